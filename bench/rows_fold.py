"""Folding an adapter in and out again, beside PEFT, and a curve of KL against the dose, beside two forwards per dose."""
import torch
from pairs import flops_per_second, row
from shared import QUIET, lora_of, memory_row, peft_of, samples_of, weights_of

from modlab import ModulatedPiSSA, baked, collate, kl_curve
from modlab.model.text import Batch, encode_records

DOSES = [-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0]


def fold_row(model, r: int, reach: float, rounds: int) -> dict:
    "All linears; `r` > 32 is a PiSSA."
    ours = ModulatedPiSSA(model, r=r, extract=False, **QUIET) if r > 32 else lora_of(model, r)
    theirs = peft_of(model, r)

    def fold() -> None:
        with baked(model, [(ours, 1.0)]): pass

    def merge() -> None:
        theirs.merge_adapter()
        theirs.unmerge_adapter()
    operations = sum(2 * min(r, *W.shape) * W.numel() for W in weights_of(model))
    return row(f"fold and take out, r = {r}", "PEFT merge, unmerge", fold, merge, rounds,
               operations / flops_per_second(model.device), reach)


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


def rows(model, tok, rounds: int = 3):
    yield fold_row(model, 32, 1.5, rounds) if model.device.type == "cuda" else fold_row(model, 256, 1.8, rounds)
    yield from curve_rows(model, tok, rounds, 32 if model.device.type == "cuda" else 8)
