"""Execute copies of the companion notebooks on the real model and gather what they found in report/index.html."""
import base64
import os
import re
import shutil
import sys
import time
from datetime import datetime
from pathlib import Path

import jinja2
import nbformat
from execute import execute
from lint_notebooks import NOT_COMPANIONS, ROOT, directives
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbconvert.filters import markdown2html, strip_ansi

LONG = {"claims", "does_selection_help", "gradient_cosine", "kl_vs_c", "train_val_nll", "trait"}  # they train: up to an hour each
VERDICT = re.compile(r"^(SURVIVES|FAILS)\s+(.+)$", re.M)


def run(path: Path, report: Path) -> dict:
    "Execute a copy of a notebook, keep the copy, and say what came of it; a failing cell is reported, not raised."
    nb, error, start = nbformat.read(path, as_version=4), None, time.perf_counter()
    for cell in nb.cells:
        if cell.cell_type == "code": cell.outputs = []  # what is shown was computed now
    try: execute(nb, path.parent)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as e: error = strip_ansi(str(e))
    seconds = time.perf_counter() - start
    nbformat.write(nb, report / "notebooks" / path.name)
    return {"name": path.stem, "seconds": seconds, "error": error, **harvest(nb, path.stem, report)}


def harvest(nb, name: str, report: Path) -> dict:
    "Title, answer, verdicts, and the figures and tables under their headings, from an executed notebook."
    text = "\n\n".join(c.source for c in nb.cells if c.cell_type == "markdown")
    quote = re.search(r"^> .+(?:\n>.*)*", text, re.M)
    found = {"title": re.search(r"^# (.+)$", text, re.M)[1], "items": [], "verdicts": [],
             "answer": markdown2html(re.sub(r"^> ?", "", quote[0], flags=re.M)) if quote else ""}
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            found["items"] += [{"heading": h} for h in re.findall(r"^##+ (.+)$", cell.source, re.M)]
        alt = next((d[9:].strip() for d in directives(cell.source) if d.startswith("fig-alt:")), None)
        for output in cell.get("outputs", []): harvest_output(output, alt, name, report, found)
    found["items"] = [i for i, after in zip(found["items"], [*found["items"][1:], {"heading": ""}])
                      if "heading" not in i or "heading" not in after]
    return found


def harvest_output(output, alt: str | None, name: str, report: Path, found: dict) -> None:
    "Add one output of a cell to what was found, if it is a figure, a table or a verdict."
    data, items = output.get("data", {}), found["items"]
    if "image/png" in data:
        number = 1 + sum("figure" in i for i in items)
        file = f"figures/{name}-{number}.png"
        (report / file).write_bytes(base64.b64decode(data["image/png"]))
        heading = next((i["heading"] for i in reversed(items) if "heading" in i), found["title"])
        items.append({"figure": file, "alt": alt or f"Figure {number} of {name}: {heading}"})
    elif "<table" in data.get("text/html", ""): items.append({"table": data["text/html"]})
    elif output.get("name") == "stdout":
        verdicts = VERDICT.findall(output.text)
        found["verdicts"] += verdicts
        if verdicts: items.append({"verdicts": verdicts})


def write_report(entries: list[dict], report: Path) -> Path:
    "Fill the template with what every notebook gave."
    env = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    tables = sorted(p.relative_to(report).as_posix() for p in (report / "results").rglob("*.csv"))
    now = datetime.now().strftime("%Y-%m-%d %H:%M")
    page = env.get_template("report.html.j2").render(entries=entries, tables=tables, now=now)
    (report / "index.html").write_text(page, encoding="utf-8")
    return report / "index.html"


def main(names: list[str], root: Path = ROOT) -> int:
    "Run the named companion notebooks, all of them for `all`, or those that do not train; 1 if one of them failed to run."
    report = root / "report"
    shutil.rmtree(report, ignore_errors=True)
    for folder in ("figures", "notebooks", "results"): (report / folder).mkdir(parents=True)
    os.environ["MODLAB_RESULTS"] = str(report / "results")  # the tables in the repository stay as they are
    paths = [p for p in sorted((root / "nbs" / "analysis").glob("*.ipynb")) if p.stem not in NOT_COMPANIONS]
    wanted = lambda name: name in names or "all" in names or not (names or name in LONG)
    paths, entries = [p for p in paths if wanted(p.stem)], []
    print(f"{len(paths)} notebooks, a minute or a few each on a quiet machine; NOTEBOOKS=name runs one", flush=True)
    for path in paths:
        print(f"{path.stem} …", end=" ", flush=True)
        entries.append(entry := run(path, report))
        counts = [sum(v == word for v, _ in entry["verdicts"]) for word in ("SURVIVES", "FAILS")]
        outcome = "RAISED" if entry["error"] else f"{counts[0]} claims survive, {counts[1]} fail"
        print(f"{entry['seconds']:.0f} s, {outcome}", flush=True)
        if entry["error"]: print(entry["error"], file=sys.stderr, flush=True)
    if not paths: print(f"no companion notebook in {root / 'nbs' / 'analysis'}" + (f" is called {names}" if names else ""))
    if not names: print(f"left out, since they take up to an hour each: {', '.join(sorted(LONG))}; NOTEBOOKS=all runs them")
    print(f"Look at {write_report(entries, report)}")
    return int(not paths or any(e["error"] for e in entries))


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
