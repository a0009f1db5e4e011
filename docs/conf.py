"""How Sphinx renders the pages that tools/docs.py lays out in _docs/source. Nothing is executed, nothing is fetched."""
import re
from configparser import ConfigParser
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.writers.html5 import HTML5Translator

settings = ConfigParser(delimiters=["="])
settings.read(Path(__file__).resolve().parent.parent / "settings.ini", encoding="utf-8")
project, author = settings["DEFAULT"]["lib_name"], settings["DEFAULT"]["author"]
version = release = settings["DEFAULT"]["version"]
copyright = settings["DEFAULT"]["copyright"]

extensions = ["myst_nb"]
myst_enable_extensions = ["colon_fence", "dollarmath", "fieldlist"]
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_merge_streams = True
nb_mime_priority_overrides = [("html", "text/html", 0)]
python_use_unqualified_type_names = True
maximum_signature_line_length = 90
add_module_names = False
toc_object_entries_show_parents = "hide"
suppress_warnings = ["misc.highlighting_failure"]  # JSON and shell lines shown as what they are part of

html_theme = "furo"
html_title = f"modlab {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
pygments_style, pygments_dark_style = "a11y-high-contrast-light", "a11y-high-contrast-dark"


def mathml(tex: str, block: bool) -> str:
    "A formula as the browser itself sets it, without a script from elsewhere."
    tex = re.sub(r"\\[bB]ig+[lrm]?(?![a-zA-Z])", "", tex).replace(r"\texttt", r"\text")  # the two that docutils does not know
    return tex2mathml(tex.strip(), as_block=block)


def visit_math(self, node) -> None:
    self.body.append(mathml(node.astext(), block=False))
    raise nodes.SkipNode


def visit_math_block(self, node) -> None:
    self.body.append(f'<div class="math">{mathml(node.astext(), block=True)}</div>')
    raise nodes.SkipNode


HTML5Translator.visit_math, HTML5Translator.visit_math_block = visit_math, visit_math_block
