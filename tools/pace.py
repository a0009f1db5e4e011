"""How long a notebook takes here: the seconds that it took on another machine, times how much faster that one multiplies."""
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

RECORD = Path(__file__).with_name("pace.json") # the rates of one machine, and what each notebook took there
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def fastest(work: Callable[[], object], patience: float = 0.4) -> float: # seconds
    "The best of a few repetitions."
    work()
    took, start = [], time.perf_counter()
    while not took or time.perf_counter() - start < patience:
        before = time.perf_counter()
        work()
        took.append(time.perf_counter() - before)
    return min(took)


def rates(rows: int = 256, width: int = 576) -> dict[str, float]: # by dtype, 1e9 operations per second
    "How fast this machine multiplies tokens by a layer of the default model: about two seconds, more where bfloat16 is emulated."
    found = {}
    for name, dtype in DTYPES.items():
        x, W = torch.ones(rows, width, dtype=dtype), torch.ones(width, width, dtype=dtype)
        found[name] = 2e-9 * rows * width**2 / fastest(lambda x=x, W=W: x @ W)
    return found


def recorded(path: Path = RECORD) -> dict: return json.loads(path.read_text(encoding="utf-8"))


def seconds(name: str, here: Mapping[str, float], record: Mapping) -> float | None:
    "What a notebook will take where `here` are the rates; none if it was never recorded."
    took = record["seconds"].get(name)
    return took and sum(s * record["rates"][dtype] / here[dtype] for dtype, s in took.items())


def spoken(name: str, here: Mapping[str, float], record: Mapping) -> str:
    "That in words. `at_most` names those that were only seen to end within that time."
    estimate = seconds(name, here, record)
    if estimate is None: return "time unknown"
    about = "at most" if name in record["at_most"] else "about"
    if estimate < 90: return f"{about} {max(10, round(estimate, -1)):.0f} s"
    return f"{about} {estimate / 60:.0f} min" if estimate < 5400 else f"{about} {estimate / 3600:.1f} h"


def write(name: str, took: float, here: Mapping[str, float], path: Path = RECORD) -> None:
    "Enter what a notebook took here, as seconds on the recorded machine. Its share of bfloat16 is kept."
    record = recorded(path)
    old = record["seconds"].get(name, {"float32": 1.0})
    factor = took / sum(s * record["rates"][dtype] / here[dtype] for dtype, s in old.items())
    record["seconds"][name] = {dtype: round(s * factor, 1) for dtype, s in old.items()}
    record["at_most"] = [other for other in record["at_most"] if other != name]
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
