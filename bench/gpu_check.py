"""Is modlab right on this device, and how fast? `make gpu-check`, or `python bench/gpu_check.py [--small] [--out FOLDER]`.

Needs torch, transformers, peft and what modlab itself needs; no network and no default model. First `checks.py` in float32 and
bfloat16, then the `rows_*.py` on a random Llama of the shape of
an 8B model (where weights are decomposed: two blocks of a 1B model).
A failure is a row, and the rest goes on; the exit code tells. JSON and CSV go to FOLDER, named after the card.
"""
import argparse
import gc
import json
import logging
import os
import sys
import time
import traceback
import warnings
from pathlib import Path

os.environ["MODLAB_SVD_CACHE"] = "0"
os.environ.setdefault("TQDM_DISABLE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository itself, installed or not

import torch
from checks import CHECKS, NotHere
from large import random_llama
from tables import RESULTS, card, facts, measured, names, shown, write

START = time.monotonic()
LARGE = {"rows_forward": {}, "rows_decode": {"rounds": 3}, "rows_fold": {"rounds": 2},
         "rows_heal": {"rounds": 2, "count": 8, "epochs": 1}}
BLOCKS = {"1B": 2}  # of the models that are decomposed: the peers would take minutes on all
ONCE = ("captured", "several_devices", "quantised")  # in bfloat16 alone on an accelerator: they take longest


def spent() -> float: return time.monotonic() - START


def checked(check, device: str, dtype: torch.dtype) -> dict:
    "One check as a row: ok, failed, or not here."
    start, row = time.monotonic(), dict(check=check.__name__, dtype=str(dtype).removeprefix("torch."))
    try: row |= dict(result="ok", said=check(device, dtype))
    except NotHere as e: row |= dict(result="not here", said=f"needs {e}")
    except Exception as e:
        traceback.print_exc()
        row |= dict(result="FAILED", said=f"{type(e).__name__}: {e}"[:500])
    row["seconds"] = round(time.monotonic() - start, 2)
    print(f"[{spent():5.0f} s] {row['result']:8} {row['check']} ({row['dtype']}): {row['said']}", flush=True)
    return row


def all_checks(device: str) -> list[dict]:
    dtypes = torch.float32, torch.bfloat16
    return [checked(check, device, dtype) for dtype in dtypes for check in CHECKS
            if not (device != "cpu" and dtype == torch.float32 and check.__name__ in ONCE)]


def all_rows(device: str, small: bool, limit: float) -> list[dict]:
    "The rows of every file, as long as there is time."
    made, model, shape = [], None, ""
    for name in [*LARGE, *(n for n in names() if n not in LARGE)]:
        if spent() > limit:
            made.append(dict(what=name, left_out=f"{spent():.0f} s were spent"))
            continue
        wanted = "small" if small else "8B" if name in LARGE else "1B"
        if wanted != shape:
            model = None
            gc.collect()
            model, tok = random_llama(wanted, device, layers=BLOCKS.get(wanted))
            shape = wanted
        how = LARGE.get(name, {"rounds": 3}) | ({"rounds": 1} if small else {})
        print(f"[{spent():5.0f} s] {name} on a model of shape {shape}", flush=True)
        made += [dict(row, shape=shape) for row in measured(name, model, tok, **how)]
        gc.collect()
    return made


def main(args: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="tiny models only, for a machine without an accelerator")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the tables")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=200.0, help="after these no other file of rows is begun")
    given = parser.parse_args(args)
    if given.device == "cpu" and not given.small: raise SystemExit("no accelerator is seen here; --small runs on a CPU")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    name = "gpu_check_" + "".join(ch if ch.isalnum() else "_" for ch in card()).strip("_")
    checks = all_checks(given.device)
    write(checks, f"{name}_checks", given.out)
    rows = all_rows(given.device, given.small, given.seconds)
    write(rows, name, given.out)
    (given.out / f"{name}.json").write_text(json.dumps(dict(facts(), checks=checks, rows=rows), indent=1, default=str))
    failed = [row["check"] for row in checks if row["result"] == "FAILED"] + [row["what"] for row in rows if "error" in row]
    print(shown(rows), f"\n{card()}: {sum(row['result'] == 'ok' for row in checks)} checks right, {len(failed)} failures "
          f"{failed or ''}, {spent():.0f} s; tables in {given.out}", sep="\n")
    return bool(failed)


if __name__ == "__main__": raise SystemExit(main(sys.argv[1:]))
