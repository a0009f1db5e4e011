"""Generating under an adapter, beside the bare model: token by token, and one decode step as a captured CUDA graph."""
import torch
from pairs import bytes_per_second, row
from peers import device, linears, peft, shared_copy
from rows_forward import filled, under
from transformers import StaticCache

from modlab import ModulatedLoRA

NEW = 32


def prompt(model, tok, b: int) -> torch.Tensor:
    return torch.randint(len(tok), (b, 16), generator=torch.Generator().manual_seed(0)).to(device(model))


def generating(model, ids):
    def run():
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW,
                       do_sample=False, pad_token_id=0)
    return run


def least(model, r: int) -> float:
    "Seconds in which the factors are read once per token."
    size = next(model.parameters()).element_size()
    amount = sum(r * (m.in_features + m.out_features) * size for m in linears(model).values())
    return NEW * amount / bytes_per_second(device(model), 2**30 if device(model).type != "cpu" else 2**26)


@torch.no_grad()
def rows(model, tok, rounds: int = 5) -> list[dict]:
    lora = filled(ModulatedLoRA(model, r=32))
    if device(model).type == "cpu": return eager_rows(model, tok, lora, 1, 1.20, rounds)
    made = eager_rows(model, tok, lora, 1, 1.25, rounds) + eager_rows(model, tok, lora, 8, 1.25, rounds)
    return made + (captured_rows(model, tok, lora, rounds) if device(model).type == "cuda" else [])


def eager_rows(model, tok, lora, b: int, reach: float, rounds: int) -> list[dict]:
    ids, text, extra = prompt(model, tok, b), f"generate {NEW}, {b} prompt{'s' * (b > 1)}", least(model, 32)
    ours, base, limit = generating(model, ids), generating(shared_copy(model), ids), lambda base: base + extra
    made = [under(model, lora, 1.0, text, "base", ours, base, rounds, limit, reach, True)]
    if b == 1: return [*made, under(model, lora, 1.0, text, "PEFT", ours, generating(peft(model, 32, share=True), ids), rounds)]
    return [*made, under(model, lora, torch.ones(b), f"{text}, one c a row", "base", ours, base, rounds, limit, None, True)]


def step_of(model, ids, length: int = 128):
    "One decode step with a static cache, always at the same position."
    dtype, where = next(model.parameters()).dtype, ids.device
    cache, token = StaticCache(config=model.config, max_cache_len=length), ids[:, :1].contiguous()
    at, mask = torch.zeros_like(token), torch.zeros(len(ids), 1, 1, length, device=where, dtype=dtype)
    def step():
        for layer in cache.layers:
            if isinstance(seen := getattr(layer, "cumulative_length", None), torch.Tensor): seen.zero_()
        return model(input_ids=token, past_key_values=cache, attention_mask=mask, position_ids=at, use_cache=True).logits
    return step


class Captured:
    "A step as a CUDA graph; holds on to what the graph reads."
    def __init__(self, step):
        self.step, self.graph, side = step, torch.cuda.CUDAGraph(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3): step()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(self.graph): self.out = step()

    def __call__(self) -> torch.Tensor:
        self.graph.replay()
        return self.out


def ten(f): return lambda: [f() for _ in range(10)]


def captured_rows(model, tok, lora, rounds: int) -> list[dict]:
    "Ten replays of a step, beside ten of the bare model's step: captured, and as generate runs it."
    made, extra, bare = [], least(model, 32) * 10 / NEW, shared_copy(model)
    limit = lambda base: base + extra
    for b in (1, 8):
        ids, text = prompt(model, tok, b), f"decode step captured, {b} prompt{'s' * (b > 1)}"
        step, plain = step_of(bare, ids), Captured(step_of(bare, ids))
        with lora(model, 1.0): # what a graph reads is there as long as the block lasts
            steered = Captured(step_of(model, ids))
            made += [row(text, "base captured", ten(steered), ten(plain), rounds, limit, 1.05, True),
                     row(text, "base eager", ten(steered), ten(step), rounds, limit, 1.05, True)]
    return made
