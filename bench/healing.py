"""The speed of `heal` beside a loop written the straightforward way: `python bench/healing.py [epochs] [samples]`.

At each of its steps the loop folds the history into the weights and out again around the student's forward and backward; runs
the reference and the student with a float32 log-softmax of every position over the whole vocabulary; takes the gradients of NLL
and barrier apart for their norms; then goes backward and steps. Its cost per sample is the same throughout, so one half of its
samples runs before `heal` and one after. The time of `heal` is all of it, reference, validation and log included, over the
samples of its steps.
"""
import logging
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager

import pandas as pd
import torch
from torch.nn.functional import nll_loss

from modlab import HealConfig, ModulatedLoRA, encode, heal, load_model, load_pairs


@contextmanager
def folded(model, history):
    "Deltas added to the weights for a while, the way that leaves rounding behind."
    for sign in (1, -1):
        with torch.no_grad():
            for adapter, c in history:
                for name, layer in adapter.layers.items(): layer.weight.data.add_(adapter.delta(name, c), alpha=sign)
        if sign == 1: yield


def log_probs(model, ids): return model(ids, use_cache=False).logits.float().log_softmax(-1)[0, :-1]


def loop(model, encoded: Sequence[tuple[list[int], int]], cfg: HealConfig, history=()) -> None:
    "Train an adapter on every sample once."
    adapter = ModulatedLoRA(model, cfg.r, cfg.alpha, layer_range=cfg.layer_range)
    params = list(adapter.parameters())
    optimizer = torch.optim.AdamW(params, cfg.lr, cfg.betas)
    for ids, border in encoded:
        ids, at = torch.tensor([ids]), slice(border - 1, None)
        with torch.no_grad(): base = log_probs(model, ids)
        with folded(model, history), adapter(model, 1.0):
            student = log_probs(model, ids)
            nll = nll_loss(student[at], ids[0, 1:][at])
            over = cfg.lam * ((student.exp() * (student - base)).sum(-1)[at].mean() - cfg.tau).relu()
            for term in (nll, over): [g.norm() for g in torch.autograd.grad(term, params, retain_graph=True)]
            (nll + over).backward()
        torch.nn.utils.clip_grad_norm_(params, cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad()


def kept(model) -> ModulatedLoRA:
    "An adapter that does something."
    seeded = lambda seed: torch.Generator().manual_seed(seed)
    adapter = ModulatedLoRA(model, 32, 64.0, layer_range=(0.2, 0.8), generator=seeded(1))
    for B in adapter.B.values(): B.data.normal_(std=1e-3, generator=seeded(2))
    return adapter


def seconds(f: Callable, *args) -> float:
    start = time.perf_counter()
    f(*args)
    return time.perf_counter() - start


def healing_row(what: str, model, tok, samples: Sequence[dict], epochs: int, history) -> dict:
    "Seconds a sample of both, and their ratio: above 1, `heal` is the faster one."
    cfg = HealConfig(epochs=epochs, lr=1e-4, min_train=1)
    encoded = [encode(tok, s["prompt"], s["completion"], cfg.max_len) for s in samples]
    loop(model, encoded[:2], cfg, history)  # does not count
    halves, runs = (encoded[::2], encoded[1::2]), []
    before = seconds(loop, model, halves[0], cfg, history)
    ours = seconds(lambda: runs.append(heal(model, tok, samples, cfg, history=history)))
    after = seconds(loop, model, halves[1], cfg, history)
    ours, theirs = ours / int((runs[0].log.split == "train").sum()), [before / len(halves[0]), after / len(halves[1])]
    mean = (before + after) / len(encoded)
    print(f"{what}: {mean / ours:.2f}", flush=True)
    return {"what": what, "peer": "a loop, step by step", "modlab s": ours, "peer s": mean, "ratio": mean / ours,
            "lowest": min(theirs) / ours, "highest": max(theirs) / ours}


def healing_rows(model, tok, epochs: int = 6, count: int = 64) -> list[dict]:
    samples = [dict(prompt=p["prompt"], completion=p["cho"]) for p in load_pairs("train")[:count]]
    return [healing_row(f"heal a sample, {what}", model, tok, samples, epochs, history)
            for what, history in (("no history", []), ("one kept adapter", [(kept(model), 1.0)]))]


def main() -> None:
    logging.disable()
    table = pd.DataFrame(healing_rows(*load_model(), *map(int, sys.argv[1:])))
    print(table.round(3).to_string(index=False))


if __name__ == "__main__": main()
