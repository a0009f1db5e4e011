"""Quantised layers on a CPU: bitsandbytes in 4 and 8 bits, torchao in 8. What cannot be extracted says so, all else works."""
import copy
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from models import adapter_of, build, changes, gap, logits, seeded, state, tokens

from modlab import (
    HistoryBake,
    ModulatedLoRA,
    ModulatedPiSSA,
    bake_,
    bake_report,
    baked,
    capture_activations,
    find_targets,
    load_adapter,
    target_table,
    tiny_model,
)
from modlab.model.calls import is_swapped
from modlab.model.layers import dense_weight, guard_4bit, is_quantised, layer_shape

sys.path.append(str(Path(sys.prefix) / "quantised"))  # where `make setup` puts it, out of transformers' sight
from torchao.quantization import Int8WeightOnlyConfig, quantize_

pytestmark = pytest.mark.usefixtures("one_thread")
HOW = ("bnb4", "bnb8", "torchao8")
KINDS = ("lora", "pissa-unextracted")
CLASS = dict(bnb4="Linear4bit", bnb8="Linear8bitLt", torchao8="Linear")
every_way, every_kind = pytest.mark.parametrize("how", HOW), pytest.mark.parametrize("kind", KINDS)


def bnb(layer, how):
    "The same layer as bitsandbytes holds it; moving it is what packs the weight."
    size = dict(input_features=layer.in_features, output_features=layer.out_features, bias=layer.bias is not None)
    if how == "bnb4": new = Linear4bit(**size, compute_dtype=torch.float32, quant_type="nf4")
    else: new = Linear8bitLt(**size, has_fp16_weights=False)
    new.load_state_dict(layer.state_dict())
    return new.to("cpu")


def quantised(how, roles=("q_proj", "down_proj")):
    "The tiny Llama with some of its layers quantised."
    model = build()
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for role in set(roles) & set(dict(parent.named_children())):
                if how != "torchao8": setattr(parent, role, bnb(getattr(parent, role), how))
    if how == "torchao8": quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda m, name: name.endswith(tuple(roles)))
    return model.eval()


@every_way
def test_these_layers_are_what_they_are_taken_for(how):
    model = quantised(how)
    layer, plain = (m.model.layers[0].self_attn.q_proj for m in (model, build()))
    assert type(layer).__name__ == CLASS[how] and is_quantised(layer) and layer_shape(layer) == (64, 64)
    table = target_table(model)
    assert set(table[table.quantised].role) == {"q_proj", "down_proj"} and table.quantised.sum() == 8
    assert table.selected.sum() == 28
    W = dense_weight(layer)
    assert type(W) is torch.Tensor and W.dtype == torch.float32
    assert gap(W, plain.weight) < (0.2 if how == "bnb4" else 0.02)  # half the widest gap between the 16 (256) values, and some
    guard_4bit(model)
    logits(model, tokens())
    assert torch.equal(dense_weight(layer), W), "a forward does not change what is read"


def dense_copy(model):
    "The same model with plain layers that hold what the quantised ones mean."
    other = build()
    for name, layer in find_targets(model).items(): other.get_submodule(name).weight.data = dense_weight(layer).clone()
    return other


def gradients(adapter, model, ids):
    with adapter(model, 1.0): return torch.autograd.grad(model(input_ids=ids, labels=ids).loss, list(adapter.parameters()))


def train(adapter, model, ids):
    "Five steps; the loss at each."
    optimizer, losses = torch.optim.AdamW(adapter.parameters(), lr=1e-2), []
    for _ in range(5):
        for p, g in zip(adapter.parameters(), gradients(adapter, model, ids)): p.grad = g
        optimizer.step()
        with torch.no_grad(), adapter(model, 1.0): losses.append(model(input_ids=ids, labels=ids).loss.item())
    return losses


@every_way
@every_kind
def test_an_adapter_runs_trains_and_repeats(how, kind):
    model, ids = quantised(how), tokens()
    a = adapter_of(kind, model)  # before the first forward, which is what repacks 4-bit weights
    base, before, dense = logits(model, ids), state(model), dense_copy(model)
    with a(model, 0.0): assert torch.equal(logits(model, ids), base)
    with a(model, torch.tensor([1.0, 0.0, -2.0])): y = logits(model, ids)
    assert torch.equal(y[1], base[1]) and gap(y[0], base[0]) > 0.05
    with a(model, 1.0): assert torch.equal(logits(model, ids), logits(model, ids)) and gap(logits(model, ids)[0], y[0]) < 2**-10
    b = adapter_of(kind, dense)
    for training in (True, False):
        model.train(training)  # in training all compute with the very weight; else 8-bit bitsandbytes rounds activations
        near = 0.1 if how == "bnb8" and not training else 2**-10
        for g, wanted in zip(gradients(a, model, ids), gradients(b, dense, ids)): assert gap(g, wanted) < near
    again = adapter_of(kind, model)
    losses = train(a, model, ids)
    assert losses[-1] < losses[0] - 0.02 and train(again, model, ids) == losses
    assert all(map(torch.equal, a.parameters(), again.parameters()))
    assert not changes(before, model) and torch.equal(logits(model, ids), base)


@every_way
def test_the_layer_under_an_adapter_is_itself_plus_delta(how):
    model = quantised(how)
    a, name, x = adapter_of("lora", model), "model.layers.1.mlp.down_proj", torch.randn(5, 128, generator=seeded(1))
    with torch.no_grad():
        plain = a.layers[name](x)
        with a(model, 1.5): assert gap(a.layers[name](x) - plain, x @ a.delta(name, 1.5).T) < 2**-16  # float32 rounding


@every_way
def test_histories_run_as_a_hook_there_and_folded_elsewhere(how):
    model, ids = quantised(how), tokens()
    history = [(adapter_of(kind, model, seed=n), c) for n, (kind, c) in enumerate((("lora", 1.0), ("pissa-unextracted", -0.5)))]
    base, before = logits(model, ids), state(model)
    with HistoryBake(model, history) as bake:
        wanted = logits(model, ids)
        bake.set_gate(lambda: False)
        assert torch.equal(logits(model, ids), base)
    with baked(model, history):
        assert gap(logits(model, ids), wanted) < (0.05 if how == "bnb8" else 2**-12)  # activations are quantised anew there
        assert all(is_swapped(m) == is_quantised(m) for m in find_targets(model).values())
    assert not changes(before, model) and torch.equal(logits(model, ids), base) and gap(wanted, base) > 0.1
    report = bake_report(model, history)
    assert (report.how == "hook").sum() == 8 and report[report.how == "hook"].error.isna().all() and report.error.max() < 1e-5
    with pytest.raises(ValueError, match=f"{CLASS[how]}.*is quantised"): bake_(model, history)
    assert not changes(before, model)


@every_way
def test_extraction_is_refused_by_name_type_and_way_out(how):
    model = quantised(how, roles=("down_proj",))
    before = state(model)
    with pytest.raises(ValueError, match=rf"model\.layers\.0\.mlp\.down_proj.*{CLASS[how]}.*extract=False"):
        ModulatedPiSSA(model, r=4, selection_score="s_only")
    assert not changes(before, model)
    assert ModulatedPiSSA(model, r=4, selection_score="s_only", targets=("up_proj",)).extracted


@pytest.mark.filterwarnings("ignore:.*differ")
@every_way
@pytest.mark.parametrize("kind", ["lora", "pissa-unextracted", "pissa-extracted"])
def test_a_file_of_the_plain_model(tmp_path, how, kind):
    "Four bits are another base to the fingerprint and eight are near its limit: strict=False. What was extracted cannot be here."
    adapter_of(kind, build()).save(tmp_path / "a")
    model = quantised(how)
    before = state(model)
    if how == "bnb4":
        with pytest.raises(ValueError, match="weights differ.*strict=False"): load_adapter(model, tmp_path / "a")
    if kind == "pissa-extracted":
        with pytest.raises(ValueError, match="q_proj.*is quantised"): load_adapter(model, tmp_path / "a", strict=False)
    assert not changes(before, model)
    if kind == "pissa-extracted": return
    with load_adapter(model, tmp_path / "a", strict=False)(model, 1.0): assert logits(model, tokens()).isfinite().all()


@every_way
@every_kind
def test_its_own_file_comes_back(tmp_path, how, kind):
    model = quantised(how)
    a = adapter_of(kind, model)
    a.save(tmp_path / "a")
    other = copy.deepcopy(model)
    b = load_adapter(other, tmp_path / "a")
    with a(model, 1.0), b(other, 1.0): assert torch.equal(logits(model, tokens()), logits(other, tokens()))


@pytest.mark.skipif(not has_avx512bf16(), reason="this processor does not repack 4-bit weights")
def test_four_bits_are_kept_from_being_repacked():
    ids, repacked = tokens(), lambda m: m.weight.quant_state.__dict__.get("packing_format_for_cpu", False)
    capture = lambda m: capture_activations(m, tiny_model()[1], [dict(prompt="a", cho="bcd", rej="efg")])
    trapped = quantised("bnb4")
    logits(trapped, ids)  # without gradients, in eval mode
    before = state(trapped)
    assert repacked(trapped.model.layers[0].self_attn.q_proj), "the trap is not there any more: guard_4bit can go"
    for make in (lambda: ModulatedLoRA(trapped, targets="up_proj"), lambda: adapter_of("pissa-unextracted", trapped),
                 lambda: capture(trapped)):
        with pytest.raises(RuntimeError, match="repacked.*load the model anew"): make()
    assert not changes(before, trapped) and all(p.requires_grad for n, p in trapped.named_parameters() if "norm" in n)
    for first in (lambda m: ModulatedLoRA(m, targets="up_proj"), capture):
        model = quantised("bnb4")
        first(model)
        logits(model, ids)
        assert not repacked(model.model.layers[0].self_attn.q_proj)
