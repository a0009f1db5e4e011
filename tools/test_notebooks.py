"""Run every notebook through `nbdev_test`, and count them: with nothing to run, nbdev_test is content and exits with 0."""
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from lint_notebooks import ROOT, notebooks

# Two workers with one thread each: on two cores, threads of two notebooks would only wait for each other.
ENV = {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "agg",
       "PYTHONUNBUFFERED": "1"}
COMPLETED = re.compile(r"- Completed (.+?\.ipynb)")


def run_nbdev_test(root: Path) -> tuple[int, list[Path]]:
    "The exit code of nbdev_test on all notebooks, and the notebooks it says it went through."
    command = [Path(sys.executable).parent / "nbdev_test", "--n_workers", "2", "--do_print", "--timing"]
    process = subprocess.Popen(command, cwd=root, env={**os.environ, **ENV}, text=True, stdout=subprocess.PIPE)
    ran = []
    for line in process.stdout:
        done = [Path(name).relative_to(root) for name in COMPLETED.findall(line)]
        for path in done: print(f"  {path}", flush=True)
        if re.fullmatch(r"\S+\.ipynb: \d+ secs", line.strip()): print(f"    {line.strip()}")
        ran += done
    return process.wait(), ran


def main(root: Path = ROOT) -> int:
    "0 if every notebook on disk ran, each once, and none failed."
    start, on_disk = time.perf_counter(), sorted(p.relative_to(root) for p in notebooks(root))
    print(f"nbdev_test on {len(on_disk)} notebooks", flush=True)
    code, ran = run_nbdev_test(root)
    missing, extra = sorted(set(on_disk) - set(ran)), sorted(set(ran) - set(on_disk))
    for path in missing: print(f"NOT RUN by nbdev_test: {path}")
    for path in extra: print(f"run, but not among the notebooks counted: {path}")
    good = code == 0 and sorted(ran) == on_disk and bool(on_disk)
    verdict, seconds = "all passed" if good else "FAILED", time.perf_counter() - start
    print(f"notebooks: {len(ran)} of {len(on_disk)} ran, {verdict}, {seconds:.0f} s", flush=True)
    return 0 if good else 1


if __name__ == "__main__": sys.exit(main())
