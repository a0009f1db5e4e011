"""Models spread over places: weights that accelerate keeps elsewhere and brings in for each layer's forward, for real."""
import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from models import adapter_of, build, gap, hooks, logits, tokens

from modlab import (
    HistoryBake,
    ModulatedPiSSA,
    bake_,
    bake_report,
    baked,
    capture_activations,
    load_adapter,
    target_table,
    tiny_model,
)
from modlab.model.layers import dense_weight, device_of

pytestmark = pytest.mark.usefixtures("one_thread")
PLACES = ("all in memory", "some on disk")
every_place = pytest.mark.parametrize("place", PLACES)
KINDS = ("lora", "pissa-unextracted")


def spread(place, folder, arch="llama"):
    "A model whose weights, or those of some blocks, are not in its parameters between calls."
    model = build(arch)
    if place == "all in memory": return cpu_offload(model, execution_device="cpu")
    stack = "transformer.h" if arch == "gpt2" else "model.layers"
    where = {n: "cpu" for n, m in model.named_modules() if not any(m.children()) and not n.startswith(f"{stack}.1.")}
    return dispatch_model(model, {**where, f"{stack}.1": "disk"}, main_device="cpu", offload_dir=folder, force_hooks=True)


@every_place
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_what_it_is_on_one_device(place, arch, kind, tmp_path):
    here, away, ids = build(arch), spread(place, tmp_path, arch), tokens()
    there = hooks(away)
    assert any(p.device.type == "meta" for p in away.parameters()), "nothing is away"
    a, b = adapter_of(kind, here), adapter_of(kind, away)
    assert all(device_of(m).type == "cpu" for m in b.layers.values())
    for name, layer in b.layers.items(): assert torch.equal(dense_weight(layer), dense_weight(a.layers[name]))
    for c in (0.0, 1.0, torch.tensor([1.0, 0.0, -2.0])):
        with a(here, c), b(away, c): assert torch.equal(logits(here, ids), logits(away, ids))
    for adapter, model in ((a, here), (b, away)):
        with adapter(model, 1.0): model(input_ids=ids, labels=ids).loss.backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(a.parameters(), b.parameters())) and hooks(away) == there
    b.save(tmp_path / "a.safetensors")
    for model in (here, away):
        with load_adapter(model, tmp_path / "a.safetensors")(model, 0.7), a(here, 0.7) if model is away else b(away, 0.7):
            assert torch.equal(logits(here, ids), logits(away, ids))


@every_place
def test_histories(place, tmp_path):
    here, away, ids = build(), spread(place, tmp_path), tokens()
    one, two = ([(adapter_of("lora", m), 1.0), (adapter_of("pissa-unextracted", m), -0.5)] for m in (here, away))
    with baked(here, one): wanted = logits(here, ids)
    base, where = logits(away, ids), [p.device for p in away.parameters()]
    with HistoryBake(away, two): assert gap(logits(away, ids), wanted) < 2**-15
    with baked(away, two): assert gap(logits(away, ids), wanted) < 2**-15
    assert torch.equal(logits(away, ids), base) and where == [p.device for p in away.parameters()]
    how = bake_report(away, two).set_index("name").how
    assert (how == "hook").sum() == (28 if place == "all in memory" else 7)
    assert bake_report(away, two).error.fillna(0).max() < 2**-15
    with pytest.raises(ValueError, match="is offloaded"): bake_(away, two)
    with pytest.raises(ValueError, match="is offloaded.*extract=False"): ModulatedPiSSA(away, r=4, selection_score="s_only")
    assert torch.equal(logits(away, ids), base)


@every_place
def test_tables_and_captures(place, tmp_path):
    here, tok = tiny_model()
    away, records = spread(place, tmp_path), [dict(prompt="a prompt", cho="chosen words", rej="rejected ones")]
    columns = ["name", "shape", "dtype", "selected"]
    assert target_table(away)[columns].equals(target_table(here)[columns])
    X, Y = (capture_activations(m, tok, records) for m in (here, away))
    assert all(torch.equal(X[n][side], Y[n][side]) for n in X for side in ("cho", "rej"))
