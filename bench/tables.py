"""A table of the benchmark: every `rows_*.py` beside this file, and where and with what it was measured."""
import importlib
import platform
import time
import traceback
from pathlib import Path

import accelerate
import pandas as pd
import peft
import torch
import transformers

from modlab.show.provenance import stamp

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def card() -> str:
    "The accelerator, or the processor."
    if torch.cuda.is_available(): return torch.cuda.get_device_name()
    try: lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError: return platform.processor() or platform.machine()
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def facts(**more) -> dict:
    "What belongs in every row."
    return stamp(machine=card(), threads=torch.get_num_threads(), instructions=torch.backends.cpu.get_cpu_capability(),
                 python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__,
                 peft=peft.__version__, accelerate=accelerate.__version__, date=time.strftime("%Y-%m-%d"), **more)


def names() -> list[str]: return sorted(p.stem for p in HERE.glob("rows_*.py"))


def measured(module: str, *args, **kw) -> list[dict]:
    "The rows of one file; where something goes wrong, those before it and a row that says what."
    made = []
    try:
        for row in importlib.import_module(module).rows(*args, **kw): made.append(row)
    except Exception as e:
        traceback.print_exc()
        made.append(dict(what=module, error=f"{type(e).__name__}: {e}"[:500]))
    return made


def shown(rows: list[dict]) -> str:
    columns = ["what", "peer", "modlab_s", "peer_s", "kind", "ratio", "lowest", "highest", "limit", "reach", "reached", "error"]
    table = pd.DataFrame(rows)
    return table.reindex(columns=[c for c in columns if c in table]).round(3).to_string(index=False, na_rep="")


def write(rows: list[dict], name: str, folder: Path = RESULTS, **more) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.csv"
    pd.DataFrame(rows).assign(**facts(**more)).to_csv(path, index=False)
    return path
