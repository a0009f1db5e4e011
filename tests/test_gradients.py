"Gradients by direction against autograd through an explicit gain, on every architecture; scores; steps; shared rank; the cost."
import gc
import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from jaxtyping import TypeCheckError
from models import ARCHS, MORE, adapter_of, build, changes, gap, logits, seeded, state, tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_calibration import TOK
from test_quantised import HOW, quantised

from modlab import (
    ContrastConfig,
    LoRAConfig,
    ModulatedPiSSA,
    baked,
    capture_gradients,
    capture_statistics,
    contrast,
    find_targets,
    from_peft,
    load_adapter,
    read_metadata,
    selection_scores,
    selection_table,
    to_peft,
)
from modlab.maths.divergence import token_nll
from modlab.maths.scores import GRADIENT_SCORES
from modlab.maths.statistics import GradientStats
from modlab.maths.steps import step_sizes
from modlab.model.cache import directions
from modlab.model.layers import guard_4bit

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*fused expert")]
PAIRS = [dict(prompt=f"{q}? ", cho=a, rej=b) for q, a, b in (
    ("How is it", "Arr, it be wild!", "It is calm."), ("Tea", "Grog, ye lubber!", "Earl Grey, if I may suggest."),
    ("Where to", "To sea!", "To the drawing room."))]
FIELDS = ("cho", "rej", "cho_square", "rej_square", "m2")


def by_autograd(model, tok, pairs, cfg=LoRAConfig()):
    "The same from an explicit gain on every direction of every layer, one answer at a time, without padding or batches."
    model.requires_grad_(False)
    guard_4bit(model)
    layers, found, handles = find_targets(model, cfg), {}, []
    frames = {name: (U, Vh, torch.zeros(len(S), requires_grad=True)) for name, (U, S, Vh) in directions(layers)}
    for name, layer in layers.items():
        def gain(m, args, kwargs, y, name=name):
            (U, Vh, theta), x = frames[name], (*args, *kwargs.values())[0]
            return y + ((x.float() @ Vh.T * theta) @ U.T).to(y.dtype)
        handles.append(layer.register_forward_hook(gain, with_kwargs=True))
    for side in ("cho", "rej"):
        for pair in pairs:
            prompt, answer = tok(pair["prompt"]).input_ids, tok(pair[side], add_special_tokens=False).input_ids
            y = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0, len(prompt) - 1:-1]
            nll = token_nll(y, torch.tensor(answer)).mean()
            gains = [theta for _, _, theta in frames.values()]
            rows = torch.autograd.grad(nll, gains, allow_unused=True, materialize_grads=True)
            for name, row in zip(layers, rows): found.setdefault(name, {}).setdefault(side, []).append(row)
    for handle in handles: handle.remove()
    return {name: GradientStats.of(*(torch.stack(sides[s]) for s in ("cho", "rej"))) for name, sides in found.items()}


def apart(a, b):
    "The largest difference between two sets of statistics, as a share of the largest value of its kind."
    assert a.keys() == b.keys() and all(a[n].count == b[n].count for n in a)
    joined = lambda of, field: torch.cat([getattr(stats, field) for stats in of.values()])
    return max(gap(joined(a, field), joined(b, field)) for field in FIELDS)


@pytest.mark.parametrize("arch", [*ARCHS, *MORE, "shared_moe"])
def test_gradients_are_those_of_an_explicit_gain(arch):
    want, model = by_autograd(build(arch), TOK, PAIRS), build(arch)
    before = state(model)
    found = capture_gradients(model, TOK, PAIRS, batch_size=4)
    assert apart(found, want) < 1e-5 and not changes(before, model), "float32, in another batch"
    assert all(p.grad is None for p in model.parameters()) and all(s.name == n and s.S is not None for n, s in found.items())


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 2**-5), (torch.float16, 2**-8)], ids=str)
def test_narrow_bases(dtype, bound):
    want = by_autograd(build(dtype=dtype), TOK, PAIRS)
    assert apart(capture_gradients(build(dtype=dtype), TOK, PAIRS), want) < bound


@pytest.mark.parametrize("how", HOW)
def test_quantised_layers(how):
    found = capture_gradients(quantised(how), TOK, PAIRS, batch_size=2)
    want = by_autograd(quantised(how), TOK, PAIRS)
    assert len(found) == 28 and apart(found, want) < (0.05 if how == "bnb8" else 1e-4)  # 8-bit activations round with the batch
    kw = dict(calibration_activations=found, selection_score="grad_fisher", step="fisher", extract=False)
    ModulatedPiSSA(quantised(how), r=4, **kw)


@pytest.mark.parametrize("size", [1, 3, 6, 8])
def test_the_batch_does_not_matter(size):
    four = capture_gradients(build(), TOK, PAIRS, batch_size=4)
    assert apart(capture_gradients(build(), TOK, PAIRS, batch_size=size), four) < 1e-5


def test_some_layers_only_and_a_head_that_is_one_of_them():
    for cfg in (LoRAConfig(layer_range=(0.5, 1.0)), LoRAConfig(targets=("lm_head", "up_proj"), exclude=())):
        found = capture_gradients(build(tied=False), TOK, PAIRS, cfg)
        assert apart(found, by_autograd(build(tied=False), TOK, PAIRS, cfg)) < 1e-5


class Twice(torch.nn.Module):
    "Calls its layer twice, and writes into what comes out."
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        y = self.layer(x)
        y += self.layer(input=torch.tanh(x)) * 0.5
        return y


def test_several_calls_of_one_layer_add_up():
    def model():
        m = build()
        for n in (0, 2): m.model.layers[n].self_attn.q_proj = Twice(m.model.layers[n].self_attn.q_proj)
        return m
    found = capture_gradients(model(), TOK, PAIRS)
    assert "model.layers.0.self_attn.q_proj.layer" in found and apart(found, by_autograd(model(), TOK, PAIRS)) < 1e-5


@pytest.mark.parametrize("how", ["trains", "checkpointed", "no_grad", "inference", "attached", "after a round"])
def test_whatever_state_the_model_is_in(how):
    model = build()
    plain = capture_gradients(build(), TOK, PAIRS)
    if how in ("trains", "checkpointed"): model.train()
    if how == "checkpointed": model.gradient_checkpointing_enable()
    if how == "attached":
        a = adapter_of("lora", model)
        with a(model, 1.0): found = capture_gradients(model, TOK, PAIRS)
        assert apart(found, plain) > 0.01, "the gradients of the model as it is"
        with baked(model, [(a, 1.0)]): assert apart(by_autograd(model, TOK, PAIRS), capture_gradients(model, TOK, PAIRS)) < 1e-4
    elif how == "after a round":
        a = ModulatedPiSSA(model, r=8, selection_score="s_only")
        with pytest.raises(RuntimeError, match="not given back"): capture_gradients(model, TOK, PAIRS)
        with a(model, 0.0): later = capture_gradients(model, TOK, PAIRS)
        name = next(iter(later))
        assert selection_scores(later[name].S, "grad_abs", later[name]).isneginf().sum() == 8, "the emptied ones"
        with pytest.raises(ValueError, match="another weight.*capture_gradients"):
            ModulatedPiSSA(build(), r=4, calibration_activations=later, selection_score="grad_abs")
    else:
        with {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(how, torch.enable_grad)():
            assert apart(capture_gradients(model, TOK, PAIRS), plain) < 1e-6
    assert model.training == (how in ("trains", "checkpointed"))


def test_a_layer_that_passes_no_gradient_is_refused_by_name():
    class Cut(torch.nn.Linear):
        def forward(self, x): return super().forward(x.detach())
    Cut.__name__ = "CutLinear"
    model = build()
    old = model.model.layers[1].mlp.down_proj
    model.model.layers[1].mlp.down_proj = Cut(old.in_features, old.out_features, bias=False)
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\.down_proj \(CutLinear .* passes no gradient"):
        capture_gradients(model, TOK, PAIRS)
    assert not any(m._forward_hooks for m in model.modules()) and all(p.requires_grad for p in model.parameters())


def test_memory_is_flat_in_the_number_of_pairs_and_each_answer_runs_once():
    def cost(pairs):
        gc.collect()  # what other tests left; the run itself must not lean on it
        model, rows, live = build(), [0], []
        def note(m, args, kwargs):
            rows[0] += len(kwargs["input_ids"])
            if rows[0] < 2 * len(pairs): return  # late in the run
            tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
            live.append(sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()))
        model.model.register_forward_pre_hook(note, with_kwargs=True)
        capture_gradients(model, TOK, pairs, batch_size=2)
        return max(live), rows[0]
    (few, a), (many, b) = cost(PAIRS[:2]), cost(PAIRS[:2] * 10)
    assert many < 1.001 * few and b - a == 2 * 18, "what is left is the comparison of one answer's logits with the model's own"


# ---- scores ----

@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 9), st.lists(st.integers(1, 7), min_size=1, max_size=5), st.sampled_from([0.0, 1e4]))
def test_scores_are_numpys_however_the_pairs_are_cut(seed, k, cuts, mean):
    g = np.random.default_rng(seed)
    cho, rej = g.normal(size=(2, sum(cuts) + 1, k)) + mean
    cho[:, -1], rej[:, -1] = 0, 0  # nothing ever passed there
    total = GradientStats.of(torch.zeros(0, k), torch.zeros(0, k))
    for c, r in zip(*(torch.tensor(side).split([*cuts, 1]) for side in (cho, rej))): total = total.merge(GradientStats.of(c, r))
    S, m = torch.linspace(3, 1, k), rej - cho
    F = (cho**2).mean(0) + (rej**2).mean(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        want = {"grad_abs": abs(m.mean(0)), "grad_snr": abs(m.mean(0)) / m.std(0, ddof=1), "grad_fisher": abs(m.mean(0)) / F**0.5,
                "taylor": S.double().numpy() * abs(m.mean(0))}
    assert set(want) == set(GRADIENT_SCORES)
    for mode, expected in want.items():
        scores = selection_scores(S, mode, total, "up")
        np.testing.assert_allclose(scores[:-1], expected[:-1], rtol=1e-6, atol=1e-9 * (1 + mean))
        assert scores[-1] == (-math.inf if mode in ("grad_snr", "grad_fisher") else 0), "a zero denominator ranks last"


def test_a_function_gets_the_layers_name_and_its_gradients():
    model, names = build(), []
    gradients, streams = capture_gradients(model, TOK, PAIRS), capture_statistics(model, TOK, PAIRS)
    def score(S, stats):
        names.append(stats.name)
        return stats.fisher
    ModulatedPiSSA(model, r=3, calibration_activations=gradients, selection_score=score, extract=False)
    assert names == list(find_targets(model))
    both = {n: streams[n] | {"gradients": gradients[n]} for n in streams}
    def product(S, stats): return stats["cho"].std * stats["gradients"].mean.abs()
    for mode, alone in ((product, None), ("wanda", streams), ("taylor", gradients)):
        picked = ModulatedPiSSA(model, r=3, calibration_activations=both, selection_score=mode, extract=False).chosen_idx
        if alone is None: continue
        same = ModulatedPiSSA(model, r=3, calibration_activations=alone, selection_score=mode, extract=False).chosen_idx
        assert all(torch.equal(picked[n], same[n]) for n in same)


@pytest.mark.parametrize("given, mode, says", [
    ("gradients", "wanda", "q_proj: selection_score='wanda' needs activations, got GradientStats; .*capture_activations"),
    ("gradients", None, "'cho_rej_min_std' needs both answers"),
    ("streams", "grad_fisher", r"needs gradients, got \['cho', 'rej'\]; .*capture_gradients"),
    ("none", "grad_snr", "'grad_snr' needs calibration_activations, got None; .*capture_gradients"),
    ("one", "grad_abs", "at least 2 pairs, got 1")])
def test_gradients_and_activations_are_not_taken_for_each_other(given, mode, says):
    model = build()
    data = dict(gradients=capture_gradients, streams=capture_statistics).get(given, lambda *_: None)(model, TOK, PAIRS)
    if given == "one":
        data = {n: GradientStats.of(*torch.ones(2, 1, len(s.cho))) for n, s in capture_gradients(model, TOK, PAIRS).items()}
    with pytest.raises(ValueError, match=says):
        ModulatedPiSSA(model, r=3, calibration_activations=data, selection_score=mode, extract=False)
    with pytest.raises(ValueError, match="gradients|calibration_activations|2 pairs|two answers"):
        if given != "gradients": ModulatedPiSSA(model, r=3, calibration_activations=data, selection_score="s_only", step="fisher")
        else: capture_gradients(model, TOK, [dict(prompt=p["prompt"], completion=p["cho"]) for p in PAIRS])


# ---- steps ----

STEPS = ("fisher", 1.0, 0.25)


def stepped(model, step="fisher", **kw):
    how = dict(r=6, calibration_activations=capture_gradients(model, TOK, PAIRS), selection_score="grad_fisher", init=(0.3, 0.5),
               generator=seeded(2), extract=False)
    return ModulatedPiSSA(model, step=step, **how | kw)


@pytest.mark.parametrize("step", STEPS)
def test_steps_are_what_the_gradients_say(step):
    model = build()
    gradients = capture_gradients(model, TOK, PAIRS)
    a, plain = stepped(model, step, calibration_activations=gradients), stepped(model, "plain")
    chosen = {n: gradients[n].fisher[idx] for n, idx in a.chosen_idx.items()}
    F, steps = torch.cat([*chosen.values()]), torch.cat([*a.step.values()]).double()
    assert abs(steps.log().mean()) < 1e-6, "a geometric mean of 1 over all layers"
    ratio = (steps * F.clamp_min(1e-3 * F.median()) ** (0.5 if step == "fisher" else step)).log()
    assert ratio.std() < 1e-5 and steps.max() / steps.min() > 2
    assert all(torch.allclose(a.delta_s[n], plain.delta_s[n], rtol=1e-5) for n in a.layers), "init draws delta_s"
    assert [n for n, _ in a.named_parameters()] == [f"theta.{n}" for n in a.layers] and not plain.step
    assert [n for n, _ in plain.named_parameters()] == [f"delta_s.{n}" for n in a.layers]
    assert all(plain.delta_s[n] is plain.theta[n] for n in plain.layers)


@pytest.mark.parametrize("extract", [False, True])
def test_a_stepped_adapter_is_an_adapter(tmp_path, extract):
    model, other, ids = build(), build(), tokens()
    gradients, base = capture_gradients(model, TOK, PAIRS), logits(model, ids)
    a = stepped(model, extract=extract, calibration_activations=gradients)
    twin = stepped(other, "plain", extract=extract, calibration_activations=gradients)
    for c in (0.0, 1.0, -0.7, torch.tensor([1.0, 0.0, 2.0])):
        with a(model, c), twin(other, c): assert gap(logits(model, ids), logits(other, ids)) < 1e-5
    name = next(iter(a.layers))
    d = lambda c: a.delta(name, c) - a.delta(name, 0.0)
    torch.testing.assert_close(d(3.0), 3 * d(1.0), rtol=1e-4, atol=1e-6)
    a.save(tmp_path / "a")
    assert read_metadata(tmp_path / "a")["step"] == "fisher"
    if extract: a.restore_base_W()
    assert torch.equal(logits(model, ids), base)
    fresh = build()
    b = load_adapter(fresh, tmp_path / "a")
    assert all(torch.equal(b.step[n], a.step[n]) and torch.allclose(b.theta[n], a.theta[n], rtol=1e-6) for n in a.layers)
    with a(model, 1.0), b(fresh, 1.0): assert gap(logits(fresh, ids), logits(model, ids)) < 1e-5
    to_peft(a, tmp_path / "peft")
    plain = build()
    with from_peft(plain, tmp_path / "peft")(plain, 1.0), a(model, 1.0): assert gap(logits(plain, ids), logits(model, ids)) < 1e-4


def test_files_of_either_kind_are_taken_over_in_place(tmp_path):
    model = build()
    a, plain = stepped(model), stepped(model, "plain", generator=seeded(9))
    for x in (a, plain): x.save(tmp_path / ("fisher" if x is a else "plain"))
    parameters = list(a.parameters())
    wanted = {n: plain.delta_s[n].detach().clone() for n in a.layers}
    a.load(tmp_path / "plain")
    assert not a.step and all(torch.equal(a.delta_s[n], wanted[n]) for n in a.layers), "1 where the table is missing"
    a.load(tmp_path / "fisher")
    plain.load(tmp_path / "fisher")
    assert a.step.keys() == plain.step.keys() == a.layers.keys()
    assert all(torch.equal(a.delta_s[n], plain.delta_s[n]) for n in a.layers)
    assert all(p is q for p, q in zip(a.parameters(), parameters)), "an optimizer keeps its parameters"


def test_a_reloaded_adapter_trains_on_alike(tmp_path):
    cfg = ContrastConfig(epochs=1, batch_size=2, lr=0.1, val_frac=0.0, max_len=64)
    runs = []
    for reload in (False, True, "plain"):
        model = build()
        a = stepped(model, "plain" if reload == "plain" else "fisher", init=(0.0, 0.0))
        contrast(model, TOK, a, PAIRS, cfg)
        if reload is True:
            a.save(tmp_path / "a")
            model = build()
            a = load_adapter(model, tmp_path / "a")
        contrast(model, TOK, a, PAIRS, cfg)
        runs.append(torch.cat([d.detach() for d in a.delta_s.values()]))
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-3, atol=1e-5)
    assert (runs[0] - runs[2]).norm() > 0.1 * runs[0].norm(), "other steps than plain ones"


def test_writing_into_delta_s_raises_and_training_goes_on():
    model = build()
    a = stepped(model)
    name = next(iter(a.layers))
    writes = (lambda d: d.zero_(), lambda d: d.copy_(torch.ones(6)), lambda d: d.data.mul_(2), lambda d: d.__setitem__(0, 1.0))
    for write in writes:
        with torch.no_grad(), pytest.raises(RuntimeError, match="computed as theta"): write(a.delta_s[name])
    with pytest.raises(TypeError): a.delta_s[name] = torch.zeros(6)
    with a(model, 1.0):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        first = logits(model, tokens())
        with torch.no_grad(): a.theta[name].add_(1.0)
        assert not torch.equal(logits(model, tokens()), first), "seen while attached"
    assert all(p.grad is not None and p.grad.any() for p in a.parameters())


@pytest.mark.parametrize("value, says", [(0.0, "not positive"), (math.nan, "NaN"), (None, "do not cover all")])
def test_a_damaged_step_is_refused(tmp_path, value, says):
    a = stepped(build())
    a.save(tmp_path / "a")
    tensors, key = load_file(tmp_path / "a"), f"step.{next(iter(a.layers))}"
    with safe_open(tmp_path / "a", "pt") as f: header = {k: v for k, v in f.metadata().items() if k != "crc32"}
    if value is None: del tensors[key]
    else: tensors[key][1] = value
    save_file(tensors, tmp_path / "b", header)
    with pytest.raises((ValueError, OSError), match=says): load_adapter(build(), tmp_path / "b")


@pytest.mark.parametrize("bad", ["natural", True, None, math.inf])
def test_steps_that_are_none(bad):
    with pytest.raises((ValueError, TypeCheckError), match="step"): stepped(build(), bad)


def test_dead_directions_have_no_endless_step():
    F = torch.tensor([0.0, 1e-9, 1.0, 1.0, 4.0]).double()
    steps = step_sizes({"a": F[:2], "b": F[2:]})
    assert torch.allclose(steps["a"] / steps["b"][0], torch.full((2,), 1000**0.5)) and steps["b"][2] < steps["b"][0]


# ---- rank shared out ----

def test_shared_rank_takes_the_best_of_all_layers(tmp_path):
    model = build()
    gradients = capture_gradients(model, TOK, PAIRS)
    scores = {n: selection_scores(s.S, "grad_fisher", s) for n, s in gradients.items()}
    ranked = sorted(((-x, list(scores).index(n), j) for n, s in scores.items() for j, x in enumerate(s.tolist())))[:30]
    a = stepped(model, r_total=30, calibration_activations=gradients)
    picked = sorted((list(scores).index(n), j) for n, idx in a.chosen_idx.items() for j in idx.tolist())
    assert picked == sorted((layer, j) for _, layer, j in ranked), "ties to the earlier layer, then to the lower index"
    assert 0 < len(a.layers) < 28 and sum(len(p) for p in a.parameters()) == 30 == selection_table(a).r.sum()
    a.save(tmp_path / "a")
    other, ids = build(), tokens()
    b = load_adapter(other, tmp_path / "a")
    assert list(b.layers) == list(a.layers) and b.cfg.r_total == 30
    to_peft(a, tmp_path / "peft")
    third = build()
    with a(model, 1.0), b(other, 1.0), from_peft(third, tmp_path / "peft")(third, 1.0):
        assert gap(logits(other, ids), logits(model, ids)) < 1e-5 and gap(logits(third, ids), logits(model, ids)) < 1e-4
    with baked(third, [(from_peft(third, tmp_path / "peft"), 1.0)]), a(model, 1.0):
        assert gap(logits(third, ids), logits(model, ids)) < 1e-4


def test_shared_rank_of_any_score_and_extracted():
    model, ids = build(), tokens()
    base = logits(model, ids)
    a = ModulatedPiSSA(model, r_total=25, selection_score="s_only")
    assert sum(map(len, a.chosen_idx.values())) == 25 and all(len(idx) == idx[-1] + 1 for idx in a.chosen_idx.values()), "the top"
    a.restore_base_W()
    assert torch.equal(logits(model, ids), base)
    everything = ModulatedPiSSA(model, r_total=10**6, selection_score="s_only", extract=False)
    assert all(len(idx) == len(everything.spectrum[n]) for n, idx in everything.chosen_idx.items())
    with pytest.raises(ValueError, match="r_total"): ModulatedPiSSA(model, r_total=0, selection_score="s_only")
