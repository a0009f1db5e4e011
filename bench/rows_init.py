"""Decomposing, choosing and extracting, beside PEFT's and beside what one writes down first; and all of it a second time.

The peers of the first rows also copy the model, since both sides write into it.
"""
import copy
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from pairs import bytes_per_second, flops_per_second, row
from shared import QUIET, memory_row, peft_of, samples_of, weights_of

from modlab import LoRAConfig, ModulatedPiSSA, capture_statistics, find_targets, load_pairs, selection_scores
from modlab.maths.statistics import project
from modlab.model import cache
from modlab.model.text import batches


@contextmanager
def caching(folder: str, gigabytes: float) -> Iterator[None]:
    "The cache of decompositions, in a folder of its own and empty in memory."
    before = {key: os.environ.get(key) for key in ("MODLAB_CACHE", "MODLAB_SVD_CACHE")}
    os.environ.update(MODLAB_CACHE=folder, MODLAB_SVD_CACHE=str(gigabytes))
    cache._MEMORY.clear()
    try: yield
    finally:
        cache._MEMORY.clear()
        for key, value in before.items():
            os.environ.pop(key)
            if value is not None: os.environ[key] = value


def eigen_seconds(model, r: int = 256) -> float:
    "A Gram matrix, 9 k³ for its eigenproblem, and the other factor, in float64 at the rate of a matrix product."
    shapes = [sorted(W.shape) for W in weights_of(model)]
    return sum(m * k * k + 9 * k**3 + 2 * m * k * min(r, k) for k, m in shapes) / flops_per_second(model.device, torch.float64)


def build_rows(model, rounds: int) -> list[dict]:
    "Decompose and extract; both sides also copy the model, since both write into it."
    gpu, limit = model.device.type != "cpu", eigen_seconds(model)
    pissa = lambda: ModulatedPiSSA(copy.deepcopy(model), r=256, **QUIET)
    peer = lambda init: lambda: peft_of(model, 256, init)
    with caching(tempfile.gettempdir(), 0):
        return [row("PiSSA init, r = 256, s_only", "PEFT pissa", pissa, peer("pissa"), rounds, limit, 10.0 if gpu else 2.5),
                row("PiSSA init, r = 256, s_only", "PEFT pissa_niter_4", pissa, peer("pissa_niter_4"), rounds, limit,
                    3.0 if gpu else 2.0)]


def emptied(folder: str) -> None:
    cache._MEMORY.clear()
    for path in Path(folder).rglob("*.safetensors"): path.unlink()


def again_rows(model, rounds: int) -> list[dict]:
    "A second score and a second round in the same process, and the same adapter in a new one."
    weights = {str(n): W for n, W in enumerate(weights_of(model))}
    made, limit = [], sum(W.nbytes for W in weights.values()) / bytes_per_second(model.device)
    top = lambda after=(): ModulatedPiSSA(model, r=64, extract=False, after=after, **QUIET)
    bottom = lambda: ModulatedPiSSA(model, r=64, extract=False, selection_score=lambda S, stats: -S)
    with tempfile.TemporaryDirectory() as folder, caching(folder, 8):
        def first() -> None:
            emptied(folder)
            top()

        def read() -> None:
            cache._MEMORY.clear()
            ModulatedPiSSA(copy.deepcopy(model), r=256, **QUIET)
        kept = top()
        for what, second in (("second score", bottom), ("second round", lambda: top([kept]))):
            first()
            made.append(row(f"{what} on the same base", "the first", second, first, rounds, limit, 5.0))
        made.append(row("PiSSA init from the cache on disk", "PEFT pissa", read, lambda: peft_of(model, 256, "pissa"), rounds,
                        cache._result_bytes(weights) / bytes_per_second(), 10.0))
    return made


@torch.no_grad()
def stored_and_decomposed(model, tok, records: list[dict], tokens: int) -> None:
    "Every layer's inputs kept, then a full SVD of each weight and its scores."
    layers, kept, mask, count = find_targets(model, LoRAConfig()), {}, [None], 0

    def keep(name: str) -> Callable:
        return lambda layer, args: kept.setdefault(name, []).append(args[0][mask[0]].float().cpu())
    hooks = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    for batch in batches(tok, records, "completion", 8):
        mask[0] = batch.is_target.to(model.device)
        model(**batch.inputs(model.device))
        count += int(batch.is_target.sum())
        if count >= tokens: break
    for hook in hooks: hook.remove()
    for name, layer in layers.items():
        U, S, Vh = torch.linalg.svd(layer.weight.float(), full_matrices=False)
        selection_scores(S, "wanda", project(torch.cat(kept.pop(name)), Vh)).topk(min(256, len(S)))


def scored_rows(model, tok, rounds: int, tokens: int) -> list[dict]:
    pairs = load_pairs("train")
    records = samples_of(len(pairs)) * (1 + tokens // (20 * len(pairs)))
    what, peer = f"activation-scored init, {tokens:,} tokens", "all activations stored, full SVD"

    def ours() -> None:
        stats = capture_statistics(model, tok, records, max_tokens=tokens)
        ModulatedPiSSA(model, r=256, extract=False, selection_score="wanda", calibration_activations=stats)
    theirs = lambda: stored_and_decomposed(model, tok, records, tokens)
    with tempfile.TemporaryDirectory() as folder, caching(folder, 8):
        return [row(what, peer, ours, theirs, rounds, None, 2.5),
                memory_row(f"{what}, host", peer, ours, theirs, torch.device("cpu"), 0.2)]


def rows(model, tok, rounds: int = 3):
    yield from build_rows(model, rounds)
    yield from again_rows(model, rounds)
    yield from scored_rows(model, tok, rounds, 2_000 if model.device.type == "cpu" else 50_000)
