"""Which layers are reached, on models of many kinds."""
import pandas as pd
import pytest
import torch
from models import ARCHS, build
from transformers import (
    BertConfig,
    BertForMaskedLM,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from modlab import ModulatedLoRA, ModulatedPiSSA
from modlab.model.targets import LoRAConfig, block_of, block_stacks, find_targets, in_range, target_table
from modlab.model.layers import is_linear, layer_shape

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48)


def bert(): return BertForMaskedLM(BertConfig(vocab_size=60, **SMALL))


def clip():
    vision = CLIPVisionConfig(image_size=8, patch_size=4, **SMALL | dict(num_hidden_layers=5))
    text = CLIPTextConfig(vocab_size=60, **SMALL)
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16))


def t5():
    sizes = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=4, num_heads=2)
    return T5ForConditionalGeneration(T5Config(vocab_size=60, **sizes))


def tied():
    return LlamaForCausalLM(LlamaConfig(vocab_size=60, num_key_value_heads=1, tie_word_embeddings=True, **SMALL))


def embed_out():
    "GPT-NeoX as it was before its head was renamed."
    model = build("neox")
    model.embed_out = model.lm_head
    del model.lm_head
    model.get_output_embeddings = lambda: model.embed_out
    return model


MODELS = {**{a: (lambda a=a: build(a)) for a in (*ARCHS, "moe")}, "bert": bert, "clip": clip, "t5": t5,
          "tied": tied, "embed_out": embed_out}
STACKS = dict(llama={"model.layers": 4}, gpt2={"transformer.h": 2}, neox={"gpt_neox.layers": 2}, opt={"model.decoder.layers": 2},
              moe={"model.layers": 2}, bert={"bert.encoder.layer": 3},
              clip={"text_model.encoder.layers": 3, "vision_model.encoder.layers": 5},
              t5={"encoder.block": 2, "decoder.block": 4}, tied={"model.layers": 3}, embed_out={"gpt_neox.layers": 2})
every_model = pytest.mark.parametrize("name", MODELS)
quiet = pytest.mark.filterwarnings("ignore:.*fused expert")


@every_model
def test_block_stacks(name):
    assert block_stacks(MODELS[name]()) == STACKS[name]


@quiet
@every_model
def test_the_output_embedding_is_left_out_whatever_its_name(name):
    model = MODELS[name]()
    head = model.get_output_embeddings()
    found, table = find_targets(model), target_table(model)
    assert all(m is not head for m in found.values()) and all(is_linear(m) for m in found.values())
    assert list(found) == [n for n, m in model.named_modules() if n in found], "not in model order"
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) or type(m).__name__ == "Conv1D"]
    left_out = set(linear) - set(found)
    assert list(table.name) == linear and left_out == {n for n in linear if model.get_submodule(n) is head}


@quiet
@every_model
@pytest.mark.parametrize("layer_range", [(0.0, 0.5), (0.5, 1.0), (0.0, 1.0), (0.3, 0.7)])
def test_table_and_search_agree(name, layer_range):
    model, cfg = MODELS[name](), LoRAConfig(layer_range=layer_range)
    table, stacks = target_table(model, cfg).set_index("name"), block_stacks(model)
    if not table.selected.any():
        with pytest.raises(ValueError, match="no layer"): find_targets(model, cfg)
        return
    found = find_targets(model, cfg)
    assert list(found) == list(table[table.selected].index) and (table.reason == "").equals(table.selected)
    for n, row in table.iterrows():
        layer, block = model.get_submodule(n), block_of(n, stacks)
        bias = getattr(layer, "bias", None)
        o, i = row["shape"]
        assert layer_shape(layer) == (o, i) and row.k == min(o, i) and (bias is None or bias.shape == (o,))
        assert row["dtype"] == "float32" and not row.quantised
        if block is None: assert row.layer is pd.NA and row.selected != bool(row.reason)
        else:
            assert row.layer == block[0] and f".{block[0]}." in n
            inside = int(layer_range[0] * block[1] + 1e-9) <= block[0] < int(layer_range[1] * block[1] + 1e-9)
            assert row.selected == inside and ("outside layer_range" in row.reason) != inside


@pytest.mark.parametrize("lo, hi, depth, kept", [
    (0.0, 0.7, 10, range(7)), (0.0, 0.29, 100, range(29)), (0.1, 0.3, 30, range(3, 9)), (0.0, 0.1, 4, range(0)),
    (0.58, 1.0, 50, range(29, 50)), (0.2, 0.8, 30, range(6, 24)), (0.0, 1.0, 7, range(7)), (0.999, 1.0, 3, range(2, 3))])
def test_a_range_loses_no_block_to_float_dust(lo, hi, depth, kept):
    assert [b for b in range(depth) if in_range(b, depth, (lo, hi))] == list(kept)


def test_neighbouring_ranges_share_the_blocks_out():
    for depth in range(1, 130):
        cuts = [n / 10 for n in range(11)]
        assert [b for lo, hi in zip(cuts, cuts[1:]) for b in range(depth) if in_range(b, depth, (lo, hi))] == list(range(depth))


def test_each_stack_counts_its_own_blocks_and_what_lies_outside_is_kept():
    found = find_targets(clip(), LoRAConfig(layer_range=(0.0, 0.4)))
    blocks = {(n.split("_")[0], n.split(".layers.")[1].split(".")[0]) for n in found if ".layers." in n}
    assert blocks == {("text", "0"), ("vision", "0"), ("vision", "1")}
    assert {"visual_projection", "text_projection"} <= set(found)


def test_the_range_is_counted_on_the_models_blocks_not_on_matched_names():
    found = find_targets(build(), LoRAConfig(targets=(r"layers\.[23]\..*q_proj",), layer_range=(0.5, 0.75)))
    assert list(found) == ["model.layers.2.self_attn.q_proj"]


@pytest.mark.parametrize("name, head", [("llama", "lm_head"), ("embed_out", "embed_out"), ("bert", "cls.predictions.decoder"),
                                        ("tied", "lm_head")])
def test_a_head_that_is_named_is_let_through_if_exclude_lets_it(name, head):
    model, cfg = MODELS[name](), LoRAConfig(targets=("all-linear", f"{head}$"), exclude=())
    assert list(find_targets(model, cfg))[-1] == head and head not in find_targets(model, LoRAConfig(exclude=()))
    with pytest.raises(ValueError, match="excluded by"): find_targets(model, LoRAConfig(targets=(f"{head}$",), exclude=(head,)))
    row = target_table(model, cfg).set_index("name").loc[head]
    shared = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert row.selected and row.tied == shared == (name in ("bert", "tied"))


def test_a_tied_head_may_be_trained_but_not_extracted():
    model = tied()
    before = model.lm_head.weight.detach().clone()
    kw = dict(r=4, targets=("lm_head",), exclude=())
    assert list(ModulatedLoRA(model, **kw).layers) == ["lm_head"]
    with pytest.raises(ValueError, match="lm_head.*tied.*extract=False"): ModulatedPiSSA(model, selection_score="s_only", **kw)
    a = ModulatedPiSSA(model, selection_score="s_only", extract=False, **kw)
    ids = torch.arange(10).view(2, 5)
    with torch.no_grad():
        base = model(ids).logits
        with a(model, torch.tensor([0.0, 1.0])): y = model(ids).logits
    assert torch.equal(y[0], base[0]) and not torch.equal(y[1], base[1]) and torch.equal(model.lm_head.weight, before)


def test_fused_experts_are_counted_in_a_warning():
    model = build("moe")
    fused = {n: p.numel() for n, p in model.named_parameters() if p.ndim == 3}
    assert len(fused) == 4
    with pytest.warns(UserWarning, match=rf"{sum(fused.values()):,} parameters"): found = find_targets(model)
    assert len(found) == 8 and not any("expert" in n for n in found)
    with pytest.warns(UserWarning, match=rf"{sum(v for n, v in fused.items() if 'down_proj' in n):,} parameters"):
        find_targets(model, LoRAConfig(targets=("q_proj", "all-linear"), exclude=("lm_head", "gate_up_proj")))


@pytest.mark.filterwarnings("error")
def test_no_warning_where_no_expert_is_asked_for():
    assert len(find_targets(build("moe"), LoRAConfig(targets=("q_proj",)))) == 2
    assert len(find_targets(build("moe"), LoRAConfig(exclude=("experts", "lm_head")))) == 8
    for arch in ARCHS: assert find_targets(build(arch))


@pytest.mark.parametrize("targets, exclude, found", [
    (("q_proj",), (), 4), (("self_attn",), ("[kv]_proj",), 8), (("^model.layers.1.",), (), 7), (("q_proj$", "mlp"), (), 16),
    (("all-linear",), ("mlp", "lm_head"), 16), (("Q_PROJ|(?i:O_PROJ)",), (), 4)])
def test_patterns_are_searched_and_exclude_wins(targets, exclude, found):
    assert len(find_targets(build(), LoRAConfig(targets=targets, exclude=exclude))) == found
