"""Execute notebooks in place and leave them as nbdev_clean does: for outputs that are committed. `--light` leaves `#| slow`
cells as they are, outputs too; without it they run as well."""
import os
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path

import nbformat
from lint_notebooks import ROOT, directives, notebooks
from nbclient import NotebookClient
from tqdm import tqdm

# Progress bars and downloads have no place among the outputs of a notebook.
ENV = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
CHATTER = ("Failed to load CPU gemm_4bit_forward",)  # what bitsandbytes says on every import, of a kernel that is optional
TIMEOUT = int(os.environ.get("NOTEBOOK_TIMEOUT", "1800"))  # seconds a cell may take


def execute(nb, folder: Path, **hooks) -> None:
    "Run every cell in the folder where the notebook lives, with a bar on a terminal; raises at the first cell that does."
    bar = tqdm(total=sum(c.cell_type == "code" for c in nb.cells), unit="cell", leave=False, disable=None)
    os.environ.update(ENV)
    with bar: NotebookClient(nb, timeout=TIMEOUT, kernel_name="python3", resources={"metadata": {"path": str(folder)}},
                   record_timing=False, store_widget_state=False, coalesce_streams=True,
                   extra_arguments=["--log-level=40"],  # errors only
                   on_cell_executed=lambda **_: bar.update(), **hooks).execute()


def light(nb, folder: Path) -> None:
    "Run the cells that `nbdev_test` runs; the others keep their source and the outputs that they have."
    skipped = [n for n, cell in enumerate(nb.cells) if {"slow", "notest", "eval: false"} & set(directives(cell.source))]
    copy = deepcopy(nb)
    for n in skipped: copy.cells[n] = nbformat.v4.new_markdown_cell()
    execute(copy, folder)
    for n, cell in enumerate(copy.cells):
        if n not in skipped and cell.cell_type == "code": nb.cells[n].outputs = cell.outputs


def quiet(nb) -> None:
    "Drop the lines that say nothing of the notebook."
    for cell in nb.cells:
        if cell.cell_type != "code": continue
        for output in cell.outputs:
            if output.get("name") != "stderr": continue
            output.text = "".join(line for line in output.text.splitlines(True) if not line.startswith(CHATTER))
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr" or output.text.strip()]


def main(arguments: list[str]) -> int:
    "Execute each notebook, write it back only if it ran through, clean it."
    run = light if "--light" in arguments else execute
    paths = [Path(a).resolve() for a in arguments if a != "--light"] or notebooks()
    for path in paths:
        start, nb = time.perf_counter(), nbformat.read(path, as_version=4)
        print(f"{path.relative_to(ROOT)} …", end=" ", flush=True)
        run(nb, path.parent)
        quiet(nb)
        nbformat.write(nb, path)
        subprocess.run([Path(sys.executable).parent / "nbdev_clean", "--fname", path], cwd=ROOT, check=True)
        print(f"{time.perf_counter() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
