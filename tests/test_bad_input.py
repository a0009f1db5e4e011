"""Wrong input: an error of the right kind that says what came and what to give, and a model that is as it was."""
import math
import re

import pytest
import torch
from models import KINDS, adapter_of, build, changes, logits, state, tokens

from modlab import ModulatedLoRA, ModulatedPiSSA
from modlab.model.targets import LoRAConfig, _check_range, find_targets, target_table

pytestmark = pytest.mark.usefixtures("one_thread")
every_kind = pytest.mark.parametrize("kind", KINDS)
BOTH = {"lora": ModulatedLoRA, "pissa": lambda model, **kw: ModulatedPiSSA(model, selection_score="s_only", **kw)}


def refused(model, error, says, call):
    "`call` raises `error` with all of `says` in its message, and the model is as before."
    before, random = state(model), torch.get_rng_state()
    with pytest.raises(error) as e: call()
    assert type(e.value) in (error, FileNotFoundError), f"{type(e.value)} instead of {error}"
    missing = [s for s in says if not re.search(s, str(e.value))]
    assert not missing, f"{missing} not in: {e.value}"
    assert not changes(before, model) and torch.equal(torch.get_rng_state(), random)


CONFIG = [
    (dict(r=0), ["rank", "0", "at least 1"]), (dict(r=-4), ["rank", "-4", "at least 1"]), (dict(r=True), ["rank", "True"]),
    (dict(layer_range=(0.8, 0.2)), ["layer_range", r"0\.8, 0\.2", "lo < hi"]),
    (dict(layer_range=(-0.1, 0.5)), ["layer_range", "-0.1"]),
    (dict(layer_range=(0.0, 1.5)), ["layer_range", "1.5", "<= 1"]), (dict(layer_range=(0.5, 0.5)), ["layer_range", "lo < hi"]),
    (dict(layer_range=(0.0, math.nan)), ["layer_range", "nan"]),
    (dict(layer_range=(0.0, 0.1)), ["no layer", r"0\.1", "outside layer_range"]),
    (dict(targets=("q_proj", "(",)), ["targets", r"'\('", r"regular expression", r"\\\\\("]),
    (dict(exclude=("*",)), ["exclude", r"'\*'", "regular expression"]),
    (dict(targets=("nothing",)), ["no layer", "'nothing'", "exclude", "layer_range"]),
    (dict(targets=("q_proj", "nothing")), ["'nothing'", "match no", "target_table"]),
    (dict(targets=("all-linear", "nothing")), ["'nothing'", "match no"]),
    (dict(targets=("q_proj",), exclude=("q_proj",)), ["no layer", "q_proj", "excluded by"]),
    (dict(targets=()), ["targets is empty", "all-linear"]),
    (dict(exclude=("",)), ["exclude", "empty pattern"]),
    (dict(targets=("q_proj", "")), ["targets", "empty pattern"]), (dict(dtype=torch.int64), ["dtype", "int64", "float"]),
]


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("kw, says", CONFIG, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_configuration(kind, kw, says):
    model = build()
    refused(model, ValueError, says, lambda: BOTH[kind](model, **kw))


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan, math.inf])
def test_alpha(alpha):
    model = build()
    refused(model, ValueError, ["alpha", str(alpha), "positive"], lambda: ModulatedLoRA(model, alpha=alpha))


def test_one_pattern_may_be_given_as_a_string():
    a = ModulatedLoRA(build(), targets="q_proj", exclude="layers.0")
    assert list(a.layers) == [f"model.layers.{n}.self_attn.q_proj" for n in (1, 2, 3)]


@pytest.mark.parametrize("init", [(math.nan, 0.1), (0.0, math.inf), (0.0, -1.0)])
def test_init(init):
    model = build()
    refused(model, ValueError, ["init", "std"], lambda: BOTH["pissa"](model, init=init))


@pytest.mark.parametrize("value", [(0.2,), (0.1, 0.2, 0.3)])
def test_a_range_of_another_length(value):
    with pytest.raises(ValueError, match=r"layer_range.*two"): _check_range(value)


def test_a_range_for_a_model_without_blocks():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    assert len(find_targets(model, LoRAConfig())) == 2
    for ask in (find_targets, target_table):
        refused(model, ValueError, ["layer_range", "Sequential", "no block stack"],
                lambda ask=ask: ask(model, LoRAConfig(layer_range=(0.0, 0.5))))


# ---- calibration ----

def activations(model, n=20):
    widths = {name: layer.in_features for name, layer in find_targets(model).items()}
    return {name: {side: torch.randn(n, i) for side in ("cho", "rej")} for name, i in widths.items()}


def spoiled(X, how):
    name = "model.layers.2.mlp.down_proj"
    sides = X[name]
    if how == "nan": sides["rej"][3, 5] = math.nan
    if how == "inf": sides["rej"][3, 5] = math.inf
    if how == "one row": sides["rej"] = sides["rej"][:1]
    if how == "no row": sides["rej"] = sides["rej"][:0]
    if how == "wrong width": sides["rej"] = sides["rej"][:, :-1]
    if how == "three axes": sides["rej"] = sides["rej"][None]
    if how == "one side": del sides["rej"]
    if how == "other sides": X[name] = {"good": sides["cho"], "bad": sides["rej"]}
    if how == "missing layer": del X[name]
    if how == "no layers": X.clear()
    return X


CALIBRATION = {"nan": ["down_proj", "NaN"], "inf": ["down_proj", "infinite"],
               "one row": ["down_proj", "2", "1"], "no row": ["down_proj", "2", "0"],
               "wrong width": ["down_proj", r"\(20, 127\)", "128"], "three axes": ["down_proj", r"\(1, 20, 128\)", "128"],
               "one side": ["down_proj", "cho", "rej"], "other sides": ["down_proj", "bad", "rej"],
               "missing layer": ["1 of 28", "down_proj"],
               "no layers": ["28 of 28"]}


@pytest.mark.parametrize("mode", ["cho_rej_min_std", "act_only", "wanda"])
@pytest.mark.parametrize("extract", [True, False])
@pytest.mark.parametrize("how", CALIBRATION)
def test_calibration(how, mode, extract):
    model = build()
    X, says = spoiled(activations(model), how), CALIBRATION[how]
    if how.endswith("row") and mode != "cho_rej_min_std":  # these take both sides together: only both being short is too little
        for of in X.values(): of["cho"], of["rej"] = of["cho"][:1], of["rej"][:0]
        says = ["_proj", "2", "1"]
    way_out = "pass .*tokens" if how.endswith("row") else "finite" if how in ("nan", "inf") else "activations"
    refused(model, ValueError, [*says, way_out],
            lambda: ModulatedPiSSA(model, r=4, selection_score=mode, calibration_activations=X, extract=extract))


@pytest.mark.parametrize("mode", ["cho_rej_min_std", "act_only", "wanda"])
def test_no_calibration(mode):
    model = build()
    refused(model, ValueError, [mode, "None", "capture_activations", "s_only"],
            lambda: ModulatedPiSSA(model, selection_score=mode))


def test_a_single_text_where_two_are_needed():
    model = build()
    X = {name: of["cho"] for name, of in activations(model).items()}
    refused(model, ValueError, ["q_proj", "cho", "rej", "cho_rej_min_std"],
            lambda: ModulatedPiSSA(model, calibration_activations=X))
    assert ModulatedPiSSA(model, r=2, selection_score="act_only", calibration_activations=X, extract=False).layers


def test_an_unknown_score():
    model = build()
    refused(model, ValueError, ["'top'", "s_only", "wanda", "act_only", "cho_rej_min_std"],
            lambda: ModulatedPiSSA(model, selection_score="top"))


@pytest.mark.parametrize("bad", [lambda S, stats: S[:-1], lambda S, stats: S * math.nan])
def test_a_score_of_ones_own_that_makes_no_sense(bad):
    model = build()
    refused(model, ValueError, ["_proj", "score", "shape", "NaN"], lambda: ModulatedPiSSA(model, selection_score=bad))


def test_a_weight_with_nan_is_named():
    model = build()
    with torch.no_grad(): model.model.layers[1].mlp.up_proj.weight[0, 0] = math.inf
    refused(model, ValueError, [r"layers\.1\.mlp\.up_proj", "1 of"], lambda: BOTH["pissa"](model))


# ---- attaching and the dose ----

@every_kind
def test_entering_twice(kind):
    model = build()
    a = adapter_of(kind, model)
    with a(model, 1.5):
        y = logits(model, tokens())
        refused(model, RuntimeError, ["attached already", "set_coeff"], lambda: a(model, -1.0).__enter__())
        assert a.c == 1.5 and a.attached and torch.equal(logits(model, tokens()), y)


@every_kind
@pytest.mark.parametrize("other", ["llama", "opt"])
def test_entering_with_another_model(kind, other):
    a, model = adapter_of(kind, build()), build(other)
    refused(model, ValueError, ["another model", "28 of its 28", "from_checkpoint"], lambda: a(model).__enter__())
    refused(a.model, ValueError, ["another model", r"layers\.\d"], lambda: a(a.model.model.layers[0]).__enter__())
    with a(a.model): assert a.attached  # a refusal must not wear it out


@every_kind
@pytest.mark.parametrize("c", [math.nan, math.inf, -math.inf, torch.tensor([1.0, math.nan, 0.0]), torch.tensor(math.inf)],
                         ids=str)
def test_a_dose_that_is_not_finite(kind, c):
    model = build()
    a = adapter_of(kind, model)
    refused(model, ValueError, ["finite", "nan|inf"], lambda: a(model, c).__enter__())
    assert not a.attached
    with a(model, 0.5):
        refused(model, ValueError, ["finite"], lambda: a.set_coeff(c))
        assert a.c == 0.5


@every_kind
def test_a_dose_of_the_wrong_length_or_shape(kind):
    model = build()
    a = adapter_of(kind, model)
    with a(model, torch.ones(2)):
        for call in (lambda: logits(model, tokens()), lambda: model.generate(tokens(), max_new_tokens=2),
                     lambda: model.base_model(tokens())):
            refused(model, ValueError, ["2 doses", "3 rows"], call)
        a.set_coeff(torch.ones(3))
        assert logits(model, tokens()).isfinite().all()
        refused(model, ValueError, [r"\(3, 1\)", r"\(b,\)"], lambda: a.set_coeff(torch.ones(3, 1)))
    refused(model, ValueError, [r"\(3, 1\)"], lambda: a(model, torch.ones(3, 1)).__enter__())
    refused(model, RuntimeError, ["not attached", "with adapter"], lambda: a.set_coeff(1.0))


@every_kind
def test_a_layer_that_it_does_not_have(kind):
    model = build()
    a = adapter_of(kind, model, targets=("q_proj",))
    for ask in (a.factors, a.delta):
        refused(model, ValueError, ["model.layers.0.self_attn.q_prj", "4 layers", "did you mean"],
                lambda ask=ask: ask("model.layers.0.self_attn.q_prj", 1.0))


@pytest.mark.parametrize("what", ["extracted", "another model"])
def test_after_something_that_cannot_be_before(what):
    model = build()
    first = adapter_of("pissa-extracted", model) if what == "extracted" else adapter_of("pissa-unextracted", build())
    refused(model, ValueError, [r"after\[0\]", "leave it out" if what == "extracted" else "this model"],
            lambda: ModulatedPiSSA(model, r=2, selection_score="s_only", extract=False, after=[first]))
