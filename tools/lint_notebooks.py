"""Lint the notebooks: what nbdev ignores without a word, and the house rules that no other tool knows."""
import ast
import re
import sys
from difflib import get_close_matches
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NOT_COMPANIONS = {"make_pairs", "walkthrough"}  # under nbs/analysis, but they ask no question: a recipe for data, and a tour
MAX_EXPORT = 40  # lines of an exported cell: beyond 25 is remarked on, beyond this refused
MAX_CLASS, MAX_BODY = 80, 12  # unless it is one class of short methods: the lines of the cell, and of the longest method's body
DIRECTIVE = re.compile(r"#\| (default_exp [a-z]\w*(?:\.[a-z]\w*)?|export|exporti|hide|slow|notest|eval: false"
                       r"|fig-(alt|cap): \S.*)")
WORDS = ("default_exp", "export", "exporti", "hide", "slow", "notest", "eval")
ABSOLUTE = re.compile(r"(?<![\w:/.<~*`$)\]-])/(?:(?:home|root|tmp|Users|mnt)/\w|(?:[\w.-]+/){2,}[\w.-])|\b[A-Z]:\\\w")
ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{6,}")


def looks_like_directive(line: str) -> bool:
    "Whether a line was meant for nbdev, however it is spelt."
    if re.match(r"\s*#+\s*\|\s*[a-z]", line) or re.search(r"#\|\s*\w+\s*$", line): return True
    if re.match(rf"\s*#({'|'.join(WORDS)})\b", line): return True
    word = re.fullmatch(r"\s*#[\W_]*([a-z_]+)\W*(false)?\s*", line)
    return bool(word) and bool(get_close_matches(word[1], WORDS, cutoff=0.8))


def directives(source: str) -> list[str]:
    "The well-formed directives in the leading block of a cell."
    found = []
    for line in source.splitlines():
        if line.strip() and not line.startswith("%%"):
            if not DIRECTIVE.fullmatch(line.rstrip()): break
            found.append(line.rstrip()[3:])
    return found


def lint_source(source: str) -> list[str]:
    "What is wrong with the directives of one code cell."
    problems, leading = [], True
    for line in source.splitlines():
        good = bool(DIRECTIVE.fullmatch(line.rstrip()))
        if good and not leading: problems.append(f"directive below other lines, nbdev ignores it: {line!r}")
        if not good and looks_like_directive(line): problems.append(f"no directive that nbdev or this house knows: {line!r}")
        leading = leading and (good or not line.strip() or line.startswith("%%"))
    if re.search(r"^\s*from\s+\S+\s+import\s+\*", source, re.M): problems.append("star import")
    return problems


def is_class_of_short_methods(source: str) -> bool:
    "Whether a cell is one class, whose methods leave the work to functions above it. Documented parameters do not count."
    body = ast.parse(source).body
    if not (len(body) == 1 and isinstance(body[0], ast.ClassDef)): return False
    methods = [f for f in body[0].body if isinstance(f, ast.FunctionDef)]
    return all(f.end_lineno - f.body[0].lineno < MAX_BODY for f in methods)


def lint_library(nb, module: str) -> list[str]:
    "The frame of a library notebook: default_exp, title, hidden export; and the size of exported cells."
    cells = [directives(c.source) if c.cell_type == "code" else [] for c in nb.cells]
    exps, want = [d for ds in cells for d in ds if d.startswith("default_exp")], f"default_exp {module}"
    problems = [] if exps == [want] == cells[0] else [f"the first cell, and no other, must be '#| {want}'; found {exps}"]
    if not re.match(r"# .+\n\n> .+", nb.cells[min(1, len(nb.cells) - 1)].source):
        problems.append("the second cell must be an H1, an empty line and a blockquote")
    if "hide" not in cells[-1] or "nbdev_export()" not in nb.cells[-1].source:
        problems.append("the last cell must be '#| hide' with nbdev.nbdev_export()")
    for cell, ds in zip(nb.cells, cells):
        n = len(cell.source.splitlines()) - len(ds)
        most = MAX_CLASS if "export" in ds and is_class_of_short_methods(cell.source) else MAX_EXPORT
        if "export" in ds and n > 25: problems.append(f"{'' if n > most else 'remark: '}exported cell of {n} lines")
    return problems


def draws(source: str) -> bool:
    "Whether a cell makes a figure by itself, rather than in a function it defines."
    if re.search(r"^\s*[%!]", source, re.M): return False
    body = [n for n in ast.parse(source).body if not isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    names = [ast.unparse(n.func) for top in body for n in ast.walk(top) if isinstance(n, ast.Call)]
    return any(re.search(r"^plt\.(subplots|figure|plot|show)$|(^|\.)plot_\w+$|^sns\.\w*(plot|map)$", n) for n in names)


def lint_companion(nb) -> list[str]:
    "A companion notebook is committed executed: figures, and a printed verdict."
    mimes = [{m for o in c.get("outputs", []) for m in o.get("data", {})} for c in nb.cells]
    problems = [f"not executed, its figure is missing: {c.source[:60]!r}" for c, m in zip(nb.cells, mimes)
                if c.cell_type == "code" and draws(c.source) and "image/png" not in m]
    if not any("image/png" in m for m in mimes): problems.append("no figure among the outputs: run make notebooks")
    if not any(line.startswith(("SURVIVES", "FAILS")) for line in "\n".join(output_text(nb)).splitlines()):
        problems.append("no line 'SURVIVES  claim: numbers' or 'FAILS  claim: numbers' among the outputs")
    return problems


def output_text(nb) -> list[str]:
    "Everything readable among a notebook's outputs."
    outputs = [o for c in nb.cells for o in c.get("outputs", [])]
    return [o.get("text", "") for o in outputs] + [v for o in outputs for m, v in o.get("data", {}).items()
                                                   if m.startswith("text/") and isinstance(v, str)]


def has_other_metadata(nb) -> bool: return set(nb.metadata) != {"kernelspec"} or any(c.metadata for c in nb.cells)


def lint_notebook(path: Path) -> list[str]:
    "All problems of one notebook; those that begin with 'remark' are no reason to refuse it."
    nb, library = nbformat.read(path, as_version=4), re.match(r"\d\d_", path.stem)
    problems = [p for c in nb.cells if c.cell_type == "code" for p in lint_source(c.source)]
    if has_other_metadata(nb): problems.append("metadata other than its kernelspec, or none: the site needs to know the language")
    problems += [f"directive in a {c.cell_type} cell" for c in nb.cells if c.cell_type != "code" and re.match(r"#\|", c.source)]
    problems += [f"a failed cell: {o.ename}" for c in nb.cells for o in c.get("outputs", []) if o.output_type == "error"]
    problems += [f"memory address in an output: {m[0]}" for t in output_text(nb) for m in [ADDRESS.search(t)] if m]
    texts = [c.source for c in nb.cells] + output_text(nb)
    problems += [f"absolute local path: {t[m.start():m.start() + 50]!r}" for t in texts for m in [ABSOLUTE.search(t)] if m]
    if library: problems += lint_library(nb, module_of(path))
    if path.parent.name == "analysis" and path.stem not in NOT_COMPANIONS: problems += lint_companion(nb)
    return problems


def notebooks(root: Path = ROOT) -> list[Path]:
    "Every notebook of the project, hidden folders (checkpoints) aside."
    return sorted(p for p in (root / "nbs").rglob("*.ipynb") if not any(x.startswith(".") for x in p.relative_to(root).parts))


def library(root: Path = ROOT) -> list[Path]:
    "The notebooks that become modules, in the order of the book: chapter by chapter, and by number within each."
    return sorted((root / "nbs").glob("[0-9]_*/[0-9][0-9]_*.ipynb"))


def module_of(path: Path) -> str:
    "The module that a library notebook becomes, below `modlab`: `maths.lowrank`."
    return f"{path.parent.name[2:]}.{path.stem[3:]}"


if __name__ == "__main__":
    found = [(p, problem) for p in notebooks() for problem in lint_notebook(p)]
    for path, problem in found: print(f"{path.relative_to(ROOT)}: {problem}")
    sys.exit(any(not problem.startswith("remark") for _, problem in found))
