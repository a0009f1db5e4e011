"""A forward under an adapter, beside the bare model and beside PEFT."""
import torch
from pairs import bytes_per_second, flops_per_second, row, seconds
from peers import added_bytes, added_flops, device, peft, shared_copy

from modlab import ModulatedLoRA

SHAPE = dict(cpu=(4, 81), cuda=(8, 512))


def filled(adapter):
    "A LoRA that does something."
    for B in adapter.B.values(): torch.nn.init.normal_(B.data, std=1e-3)
    return adapter


def least(model, r: int, tokens: int) -> float:
    "Seconds that maps of rank r need on this machine: the operations, or the bytes where they take longer (on an accelerator)."
    where, dtype = device(model), next(model.parameters()).dtype
    big = where.type != "cpu"
    by_flops = added_flops(model, r, tokens) / flops_per_second(where, dtype, 8192 if big else 1024)
    return max(by_flops, added_bytes(model, r, tokens) / bytes_per_second(where, 2**30)) if big else by_flops


def under(model, adapter, c, *args, **kw) -> dict:
    "A row that is measured while an adapter is attached at one dose; the peer is a model of its own."
    with adapter(model, c): return row(*args, **kw)


@torch.no_grad()
def rows(model, tok, rounds: int = 5) -> list[dict]:
    where = device(model)
    b, s = SHAPE["cpu" if where.type == "cpu" else "cuda"] if model.config.hidden_size > 64 else (2, 8)
    ids = torch.randint(len(tok), (b, s), generator=torch.Generator().manual_seed(0)).to(where)
    run = lambda m: lambda: m.base_model(ids, use_cache=False)
    return [*narrow(model, ids, run, rounds), *wide(model, ids, run, rounds)]


def narrow(model, ids, run, rounds: int) -> list[dict]:
    lora, extra, other = filled(ModulatedLoRA(model, r=32)), least(model, 32, ids.numel()), peft(model, 32, share=True)
    text, limit = "forward {} x {}, LoRA r = 32".format(*ids.shape), lambda base: base + extra
    ours, base, theirs = run(model), run(shared_copy(model)), run(other.base_model.model)
    return [under(model, lora, 1.0, text, "base", ours, base, rounds, limit, 1.10, True),
            under(model, lora, torch.ones(len(ids)), f"{text}, one c a row", "base", ours, base, rounds, limit, 1.12, True),
            under(model, lora, 1.0, text, "PEFT", ours, theirs, rounds)]


def wide(model, ids, run, rounds: int) -> list[dict]:
    "Rank 256. The directions are random: a forward does not depend on them, and a large model would be decomposed for minutes."
    lora, extra, other = filled(ModulatedLoRA(model, r=256)), least(model, 256, ids.numel()), peft(model, 256, share=True)
    text, ours, base, gpu = "forward {} x {}, r = 256".format(*ids.shape), run(model), run(shared_copy(model)), ids.is_cuda
    limit = min(seconds(base) for _ in range(3)) + extra
    return [under(model, lora, 1.0, text, "PEFT r = 256", ours, run(other.base_model.model), rounds, limit, 1.4 if gpu else 1.1),
            under(model, lora, 1.0, text, "base", ours, base, rounds, limit, 1.1 * limit / (limit - extra), True)]
