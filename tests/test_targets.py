"""Which layers are reached, on models of many kinds."""
import tempfile

import pandas as pd
import peft
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
from modlab.model.layers import inner_model, is_linear, layer_shape
from modlab.model.targets import LoRAConfig, _in_range, block_of, block_stacks, find_targets, target_table

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
    assert [b for b in range(depth) if _in_range(b, depth, (lo, hi))] == list(kept)


def test_neighbouring_ranges_share_the_blocks_out():
    for depth in range(1, 130):
        cuts = [n / 10 for n in range(11)]
        assert [b for lo, hi in zip(cuts, cuts[1:]) for b in range(depth) if _in_range(b, depth, (lo, hi))] == list(range(depth))


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


@pytest.mark.parametrize("targets, meant", [
    ("qproj", "q_proj"), (("q_proj", "k_porj"), "k_proj"), (("qproj", "vproj"), "q_proj, v_proj"), ("all_linear", "all-linear")])
def test_a_mistyped_role_names_the_roles_that_exist(targets, meant):
    roles = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head"
    for f in (lambda cfg: find_targets(build(), cfg), lambda cfg: ModulatedLoRA(build(), targets=cfg.targets)):
        with pytest.raises(ValueError, match=rf"roles here: {roles}; did you mean {meant}\? target_table"):
            f(LoRAConfig(targets=targets))


def test_where_nothing_is_near_the_roles_are_still_named():
    with pytest.raises(ValueError, match=r"roles here: c_attn, c_proj, c_fc, lm_head; target_table"):
        find_targets(build("gpt2"), LoRAConfig(targets="xyz"))
    with pytest.raises(ValueError, match="roles here: none"): find_targets(torch.nn.ReLU())


# ---- wrapped models ----

def peft_of(model, **kw):
    "The model with a PEFT LoRA on its attention."
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **kw))


def compiled_blocks(model):
    "Each block compiled by itself, as for large models."
    for n, block in enumerate(model.model.layers): model.model.layers[n] = torch.compile(block, backend="eager")
    return model


WRAPPERS = {"compiled": lambda m: torch.compile(m, backend="eager"), "parallel": torch.nn.DataParallel, "peft": peft_of,
            "blocks": compiled_blocks,
            "parallel, compiled, peft": lambda m: torch.nn.DataParallel(torch.compile(peft_of(m), backend="eager")),
            "peft, saved head": lambda m: peft_of(m, modules_to_save=["lm_head"])}
every_wrapper = pytest.mark.parametrize("wrapper", WRAPPERS)
CFGS = [LoRAConfig(), LoRAConfig(layer_range=(0.25, 0.75)), LoRAConfig(targets=("^model.layers.1", "q_proj$")),
        LoRAConfig(targets=("all-linear", "lm_head"), exclude=())]


@every_wrapper
@pytest.mark.parametrize("cfg", CFGS)
def test_a_wrapped_model_has_the_targets_of_the_plain_one(wrapper, cfg):
    plain = build()
    names, table, stacks = list(find_targets(plain, cfg)), target_table(plain, cfg), block_stacks(plain)
    wrapped = WRAPPERS[wrapper](plain)
    found = find_targets(wrapped, cfg)
    assert list(found) == names and all(type(m) is torch.nn.Linear for m in found.values())
    pd.testing.assert_frame_equal(target_table(wrapped, cfg), table)
    assert block_stacks(wrapped) == stacks and type(inner_model(wrapped)) is LlamaForCausalLM
    weights = build().state_dict()
    assert all(torch.equal(m.weight, weights[f"{n}.weight"]) for n, m in found.items()), "the base layers, not what PEFT added"


@pytest.mark.parametrize("wrapper", ["parallel", "peft", "peft, saved head"])  # a compiled graph does not see a later hook
def test_what_is_found_is_what_runs(wrapper):
    "A change in a layer that was found changes what the wrapped model computes."
    wrapped, ids = WRAPPERS[wrapper](build()).eval(), torch.arange(10).view(2, 5)
    with torch.no_grad():
        for name, layer in find_targets(wrapped, LoRAConfig(targets=("layers.2.*", "lm_head"), exclude=())).items():
            before = wrapped(ids).logits
            handle = layer.register_forward_hook(lambda m, args, y: y + 0.5 * torch.randn_like(y))
            assert not torch.equal(wrapped(ids).logits, before), name
            handle.remove()


def test_a_model_into_which_peft_was_injected():
    model = build()
    names = list(find_targets(model))
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert list(find_targets(model)) == names and not any("lora" in n for n in target_table(model).name)


def test_a_peft_prompt_is_refused_by_name():
    prompted = peft.get_peft_model(build(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    for f in (find_targets, target_table, inner_model):
        with pytest.raises(ValueError, match="PeftModelForCausalLM with virtual tokens.*get_base_model"): f(prompted)


def test_parallel_on_the_way_to_many_processes():
    import torch.distributed as dist
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try: assert list(find_targets(torch.nn.parallel.DistributedDataParallel(build()))) == list(find_targets(build()))
        finally: dist.destroy_process_group()
