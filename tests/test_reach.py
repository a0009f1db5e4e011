"""What a text reaches: towers by structure, weights read past their layer, layers that nothing calls, and the writers."""
import functools

import peft
import pytest
import torch
from faults import architectures, small
from models import adapter_of, build, gap, tokens

from modlab import (
    LoRAConfig,
    ModulatedLoRA,
    ModulatedPiSSA,
    capture_activations,
    find_targets,
    from_peft,
    load_adapter,
    target_table,
)
from modlab.model.reach import text_reach, writers
from modlab.model.targets import block_of, block_stacks

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
KINDS = {name: kind for kind, name in small.cases()}
READ = {"MambaForCausalLM": 3, "FalconMambaForCausalLM": 3, "JambaForCausalLM": 2} # a dt_proj in each block of that kind
TOWERS = {"Qwen2_5_VLForConditionalGeneration": "visual", "Idefics3ForConditionalGeneration": "vision_model|connector",
          "LlavaForConditionalGeneration": "vision_tower|multi_modal_projector",
          "MllamaForConditionalGeneration": "vision_model|multi_modal_projector|cross_attn|layers.1.mlp",
          "Qwen2AudioForConditionalGeneration": "audio_tower|multi_modal_projector"}
SHORT = ("GPT2LMHeadModel", "JambaForCausalLM", "Zamba2ForCausalLM", "ZayaForCausalLM", "Qwen2_5_VLForConditionalGeneration",
         "Qwen3NextForCausalLM", "DeepseekV3ForCausalLM", "BloomForCausalLM", "XLNetLMHeadModel", "Llama4ForCausalLM")


def made(name): return small.build(KINDS[name], name)


@pytest.mark.parametrize("name", SHORT)
def test_what_has_to_hold_on_every_architecture(name):
    "The short form of `make faults architectures`."
    found = architectures.model_case(KINDS[name], name)
    assert not {check: words for check, words in found.items() if words.startswith(("failed", "no:"))}


# ---- a weight that is read, and a layer that is not called ----

@pytest.mark.parametrize("name", READ)
def test_a_layer_that_is_read_past_its_call_is_left_out_and_refused_where_it_is_named(name, tmp_path):
    model = made(name)
    table = target_table(model).set_index("name")
    read = [n for n in table.index if n.endswith("dt_proj")]
    assert len(read) == READ[name] and set(table.reason[read]) == {"the model reads its weight without calling it"}
    assert not set(read) & set(find_targets(model))
    for kind in (ModulatedLoRA, functools.partial(ModulatedPiSSA, selection_score="s_only")):
        with pytest.raises(ValueError, match=r"reads the weight of .*dt_proj without calling.*exclude"):
            kind(model, r=2, targets=("dt_proj", "in_proj"))


def test_a_file_or_a_peft_folder_that_names_such_a_layer_is_refused(tmp_path, monkeypatch):
    model = made("MambaForCausalLM")
    monkeypatch.setattr("modlab.model.targets.check_called", lambda *args: None)
    ModulatedLoRA(model, r=2, targets="dt_proj").save(tmp_path / "old.safetensors")
    with pytest.raises(ValueError, match=r"old\.safetensors: the model reads the weight of .*dt_proj"):
        load_adapter(made("MambaForCausalLM"), tmp_path / "old.safetensors")
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["dt_proj"])).save_pretrained(tmp_path / "peft")
    with pytest.raises(ValueError, match=r"peft: the model reads the weight of .*dt_proj"):
        from_peft(made("MambaForCausalLM"), tmp_path / "peft")


def test_layers_that_nothing_calls_are_told_and_a_capture_does_without_them():
    model = made("Zamba2ForCausalLM")
    table = target_table(model).set_index("name")
    idle = table[table.reason.str.startswith("no text token passes through it")]
    assert len(idle) == 32 and idle.index.str.contains("adapter_list").all()
    X = capture_activations(model, architectures.tokenizer(), architectures.RECORDS)
    assert list(X) == list(table[table.selected].index)


def test_a_layer_that_is_called_once_more_with_something_else_is_captured():
    "Zaya's delayed values begin with a row of zeros of their own."
    model = made("ZayaForCausalLM")
    cfg = LoRAConfig(targets=("v_proj", r"self_attn.*q_proj$"))
    X = capture_activations(model, architectures.tokenizer(), architectures.RECORDS, cfg)
    delayed, q = (next(x["cho"] for n, x in X.items() if n.endswith(end)) for end in ("0.self_attn.qkv_proj.v_proj_delayed",
                                                                                     "0.self_attn.qkv_proj.q_proj"))
    assert torch.equal(delayed, q)


# ---- other modalities ----

@pytest.mark.parametrize("name", TOWERS)
def test_what_no_text_passes_through_is_no_target_unless_it_is_named(name):
    model = made(name)
    default = set(find_targets(model, LoRAConfig(exclude="lm_head")))
    named = set(find_targets(model, LoRAConfig(targets=("all-linear", TOWERS[name]), exclude="lm_head")))
    assert default == {n for n in text_reach(model).called if n != "lm_head"} and named > default
    assert all(any(part in n for part in TOWERS[name].split("|")) for n in named - default)
    assert LoRAConfig().exclude == ("vision_tower", "lm_head")


@pytest.mark.parametrize("c", [(0.0, 1.0), (1.0, 0.0)])
def test_two_images_in_one_row_are_no_two_rows(c):
    model = made("LlavaForConditionalGeneration")
    patches, image = 16, model.config.image_token_id
    ids = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(0))
    for start in (2, 20): ids[1, start:start + patches] = image
    pixels, cs = torch.randn(2, 3, 16, 16), torch.tensor(c)
    run = lambda *args, **kw: model(*args, **kw).logits.detach()
    base, a = run(input_ids=ids, pixel_values=pixels), adapter_of("lora", model)
    for args, kw in (((), dict(input_ids=ids, pixel_values=pixels)), ((ids, pixels), {})):
        with a(model, cs): y = run(*args, **kw)
        assert [torch.equal(y[n], base[n]) for n in range(2)] == [x == 0 for x in c]
    named = adapter_of("lora", model, targets=("all-linear", "projector"))
    calls = (lambda: run(ids, pixels), lambda: run(input_ids=ids, pixel_values=pixels),
             lambda: (model(input_ids=ids[:1].repeat(2, 1)), model.get_image_features(pixel_values=pixels)))
    for call in calls:
        with named(model, cs), pytest.raises(ValueError, match="2 doses, but the rows of .*projector.* sees no text"): call()


# ---- the probe leaves nothing behind, and the preset ----

def test_the_probe_is_run_once_and_changes_nothing():
    model = build()
    calls, draws, modes = [], torch.get_rng_state(), {m: m.training for m in model.train().modules()}
    model.register_forward_pre_hook(lambda *args: calls.append(1))
    model.model.register_forward_pre_hook(lambda *args: calls.append(1))
    for _ in range(3): find_targets(model)
    assert len(calls) == 1 and torch.equal(torch.get_rng_state(), draws)
    assert {m: m.training for m in model.modules()} == modes
    assert not any(m._forward_pre_hooks for n, m in model.named_modules() if n not in ("", "model"))


@pytest.mark.parametrize("name", [
    "LlamaForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM", "OPTForCausalLM", "JambaForCausalLM", "BloomForCausalLM",
    "FalconForCausalLM", "PhiForCausalLM", "GPTJForCausalLM", "Qwen2MoeForCausalLM"])
def test_writers_are_in_every_block_and_as_wide_as_the_stream(name):
    model = made(name)
    found, stacks = find_targets(model, LoRAConfig(roles="writers")), block_stacks(model)
    depth = next(iter(stacks.values()))
    assert {block_of(n, stacks)[0] for n in found} == set(range(depth)) and set(found) <= writers(model)
    assert len(found) >= depth and not any(n.endswith(("q_proj", "up_proj", "c_fc", "c_attn", "fc1")) for n in found)


def test_the_preset_is_saved_and_loaded(tmp_path):
    model, ids = build(), tokens()
    a = adapter_of("lora", model, roles="writers")
    assert {n.rpartition(".")[2] for n in a.layers} == {"o_proj", "down_proj"}
    a.save(tmp_path)
    again = load_adapter(build(), tmp_path)
    assert again.cfg == a.cfg and again.cfg.roles == "writers" and list(again.layers) == list(a.layers)
    with torch.no_grad(), a(model, 1.0): wanted = model(ids).logits
    with torch.no_grad(), again(again.model, 1.0): assert gap(again.model(ids).logits, wanted) == 0
    with pytest.raises(ValueError, match='roles must be "writers" or None'): LoRAConfig(roles="readers")
    table = target_table(model, a.cfg).set_index("name")
    assert "does not write to the residual stream" in table.reason["model.layers.0.mlp.up_proj"]
