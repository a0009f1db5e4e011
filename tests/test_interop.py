"""Adapters to and from the real PEFT: the same logits both ways, what is refused, and folders that are not whole."""
import dataclasses
import json
import multiprocessing
import os
import re
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from models import ARCHS, IDS, KINDS, MORE, WIDE, adapter_of, build, changes, gap, logits, seeded, state, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from modlab import ModulatedLoRA, from_peft, load_adapter, to_peft
from modlab.model.layers import layer_shape
from modlab.share import folder as folders
from modlab.share.fields import _REFUSED
from modlab.share.places import places

pytestmark = [pytest.mark.usefixtures("one_thread"), *map(pytest.mark.filterwarnings, (
    "ignore:`is_gradient_checkpointing`:FutureWarning", "ignore:.*fused expert tensors:UserWarning", "ignore::UserWarning:peft"))]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# In float32 the two sides differ in the order of sums, and an extracted weight by one more rounding: 2**-23 each, over a few
# dozen layers. 2**-16 leaves them two orders of magnitude; what the adapters do to the logits is three orders above that.
CLOSE = 2**-16


def in_peft(path, arch="llama", **kw): return logits(PeftModel.from_pretrained(build(arch, **kw), path), tokens())


def in_modlab(*history):
    with ExitStack() as attached:
        for a, c in history: attached.enter_context(a(a.model, c))
        return logits(history[0][0].model, tokens())


def made_by_peft(path, arch="llama", rename=None, safe=True, **kw):
    "An adapter as PEFT makes and saves it, with a B that is something; its logits."
    model = get_peft_model(build(arch), LoraConfig(**dict(r=4, lora_alpha=6, target_modules=["q_proj"]) | kw)).eval()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n: p.copy_(torch.randn(p.shape, generator=seeded(3)) * 0.1)
    model.save_pretrained(path, safe_serialization=safe)
    if rename: save_file({rename(k): t for k, t in load_file(path / WEIGHTS).items()}, path / WEIGHTS)
    return logits(model, tokens())


# ---- to PEFT ----

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", [*ARCHS, *MORE, "shared_moe"])
def test_peft_runs_what_modlab_runs(tmp_path, arch, kind):
    base, a = logits(build(arch), tokens()), adapter_of(kind, build(arch))
    to_peft(a, tmp_path, c=-0.7)
    want = in_modlab((a, -0.7))
    assert gap(in_peft(tmp_path, arch), want) < CLOSE and gap(base, want) > 0.05
    placed = places(build(arch), LoraConfig.from_pretrained(tmp_path))
    assert placed == {n: (min(6, *layer_shape(layer)) if "pissa" in kind else 6, 1.0) for n, layer in a.layers.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_both_signs_and_zero(tmp_path, kind):
    base, a = logits(build(), tokens()), adapter_of(kind, build())
    for c in (2.0, torch.tensor(-1.0)):
        to_peft(a, tmp_path, c)
        assert gap(in_peft(tmp_path), in_modlab((a, float(c)))) < CLOSE
    with a(a.model, 0.0): to_peft(a, tmp_path, a.c)  # in the middle of a run as well
    assert torch.equal(in_peft(tmp_path), base)


def test_a_history_is_one_adapter(tmp_path):
    "Kinds, ranks and target sets mixed, two extracted rounds; one adapter twice, with both signs."
    model = build()
    a = adapter_of("lora", model, r=3, targets="mlp")
    b = adapter_of("pissa-unextracted", model, seed=4, r=5, targets=("q_proj", "up_proj"))
    first, second = (adapter_of("pissa-extracted", model, seed=s, r=7, layer_range=(0.0, 0.5)) for s in (5, 6))
    to_peft([(a, 1.0), (b, -0.5), (first, 0.7), (a, -0.4), (second, 0.0)], tmp_path, c=1.5)
    want = in_modlab((a, 0.9), (b, -0.75), (first, 1.05), (second, 0.0))
    theirs = PeftModel.from_pretrained(build(), tmp_path)
    assert gap(logits(theirs, tokens()), want) < CLOSE
    ranks = {n.split(".", 2)[2]: r for n, (r, s) in places(model, theirs.peft_config["default"]).items() if s == 1.0}
    assert ranks["0.mlp.up_proj"] == 3 + 5 + 7 + 7 and ranks["3.mlp.up_proj"] == 3 + 5 and ranks["3.self_attn.q_proj"] == 5
    assert gap(logits(theirs.merge_and_unload(), tokens()), want) < CLOSE
    assert gap(in_modlab((from_peft(build(), tmp_path), 1.0)), want) < CLOSE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
def test_bfloat16(tmp_path, kind, factors):
    "PEFT is off the same map in float32 by about as much as the bfloat16 base is off itself; the product in B is not rounded."
    half = dict(dtype=torch.bfloat16)
    a, exact = adapter_of(kind, build(**half), dtype=factors), build(**half).float()
    alone = gap(logits(build(**half), tokens()), logits(exact, tokens()))
    to_peft(a, tmp_path, 0.5)
    stored = load_file(tmp_path / WEIGHTS)
    assert {k[-8]: t.dtype for k, t in stored.items()} == dict(A=factors, B=torch.float32)
    want = logits(PeftModel.from_pretrained(exact, tmp_path), tokens())
    assert gap(in_peft(tmp_path, **half), want) < 2 * alone and gap(in_modlab((a, 0.5)), want) < 4 * alone < 0.1


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_base(tmp_path, bits):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from test_quantised import quantised
    a = adapter_of("pissa-unextracted", quantised(bits))
    to_peft(a, tmp_path)
    assert gap(logits(PeftModel.from_pretrained(quantised(bits), tmp_path), tokens()), in_modlab((a, 1.0))) < CLOSE


def test_a_name_that_ends_another(tmp_path):
    class Toy(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.tower = nn.Linear(6, 6), nn.ModuleDict({"q": nn.Linear(6, 6), "v": nn.Linear(6, 6)})
        def forward(self, x): return self.tower["v"](self.tower["q"](self.q(x)))
    toy, x = Toy(), torch.randn(5, 6)
    a, b = (adapter_of("lora", toy, targets=t, r=r) for t, r in (("^q$", 2), (("^q$", "v"), 3)))
    to_peft([(a, 1.0), (b, 1.0)], tmp_path)
    with a(toy), b(toy): want = toy(x)
    assert gap(PeftModel.from_pretrained(toy, tmp_path)(x), want) < CLOSE
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == r"q|tower\.v"


def test_layers_that_peft_would_leave_out(tmp_path):
    "In this family PEFT takes gate_proj, up_proj and down_proj for the fused experts, also where the block is dense."
    moe = Qwen3MoeForCausalLM(Qwen3MoeConfig(moe_intermediate_size=24, num_experts=4, mlp_only_layers=[0], **WIDE, **IDS))
    for targets, match in (("all-linear", "3 of 11 layers of this Qwen3Moe.*mlp.gate_proj"), ("gate_proj", "cannot address")):
        with pytest.raises(ValueError, match=f"{match}.*bake_"): to_peft(ModulatedLoRA(moe, targets=targets), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    to_peft(ModulatedLoRA(moe, exclude="mlp"), tmp_path / "a")


def test_what_cannot_be_written(tmp_path):
    a, other = (adapter_of("lora", build(), targets="q_proj") for _ in range(2))
    before, numbers = state(a.model), torch.get_rng_state()
    for history, c, match in (
            (a, torch.tensor([1.0, 2.0]), "one number, got 2"), (a, float("inf"), "finite"), ([(a, 1e300)], 1e300, "finite"),
            ([], 1.0, "empty"), ([a], 1.0, r"\[0\] is a ModulatedLoRA, expected \(adapter, c\)"),
            ([(a, 1.0), (other, 1.0)], 1.0, r"\[1\].*another model"),
            ([(a, torch.ones(3))], 1.0, r"\[0\]: c must be one number")):
        with pytest.raises(ValueError, match=match): to_peft(history, tmp_path / "a", c)
    assert not (tmp_path / "a").exists()
    to_peft(a, tmp_path / "a")
    assert not changes(before, a.model) and torch.equal(numbers, torch.get_rng_state())


def test_the_folder(tmp_path, monkeypatch):
    "Made with its parents; an adapter is replaced, other files stay; a failure leaves what was there, or nothing that loads."
    a, path = adapter_of("lora", build(), targets="q_proj"), tmp_path / "runs" / "one"
    to_peft(a, path)
    (path / "notes.txt").write_text("mine")
    to_peft(a, str(path), 0.5)
    files = {p.name: p.read_bytes() for p in path.iterdir()}
    assert set(files) == {CONFIG, WEIGHTS, "notes.txt"}

    def fail(*_, **__): raise OSError("no space")
    with monkeypatch.context() as m, pytest.raises(OSError, match="no space"):
        m.setattr(folders, "save_file", fail)
        to_peft(a, path)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == files and not list(path.parent.glob(".*"))
    to_peft(a, path, 2.0)
    twice = {p.name: p.read_bytes() for p in path.iterdir()}
    assert twice["notes.txt"] == b"mine" and twice[WEIGHTS] != files[WEIGHTS] and twice.keys() == files.keys()
    (tmp_path / "shortcut").symlink_to(path)
    to_peft(a, tmp_path / "shortcut", 0.5)
    assert (tmp_path / "shortcut").is_symlink() and {p.name: p.read_bytes() for p in path.iterdir()} == files


def test_without_an_exchange_of_folders(tmp_path, monkeypatch):
    "Where the system has none, the configuration goes first and comes last: what is half written does not load."
    a, path = adapter_of("lora", build(), targets="q_proj"), tmp_path / "one"
    monkeypatch.setattr(folders, "_exchange", lambda *_: False)
    to_peft(a, path)
    (path / "notes.txt").write_text("mine")
    to_peft(a, path, 0.5)
    assert {p.name for p in path.iterdir()} == {CONFIG, WEIGHTS, "notes.txt"} and gap(in_peft(path), in_modlab((a, 0.5))) < CLOSE
    def killed(self, to):
        if self.name == CONFIG: raise OSError("no space")
        return self.rename(to)
    with monkeypatch.context() as m, pytest.raises(OSError, match="no space"):
        m.setattr(Path, "replace", killed)  # between the two files
        to_peft(a, path)
    assert {p.name for p in path.iterdir()} == {WEIGHTS, "notes.txt"}
    refused(path, f"no {CONFIG}", OSError)


def test_where_no_adapter_is_written(tmp_path):
    a = adapter_of("lora", build(), targets="q_proj")
    (tmp_path / "file").write_text("")
    build().save_pretrained(tmp_path / "model")
    for name, match in (("file", "is a file"), ("model", "holds a model")):
        with pytest.raises(OSError, match=f"{name}: {match}"): to_peft(a, tmp_path / name)
    assert not (tmp_path / "model" / CONFIG).exists()


def write_rank(path, r):
    "An adapter of this rank: the two files of one rank do not fit those of another."
    name = "model.layers.0.self_attn.q_proj"
    tensors = {f"base_model.model.{name}.lora_{t}.weight": torch.ones(size) for t, size in (("A", (r, 64)), ("B", (64, r)))}
    folders.write_folder(path, LoraConfig(r=r, target_modules=[name]), tensors)


def write_for_ever(path, start):
    "What a process does until it is killed."
    start.set()
    while True:
        for r in (2, 5): write_rank(path, r)


def test_a_killed_writer_leaves_the_old_adapter_or_the_new_one(tmp_path):
    path, context, seen = tmp_path / "adapter", multiprocessing.get_context("fork"), set()
    write_rank(path, 2)
    (path / "notes.txt").write_text("mine")
    if not folders._exchange(path, path): pytest.skip("no exchange of folders on this file system")
    for n in range(20):
        start = context.Event()
        writer = context.Process(target=write_for_ever, args=(path, start))
        writer.start()
        assert start.wait(60)
        time.sleep(0.05 + 0.0013 * n)
        writer.kill()
        writer.join()
        rank = json.loads((path / CONFIG).read_text())["r"]
        shapes = {tuple(t.shape) for t in load_file(path / WEIGHTS).values()}
        assert shapes == {(rank, 64), (64, rank)} and (path / "notes.txt").read_text() == "mine"
        seen.add(rank)
    assert seen <= {2, 5}
    for left in tmp_path.glob(".*"): os.utime(left, (0, 0))
    folders.write_folder(path, LoraConfig(), {"a": torch.ones(1)})
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"], "what the killed ones left is removed once it is old"


# ---- from PEFT ----

LANGUAGE = dict(arch="gemma3_vision", target_modules=r".*language_model.*\.(q|o)_proj")
FORMS = dict(
    plain={}, rslora=dict(use_rslora=True, init_lora_weights="orthogonal"),
    binary=dict(safe=False, init_lora_weights="gaussian", lora_dropout=0.3),
    ranks=dict(rank_pattern={r"layers\.1\.self_attn\.q_proj": 7}), alphas=dict(alpha_pattern={"^model.layers.2.*q_proj": 1}),
    all=dict(use_rslora=True, rank_pattern={"down_proj": 3}, alpha_pattern={"q_proj": 20}, layers_to_transform=[0, 2],
             target_modules=["q_proj", "down_proj"]),
    gpt2=dict(arch="gpt2", target_modules=["c_attn", "mlp.c_proj"]), opt=dict(arch="opt", target_modules=["q_proj", "fc2"]),
    vision=LANGUAGE, old_names=dict(LANGUAGE, rename=lambda k: k.replace("model.language_model.", "language_model.model.")))


@pytest.mark.parametrize("form", FORMS)
def test_modlab_runs_what_peft_runs(tmp_path, form):
    want, arch = made_by_peft(tmp_path, **FORMS[form]), FORMS[form].get("arch", "llama")
    base, a = logits(build(arch), tokens()), from_peft(build(arch), tmp_path)
    assert gap(in_modlab((a, 1.0)), want) < CLOSE and gap(base, want) > 0.02
    assert torch.equal(in_modlab((a, 0.0)), base) and gap(in_modlab((a, -1.0)), want) > 0.02
    a.save(tmp_path / "ours")
    assert torch.equal(in_modlab((load_adapter(build(arch), tmp_path / "ours"), 1.0)), in_modlab((a, 1.0)))
    to_peft(a, tmp_path / "back", -2.0)
    assert gap(in_peft(tmp_path / "back", arch), in_modlab((a, -2.0))) < CLOSE


def test_a_pissa_of_peft(tmp_path):
    "As it is saved it fits a base that PEFT has changed; converted it is a LoRA for the base."
    theirs = get_peft_model(build(), LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"], init_lora_weights="pissa")).eval()
    config = theirs.peft_config["default"]
    config.init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    config.init_lora_weights = "pissa"
    with torch.no_grad():
        for n, p in theirs.named_parameters(): p.mul_(-0.5 if "lora_B" in n else 1.0)
    theirs.save_pretrained(tmp_path / "raw")
    refused(tmp_path / "raw", "init_lora_weights='pissa'.*path_initial_model_for_weight_conversion")
    theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "start")
    assert gap(in_modlab((from_peft(build(), tmp_path / "converted"), 1.0)), logits(theirs, tokens())) < CLOSE


# ---- refusals ----

def refused(path, match, error=ValueError, model=None):
    "It is, the message names the folder, and the model is as before: not even frozen."
    model = model or build()
    before = state(model)
    with pytest.raises(error, match=match) as e: from_peft(model, path)
    assert str(path) in str(e.value) and not changes(before, model)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    made_by_peft(path := tmp_path_factory.mktemp("good"))
    return {name: (path / name).read_bytes() for name in (CONFIG, WEIGHTS)}


@pytest.fixture
def folder(good, tmp_path):
    "A folder that PEFT wrote, to be spoilt."
    for name, content in good.items(): (tmp_path / name).write_bytes(content)
    return tmp_path


def altered(path, **fields):
    "The folder with other fields in its configuration."
    (path / CONFIG).write_text(json.dumps(json.loads((path / CONFIG).read_text()) | fields))
    return path


VALUES = dict(bias="all", peft_type="LOHA", modules_to_save=["lm_head"], trainable_token_indices=[1], layer_replication=[[0, 2]],
              target_parameters=["experts.down_proj"], alora_invocation_tokens=[5, 6], use_bdlora=dict(nblocks=2),
              arrow_config=dict(top_k=2), kasa_config=dict(beta=1e-4), monteclora_config=dict(num_samples=4))
BY_NAME = [(f, VALUES.get(f, True)) for f in (*_REFUSED, "velora_config", "bias", "peft_type")] + [
    ("init_lora_weights", s) for s in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "of a later day")]
# What says how it was trained, where it came from, or where the layers are: read, or of no account to what it computes.
JUDGED = set("""task_type auto_mapping peft_version base_model_name_or_path revision inference_mode r target_modules
exclude_modules lora_alpha lora_dropout fan_in_fan_out use_rslora layers_to_transform layers_pattern rank_pattern alpha_pattern
megatron_config megatron_core loftq_config eva_config corda_config lora_ga_config qalora_group_size runtime_config
ensure_weight_tying""".split())


@pytest.mark.parametrize("field, value", BY_NAME)
def test_refused_by_name(folder, field, value):
    match = "type LOHA.*save_as_lora" if field == "peft_type" else f"{field}=.*(PEFT can$|base$)"
    refused(altered(folder, **{field: value}), match)


def test_every_field_of_peft_was_looked_at():
    assert {f.name for f in dataclasses.fields(LoraConfig)} == JUDGED | {f for f, _ in BY_NAME}, "decide about the new ones"


@pytest.mark.parametrize("arch, kw, match", [
    ("llama", dict(use_dora=True), "use_dora=True"), ("opt", dict(bias="lora_only"), "bias='lora_only'"),
    ("opt", dict(lora_bias=True), "lora_bias=True"), ("llama", dict(modules_to_save=["lm_head"]), "modules_to_save"),
    ("llama", dict(target_modules=["embed_tokens"]), r"embed_tokens\.lora_embedding_A"),
    ("gemma3_vision", dict(target_modules=["patch_embedding"]), "1 of the 1 layers.*no linear layers.*patch_embedding"),
    ("mixtral", dict(target_modules=[], target_parameters=["experts.down_proj"]), "target_parameters=")])
def test_refused_as_peft_writes_it(tmp_path, arch, kw, match):
    made_by_peft(tmp_path, arch, **kw)
    refused(tmp_path, match, model=build(arch))


def test_a_model_that_peft_or_the_compiler_wrapped_is_the_model_inside(folder, tmp_path):
    want = in_modlab((from_peft(build(), folder), 1.0))
    for wrap in (lambda model: PeftModel.from_pretrained(model, folder), torch.compile, nn.DataParallel):
        model = build()
        a = from_peft(wrap(model), folder)
        assert all(not n.startswith(("base_model", "_orig_mod", "module")) for n in a.layers)
        to_peft(a, tmp_path / "again")
        assert gap(in_modlab((from_peft(build(), tmp_path / "again"), 1.0)), want) < CLOSE


def test_another_model(folder):
    for arch, n in (("gpt2", 4), ("qwen3", 2)):
        refused(folder, rf"{n} of the 4 layers.*no linear layers of this \w+ \(model.layers..", model=build(arch))
    model = build()
    for block in model.model.layers[1:3]: block.self_attn.q_proj = nn.Linear(64, 48)
    shapes = r"\(model.layers.1.self_attn.q_proj is \(48, 64\), A \(4, 64\), B \(64, 4\)"
    refused(folder, f"2 of the 4 .*another shape here {shapes}", model=model)


def test_configuration_and_weights_disagree(folder):
    for fields, match in ((dict(r=5), "4 of 4 layers no adapter, or one of another rank"),
                          (dict(lora_alpha=0), "alpha must be positive"), (dict(target_modules=["no"]), "cannot put it on"),
                          (dict(target_modules=["k_proj"]), "4 of 4 layers no adapter")):
        refused(altered(folder, **dict(r=4, lora_alpha=6, target_modules=["q_proj"]) | fields), match)
    with pytest.warns(UserWarning, match="4 more layers, which stay as they are"):
        assert len(from_peft(build(), altered(folder, target_modules=["q_proj", "v_proj"])).layers) == 4


@pytest.mark.parametrize("fields, scale", [
    (dict(lora_alpha="6"), 1.5), (dict(r=4.0), 1.5), (dict(r="4"), 1.5), (dict(lora_alpha=-6), -1.5),
    (dict(rank_pattern=None), 1.5),
    (dict(alpha_pattern={"q_proj": "-2"}), -0.5), (dict(alpha_pattern=None, rank_pattern=None, use_rslora=None), 1.5),
    (dict(use_rslora=True, lora_alpha="3e0"), 1.5), (dict(lora_dropout="0.1"), 1.5), (dict(target_modules="q_proj"), 1.5),
    (dict(runtime_config={"ephemeral_gpu_offload": True}), 1.5)])
def test_values_that_are_meant_are_read(folder, fields, scale):
    if "target_modules" in fields: fields = dict(target_modules=r".*q_proj")
    a = from_peft(build(), altered(folder, **fields))
    assert set(a.scale.values()) == {scale} and len(a.layers) == 4
    a.save(folder / "ours")
    assert load_adapter(build(), folder / "ours").scale == a.scale


@pytest.mark.parametrize("fields", [
    dict(r=[]), dict(r=None), dict(r=0), dict(r=-4), dict(r=2.5), dict(r=True), dict(r="many"), dict(r=float("nan")),
    dict(r={"a": 1}),
    dict(lora_alpha=None), dict(lora_alpha="x"), dict(lora_alpha=[6]), dict(lora_alpha=float("inf")), dict(alpha_pattern="x"),
    dict(alpha_pattern={"q_proj": None}), dict(alpha_pattern=[6]), dict(rank_pattern={"q_proj": 0}), dict(rank_pattern="x"),
    dict(target_modules=3), dict(target_modules=[None]), dict(exclude_modules={"a": 1}), dict(layers_to_transform="x"),
    dict(layers_to_transform=[0.5]), dict(use_rslora="yes"), dict(fan_in_fan_out=[]), dict(lora_dropout={}),
    dict(layers_pattern=1)])
def test_values_that_mean_nothing_are_refused(folder, fields):
    (name, value), = fields.items()
    refused(altered(folder, **fields), re.escape(f"{CONFIG}: {name} is {value!r}, expected "))


@pytest.mark.parametrize("fields", [
    dict(target_modules="q_proj["), dict(target_modules=None, layers_pattern="x"), dict(rank_pattern={"q_proj[": 4}),
    dict(task_type=["x"]), dict(init_lora_weights=[]), dict(bias=None), dict(peft_type=["LORA"]),
    dict(peft_type=None), dict(layers_to_transform=[0])])
def test_other_nonsense_names_the_folder(folder, fields):
    "What PEFT itself can make something of is read; the rest is refused, by no other kind of error."
    try: from_peft(model := build(), altered(folder, **fields))
    except (ValueError, OSError) as e: assert str(folder) in str(e) and all(p.requires_grad for p in model.parameters())


def test_factors_that_are_not_finite(folder):
    tensors = load_file(folder / WEIGHTS)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, folder / WEIGHTS)
    refused(folder, "1 factors hold values that are not finite", OSError)


def test_folders_that_are_not_whole(folder, good):
    tensors = load_file(folder / WEIGHTS)
    without = {k: t for k, t in tensors.items() if "3.self_attn.q_proj.lora_B" not in k}
    for spoilt, match, error in ((without, "4 factors A and 3 factors B", OSError), ({}, "0 factors A", OSError),
                                 (tensors | {"base_model.model.lm_head.weight": torch.ones(2)}, "1 of its 9", ValueError)):
        save_file(spoilt, folder / WEIGHTS)
        refused(folder, match, error)
    (folder / WEIGHTS).write_bytes(good[WEIGHTS][:-9])
    refused(folder, "cannot be read.*cut off", OSError)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    refused(folder, "cannot be read", OSError)
    (folder / "adapter_model.bin").unlink()
    refused(folder, "no weights.*adapter_model.safetensors or adapter_model.bin", OSError)
    (folder / WEIGHTS).write_bytes(good[WEIGHTS])
    for text, match in ((good[CONFIG].decode()[:40], "cannot be read"), ("[]", "does not say"), ('{"r": 4}', "does not say"),
                        ("null", "does not say"), ("3", "does not say"), ("", "cannot be read")):
        (folder / CONFIG).write_text(text)
        refused(folder, match, OSError)
    (folder / "epoch1").mkdir()
    (folder / CONFIG).rename(folder / "epoch1" / CONFIG)
    refused(folder, r"no adapter_config.json.*\['epoch1'\]", OSError)


@pytest.mark.parametrize("path", ["nobody/nothing", "no folder at all"])
def test_neither_a_folder_nor_on_the_hub(path): refused(path, "no such folder here, and no such adapter on the hub", OSError)


@pytest.mark.parametrize("path", ["a/b/c", "./a", Path("owner/name")], ids=str)
def test_a_path_that_is_not_there(path): refused(path, "there is no such folder, and it looks like a path", OSError)


def test_a_file_of_modlab_is_sent_elsewhere(tmp_path):
    adapter_of("lora", build(), targets="q_proj").save(tmp_path / "a")
    refused(tmp_path / "a", "is a file.*load_adapter", OSError)
