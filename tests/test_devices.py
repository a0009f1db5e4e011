"""Where things lie: every tensor says its device, whatever torch's default is; a model goes where it is told."""
import ast
from pathlib import Path

import pytest
import torch
from models import DEVICE, adapter_of, build, seeded
from transformers import AutoModelForCausalLM

import modlab
from modlab import (
    ContrastConfig,
    HealConfig,
    ModulatedLoRA,
    ModulatedPiSSA,
    bake_report,
    baked,
    calibrate_c,
    capture_activations,
    capture_statistics,
    contrast,
    from_peft,
    generate_at,
    gradient_cosine,
    heal,
    kl_curve,
    load_adapter,
    load_model,
    tiny_model,
    to_peft,
)

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
PACKAGE = Path(modlab.__file__).parent
MAKES = {"tensor", "zeros", "ones", "empty", "full", "arange", "linspace", "eye", "rand", "randn", "randint", "randperm"}
PAIRS = [dict(prompt=f"question {n}", cho=f"the chosen answer number {n}", rej="none") for n in range(10)]
SAMPLES = [dict(prompt=p["prompt"], completion=p["cho"]) for p in PAIRS] * 2


def without_device(source: str) -> list[int]:
    "The lines on which torch makes a tensor and is not told where."
    calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]
    makes = [n for n in calls if ast.unparse(n.func.value) == "torch" and n.func.attr in MAKES]
    return [n.lineno for n in makes if not any(k.arg == "device" for k in n.keywords)]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_every_tensor_that_modlab_makes_says_where(path):
    assert not without_device(path.read_text(encoding="utf-8"))


def test_a_tensor_that_does_not_is_seen():
    assert without_device("import torch\nx = torch.ones(2)\ny = torch.ones(2, device=x.device) + x.new_ones(2)\n") == [2]


@pytest.fixture
def elsewhere():
    "torch's default device is one on which nothing can be computed: a tensor that lands there by default is an error."
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.fixture
def case():
    model = build()
    return model, tiny_model()[1], adapter_of("pissa-unextracted", model)


# (model, tokenizer, adapter, folder) -> whatever it does
WORK = dict(
    lora=lambda m, tok, a, path: ModulatedLoRA(m, r=4, generator=seeded(0)),
    pissa=lambda m, tok, a, path: ModulatedPiSSA(m, r=4, selection_score="s_only", generator=seeded(0)).restore_base_W(),
    scored=lambda m, tok, a, path: ModulatedPiSSA(m, r=4, extract=False,
                                                  calibration_activations=capture_statistics(m, tok, PAIRS)),
    activations=lambda m, tok, a, path: capture_activations(m, tok, PAIRS),
    curve=lambda m, tok, a, path: kl_curve(m, tok, a, PAIRS, [-1, 0, 1]),
    calibration=lambda m, tok, a, path: calibrate_c(m, tok, a, PAIRS, 0.05),
    texts=lambda m, tok, a, path: generate_at(m, tok, a, ["a", "bcd"], [-1, 0], max_new_tokens=3),
    samples=lambda m, tok, a, path: generate_at(m, tok, a, ["a", "bcd"], [-1, 0], max_new_tokens=3, temperature=1.0),
    contrast=lambda m, tok, a, path: contrast(m, tok, a, PAIRS, ContrastConfig(epochs=1)),
    heal=lambda m, tok, a, path: heal(m, tok, SAMPLES, HealConfig(epochs=1, min_train=10)),
    cosine=lambda m, tok, a, path: gradient_cosine(m, tok, a, PAIRS[:2]),
    report=lambda m, tok, a, path: bake_report(m, [(a, 1.0)]),
    folded=lambda m, tok, a, path: baked(m, [(a, 1.0)]).__enter__(),
    file=lambda m, tok, a, path: (a.save(path / "a.safetensors"), load_adapter(m, path / "a.safetensors")),
    peft=lambda m, tok, a, path: (to_peft(a, path / "peft"), from_peft(m, path / "peft")))


@pytest.mark.parametrize("work", WORK)
def test_nothing_hangs_on_the_default_device(case, tmp_path, elsewhere, work):
    WORK[work](*case, tmp_path)


def test_an_adapter_is_the_same_on_every_device():
    here, there = build(), build().to("cpu")
    for kind in ("lora", "pissa-unextracted"):
        a, b = adapter_of(kind, here), adapter_of(kind, there)
        assert {p.device.type for p in a.parameters()} == {DEVICE.type} and {p.device.type for p in b.parameters()} == {"cpu"}
        if kind == "lora": assert all(torch.equal(p.cpu(), q) for p, q in zip(a.parameters(), b.parameters()))
        else: assert all(torch.equal(a.chosen_idx[n].cpu(), b.chosen_idx[n].cpu()) for n in a.layers)


# ---- where a model goes ----

@pytest.fixture
def asked(monkeypatch, tmp_path):
    "The keywords that `from_pretrained` got, of a tiny model in a folder."
    model, tok = tiny_model()
    for part in (model, tok): part.save_pretrained(tmp_path)
    seen, real = {}, AutoModelForCausalLM.from_pretrained

    def spy(source, **kwargs):
        seen.update(kwargs)
        return real(source, **{k: v for k, v in kwargs.items() if k != "device_map" or v == "auto"})
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spy)
    return tmp_path, seen


def test_without_an_accelerator_a_model_stays_on_the_cpu(asked, monkeypatch):
    folder, seen = asked
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    model, _ = load_model(folder)
    assert seen == dict(dtype="auto") and model.device.type == "cpu" and not model.training


def test_with_one_it_goes_there(asked, monkeypatch):
    folder, seen = asked
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    load_model(folder)
    assert seen["device_map"] == {"": torch.device("meta")}
    seen.clear()
    load_model(folder, device="cpu")
    assert "device_map" not in seen


def test_other_keywords_are_passed_on(asked):
    folder, seen = asked
    load_model(folder, torch.bfloat16, device_map="auto", attn_implementation="eager", revision="main")
    assert seen == dict(dtype=torch.bfloat16, device_map="auto", attn_implementation="eager", revision="main")


@pytest.mark.parametrize("kw, said", [(dict(device="cpu", device_map="auto"), "give one"),
                                      (dict(device="nowhere"), "device='cpu' can")])
def test_a_device_that_cannot_be_is_told(kw, said):
    with pytest.raises(ValueError, match=said): load_model(**kw)
