"""Render README.md from nbs/index.ipynb: hidden cells dropped, links to notebooks and guides made links to the site."""
import posixpath
import re
import shutil
import sys
from configparser import ConfigParser
from pathlib import Path

import nbformat
from lint_notebooks import DIRECTIVE, ROOT, directives
from nbconvert import MarkdownExporter

IMAGES = "docs/images"
LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)[^)\s]+")
PAGE = re.compile(r"(?:nbs|docs)/(.+)\.(?:ipynb|md)")
STYLE = re.compile(r"<style scoped>.*?</style>\n?", re.S)  # pandas adds it; on most pages it would show as text


def alt_texts(nb) -> list[str]:
    "For each PNG that will be shown, the `#| fig-alt:` of its cell, or else the heading above."
    heading, alts = "figure", []
    for cell in nb.cells:
        if cell.cell_type == "markdown": heading = ([heading] + re.findall(r"^#+ (.+)$", cell.source, re.M))[-1]
        given = [d[9:].strip() for d in directives(cell.source) if d.startswith("fig-alt:")]
        shown = [o for o in cell.get("outputs", []) if "image/png" in o.get("data", {}) and "text/html" not in o.data]
        alts += [(given or [heading])[0]] * len(shown)
    return alts


def site(root: Path = ROOT) -> str:
    "The address of the site, as settings.ini has it."
    parser = ConfigParser(delimiters=["="])
    parser.read(root / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]["doc_host"] + parser["DEFAULT"]["doc_baseurl"]


def moved(link: str) -> str:
    "Where a link of the notebook leads from the top folder: to the site, if it has a page of it."
    path = posixpath.normpath(posixpath.join("nbs", link))
    page = PAGE.fullmatch(path)
    return f"{site()}/{page[1]}.html" if page else path


def relocate(cell) -> None:
    "Take the directives off a code cell; move the links of a markdown cell."
    if cell.cell_type == "markdown": cell.source = LINK.sub(lambda m: moved(m[0]), cell.source)
    else:
        cell.source = "\n".join(x for x in cell.source.splitlines() if not DIRECTIVE.fullmatch(x.rstrip()))


def render(path: Path) -> tuple[str, dict[str, bytes]]:
    "The text of the README and its images, by path."
    nb = nbformat.read(path, as_version=4)
    nb.cells = [c for c in nb.cells if "hide" not in directives(c.source)]
    nb.metadata["language_info"] = {"name": "python"}  # for the fences
    alts = iter(alt_texts(nb))
    for cell in nb.cells: relocate(cell)
    text, resources = MarkdownExporter().from_notebook_node(nb, {"unique_key": "index", "output_files_dir": IMAGES})
    text = re.sub(r"!\[png\]", lambda m: f"![{next(alts)}]", STYLE.sub("", text))
    text = re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+$", "", text, flags=re.M)).strip() + "\n"
    return f"<!-- Rendered from nbs/index.ipynb by `make readme`; edit the notebook. -->\n\n{text}", resources.get("outputs", {})


def main(root: Path = ROOT) -> int:
    "Write README.md and the images, and remove images that it no longer shows."
    text, images = render(root / "nbs" / "index.ipynb")
    shutil.rmtree(root / IMAGES, ignore_errors=True)
    for name, data in images.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    (root / "README.md").write_text(text, encoding="utf-8")
    print(f"README.md: {len(text.splitlines())} lines, {len(images)} images")
    return 0


if __name__ == "__main__": sys.exit(main())
