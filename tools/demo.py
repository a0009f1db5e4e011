"""Execute copies of the companion notebooks on the real model and gather what they found in report/index.html.
`demo` alone, or the notebooks that are named, or `all`; `--record` keeps what they took, for later estimates."""
import base64
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import jinja2
import nbformat
import pace
from execute import execute
from lint_notebooks import NOT_COMPANIONS, ROOT, directives
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbconvert.filters import markdown2html, strip_ansi

FIRST = "demo" # what runs where no notebook is named
BEAT = 8 # seconds between two lines of progress
VERDICT = re.compile(r"^(SURVIVES|FAILS)\s+(.+)$", re.M)


def headline(nb, cell: int) -> str:
    "What a cell is about: the heading above it."
    above = [h for c in nb.cells[:cell + 1] if c.cell_type == "markdown" for h in re.findall(r"^#+ (.+)$", c.source, re.M)]
    return above[-1] if above else ""


@contextmanager
def heartbeat(nb, beat: float = BEAT) -> Iterator[dict]:
    "Within the block, a line of progress every few seconds. Its value goes to `execute`."
    now, start, end = {"cell": 0}, time.perf_counter(), threading.Event()
    cells = [n for n, cell in enumerate(nb.cells) if cell.cell_type == "code"]

    def tell() -> None:
        while not end.wait(beat):
            done = sum(n < now["cell"] for n in cells)
            place = f"cell {done + 1} of {len(cells)}: {headline(nb, now['cell'])}"
            print(f"  {time.perf_counter() - start:4.0f} s  {place}", flush=True)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try: yield dict(on_cell_start=lambda cell, cell_index: now.update(cell=cell_index))
    finally:
        end.set()
        thread.join()


def run(path: Path, report: Path) -> dict:
    "Execute a copy of a notebook, keep the copy, and say what came of it; a failing cell is reported, not raised."
    nb, error, start = nbformat.read(path, as_version=4), None, time.perf_counter()
    for cell in nb.cells:
        if cell.cell_type == "code": cell.outputs = []  # what is shown was computed now
    try:
        with heartbeat(nb) as hooks: execute(nb, path.parent, **hooks)
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


def chosen(names: list[str], paths: list[Path]) -> list[Path]:
    "The notebooks that are named, all for `all`, the first one for none."
    wanted = {FIRST} if not names else set(names)
    return [p for p in paths if p.stem in wanted or "all" in wanted]


def told(path: Path, report: Path) -> dict:
    "Run a notebook, and print its outcome in a line."
    entry = run(path, report)
    counts = [sum(v == word for v, _ in entry["verdicts"]) for word in ("SURVIVES", "FAILS")]
    outcome = "RAISED" if entry["error"] else f"{counts[0]} claims survive, {counts[1]} fail"
    print(f"{path.stem}: {entry['seconds']:.0f} s, {outcome}", flush=True)
    if entry["error"]: print(entry["error"], file=sys.stderr, flush=True)
    return entry


def main(arguments: list[str], root: Path = ROOT) -> int:
    "Run the named companion notebooks and write the report; 1 if there is none of that name, or if one failed to run."
    names = [a for a in arguments if a != "--record"]
    every = [p for p in sorted((root / "nbs" / "analysis").glob("*.ipynb")) if p.stem not in NOT_COMPANIONS]
    paths, report = chosen(names, every), root / "report"
    if unknown := set(names) - {p.stem for p in every} - {"all"}:
        print(f"no companion notebook is called {', '.join(sorted(unknown))}; there are: {', '.join(p.stem for p in every)}")
        return 1
    shutil.rmtree(report, ignore_errors=True)
    for folder in ("figures", "notebooks", "results"): (report / folder).mkdir(parents=True)
    os.environ["MODLAB_RESULTS"] = str(report / "results")  # the tables in the repository stay as they are
    record, here = pace.recorded(), pace.rates()
    takes = {p.stem: pace.spoken(p.stem, here, record) for p in every}
    print(f"to run, timed for this machine: {', '.join(f'{p.stem} {takes[p.stem]}' for p in paths)}", flush=True)
    entries = [told(path, report) for path in paths]
    if "--record" in arguments:
        for entry in entries: pace.write(entry["name"], entry["seconds"], here)
    others = [f"  {p.stem:28} {takes[p.stem]}" for p in every if p not in paths]
    if others: print("\n".join(["there is more: make demo NOTEBOOKS=name", *others]))
    print(f"Look at {write_report(entries, report)}")
    return int(any(e["error"] for e in entries))


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
