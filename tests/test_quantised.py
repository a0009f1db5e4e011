"""Layers of bitsandbytes on a CPU: what cannot be extracted says so, all else works."""
import copy

import pytest
import torch
from models import adapter_of, build, changes, gap, logits, state, tokens

from modlab import ModulatedPiSSA, load_adapter
from modlab.targets import dense_weight, find_targets, is_quantised, target_table

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")
every_bits = pytest.mark.parametrize("bits", [4, 8])


def quantise(layer, bits):
    "The same layer as bitsandbytes holds it."
    size = dict(input_features=layer.in_features, output_features=layer.out_features, bias=layer.bias is not None)
    if bits == 4: new = bnb.nn.Linear4bit(**size, compute_dtype=torch.float32, quant_type="nf4")
    else: new = bnb.nn.Linear8bitLt(**size, has_fp16_weights=False)
    new.load_state_dict(layer.state_dict())
    new = new.to("cpu")  # this is what packs a 4-bit weight
    # Else the first forward in eval mode packs the weight anew where the processor can, and gradients are wrong from then on.
    if bits == 4: new.support_avx512bf16_for_cpu = False
    return new


def quantised(bits, targets=("q_proj", "down_proj")):
    "The tiny Llama with some of its layers quantised."
    model = build()
    for block in model.model.layers:
        if "q_proj" in targets: block.self_attn.q_proj = quantise(block.self_attn.q_proj, bits)
        if "down_proj" in targets: block.mlp.down_proj = quantise(block.mlp.down_proj, bits)
    return model.eval()


@every_bits
def test_these_layers_are_what_they_are_taken_for(bits):
    model = quantised(bits)
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.weight.dtype == {4: torch.uint8, 8: torch.int8}[bits] and is_quantised(layer)
    table = target_table(model)
    assert table.quantised.sum() == 8 and set(table[table.quantised].role) == {"q_proj", "down_proj"}
    assert len(find_targets(model)) == 28
    plain = build().model.layers[0].self_attn.q_proj.weight
    assert gap(dense_weight(layer), plain) < {4: 0.2, 8: 0.02}[bits]  # half the widest gap between the 16 (256) values, and some


@every_bits
@pytest.mark.parametrize("kind", ["lora", "pissa-unextracted"])
def test_a_forward_and_a_backward_run_there(bits, kind):
    model, ids = quantised(bits), tokens()
    base = logits(model, ids)
    a = adapter_of(kind, model)
    before = state(model)
    with a(model, 0.0): assert torch.equal(logits(model, ids), base)
    with a(model, torch.tensor([1.0, 0.0, -2.0])): y = logits(model, ids)
    assert torch.equal(y[1], base[1]) and gap(y[0], base[0]) > 0.05
    with a(model, 1.0): model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in a.parameters())
    assert not changes(before, model)
    name = "model.layers.1.mlp.down_proj"
    layer, x = a.layers[name], torch.randn(5, 128)
    with torch.no_grad():
        plain = layer(x)
        with a(model, 1.5): assert gap(layer(x) - plain, x @ a.delta(name, 1.5).T) < 2**-16  # float32 rounding


@every_bits
def test_extraction_is_refused_by_name_type_and_way_out(bits):
    model = quantised(bits, targets=("down_proj",))
    before = state(model)
    kind = {4: "Linear4bit", 8: "Linear8bitLt"}[bits]
    with pytest.raises(ValueError, match=rf"model\.layers\.0\.mlp\.down_proj.*{kind}.*extract=False"):
        ModulatedPiSSA(model, r=4, selection_score="s_only")
    assert not changes(before, model)
    assert ModulatedPiSSA(model, r=4, selection_score="s_only", targets=("up_proj",)).extracted


@every_bits
@pytest.mark.parametrize("kind", ["lora", "pissa-unextracted", "pissa-extracted"])
def test_a_file_of_the_plain_model(tmp_path, bits, kind):
    "Another base to the fingerprint, so it takes strict=False; what was extracted cannot be extracted here at all."
    adapter_of(kind, build()).save(tmp_path / "a")
    model = quantised(bits)
    before = state(model)
    with pytest.raises(ValueError, match="weights differ.*strict=False"): load_adapter(model, tmp_path / "a")
    if kind == "pissa-extracted":
        with pytest.warns(UserWarning, match="of 28 weights"), pytest.raises(ValueError, match="q_proj.*is quantised"):
            load_adapter(model, tmp_path / "a", strict=False)
    assert not changes(before, model)
    if kind == "pissa-extracted": return
    with pytest.warns(UserWarning, match="of 28 weights"): a = load_adapter(model, tmp_path / "a", strict=False)
    with a(model, 1.0): assert logits(model, tokens()).isfinite().all()


@every_bits
@pytest.mark.parametrize("kind", ["lora", "pissa-unextracted"])
def test_its_own_file_comes_back(tmp_path, bits, kind):
    model = quantised(bits)
    a = adapter_of(kind, model)
    a.save(tmp_path / "a")
    other = copy.deepcopy(model)
    b = load_adapter(other, tmp_path / "a")
    with a(model, 1.0), b(other, 1.0): assert torch.equal(logits(model, tokens()), logits(other, tokens()))
