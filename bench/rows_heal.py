"""A step of `heal`, with KL, reference, validation and log, beside plain training without any of these but the validation."""
import logging

import torch
from pairs import row
from peers import device, labelled, peft, sft
from rows_forward import filled

from modlab import HealConfig, ModulatedLoRA, heal, load_pairs

COUNT, EPOCHS, R = 24, 2, 32


def rows(model, tok, rounds: int = 3, count: int = COUNT, epochs: int = EPOCHS) -> list[dict]:
    "All of `heal` beside all of the plain run: as many steps, the same samples, the same layers, the same rank."
    samples = [dict(prompt=p["prompt"], completion=p["cho"]) for p in load_pairs("train")[:count]]
    cfg = HealConfig(epochs=epochs, lr=1e-4, min_train=1, r=R)
    data, held = labelled(tok, samples, device(model)), round(count * cfg.val_frac)
    first, last = (round(part * model.config.num_hidden_layers) for part in cfg.layer_range)
    other = peft(model, R, layers=list(range(first, last)), share=True, scale=2.0)
    how = dict(r=R, alpha=2.0 * R, layer_range=cfg.layer_range)
    ours = lambda: heal(model, tok, filled(ModulatedLoRA(model, **how)), samples, cfg)
    theirs = lambda: sft(other, data[held:], data[:held], epochs)
    before = logging.root.manager.disable
    logging.disable()
    with torch.enable_grad():
        made = [row("heal step, KL and validation", "plain SFT with validation", ours, theirs, rounds, None, 1.15, True)]
    logging.disable(before)
    return made
