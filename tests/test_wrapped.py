"""Every public function that takes a model, on wrapped ones: it works on the model inside, under plain names."""
import inspect
import warnings

import matplotlib.pyplot as plt
import peft
import pytest
import torch
from models import adapter_of, build, changes, same, state

import modlab
from modlab.model.layers import inner_model
from modlab.model.loading import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
TOK = tiny_model()[1]
PAIRS = [dict(prompt=f"{n} is ", cho="good.", rej="bad.") for n in ("bread", "tea", "rain", "it")]
SAMPLES = [dict(prompt=r["prompt"], completion=r["cho"]) for r in PAIRS]
CFG = modlab.LoRAConfig(r=2, targets="q_proj")


def lora(m): return adapter_of("lora", m, r=2, targets="q_proj")
def pissa(m): return adapter_of("pissa-extracted", m, r=2, targets="q_proj")
def short(kind, **kw): return kind(epochs=1, batch_size=2, **kw)


def used(m, block):
    "What the model inside computes within a block: that compiled graphs see it is tested with the compiler."
    with block, torch.no_grad(): return inner_model(m)(input_ids=torch.arange(8).view(2, 4)).logits


def in_folder(save, load):
    def call(m, path):
        save(lora(m), path)
        return load(m, path)
    return call


def restored(m):
    pissa(m)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return modlab.restore(m)


CALLS = { # public name -> a call of it, on a model and with a folder
    "find_targets": lambda m, _: list(modlab.find_targets(m, CFG)),
    "target_table": lambda m, _: modlab.target_table(m, CFG).name.tolist(),
    "ModulatedLoRA": lambda m, _: used(m, lora(m)(m, 1.0)),
    "ModulatedPiSSA": lambda m, _: used(m, pissa(m)(m, 1.0)),
    "Adapter": lambda m, _: used(m, lora(m)(m, torch.tensor([0.0, 1.0]))),
    "load_adapter": in_folder(lambda a, p: a.save(p / "a.safetensors"), lambda m, p: list(modlab.load_adapter(m, p).layers)),
    "from_peft": in_folder(modlab.to_peft, lambda m, p: list(modlab.from_peft(m, p).layers)),
    "HistoryBake": lambda m, _: used(m, modlab.HistoryBake(m, [(lora(m), 1.0)])),
    "PiSSAHistoryBake": lambda m, _: used(m, modlab.PiSSAHistoryBake(m, [(pissa(m), 1.0)])),
    "baked": lambda m, _: used(m, modlab.baked(m, [(lora(m), 1.0)])),
    "bake_": lambda m, _: modlab.bake_(m, [(lora(m), 1.0)]),
    "bake_report": lambda m, _: modlab.bake_report(m, [(lora(m), 1.0)]),
    "restore": lambda m, _: restored(m),
    "capture_activations": lambda m, _: modlab.capture_activations(m, TOK, PAIRS, CFG),
    "capture_statistics": lambda m, _: list(modlab.capture_statistics(m, TOK, PAIRS, CFG)),
    "capture_gradients": lambda m, _: list(modlab.capture_gradients(m, TOK, PAIRS, CFG)),
    "gradient_cosine": lambda m, _: modlab.gradient_cosine(m, TOK, lora(m), PAIRS),
    "kl_curve": lambda m, _: modlab.kl_curve(m, TOK, lora(m), PAIRS, [0.0, 1.0]),
    "calibrate_c": lambda m, _: modlab.calibrate_c(m, TOK, lora(m), PAIRS, 0.01, bracket=(0, 8)).c,
    "heal": lambda m, _: modlab.heal(m, TOK, SAMPLES, short(modlab.HealConfig, r=2, targets="q_proj", min_train=1)).log.nll,
    "contrast": lambda m, _: modlab.contrast(m, TOK, lora(m), PAIRS, short(modlab.ContrastConfig)).log.loss,
    "explore": lambda m, _: modlab.explore(m, TOK, lora(m), max_new_tokens=2).close(),
    "generate_at": lambda m, _: modlab.generate_at(m, TOK, lora(m), ["Tea "], [1.0], max_new_tokens=2).text.tolist(),
}


def takes_a_model(thing):
    try: return callable(thing) and "model" in inspect.signature(thing).parameters
    except ValueError: return False


PUBLIC = {name for name, thing in vars(modlab).items() if not name.startswith("_") and takes_a_model(thing)}
WRAPPERS = {
    "compiled": lambda m: torch.compile(m, backend="eager"), "parallel": torch.nn.DataParallel,
    "compiled, parallel": lambda m: torch.nn.DataParallel(torch.compile(m, backend="eager")),
    "peft": lambda m: peft.get_peft_model(m, peft.LoraConfig(r=2, target_modules=["v_proj"])),  # B = 0: the same function
    "peft, on the targets": lambda m: peft.get_peft_model(m, peft.LoraConfig(r=2, target_modules=["q_proj"]))}


def plain(x):
    "A result as something to compare."
    if hasattr(x, "to_numpy"): return x.to_numpy().tolist()
    return {k: plain(v) for k, v in x.items()} if isinstance(x, dict) else x


def equal(a, b):
    if isinstance(a, dict): return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, torch.Tensor): return torch.allclose(a, b, atol=1e-5)
    return a == b or pytest.approx(a, rel=1e-4, nan_ok=True) == b


def test_every_public_name_that_takes_a_model_is_here():
    "A new one: add a call of it to CALLS."
    missing = PUBLIC - CALLS.keys()
    assert not missing and len(PUBLIC) > 18


@pytest.mark.parametrize("name", sorted(PUBLIC & CALLS.keys()))
@pytest.mark.filterwarnings("ignore")
def test_wrapped_is_as_plain(name, tmp_path):
    def result(model, folder):
        (tmp_path / folder).mkdir()
        torch.manual_seed(0)
        return plain(CALLS[name](model, tmp_path / folder))
    wanted = result(build(), "plain")
    for wrapper, wrap in WRAPPERS.items():
        inside = build()
        assert equal(result(wrap(inside), wrapper), wanted), wrapper
    plt.close("all")


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_nothing_is_left_behind_inside_a_wrapper(wrapper):
    inside = build()
    wrapped = WRAPPERS[wrapper](inside)
    inside.requires_grad_(False)
    before = state(inside)
    for name in ("kl_curve", "capture_activations", "baked", "restore"):
        CALLS[name](wrapped, None)
        assert not changes(before, inside), name


def test_a_peft_model_goes_to_peft_and_back(tmp_path):
    "What PEFT loads on the base computes what modlab computed inside the wrapper."
    model = WRAPPERS["peft"](build())
    a, ids = lora(model), torch.arange(8).view(2, 4)
    with torch.no_grad(), a(model, 1.0): wanted = model(input_ids=ids).logits
    modlab.to_peft(a, tmp_path)
    with torch.no_grad(): found = peft.PeftModel.from_pretrained(build(), tmp_path)(input_ids=ids).logits
    assert torch.allclose(found, wanted, atol=1e-5) and same(sorted(a.layers), sorted(modlab.find_targets(build(), CFG)))
