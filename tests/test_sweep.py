"""Curves and calibrations on tiny models, against full logits and against what was asked for."""
import functools
import json
import math
import re
import subprocess
import sys

import pandas as pd
import pytest
import torch
from models import adapter_of, build, changes, hooks, state
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig

from modlab import (
    Calibration,
    ModulatedLoRA,
    ModulatedPiSSA,
    aggregate,
    calibrate_c,
    capture_activations,
    collate,
    gradient_cosine,
    kl_curve,
    kl_fwd,
    kl_rev,
    restore,
    tiny_model,
    token_nll,
)
from modlab.maths.divergence import AGGREGATES
from modlab.measure import dose
from modlab.measure.crossing import crossing
from modlab.model.text import encode_records

pytestmark = pytest.mark.usefixtures("one_thread")
PAIRS = [dict(prompt=f"question {n}", cho="abcdefgh"[: 2 + n % 5] * 3, rej="xyz" * (1 + n % 3)) for n in range(7)]


def by_hand(model, tok, adapter, c, side="cho"):
    "Every aggregate from the logits of all positions, one record at a time."
    parts = []
    for encoded in encode_records(tok, PAIRS, side):
        b = collate([encoded])
        with torch.no_grad(), adapter(model, 0.0):
            base = model(**b.inputs()).logits[0, :-1][b.is_target[0, 1:]]
            adapter.set_coeff(c)
            y = model(**b.inputs()).logits[0, :-1][b.is_target[0, 1:]]
        parts.append(torch.stack([kl_rev(y, base), kl_fwd(y, base), token_nll(y, b.input_ids[0, 1:][b.is_target[0, 1:]])]))
    rev, fwd, nll = torch.cat(parts, 1)
    both = {f"{key}_{how}": aggregate(kl, how).item() for key, kl in (("kl_rev", rev), ("kl_fwd", fwd)) for how in AGGREGATES}
    return both | dict(nll=nll.mean().item(), n_tokens=len(nll))


@pytest.mark.parametrize("kind", ["lora", "pissa-unextracted", "pissa-extracted"])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_curve_is_what_full_logits_give(kind, batch_size, monkeypatch):
    monkeypatch.setattr("modlab.measure.dose._CHUNK", 5)  # several chunks a batch
    model, tok = tiny_model()
    a = adapter_of(kind, model)
    before = state(model)
    curve = kl_curve(model, tok, a, PAIRS, [-1.0, 0.0, 0.7], batch_size=batch_size)
    assert not changes(before, model) and not a.attached and curve.c.tolist() == [-1.0, 0.0, 0.7]
    for _, row in curve.iterrows():
        expected = by_hand(model, tok, a, row.c)
        for key, value in expected.items(): assert row[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
        assert row.nll_rej == pytest.approx(by_hand(model, tok, a, row.c, "rej")["nll"], rel=1e-4)
        assert row.margin == pytest.approx(row.nll_rej - row.nll)
    zero = curve.iloc[1]
    assert zero.kl_rev_max == zero.kl_fwd_max == 0 and zero.kl_rev_rmse == pytest.approx(1e-4)
    assert (curve.iloc[[0, 2]].kl_rev_mean > 1e-3).all(), "the doses do something"


def routed(model):
    "MLPs that see their tokens in one list that lacks some, as experts do."
    def forward(plain, x):
        y = torch.zeros_like(x)
        y[:, 1:] = plain(x[:, 1:].flatten(0, 1)).view_as(x[:, 1:])
        return y
    for block in model.model.layers: block.mlp.forward = functools.partial(forward, block.mlp.forward)
    return model


@pytest.mark.parametrize("kind, name", [*(("lora", name) for name in ("tiny", "opt", "gemma3", "routed")),
                                        ("pissa-unextracted", "gpt2"), ("pissa-extracted", "tiny")])
def test_doses_as_rows_are_doses_one_by_one(kind, name, monkeypatch):
    "The plain twin is one forward per dose. Routed experts have no rows: there the doses are run one by one by themselves."
    model, tok = tiny_model()
    if name == "routed": model = routed(model)
    elif name != "tiny": (model := build(name)).resize_token_embeddings(len(tok))
    a, curves, calls = adapter_of(kind, model), [], []
    plain = dose.Readout.states
    counted = lambda readout, batch: calls.append(len(batch.input_ids)) or plain(readout, batch)
    monkeypatch.setattr(dose.Readout, "states", counted)
    for tokens in (1, 10**6):
        monkeypatch.setattr(dose, "_BUSY", dict(cpu=tokens))
        calls.append(0)
        curves.append(kl_curve(model, tok, a, PAIRS, [-1.0, 0.0, 0.5, 0.5, 1.0], batch_size=4, progress=False))
    alone, together = calls[1:calls.index(0, 1)], calls[calls.index(0, 1) + 1:]
    if name == "routed": assert len(together) == len(alone) + 1, "one forward finds out"
    else: assert len(together) == 1 + 2 * 3 and max(together) == 4 * 4, "probe; reference, chosen, rejected of two batches"
    pd.testing.assert_frame_equal(*curves, rtol=1e-3, atol=2e-5, check_exact=False)
    assert curves[1].kl_rev_max[1] == curves[1].kl_fwd_max[1] == 0 and curves[1].iloc[2].equals(curves[1].iloc[3])


def test_words_that_cannot_come_are_computed_with_care():
    "A student or a reference that gives a word the probability 0: the divergence is finite or infinite, and never NaN."
    g = torch.Generator().manual_seed(0)
    base, student = torch.randn(300, 9, generator=g), torch.randn(300, 9, generator=g)
    base[5, 2] = base[290, 2] = student[5, 2] = student[7, 1] = -torch.inf
    model, tok = tiny_model()
    batch, ids = collate(encode_records(tok, PAIRS, "cho")), torch.zeros(300, dtype=torch.long)
    readout = dose.Readout(model, batch)
    readout.direct = True # its states are logits
    got = dose.compare(readout, dose._Reading(batch, ids, ids, base), [student, base])
    expected = torch.stack([kl_rev(student, base), kl_fwd(student, base), token_nll(student, ids)])
    torch.testing.assert_close(got[0], expected, rtol=1e-5, atol=1e-6)
    assert (got[1, :2] == 0).all() and got[0, 0, 290] == got[0, 1, 7] == torch.inf and not got.isnan().any()


SMALL = dict(vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, head_dim=16, initializer_range=0.2)


@pytest.mark.parametrize("cfg", [Gemma2Config(**SMALL, final_logit_softcapping=0.5), GraniteConfig(**SMALL, logits_scaling=7.0),
                                 CohereConfig(**SMALL, logit_scale=0.1)], ids=lambda c: c.model_type)
def test_models_that_finish_their_logits(cfg):
    model, tok = AutoModelForCausalLM.from_config(cfg).eval(), tiny_model()[1]
    a = adapter_of("lora", model)
    row = kl_curve(model, tok, a, PAIRS, [1.0]).iloc[0]
    for key, value in by_hand(model, tok, a, 1.0).items(): assert row[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key


def test_an_adapter_on_the_head_is_seen():
    model, tok = tiny_model()
    a = adapter_of("lora", model, targets=("lm_head", "q_proj"), exclude=())
    row = kl_curve(model, tok, a, PAIRS, [1.0]).iloc[0]
    for key, value in by_hand(model, tok, a, 1.0).items(): assert row[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key


def test_samples_have_no_margin():
    model, tok = tiny_model()
    curve = kl_curve(model, tok, adapter_of("lora", model), [dict(prompt="a", completion="bcd")], [1.0])
    assert "margin" not in curve and "nll_rej" not in curve and curve.n_tokens[0] == 3


@pytest.mark.parametrize("empty", [dict(cho=""), dict(rej=""), dict(prompt="q" * 600)])
def test_a_pair_without_an_answer_counts_on_neither_side(empty):
    model, tok = tiny_model()
    a, pairs = adapter_of("lora", model), [*PAIRS[:3], PAIRS[3] | empty, *PAIRS[4:]]
    with pytest.warns(UserWarning, match=r"records \[3\]"): curve = kl_curve(model, tok, a, pairs, [0, 1])
    pd.testing.assert_frame_equal(curve, kl_curve(model, tok, a, PAIRS[:3] + PAIRS[4:], [0, 1]))


def refusing(tok):
    tok.chat_template = "{{ raise_exception('no system role here') }}"
    return tok


CHAT = [dict(role="system", content="Be brief.")]


@pytest.mark.parametrize("f", [lambda *args: kl_curve(*args, [1]), lambda *args: calibrate_c(*args, 1),
                               lambda model, tok, a, records: capture_activations(model, tok, records)])
@pytest.mark.parametrize("bad, mend, match", [
    (dict(cho=None), lambda tok: tok, "record 4: cho is None"), (dict(prompt=3), lambda tok: tok, "record 4: prompt is 3"),
    (dict(prompt=[dict(user="hi")]), lambda tok: tok, "record 4: message 0 of the prompt is {'user': 'hi'}"),
    (dict(prompt=CHAT), refusing, "record 4: .* refuses the prompt: no system role here")])
def test_what_is_no_text_is_named_by_its_record(f, bad, mend, match):
    model, tok = tiny_model()
    a, before = adapter_of("lora", model), state(model)
    with pytest.raises(ValueError, match=match): f(model, mend(tok), a, PAIRS[:4] + [PAIRS[4] | bad] + PAIRS[5:])
    assert not changes(before, model) and not a.attached


@pytest.mark.parametrize("call", [lambda model, tok, a, n: kl_curve(model, tok, a, PAIRS, [1], batch_size=n),
                                  lambda model, tok, a, n: calibrate_c(model, tok, a, PAIRS, 1, batch_size=n),
                                  lambda model, tok, a, n: gradient_cosine(model, tok, a, PAIRS, batch_size=n),
                                  lambda model, tok, a, n: capture_activations(model, tok, PAIRS, batch_size=n)])
@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_has_at_least_one_row(call, size):
    model, tok = tiny_model()
    with pytest.raises(ValueError, match="batch_size must be"): call(model, tok, adapter_of("lora", model), size)


def test_a_record_that_is_left_out_is_warned_of_once():
    model, tok = tiny_model()
    a, records = adapter_of("lora", model), [*PAIRS, PAIRS[0] | dict(rej="")]
    with pytest.warns(UserWarning) as said: kl_curve(model, tok, a, records, [1])
    assert [str(w.message) for w in said if "left out" in str(w.message)] == [str(said[0].message)]


@pytest.mark.parametrize("measure", [lambda *args: kl_curve(*args, PAIRS, [1.0]), lambda *args: calibrate_c(*args, PAIRS, 0.01)])
def test_an_extraction_that_is_not_given_back_is_refused(measure):
    "Its adapter's variable is gone or another adapter is measured: c = 0 would be a model without its directions."
    model, tok = tiny_model()
    other = adapter_of("lora", model)
    ModulatedPiSSA(model, r=4, selection_score="s_only")
    fresh = ModulatedLoRA(model, r=2)
    for a in (other, fresh):
        with pytest.raises(RuntimeError, match="restore"): measure(model, tok, a)
        assert not a.attached and not hooks(model)
    restore(model)
    measure(model, tok, other)


def test_dropout_is_no_divergence():
    model, tok = tiny_model()
    for block in model.model.layers: block.self_attn.attention_dropout = 0.5
    a = adapter_of("lora", model)
    expected = kl_curve(model, tok, a, PAIRS, [0, 1]), capture_activations(model, tok, PAIRS)
    model.train()
    with torch.no_grad(): assert not torch.equal(*(model(**tok("a question", return_tensors="pt")).logits for _ in range(2)))
    pd.testing.assert_frame_equal(kl_curve(model, tok, a, PAIRS, [0, 1]), expected[0])
    captured = capture_activations(model, tok, PAIRS)
    assert all(torch.equal(of["cho"], captured[name]["cho"]) for name, of in expected[1].items())
    assert calibrate_c(model, tok, a, PAIRS, 0.01).reached and all(m.training for m in model.modules())


def test_a_budget_below_rounding_is_no_crash():
    model, tok = tiny_model()
    a = ModulatedLoRA(model, r=4)
    for B in a.B.values(): B.data.normal_(std=0.05)
    cal = calibrate_c(model, tok, a, SAMPLES[:8], 1e-9, stat="mean")
    assert not cal.reached or abs(cal.kl - 1e-9) <= 0.05e-9


@pytest.mark.parametrize("quiet", [False, True])
def test_no_bar_where_none_is_wanted(quiet, monkeypatch):
    said, (model, tok) = [], tiny_model()
    for module in ("dose", "calibrate"):
        monkeypatch.setattr(f"modlab.measure.{module}.tqdm", lambda of, disable=False, **kw: said.append(disable) or of)
    a = adapter_of("lora", model)
    kl_curve(model, tok, a, PAIRS, [1], progress=not quiet), calibrate_c(model, tok, a, PAIRS, 0.01, progress=not quiet)
    assert len(said) > 4 and set(said) == {quiet}


def test_no_pad_token_is_needed():
    model, tok = tiny_model()
    a = adapter_of("lora", model)
    padded = kl_curve(model, tok, a, PAIRS, [1.0])
    tok.pad_token = None
    assert tok.pad_token_id is None
    pd.testing.assert_frame_equal(kl_curve(model, tok, a, PAIRS, [1.0]), padded)


SAMPLES = [dict(prompt=f"q{n}", completion="".join(chr(97 + (n * 11 + i * i) % 26) for i in range(40))) for n in range(80)]


@pytest.mark.parametrize("kind, sign", [("lora", 1), ("pissa-extracted", -1)])
@pytest.mark.parametrize("stat", AGGREGATES)
def test_a_calibrated_dose_meets_its_budget(kind, sign, stat):
    model, tok = tiny_model()
    a = adapter_of(kind, model)
    budget = kl_curve(model, tok, a, SAMPLES, [0.4 * sign]).iloc[0][f"kl_rev_{stat}"]  # certainly within reach
    cal = calibrate_c(model, tok, a, SAMPLES, budget, stat=stat, sign=sign, tol=0.02)
    assert cal.reached and cal.c * sign > 0 and abs(cal.kl - budget) <= 0.02 * budget
    assert cal.forwards % 5 == 0 and cal.n_tokens == (1600, 1600) and not a.attached
    if stat == "max": return  # one token decides it, and other text has another one
    assert cal.interval[0] <= cal.kl_held_out <= cal.interval[1]
    assert abs(cal.kl_held_out - budget) <= 0.15 * budget or cal.interval[0] <= budget <= cal.interval[1]


def test_held_out_records_are_used():
    model, tok = tiny_model()
    a = adapter_of("lora", model)
    cal = calibrate_c(model, tok, a, SAMPLES[:20], 0.05, held_out=SAMPLES[40:44], tol=0.01)
    there = kl_curve(model, tok, a, SAMPLES[40:44], [cal.c]).iloc[0]
    assert cal.kl_held_out == pytest.approx(there.kl_rev_p95, rel=1e-3) and cal.n_tokens == (800, 160)


def test_out_of_reach_is_said_and_nothing_invented(caplog):
    model, tok = tiny_model()
    cal = calibrate_c(model, tok, ModulatedLoRA(model, r=2), SAMPLES[:8], 0.1)
    assert not cal.reached and all(map(math.isnan, (cal.c, cal.kl, cal.kl_held_out, *cal.interval))) and cal.forwards > 0
    assert "less still at its upper end (0)" in caplog.text and "1500" in caplog.text
    a = adapter_of("lora", model)
    low = calibrate_c(model, tok, a, SAMPLES[:8], 1e-4, bracket=(1, 4))
    assert not low.reached and math.isnan(low.c) and "more already at its lower end" in caplog.text


def test_a_dose_that_destroys_the_model_is_beyond_every_budget():
    f = lambda c: math.inf if c > 1 else c * c
    c, value, why = crossing(f, 0.25, 0.0, 1000.0, 0.01)
    assert abs(value - 0.25) <= 0.0025 and abs(c - 0.5) < 0.01 and not why


CURVES = dict(square=lambda c: c * c, destroyed=lambda c: c * c if c < 3 else math.inf,
              saturating=lambda c: 5 * math.tanh(c * c / 5),
              flat_again=lambda c: c * c if c < 2 else 4 / (1 + math.log(c / 2)))


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("lo, hi", [(0, 4.5), (0, 100), (0, 1e30), (0, 1e100), (1e-9, 1e9), (0.3, 2.2)])
@pytest.mark.parametrize("target", [0.1, 1.0, 3.5])
def test_a_crossing_is_found_in_a_bracket_of_any_width(curve, lo, hi, target):
    asked = []
    def f(c):
        assert lo <= c <= hi, "never outside the bracket"
        asked.append(c)
        return CURVES[curve](c)
    c, value, why = crossing(f, target, lo, hi, 0.02)
    assert abs(f(c) - target) <= 0.02 * target and value == CURVES[curve](c) and not why and len(asked) < 25


@pytest.mark.parametrize("f, why", [(lambda c: 0.0, "less still at its upper end (0)"),
                                    (lambda c: 1 + c, "more already at its lower end (1)"),
                                    (lambda c: c * c / 100, "less still at its upper end (0.16)"),
                                    (lambda c: 9.0 if c > 1 else 0.0, "not found between 1 (0) and 1 (9)")])
def test_what_was_not_found_is_said_as_it_is(f, why):
    c, _, said = crossing(f, 0.5, 0.0, 4.0, 0.01)
    assert math.isnan(c) and said == why


@pytest.mark.parametrize("kind", ["lora", "pissa-unextracted", "pissa-extracted"])
@pytest.mark.parametrize("high", [1e3, 1e30, 1e300])
def test_a_bracket_far_too_wide_does_not_hide_the_dose(kind, high, caplog):
    model, tok = tiny_model()
    a = adapter_of(kind, model)
    budget = kl_curve(model, tok, a, SAMPLES[:16], [0.4]).iloc[0].kl_rev_p95
    cal = calibrate_c(model, tok, a, SAMPLES[:16], budget, bracket=(0, high))
    assert cal.reached and abs(cal.kl - budget) <= 0.05 * budget and "no dose found" not in caplog.text


def test_no_dose_found_is_no_claim_that_there_is_none(caplog):
    model, tok = tiny_model()
    cal = calibrate_c(model, tok, ModulatedLoRA(model, r=2), SAMPLES[:8], 0.1, bracket=(0, 1e30))
    text = repr(cal)
    assert "no dose found for a p95 KL of 0.1 nats: less still at its upper end (0), after" in text and "no c " not in text
    assert text in caplog.text and "change it, or the budget" in caplog.text


def test_a_calibration_is_escaped():
    nan = float("nan")
    bad = Calibration(nan, False, nan, nan, 0, (nan, nan), 1.0, "<b>p95", (1, 1), "<script>")
    assert "<b>p95" not in bad._repr_html_() and "<script>" not in bad._repr_html_() and "&lt;script&gt;" in bad._repr_html_()


WRONG_PLACES = {
    "kl_curve(m, t, P, a, [1])": "ModulatedLoRA in the place of the records",
    "kl_curve(m, t, P, P, [1])": "list in the place of the adapter",
    "kl_curve(m, t, a, 'pairs.jsonl', [1])": "str in the place of the records",
    "kl_curve(m, t, a, P[0], [1])": "dict in the place of the records",
    "kl_curve(m, t, a, iter(P), [1])": "list_iterator in the place of the records",
    "kl_curve(m, t, a, P, [[0, 1]])": "list of doses",
    "calibrate_c(m, t, P, a, 1)": "list in the place of the adapter",
    "calibrate_c(m, t, P, P, 1)": "list in the place of the adapter",
    "explore(m, t, P, a)": "list in the place of the adapter",
    "explore(m, t, P)": "list in the place of the adapter",
    "explore(m, t, a, 'pairs.jsonl')": "str in the place of the records",
    "capture_activations(m, t, a, P)": "list in the place of cfg",
    "capture_activations(m, t, P, a)": "ModulatedLoRA in the place of cfg.*adapter.cfg",
    "capture_statistics(m, t, P, a)": "ModulatedLoRA in the place of cfg.*adapter.cfg",
    "capture_statistics(m, t, 'pairs.jsonl')": "str in the place of the records",
    "target_table(m, a)": "ModulatedLoRA in the place of cfg.*adapter.cfg",
}
AS_A_USER = """
import json, sys
from modlab import *
(m, t), told = tiny_model(), {}
a, P = ModulatedLoRA(m, r=2), [dict(prompt="a", cho="b", rej="c"), dict(prompt="d", cho="e", rej="f")]
for call in json.loads(sys.argv[1]):
    try: told[call] = f"nothing: {eval(call)!r}"
    except Exception as e: told[call] = f"{type(e).__name__}: {e}"
print(json.dumps(told))
"""


def test_what_stands_in_the_wrong_place_is_told():
    "In a process of its own: under test the types of all arguments are checked before a function sees them."
    ran = subprocess.run([sys.executable, "-c", AS_A_USER, json.dumps(list(WRONG_PLACES))], capture_output=True, text=True)
    assert not ran.returncode, ran.stderr
    told = json.loads(ran.stdout.splitlines()[-1])
    assert not {call: said for call, said in told.items() if not re.match(f"ValueError: .*{WRONG_PLACES[call]}", said)}


@pytest.mark.parametrize("bad, match", [(dict(target_kl=-1.0), "positive"), (dict(target_kl=float("nan")), "positive"),
                                        (dict(stat="p50"), "p95"), (dict(sign=2), "sign"), (dict(bracket=(3, 1)), "bracket"),
                                        (dict(bracket=(4,)), "bracket"), (dict(bracket=(0, 1, 2)), "bracket"),
                                        (dict(tol=0.0), "tol"),
                                        (dict(records=[]), "no records"), (dict(records=SAMPLES[:1]), "split")])
def test_bad_arguments(bad, match):
    model, tok = tiny_model()
    a = adapter_of("lora", model)
    before = state(model)
    kw = dict(records=SAMPLES[:4], target_kl=0.1) | bad
    with pytest.raises(ValueError, match=match): calibrate_c(model, tok, a, kw.pop("records"), kw.pop("target_kl"), **kw)
    for cs in ([], [float("inf")]):
        with pytest.raises(ValueError, match="finite"): kl_curve(model, tok, a, PAIRS, cs)
    other = build(seed=1)
    with pytest.raises(ValueError, match="another model"): kl_curve(other, tok, a, PAIRS, [1.0])
    with a(model), pytest.raises(RuntimeError, match="attached"): kl_curve(model, tok, a, PAIRS, [1.0])
    assert not changes(before, model)
