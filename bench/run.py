"""The speed of modlab beside what one would pick instead, as ratios of runs taken in turn: `make bench`.

Machines drift, so the two sides of a row run one after the other, several times, and the ratio is taken pair by pair. A ratio
above 1 means that modlab is the faster one. The decomposition cache is off. `healing.py` explains its own two rows.
"""
import copy
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable

os.environ["MODLAB_SVD_CACHE"] = "0"

import pandas as pd
import torch
from healing import healing_rows
from peft import LoraConfig, get_peft_model

from modlab import LoRAConfig, ModulatedLoRA, ModulatedPiSSA, baked, find_targets, load_model
from modlab.model.cache import thin_svds

ROUNDS = int(sys.argv[1]) if len(sys.argv) > 1 else 3
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def seconds(f: Callable[[], object]) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def row(what: str, peer: str, ours: Callable, theirs: Callable) -> dict:
    "Run the two in turn, after one run of each that does not count."
    for f in (ours, theirs): f()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(ROUNDS)]
    ratios = [b / a for a, b in pairs]
    print(f"{what} / {peer}: {statistics.median(ratios):.2f}", flush=True)
    ours_s, theirs_s = (statistics.median(side) for side in zip(*pairs))
    return {"what": what, "peer": peer, "modlab s": ours_s, "peer s": theirs_s, "ratio": statistics.median(ratios),
            "lowest": min(ratios), "highest": max(ratios)}


def peft(model, r: int, init=True):
    return get_peft_model(copy.deepcopy(model), LoraConfig(r=r, lora_alpha=r, target_modules=TARGETS, init_lora_weights=init))


def build_rows(model) -> list[dict]:
    "Decompose and extract; both sides also copy the model, since both write into it."
    weights = {name: layer.weight for name, layer in find_targets(model, LoRAConfig()).items()}
    pissa = lambda: ModulatedPiSSA(copy.deepcopy(model), r=256, selection_score="s_only")
    plain = lambda: [torch.linalg.svd(W.detach(), full_matrices=False) for W in weights.values()]
    return [row("PiSSA init, r = 256", "PEFT pissa", pissa, lambda: peft(model, 256, "pissa")),
            row("PiSSA init, r = 256", "PEFT pissa_niter_4", pissa, lambda: peft(model, 256, "pissa_niter_4")),
            row("SVD of 210 layers", "torch.linalg.svd", lambda: dict(thin_svds(weights)), plain)]


@torch.no_grad()
def forward_rows(model, ids) -> list[dict]:
    "A forward under an adapter, beside PEFT's and beside the bare model."
    lora, pissa = ModulatedLoRA(model, r=32), ModulatedPiSSA(model, r=256, selection_score="s_only", extract=False)
    small, large = peft(model, 32), peft(model, 256)
    def under(adapter, c):
        def run():
            with adapter(model, c=c): model(ids)
        return run
    return [row("forward, LoRA r = 32", "PEFT", under(lora, 1.0), lambda: small(ids)),
            row("forward, LoRA r = 32, a dose a row", "PEFT, one dose", under(lora, torch.ones(4)), lambda: small(ids)),
            row("forward, LoRA r = 32 at c = 0", "bare model", under(lora, 0.0), lambda: model(ids)),
            row("forward, PiSSA r = 256", "PEFT r = 256", under(pissa, 1.0), lambda: large(ids)),
            row("fold and unfold, r = 256", "PEFT merge, unmerge", lambda: folded(model, pissa), lambda: merged(large))]


def folded(model, adapter):
    with baked(model, [(adapter, 1.0)]): pass


def merged(model):
    model.merge_adapter()
    model.unmerge_adapter()


def main() -> None:
    warnings.simplefilter("ignore")
    model, tok = load_model()
    ids = torch.randint(len(tok), (4, 81), generator=torch.Generator().manual_seed(0))
    table = pd.DataFrame(build_rows(model) + forward_rows(model, ids) + healing_rows(model, tok))
    print(f"\n{ROUNDS} rounds, medians; {torch.get_num_threads()} threads, torch {torch.__version__}, float32, default model")
    print(table.round(2).to_string(index=False))


if __name__ == "__main__": main()
