"""Run the light cells of every notebook once: a cell that fails is a failed test, and an output that is not the committed one
is out of step. What passed is remembered, so that `make check` and `make test` in a row run each notebook once."""
import hashlib
import json
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from importlib.metadata import distributions
from multiprocessing.connection import wait
from pathlib import Path

import nbformat
from fresh import differences
from lint_notebooks import ROOT, directives, notebooks

# Two workers with one thread each: on two cores, threads of two notebooks would only wait for each other.
WORKERS = 2
ENV = {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "IN_TEST": "1",
       "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
HEAVY = ("torch", "transformers", "pandas", "matplotlib.pyplot", "peft", "modlab")  # imported once; each notebook is a fork
COMPARES = sys.version_info >= (3, 11)  # below, older versions of pandas and numpy are pinned, which print otherwise
PATIENCE = 900  # seconds without any notebook coming to an end
PASSED = Path(".venv/.notebooks.json")


# ---- one notebook ----

def runs(cell) -> bool:
    "Whether a cell is code that runs here; `#| slow` and the like is for those who want the real model."
    left_out = {"slow", "notest", "eval: false"} & set(directives(cell.source))
    return cell.cell_type == "code" and not left_out and "nbdev_export()" not in cell.source


def shell_for(path: Path):
    "A shell without a kernel, which shows tables and figures as a notebook's kernel does."
    import pandas as pd
    from execnb.shell import CaptureShell
    shell = CaptureShell(path, mpl_format="png")
    pd.set_option("display.max_columns", 20, "display.width", 80)  # as pandas itself does where it sees a kernel
    return shell


def outputs_of(shell, source: str) -> list[dict]:
    "What a cell shows; no value behind a semicolon, also where a remark follows it."
    outputs = shell.run(source)
    silent = shell.displayhook.semicolon_at_end_of_expression(source)
    return [o for o in outputs if not (silent and o["output_type"] == "execute_result")]


def failure(error: BaseException) -> str: return "".join(traceback.format_exception(error))[-3000:]


def run(path: Path, root: Path) -> list[str]:
    "The problems of one notebook: the cell that failed, or each output that is another one now."
    nb, problems = nbformat.read(path, as_version=4), []
    os.chdir(path.parent)
    sys.path.insert(0, str(root))
    shell = shell_for(path)
    for n, cell in enumerate(nb.cells):
        if not runs(cell): continue
        outputs = outputs_of(shell, cell.source)
        if shell.exc: return [*problems, f"cell {n} fails\n{failure(shell.exc)}"]
        if not COMPARES: continue
        head = next((x for x in cell.source.splitlines() if x and not x.startswith("#|")), "")[:70]
        problems += [f"cell {n}, {head!r}, shows another output\n{text}" for text in differences(cell.outputs, outputs)]
    return problems


def timed(path: Path, root: Path, answer) -> None:
    "One notebook in a process of its own: sends its problems, and the seconds that it took."
    start = time.perf_counter()
    answer.send((run(path, root), time.perf_counter() - start))


def begin(path: Path, root: Path):
    "The end of a pipe on which a notebook's result will come; it is closed where the process dies first."
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    context.Process(target=timed, args=(path, root, theirs), daemon=True).start()
    theirs.close()
    return ours


def result(answer) -> tuple[list[str], float]:
    "What came of a notebook."
    try: return answer.recv()
    except EOFError: return ["did not end: its process was killed, or failed outside of a cell"], 0.0


def run_all(paths: list[Path], root: Path) -> dict[Path, list[str]]:
    "Every notebook with its problems, each told of when it is through."
    os.environ.update(ENV)
    sys.path.insert(0, str(root))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in HEAVY: __import__(name)
    found, ahead, running = {}, list(paths), {}
    while ahead or running:
        while ahead and len(running) < WORKERS:
            path = ahead.pop(0)
            running[begin(path, root)] = path
        done = wait(list(running), timeout=PATIENCE)
        if not done: sys.exit(f"{', '.join(p.name for p in running.values())}: a cell hangs, {PATIENCE} s without an answer")
        for answer in done:
            path, (problems, seconds) = running.pop(answer), result(answer)
            found[path] = problems
            print(f"  {seconds:4.0f} s  {path.relative_to(root)}", flush=True)
            for problem in problems: print(f"{path.relative_to(root)}: {problem}\n", flush=True)
    return found


# ---- what is known already ----

def surroundings(root: Path) -> str:
    "A hash of all that a notebook's outputs depend on, itself aside: package, data, tables, tools, versions."
    inside = [p for folder in ("modlab", "nbs/analysis", "tools") for p in sorted((root / folder).rglob("*"))
              if p.is_file() and p.suffix in (".py", ".csv", ".jsonl", ".json", ".txt")]
    made = hashlib.sha256(sys.version.encode())
    for p in inside: made.update(f"{p.relative_to(root)} {hashlib.sha256(p.read_bytes()).hexdigest()}\n".encode())
    made.update("\n".join(sorted({f"{d.name} {d.version}" for d in distributions()})).encode())
    made.update(json.dumps({k: v for k, v in os.environ.items() if k.startswith("MODLAB_")}, sort_keys=True).encode())
    return made.hexdigest()


def states(paths: list[Path], root: Path) -> dict[str, str]:
    "Notebook -> a hash of it and of everything that it depends on."
    around = surroundings(root)
    return {str(p.relative_to(root)): hashlib.sha256(around.encode() + p.read_bytes()).hexdigest() for p in paths}


def remembered(root: Path) -> dict[str, str]:
    "Notebook -> the state in which it passed, from the file; nothing where there is none, or where it was cut off."
    try: return json.loads((root / PASSED).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError): return {}


def main(arguments: list[str], root: Path = ROOT) -> int:
    "0 if every notebook on disk passes, each run once; `--again` runs those too that have passed in this very state."
    start, paths = time.perf_counter(), notebooks(root)
    now, known = states(paths, root), {} if "--again" in arguments else remembered(root)
    paths = sorted(paths, key=lambda p: len(p.parts))  # the tour, which takes longest, first
    wanted = [p for p in paths if known.get(str(p.relative_to(root))) != now[str(p.relative_to(root))]]
    others = "" if wanted == paths else ", the others have passed as they are"
    print(f"notebooks: {len(wanted)} of {len(paths)} to run{others}", flush=True)
    found = run_all(wanted, root) if wanted else {}
    passed = {p for p in paths if not found.get(p, [] if p not in wanted else ["not run"])}
    if (root / PASSED).parent.is_dir():
        (root / PASSED).write_text(json.dumps({str(p.relative_to(root)): now[str(p.relative_to(root))] for p in passed}))
    failed = [p for p in paths if p not in passed]
    for path in failed: print(f"out of step or failed: {path.relative_to(root)}")
    good = bool(paths) and not failed
    way_out = "" if good else "; after a look at them: tools/execute.py --light NOTEBOOK"
    verdict = "all in step" if COMPARES else "outputs not compared below Python 3.11"
    print(f"notebooks: {len(passed)} of {len(paths)} pass, {verdict if good else 'FAILED'}, "
          f"{time.perf_counter() - start:.0f} s{way_out}", flush=True)
    return 0 if good else 1


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
