"""Execute notebooks in place, `#| slow` cells too, and leave them as nbdev_clean does: for outputs that are committed."""
import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
from lint_notebooks import ROOT, notebooks
from nbclient import NotebookClient
from tqdm import tqdm

# Progress bars and downloads have no place among the outputs of a notebook.
ENV = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
CHATTER = ("Failed to load CPU gemm_4bit_forward",)  # what bitsandbytes says on every import, of a kernel that is optional
TIMEOUT = int(os.environ.get("NOTEBOOK_TIMEOUT", "1800"))  # seconds a cell may take


def execute(nb, folder: Path) -> None:
    "Run every cell in the folder where the notebook lives, with a bar on a terminal; raises at the first cell that does."
    bar = tqdm(total=sum(c.cell_type == "code" for c in nb.cells), unit="cell", leave=False, disable=None)
    os.environ.update(ENV)
    with bar: NotebookClient(nb, timeout=TIMEOUT, kernel_name="python3", resources={"metadata": {"path": str(folder)}},
                   record_timing=False, store_widget_state=False, coalesce_streams=True,
                   extra_arguments=["--log-level=40"],  # errors only
                   on_cell_executed=lambda **_: bar.update()).execute()


def quiet(nb) -> None:
    "Drop the lines that say nothing of the notebook."
    for cell in nb.cells:
        if cell.cell_type != "code": continue
        for output in cell.outputs:
            if output.get("name") != "stderr": continue
            output.text = "".join(line for line in output.text.splitlines(True) if not line.startswith(CHATTER))
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr" or output.text.strip()]


def main(paths: list[Path]) -> int:
    "Execute each notebook, write it back only if it ran through, clean it."
    for path in paths:
        start, nb = time.perf_counter(), nbformat.read(path, as_version=4)
        print(f"{path.relative_to(ROOT)} …", end=" ", flush=True)
        execute(nb, path.parent)
        quiet(nb)
        nbformat.write(nb, path)
        subprocess.run([Path(sys.executable).parent / "nbdev_clean", "--fname", path], cwd=ROOT, check=True)
        print(f"{time.perf_counter() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__": sys.exit(main([Path(a).resolve() for a in sys.argv[1:]] or notebooks()))
