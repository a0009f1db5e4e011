"""What is built, folded, measured and healed, beside what one would do instead: the rows of the benchmark that are not hooks.

Each `limit` is what ours must have: its operations at the rate of a matrix product in the same run, or its share of the peer's
forward passes. Adapters are built on copies where the peer writes into the model.
"""
import copy
import gc
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from pairs import bytes_per_second, flops_per_second, row, settle, told
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy

from modlab import (
    HealConfig,
    LoRAConfig,
    ModulatedLoRA,
    ModulatedPiSSA,
    baked,
    capture_statistics,
    collate,
    find_targets,
    heal,
    kl_curve,
    load_pairs,
    selection_scores,
)
from modlab.maths.scores import project
from modlab.model import cache
from modlab.model.text import Batch, batches, encode_records

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DOSES = [-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0]
QUIET = dict(selection_score="s_only")


def peft_of(model, r: int, init=True):
    return get_peft_model(copy.deepcopy(model), LoraConfig(r=r, lora_alpha=r, target_modules=TARGETS, init_lora_weights=init))


def lora_of(model, r: int = 32) -> ModulatedLoRA:
    "One that does something."
    lora = ModulatedLoRA(model, r=r, generator=torch.Generator().manual_seed(0))
    for n, B in enumerate(lora.B.values()):
        B.data.copy_(torch.randn(B.shape, generator=torch.Generator().manual_seed(n)) * 1e-3)
    return lora


def weights_of(model) -> list[torch.Tensor]: return [layer.weight for layer in find_targets(model, LoRAConfig()).values()]


def samples_of(count: int) -> list[dict]:
    return [dict(prompt=p["prompt"], completion=p["cho"]) for p in load_pairs("train")[:count]]


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


# ---- memory ----

def resident() -> int: return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak(f: Callable[[], object], device: torch.device) -> float:
    "The most memory that it takes beyond what was taken before, in bytes: of the accelerator, or of the process, sampled."
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        f()
        settle()
        return torch.cuda.max_memory_allocated() - start
    start, seen, done = resident(), [resident()], threading.Event()

    def watch() -> None:
        while not done.wait(0.005): seen.append(resident())
    watcher = threading.Thread(target=watch)
    watcher.start()
    try: f()
    finally:
        done.set()
        watcher.join()
    return max(seen) - start


def memory_row(what: str, peer: str, ours: Callable, theirs: Callable, device: torch.device, reach: float) -> dict:
    "Ours over the peer's; the lower the better."
    a, b = peak(ours, device), peak(theirs, device)
    return told(dict(what=f"{what}, memory", peer=peer, modlab_s=None, peer_s=None, kind="over", ratio=a / b, lowest=a / b,
                     highest=a / b, limit=None, reach=reach, modlab_bytes=a, peer_bytes=b))


# ---- rows ----

def folded(model, adapter) -> None:
    with baked(model, [(adapter, 1.0)]): pass


def merged(model) -> None:
    model.merge_adapter()
    model.unmerge_adapter()


def fold_row(model, r: int, reach: float | None, rounds: int) -> dict:
    ours, theirs = lora_of(model, r), peft_of(model, r)
    operations = sum(2 * r * W.numel() for W in weights_of(model))
    return row(f"fold and take out, r = {r}", "PEFT merge, unmerge", lambda: folded(model, ours), lambda: merged(theirs), rounds,
               operations / flops_per_second(model.device), reach)


def fold_rows(model, rounds: int) -> list[dict]:
    gpu = model.device.type != "cpu"
    return [fold_row(model, 256, None if gpu else 1.8, rounds), fold_row(model, 32, 1.5 if gpu else None, rounds)]


@torch.no_grad()
def two_forwards_per_dose(model, lora, batch: Batch) -> None:
    "Reference and student over all positions for each dose, as one writes it down first."
    inputs, mask = batch.inputs(model.device), batch.is_target[:, 1:].to(model.device)
    for c in DOSES:
        both = []
        for dose in (0.0, c):
            with lora(model, dose): both.append(model(**inputs).logits[:, :-1].float().log_softmax(-1))
        q, p = both
        rev, fwd = (p.exp() * (p - q)).sum(-1)[mask], (q.exp() * (q - p)).sum(-1)[mask]
        nll = -p.gather(-1, inputs["input_ids"][:, 1:, None])[..., 0][mask]
        [x.mean().item() for x in (rev, fwd, nll)]


def curve_rows(model, tok, rounds: int, count: int = 8) -> list[dict]:
    lora, samples = lora_of(model), samples_of(count)
    encoded = encode_records(tok, samples, "completion")
    batch, real = collate(encoded), sum(len(ids) for ids, _ in encoded)
    head, body = model.get_output_embeddings().weight.numel(), sum(W.numel() for W in weights_of(model))
    share = (real * body + int(batch.is_target.sum()) * head) / (2 * batch.input_ids.numel() * (body + head))
    what, peer = f"kl_curve, 9 doses, {count} × {batch.input_ids.shape[1]} tokens", "two forwards per dose"
    ours = lambda: kl_curve(model, tok, lora, samples, DOSES, progress=False)
    theirs = lambda: two_forwards_per_dose(model, lora, batch)
    return [row(what, peer, ours, theirs, rounds, lambda s: s * share, 2.5),
            memory_row(what, peer, ours, theirs, model.device, 0.5)]


def plain_training(model, tok, samples: list[dict], cfg: HealConfig) -> None:
    "The same steps on the same samples, without a divergence, a validation or a log."
    encoded = encode_records(tok, samples, "completion", cfg.max_len)
    adapter = ModulatedLoRA(model, cfg.r, cfg.alpha, layer_range=cfg.layer_range)
    params = list(adapter.parameters())
    optimizer = torch.optim.AdamW(params, cfg.lr, cfg.betas)
    with adapter(model, 1.0):
        for ids, border in encoded * cfg.epochs:
            ids = torch.tensor([ids], device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            cross_entropy(logits[border - 1:].float(), ids[0, border:]).backward()
            torch.nn.utils.clip_grad_norm_(params, cfg.grad_clip)
            optimizer.step()
            optimizer.zero_grad()


def heal_rows(model, tok, rounds: int) -> list[dict]:
    count = 8 if model.device.type == "cpu" else 24
    samples, cfg = samples_of(count), HealConfig(lr=1e-4, min_train=1)
    trained = samples[:count - count // 8]
    forward = (count + (cfg.epochs + 1) * (count // 8)) / (3 * cfg.epochs * len(trained)) # reference, validation
    return [row(f"heal with KL and validation, {cfg.epochs} epochs of {len(trained)} samples", "plain steps without KL",
                lambda: heal(model, tok, samples, cfg), lambda: plain_training(model, tok, trained, cfg), rounds,
                lambda s: s * (1 + forward), 1.15, over=True)]


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
        return [row(what, peer, ours, theirs, rounds, None, 2.5), memory_row(what, peer, ours, theirs, model.device, 0.2)]


def rows(model, tok, rounds: int = 3) -> list[dict]:
    tokens = 2_000 if model.device.type == "cpu" else 50_000
    return (fold_rows(model, rounds) + build_rows(model, rounds) + again_rows(model, rounds) + curve_rows(model, tok, rounds)
            + heal_rows(model, tok, rounds) + scored_rows(model, tok, rounds, tokens))
