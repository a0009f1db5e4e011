"""What the rows on folding, measuring and decomposing share: peers, samples, and the most memory that something takes."""
import copy
import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from pairs import settle, told
from peft import LoraConfig, get_peft_model

from modlab import LoRAConfig, ModulatedLoRA, find_targets, load_pairs

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
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
