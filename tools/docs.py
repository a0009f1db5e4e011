"""Lay out the pages of the site in _docs/source, and let Sphinx render them: notebooks as executed, reference, guides."""
import re
import shutil
import subprocess
import sys
from pathlib import Path

import api
import nbformat
from faults import page as faults
from lint_notebooks import DIRECTIVE, ROOT, directives, library, notebooks
from readme import site

SITE = Path("_docs")
START = ("analysis/walkthrough", "analysis/make_pairs")
GUIDES = ("names", "dependencies")
CHAPTERS = dict(maths="Mathematics", model="What a model is to modlab", adapters="What can be attached",
                learn="Where the numbers come from",
                measure="What a dose costs and buys", share="To and from everyone else", show="Figures and the explorer")
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md") # of the top folder
FENCE = re.compile(r"(^```.*?^```|^:::+.*?$)", re.M | re.S)
SPAN = re.compile(r"(?<!`)(?<!\[)`[^`\n]+`(?!`)(?!\])")


def link_names(text: str, names: dict[str, str]) -> str:
    "Code spans of a page that are public names, made links to the reference; fenced code and headings stay as they are."
    def line(x: str) -> str: return x if x.startswith("#") else SPAN.sub(lambda m: api.link(m[0], names), x)
    parts = FENCE.split(text)
    return "".join(p if n % 2 else "\n".join(map(line, p.split("\n"))) for n, p in enumerate(parts))


def on_the_site(text: str) -> str:
    "Links to files elsewhere in the repository as they lie on the site; `#### Errors`, two levels down, one down."
    text = re.sub(r"\]\(\.\./(?:docs/)?(?=[\w-]+\.md)", "](", text)
    text = re.sub(rf"\]\({re.escape(site())}/([\w/-]+)\.html", r"](\1.md", text)
    return re.sub(r"^#### ", "### ", text, flags=re.M)


def prepare(nb, names: dict[str, str]):
    "A notebook as a page: hidden cells dropped, directives taken off, their alternative texts given to the figures."
    nb.cells = [c for c in nb.cells if not {"hide"} & set(directives(c.source)) and not c.source.startswith("#| default_exp")]
    for cell in nb.cells:
        if cell.cell_type == "markdown": cell.source = link_names(on_the_site(cell.source), names)
        else: prepare_code(cell)
    return nb


def prepare_code(cell) -> None:
    "Directives become what the page makes of them: an image's text, or a caption; warnings on stderr are left out."
    said = dict(d.split(": ", 1) for d in directives(cell.source) if d.startswith("fig-"))
    cell.source = "\n".join(x for x in cell.source.splitlines() if not DIRECTIVE.fullmatch(x.rstrip()))
    render = {"image": {"alt": said["fig-alt"]}} if "fig-alt" in said else {}
    if "fig-cap" in said: render["figure"] = {"caption": said["fig-cap"]}
    if render: cell.metadata["mystnb"] = render
    cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]


def toctree(caption: str, entries: list[str]) -> str:
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *entries, "```"])


def contents(root: Path) -> str:
    "The tables of contents, from what is there."
    chapters = {}
    for p in library(root): chapters.setdefault(p.parent.name, []).append(f"{p.parent.name}/{p.stem}")
    books = {f"{folder[0]}. {CHAPTERS[folder[2:]]}": pages for folder, pages in chapters.items()}
    companions = [f"analysis/{p.stem}" for p in sorted((root / "nbs" / "analysis").glob("*.ipynb"))]
    first = [p for p in START if p in companions]
    guides = [g for g in GUIDES if (root / "docs" / f"{g}.md").exists()] + ["faults"] * (root / faults.FIGURES).exists()
    trees = {"Begin here": first, "Questions": [p for p in companions if p not in first], **books,
             "Reference": ["api/index", *guides], "Project": [p.removesuffix(".md") for p in PAGES]}
    return "\n\n".join(toctree(caption, entries) for caption, entries in trees.items() if entries)


def stage(root: Path, source: Path) -> None:
    "Write every page below `source`."
    sources = api.Sources(root / "modlab")
    names = sources.names()
    for path in notebooks(root):
        nb = prepare(nbformat.read(path, as_version=4), names)
        if path.name == "index.ipynb": nb.cells.append(nbformat.v4.new_markdown_cell(contents(root)))
        target = source / path.relative_to(root / "nbs")
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nb, target)
    written = [(root / "docs" / f"{g}.md", f"{g}.md") for g in GUIDES] + [(root / p, p) for p in PAGES]
    texts = {name: link_names(p.read_text(encoding="utf-8"), names) for p, name in written if p.exists()}
    if (root / faults.FIGURES).exists(): texts["faults.md"] = link_names(faults.text(root), names)
    for name, text in {**texts, **api.pages(sources, root)}.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text, encoding="utf-8")


def main(root: Path = ROOT) -> int:
    "Stage and build; 1 if Sphinx had so much as a warning."
    folder = root / SITE
    shutil.rmtree(folder, ignore_errors=True)
    stage(root, folder / "source")
    options = ["-q", "-W", "--keep-going", "-b", "html", "-c", root / "docs"]
    command = [sys.executable, "-m", "sphinx", *options, folder / "source", folder / "html"]
    failed = subprocess.run(command, cwd=root).returncode != 0
    pages = len(list((folder / "html").rglob("*.html")))
    print("docs: with warnings, see above" if failed else f"docs: {pages} pages; look at {SITE / 'html' / 'index.html'}")
    return int(failed)


if __name__ == "__main__": sys.exit(main())
