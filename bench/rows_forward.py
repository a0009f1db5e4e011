"""A forward under an adapter, beside the bare model and beside PEFT."""
import torch
from pairs import bytes_per_second, flops_per_second, row, seconds
from peers import added_bytes, added_flops, device, peft

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


def under(model, adapter, ids, c):
    def run():
        with adapter(model, c=c): model.base_model(ids, use_cache=False)
    return run


@torch.no_grad()
def rows(model, tok, rounds: int = 5) -> list[dict]:
    where = device(model)
    b, s = SHAPE["cpu" if where.type == "cpu" else "cuda"] if model.config.hidden_size > 64 else (2, 8)
    ids = torch.randint(len(tok), (b, s), generator=torch.Generator().manual_seed(0)).to(where)
    bare, text = lambda: model.base_model(ids, use_cache=False), f"forward {b} x {s}"
    return narrow(model, ids, text, bare, rounds) + wide(model, ids, text, bare, rounds)


def narrow(model, ids, text, bare, rounds: int) -> list[dict]:
    lora, extra, other = filled(ModulatedLoRA(model, r=32)), least(model, 32, ids.numel()), peft(model, 32, share=True)
    limit = lambda base: base + extra
    one, each = under(model, lora, ids, 1.0), under(model, lora, ids, torch.ones(len(ids)))
    theirs = lambda: other.base_model.model.model(ids, use_cache=False)
    return [row(f"{text}, LoRA r = 32", "base", one, bare, rounds, limit, 1.10, True),
            row(f"{text}, LoRA r = 32, one c a row", "base", each, bare, rounds, limit, 1.12, True),
            row(f"{text}, LoRA r = 32", "PEFT", one, theirs, rounds)]


def wide(model, ids, text, bare, rounds: int) -> list[dict]:
    "Rank 256. The directions are random: a forward does not depend on them, and a large model would be decomposed for minutes."
    lora, other = filled(ModulatedLoRA(model, r=256)), peft(model, 256, share=True)
    base = min(seconds(bare) for _ in range(3))
    limit, gpu = base + least(model, 256, ids.numel()), ids.device.type != "cpu"
    ours, theirs = under(model, lora, ids, 1.0), lambda: other.base_model.model.model(ids, use_cache=False)
    return [row(f"{text}, r = 256", "PEFT r = 256", ours, theirs, rounds, limit, 1.4 if gpu else 1.1),
            row(f"{text}, r = 256", "base", ours, bare, rounds, limit, 1.1 * limit / base, True)]
