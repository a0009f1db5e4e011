"""What one would use instead of modlab: PEFT, and a loop that trains without a barrier."""
import copy
from collections.abc import Sequence

import torch
from peft import LoraConfig, get_peft_model

from modlab import encode
from modlab.model.layers import device_of, inner_model
from modlab.model.targets import LoRAConfig, find_targets

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def shared_copy(model):
    "A copy of a model that shares its weights: only modules are made anew."
    memo = {id(p): p for p in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, memo)


def peft(model, r: int, init=True, layers=None, share: bool = False, scale: float = 1.0):
    "PEFT's LoRA on all linear layers, as it comes: float32 factors."
    cfg = LoraConfig(r=r, lora_alpha=r * scale, target_modules=TARGETS, init_lora_weights=init, layers_to_transform=layers)
    return get_peft_model(shared_copy(model) if share else copy.deepcopy(model), cfg)


def device(model) -> torch.device: return device_of(inner_model(model).get_input_embeddings())


def linears(model) -> dict: return find_targets(model, LoRAConfig())


def added_flops(model, r: int, tokens: int) -> float:
    "What maps of rank r on all linear layers cost, at two operations per multiplication."
    return sum(2.0 * r * (layer.in_features + layer.out_features) * tokens for layer in linears(model).values())


def added_bytes(model, r: int, tokens: int) -> float:
    "What they must move at least: factors, inputs (once per group that shares them), and outputs read and written again."
    size, total, seen = next(model.parameters()).element_size(), 0.0, set()
    for name, layer in linears(model).items():
        o, i = layer.out_features, layer.in_features
        group = name.rpartition(".")[0], i, name.endswith(("o_proj", "down_proj"))
        total += r * (o + i) + 2 * tokens * o + (0 if group in seen else tokens * i)
        seen.add(group)
    return total * size


def sft(model, samples: Sequence[tuple[torch.Tensor, torch.Tensor]], held: Sequence, epochs: int, lr: float = 1e-4) -> None:
    "Plain training: forward with labels, backward, clip, step; and the same held-out samples after each epoch."
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr)
    def evaluate():
        with torch.no_grad(): return [model(input_ids=ids, labels=labels, use_cache=False).loss.item() for ids, labels in held]
    evaluate()
    for _ in range(epochs):
        for ids, labels in samples:
            model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0).item()
            optimizer.step()
            optimizer.zero_grad()
        evaluate()


def labelled(tok, records: Sequence[dict], where: torch.device, max_len: int = 1024) -> list:
    "Token ids and labels, one sample each."
    made = []
    for r in records:
        ids, border = encode(tok, r["prompt"], r["completion"], max_len)
        made.append((torch.tensor([ids], device=where), torch.tensor([[-100] * border + ids[border:]], device=where)))
    return made
