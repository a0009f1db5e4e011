"""The study and the explorer without a browser: callbacks are called, and what they wrote into the widgets is read."""
import copy
import gc
import html
import math
import re
import subprocess
import sys
import threading
import time
import weakref
from contextlib import nullcontext

import browser_test
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from models import adapter_of, changes, hooks, state
from test_legacy import pissa_file

from modlab import (
    Calibration,
    ModulatedLoRA,
    ModulatedPiSSA,
    PiSSAHistoryBake,
    explore,
    kl_curve,
    load_pairs,
    spectrum_table,
    tiny_model,
)
from modlab.show.beside import write_beside
from modlab.show.latest import Latest, Stale, breaking_off
from modlab.show.page import beside, failed, no_reading, page, reading, widgets_of
from modlab.show.study import NO_RECORDS, Study, measure, nearest, no_spectrum, spectra, static

pytestmark = pytest.mark.usefixtures("one_thread")
PAIRS = [dict(prompt=f"question {n}", cho="abcdefgh"[: 2 + n % 5] * 3, rej="xyz" * (1 + n % 3)) for n in range(4)]
SAMPLES = [dict(prompt=f"q{n}", completion="abc" * (n + 1)) for n in range(4)]
KINDS = ["lora", "pissa-unextracted", "pissa-extracted"]
EVERY_KIND = [*KINDS, "old-file"]  # what a page must work with


def never() -> bool: return False


def any_adapter(kind, model, path):
    "An adapter of any kind, also one from a file of the earlier implementation, which has no chosen_idx."
    if kind != "old-file": return adapter_of(kind, model)
    pissa_file(path, model)
    return ModulatedPiSSA.from_checkpoint(model, path)


def widgets_in(part) -> list:
    "A widget and all that stand within it."
    return [part, *(w for child in getattr(part, "children", ()) for w in widgets_in(child))]


def visible(part, wanted) -> bool:
    "Is a widget on the page, with nothing around it hidden?"
    if part.layout.display == "none": return False
    return part is wanted or any(visible(child, wanted) for child in getattr(part, "children", ()))


def plain(text: str) -> str:
    return html.unescape(re.sub("<[^>]*>", "", text))


@pytest.fixture
def opened(tmp_path):
    "Makes explorers, and closes them whatever happens."
    made = []
    def make(kind="pissa-unextracted", records=PAIRS, **kw):
        model, tok = tiny_model()
        options = dict(cs=[-1, 1], max_new_tokens=6, min_new_tokens=6, widgets=True) | kw
        made.append(explore(model, tok, any_adapter(kind, model, tmp_path / "old.safetensors"), records, **options))
        return made[-1]
    yield make
    for e in made: e.close()


# ---- text ----

@pytest.mark.parametrize("kind", KINDS)
def test_two_rows_are_two_texts(kind):
    model, tok = tiny_model()
    a, seen, options = adapter_of(kind, model), [], dict(max_new_tokens=12, min_new_tokens=12)
    before = state(model)
    write_beside(model, tok, a, "a question", 1.5, seen.append, never, **options)
    ids = tok("a question", return_tensors="pt")
    for row, c in enumerate((0.0, 1.5)):
        with a(model, c): alone = model.generate(**ids, do_sample=False, pad_token_id=0, **options)
        assert seen[-1][row] == tok.decode(alone[0, ids.input_ids.shape[1]:], skip_special_tokens=True)
    assert seen[0] == ["", ""] and len(seen) == 13 and seen[-1][0] != seen[-1][1]
    assert not a.attached and not hooks(model) and not changes(before, model)


def test_a_text_stops_when_asked_to():
    model, tok = tiny_model()
    a, seen = adapter_of("lora", model), []
    write_beside(model, tok, a, "a question", 1.0, seen.append, lambda: len(seen) >= 3, max_new_tokens=200, min_new_tokens=200)
    assert len(seen) < 6 and not a.attached


def test_an_error_in_the_middle_of_a_text_leaves_nothing():
    model, tok = tiny_model()
    a = adapter_of("lora", model)
    def broken(texts):
        if texts[0]: raise OSError("the page is gone")
    with pytest.raises(OSError, match="gone"): write_beside(model, tok, a, "a question", 1.0, broken, never, max_new_tokens=20)
    with pytest.raises(ValueError, match="no token"): write_beside(model, tok, a, "", 1.0, broken, never)
    assert not a.attached and not hooks(model)


def test_texts_are_escaped():
    assert "<script>" not in beside("<script>", "<script>x</script>", 1.0)


# ---- curve and spectrum ----

def test_between_measured_doses_the_curve_is_interpolated():
    curve = pd.DataFrame(dict(c=[-1.0, 0, 2], kl_rev_mean=[1.0, 0, 4], nll=[3.0, 1, 2]))
    assert nearest(curve, 1.0) == pytest.approx(dict(kl_rev_mean=1.0, nll=1.5))
    assert nearest(curve, -1.0) == dict(kl_rev_mean=1.0, nll=3.0) and np.isnan(nearest(curve, 3.0)["nll"])
    full = curve.assign(kl_rev_p95=curve["kl_rev_mean"])
    assert "interpolated" in reading(full, 1.0) and "completion 1.500 (+0.500)" in plain(reading(full, 1.0))
    assert "measured" in reading(full, 2.0) and "measuring" in reading(full, 3.0) and "measuring" in reading(full[:0], 0.0)


def test_a_study_measures_the_current_dose_first_and_keeps_what_it_has():
    model, tok = tiny_model()
    x = Study(model, tok, adapter_of("lora", model), PAIRS, [-2, -1, 1, 2], calibrated=0.3)
    assert x.c == 0.3 and x.pending() == [0.3, 0.0, -1.0, 1.0, -2.0, 2.0]
    turns = iter([False] * 4)  # asked by the loop, and before each forward
    with pytest.raises(Stale): measure(x, lambda: next(turns, True))
    assert len(x.curve) == 0 and not x.adapter.attached and not hooks(model)
    seen = []
    measure(x, lambda: len(seen) == 1, lambda: seen.append(x.curve["c"].tolist()))
    assert seen == [[-1.0, 0.0, 0.3]], "told to stop, and what was measured is kept"
    measure(x, never)
    assert x.curve["c"].tolist() == [-2, -1, 0, 0.3, 1, 2] and not x.pending()


def test_what_other_scores_would_choose_is_what_they_choose():
    for kind in KINDS[1:]:
        model, tok = tiny_model()
        a = adapter_of(kind, model)
        x = Study(model, tok, a, load_pairs("test")[:3], [1])
        name = list(a.layers)[3]
        table = spectra(x, name, ["s_only", "wanda", "grad_fisher"], never).pivot(index="index", columns="mode", values="chosen")
        fresh, _ = tiny_model()
        from modlab import capture_activations, capture_gradients
        X, gradients = capture_activations(fresh, tok, x.records, a.cfg), capture_gradients(fresh, tok, x.records, a.cfg)
        X = {n: X[n] | {"gradients": gradients[n]} for n in X}
        for mode in ("s_only", "wanda", "grad_fisher"):
            other = ModulatedPiSSA(fresh, r=a.cfg.r, targets=a.cfg.targets, selection_score=mode, calibration_activations=X,
                                   extract=False)
            assert table.index[table[mode]].tolist() == other.chosen_idx[name].tolist(), (kind, mode)
        assert table.index[table["held"]].tolist() == a.chosen_idx[name].tolist() and not a.attached


def test_samples_have_no_pairs_score():
    model, tok = tiny_model()
    a = adapter_of("pissa-unextracted", model)
    x, name = Study(model, tok, a, SAMPLES, [1]), next(iter(a.layers))
    assert set(spectra(x, name, ["act_only"], never)["mode"]) == {"held", "act_only"}
    with pytest.raises(ValueError, match="cho"): spectra(x, name, ["cho_rej_min_std"], never)


def test_what_breaks_off_is_in_no_copy():
    model, tok = tiny_model()
    text = tok("a", return_tensors="pt")
    with breaking_off(model, lambda: True): twin = copy.deepcopy(model)
    assert not hooks(twin) and torch.equal(twin(**text).logits, model(**text).logits)


def test_breaking_off_takes_its_hook_along():
    model, tok = tiny_model()
    text, seen = tok("a", return_tensors="pt"), []
    with pytest.raises(Stale), breaking_off(model, lambda: True):
        elsewhere = threading.Thread(target=lambda: seen.append(model(**text)))
        elsewhere.start(), elsewhere.join()
        assert seen, "other threads are let through"
        model(**text)
    assert not hooks(model)


@pytest.mark.parametrize("bad, match", [(dict(cs=[0]), "other than 0"), (dict(cs=[float("nan")]), "finite"),
                                        (dict(records=[]), "no records"), (dict(records=[dict(prompt="a")]), "record 0")])
def test_bad_arguments(bad, match):
    model, tok = tiny_model()
    kw = dict(records=PAIRS) | bad
    with pytest.raises(ValueError, match=match): explore(model, tok, adapter_of("lora", model), **kw)
    other, _ = tiny_model()
    with pytest.raises(ValueError, match="another model"): explore(other, tok, adapter_of("lora", model), PAIRS)


# ---- threads ----

def test_the_newest_request_wins():
    began, go, ran = threading.Event(), threading.Event(), []
    worker = Latest(ran.append)
    def first(stale):
        began.set()
        go.wait(10)
        ran.append(("first", stale()))
    worker.ask(first)
    began.wait(10)
    skipped, last = worker.ask(lambda stale: ran.append("second")), worker.ask(lambda stale: ran.append(("third", stale())))
    go.set()
    last.result(10), skipped.result(10)
    assert ran == [("first", True), ("third", False)]
    worker.close()
    assert worker.ask(first) is None and len(ran) == 2


def test_a_thread_survives_an_error():
    errors = []
    worker = Latest(errors.append)
    worker.ask(lambda stale: 1 / 0).result(10)
    assert worker.ask(lambda stale: errors.append("next")).result(10) is None
    worker.close()
    assert isinstance(errors[0], ZeroDivisionError) and errors[1:] == ["next"]


# ---- the page ----

def settled(e) -> None:
    "Until no request is on its way."
    for ask in (e.write, e.look, e.redraw): ask().result(60)
    e.redraw().result(60)


@pytest.mark.parametrize("kind", KINDS)
def test_moving_the_slider(opened, kind):
    e = opened(kind)
    settled(e)
    text, doses = e.ui.text.value, e.ui.doses.value
    e.ui.c.value = -0.7
    settled(e)
    assert e.c == -0.7 and np.isclose(e.curve["c"], -0.7).any() and len(e.curve) == 4  # 0 and the two ends besides
    assert "c = -0.70" in e.ui.text.value and e.ui.text.value != text
    assert e.ui.doses.value != doses and bytes(e.ui.doses.value[:4]) == b"\x89PNG"
    assert "measured" in e.ui.reading.value and e.ui.status.value == "" and e.error is None
    assert not e.adapter.attached and not hooks(e.model)


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_everything_is_on_the_page_whatever_the_adapter(opened, kind):
    e = opened(kind)
    settled(e)
    hidden = {name for name, w in vars(e.ui).items() if name != "scores" and not visible(e.box, w)}
    assert hidden == (set() if kind.startswith("pissa") else {"layer", "spectrum"})
    assert all(visible(e.box, w) == kind.startswith("pissa") for w in e.ui.scores)
    assert e.texts[0] and e.error is None and e.ui.doses.value


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_no_two_widgets_share_a_layout_or_a_style(opened, kind):
    parts = widgets_in(opened(kind).box)
    for trait in ("layout", "style", "children"):
        values = [id(value) for w in parts if (value := getattr(w, trait, None))]
        assert len(values) > 5 and len(values) == len(set(values)), f"one {trait} in two widgets"


def test_dragging_ends_at_the_last_place(opened):
    e = opened(max_new_tokens=200, min_new_tokens=200)
    for c in np.linspace(0.9, -0.9, 40): e.ui.c.value = float(c)
    e.stop().result(60)  # what was being written stops at once, and the curve is measured where the slider stands
    assert e.c == -0.9 and np.isclose(e.curve["c"], -0.9).any() and len(e.curve) <= 6


def test_stop_keeps_what_was_written(opened):
    e = opened(max_new_tokens=400, min_new_tokens=400)
    started = e.write()
    end = time.monotonic() + 30
    while not e.texts[0] and time.monotonic() < end: time.sleep(0.01)
    e.ui.stop.click()
    started.result(10)
    written = e.texts
    e.stop().result(60)
    assert written[0] and e.texts == written and e.ui.status.value == ""


def test_an_error_is_said_and_the_next_request_works(opened):
    e = opened()
    e.ui.chat.value, e.ui.prompt.value = False, ""
    e.write().result(60)
    assert plain(e.ui.status.value) == f"ValueError {e.error}" and "no token" in e.ui.status.value and not hooks(e.model)
    e.ui.prompt.value = "a question"
    settled(e)
    assert e.ui.status.value == "" and e.texts[0]


def test_errors_are_escaped_and_those_of_the_spectrum_stand_beside_it(opened, monkeypatch):
    e = opened()
    def broken(*args): raise RuntimeError("<b>no</b>")
    monkeypatch.setattr(sys.modules["modlab.show.explore"], "spectra", broken)  # modlab.show.explore is the function
    e.look().result(60)
    assert "&lt;b&gt;no" in e.ui.note.value and "RuntimeError" in e.ui.note.value
    e.write().result(60)
    assert e.ui.status.value == ""


def test_an_adapter_in_use_is_an_error_on_the_page(opened):
    e = opened()
    settled(e)
    with e.adapter(e.model, 1.0):
        e.ui.c.value = 0.33
        e.write().result(60)
        assert "attached already" in e.ui.status.value and e.adapter.c == 1.0, "somebody else's block is left alone"
    settled(e)
    assert e.ui.status.value == ""


def test_picking_a_layer_and_scores(opened):
    e = opened(records=load_pairs("test")[:2])
    settled(e)
    seen = [e.ui.spectrum.value]
    for control, value in ((e.ui.layer, e.ui.layer.options[-1]), *((b, True) for b in e.ui.scores)):
        control.value = value
        e.look().result(60)
        assert e.ui.note.value == "" and e.ui.spectrum.value not in seen
        seen.append(e.ui.spectrum.value)
    assert not hooks(e.model)


def test_a_lora_has_no_spectrum(opened):
    e = opened("lora")
    e.look().result(60)
    assert "no spectrum" in e.ui.note.value and e.ui.layer.layout.display == e.ui.spectrum.layout.display == "none"


def test_calibrating(opened):
    e = opened(records=load_pairs("test")[:4])
    e.ui.budget.value = 1e-3
    settled(e)
    assert e.ui.to.disabled
    e.fit().result(60)
    assert 0 < e.calibrated < 1 and f"{e.calibrated:+.2f}" in e.ui.to.description and np.isclose(e.curve["c"], e.calibrated).any()
    e.ui.to.click()
    assert e.c == e.calibrated
    e.ui.budget.value = 500.0
    e.fit().result(60)
    assert "no dose between 0 and 1" in e.ui.status.value and not e.adapter.attached


def test_a_calibration_that_failed_marks_nothing():
    model, tok = tiny_model()
    nan = float("nan")
    lost = Calibration(nan, False, nan, nan, 0, (nan, nan), 1.0, "p95", (1, 1))
    assert Study(model, tok, adapter_of("lora", model), PAIRS, [1], lost).calibrated is None


@pytest.mark.parametrize("moment", ["writing", "measuring"])
def test_closing_in_the_middle_leaves_the_model_free(opened, moment):
    e = opened(max_new_tokens=400 if moment == "writing" else 1, min_new_tokens=1, cs=list(range(1, 40)))
    end = time.monotonic() + 30
    while moment not in e.ui.busy.value and time.monotonic() < end: time.sleep(0.001)
    assert moment in e.ui.busy.value
    e.ui.quit.click()
    assert not e.adapter.attached and not hooks(e.model) and e.adapter.c == 0
    assert "free" in e.ui.status.value and e.ui.c.disabled and e.ui.go.disabled
    assert e.write() is None and e.redraw() is None
    e.ui.c.value = 3.0  # a late event is no error
    e.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("modlab-explore")]


def test_a_cell_that_runs_the_model_meanwhile_sees_it_undosed(opened):
    e = opened(cs=list(range(1, 30)), max_new_tokens=40)
    ids, fresh = e.tok("a question", return_tensors="pt"), ModulatedLoRA(e.model, r=2)
    assert e.pending(), "it is at work"
    with torch.no_grad(): alone = [torch.equal(e.model(**ids).logits, e.model(**ids).logits) for _ in range(40)]
    curve = kl_curve(e.model, e.tok, fresh, PAIRS, [1])
    assert all(alone) and curve.kl_rev_max.item() == 0, "nothing of it was seen"
    e.close()
    with torch.no_grad(): assert torch.equal(e.model(**ids).logits, tiny_model()[0](**ids).logits)


def test_a_block_elsewhere_acts_in_every_thread():
    model, tok = tiny_model()
    a, ids, seen = adapter_of("lora", model), tok("a question", return_tensors="pt"), []
    with torch.no_grad():
        base = model(**ids).logits
        with a(model, 1):
            worker = threading.Thread(target=lambda: seen.append(model(**ids).logits.detach()))
            worker.start(), worker.join()
            assert torch.equal(seen[0], model(**ids).logits) and not torch.equal(seen[0], base)


def test_closing_lets_go_of_the_model():
    model, tok = tiny_model()
    e = explore(model, tok, adapter_of("lora", model), PAIRS, cs=[1], widgets=True, max_new_tokens=1)
    e.close()
    gone = weakref.ref(model)
    del model, tok, e
    gc.collect()
    assert gone() is None


def test_what_will_not_do_leaves_the_open_one_alone(opened):
    e = opened()
    with pytest.raises(ValueError, match="finite"): explore(e.model, e.tok, e.adapter, PAIRS, cs=[math.nan], widgets=True)
    with pytest.raises(ValueError, match="record 1: cho is None"):
        explore(e.model, e.tok, e.adapter, [PAIRS[0], PAIRS[1] | dict(cho=None)], widgets=True)
    settled(e)
    assert not e.ui.c.disabled and e.error is None


def test_a_prompt_that_cannot_be_written_does_not_stop_the_curve(opened):
    e = opened(records=[dict(prompt="", completion="some text")])
    e.write().result(60)
    assert "no token" in e.ui.status.value and len(e.curve) == 3 and e.ui.busy.value == ""


def test_turns_before_the_last_are_kept(opened, monkeypatch):
    chat, seen = [dict(role="system", content="Be brief."), dict(role="user", content="Tea?")], []
    monkeypatch.setattr(sys.modules["modlab.show.explore"], "write_beside", lambda *args, **_: seen.append(args[3]))
    e = opened(records=[dict(prompt=chat, cho="Yea.", rej="no")])
    settled(e)
    e.ui.prompt.value = "Coffee?"
    settled(e)
    assert seen[0] == chat and seen[-1] == [chat[0], dict(role="user", content="Coffee?")]


def test_doses_on_one_side_can_be_calibrated(opened):
    e = opened(cs=[-2, -1], records=load_pairs("test")[:4])
    e.ui.budget.value = 0.02
    e.fit().result(60)
    assert e.calibrated < 0 and e.error is None


def test_a_second_one_on_the_same_model_closes_the_first(opened):
    e = opened()
    second = explore(e.model, e.tok, e.adapter, PAIRS, cs=[1], widgets=True, max_new_tokens=2)
    assert e.ui.c.disabled and "free" in e.ui.status.value and not second.ui.c.disabled
    settled(second)
    assert second.error is None
    second.close()


# ---- without records ----

@pytest.mark.parametrize("kind", EVERY_KIND)
def test_without_records_all_but_the_curve_works(opened, kind):
    e = opened(kind, records=None)
    settled(e)
    text = e.ui.text.value
    e.ui.c.value = -0.7
    e.ui.prompt.value = "a question"
    settled(e)
    assert e.texts[0] and e.ui.text.value != text and "c = -0.70" in e.ui.text.value and e.error is None
    assert NO_RECORDS in plain(e.ui.reading.value) and "records=" in NO_RECORDS and not visible(e.box, e.ui.doses)
    assert all(visible(e.box, w) for w in (e.ui.c, e.ui.prompt, e.ui.text, e.ui.reading, e.ui.go))
    assert len(e.curve) == 0 and not e.pending() and e.ui.busy.value == "" and NO_RECORDS in repr(e)


def test_without_records_nothing_is_calibrated_and_it_is_said_why(opened):
    e = opened(records=None)
    assert e.ui.fit.disabled and e.ui.budget.disabled and e.ui.fit.tooltip == NO_RECORDS
    e.fit().result(60)
    assert NO_RECORDS in plain(e.ui.status.value) and not e.adapter.attached
    settled(e)
    can = {box.description: not box.disabled for box in e.ui.scores}
    assert can == {mode: mode == "s_only" for mode in can} and len(can) >= 4
    e.ui.scores[0].value = True
    e.look().result(60)
    assert e.ui.note.value == "" and e.error is not None
    with pytest.raises(ValueError, match="records="): measure(e, never)
    with pytest.raises(ValueError, match="records="): spectra(e, e.ui.layer.value, ["wanda"], never)


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_without_records_and_without_a_page_the_figure_says_what_to_pass(kind, tmp_path):
    model, tok = tiny_model()
    x = explore(model, tok, any_adapter(kind, model, tmp_path / "old.safetensors"), cs=[-1, 1])
    kl, right, nll = x.figure.axes
    assert "records=" in kl.texts[0].get_text() and not kl.lines and not nll.lines and len(x.curve) == 0
    assert bool(right.lines) == kind.startswith("pissa") and "records=" in repr(x) and not hooks(model)
    plt.close(x.figure)


def test_nothing_is_measured_that_was_not_given():
    "The shipped pairs are of one axis, and not the one of every adapter."
    for name in ("explore", "study", "page"): assert not hasattr(sys.modules[f"modlab.show.{name}"], "load_pairs")


# ---- HTML ----

HOSTILE = "<script>alert(1)</script>&amp;"


def test_all_html_is_escaped(opened, monkeypatch):
    e = opened(records=[dict(prompt=HOSTILE, completion=HOSTILE)])
    monkeypatch.setattr(sys.modules["modlab.show.explore"], "write_beside", lambda *args, **_: args[5]([HOSTILE, HOSTILE]))
    settled(e)
    def broken(*args): raise type(HOSTILE, (RuntimeError,), {})(HOSTILE)
    monkeypatch.setattr(sys.modules["modlab.show.explore"], "spectra", broken)
    e.look().result(60)
    e.writer.ask(broken).result(60)
    texts = [w.value for w in widgets_of(e.ui) if type(w).__name__ == "HTML"]
    texts += [failed(type(HOSTILE, (ValueError,), {})("")), no_reading(1.0)]
    assert sum("&lt;script&gt;" in text for text in texts) >= 4 and not [text for text in texts if "<script" in text]


def test_a_kind_of_adapter_with_a_strange_name_is_escaped(opened, monkeypatch):
    e = opened("lora")
    monkeypatch.setattr(sys.modules["modlab.show.explore"], "no_spectrum", lambda adapter: HOSTILE)
    e.look().result(60)
    assert "<script" not in e.ui.note.value and "no spectrum" in no_spectrum(e.adapter)


# ---- without a page ----

@pytest.mark.parametrize("rounds", [1, 2])
def test_scores_can_be_tried_on_rounds_and_narrow_factors(rounds):
    model, tok = tiny_model()
    model = model.to(torch.bfloat16) if rounds == 2 else model
    *earlier, a = [ModulatedPiSSA(model, r=8, selection_score="s_only", dtype=torch.bfloat16) for _ in range(rounds)]
    name, x = next(iter(a.layers)), Study(model, tok, a, PAIRS, [1])
    if earlier:
        with pytest.raises(RuntimeError, match="PiSSAHistoryBake"): spectra(x, name, ["wanda"], never)
        assert not a.attached
    with PiSSAHistoryBake(model, [(e, 0.0) for e in earlier]) if earlier else nullcontext():
        table = spectra(x, name, ["s_only", "wanda"], never).set_index("index")
    assert set(spectrum_table(a)["mode"]) == {"s_only"}
    held, same = (table[table["mode"] == mode].chosen for mode in ("held", "s_only"))
    assert held.sum() == 8 and held.equals(same)
    with pytest.raises(ValueError, match="chosen for a ModulatedLoRA"): spectrum_table(adapter_of("lora", model))


def test_a_file_that_names_no_directions_still_has_a_figure(tmp_path):
    model, tok = tiny_model()
    pissa_file(tmp_path / "old.safetensors", model)
    x = explore(model, tok, ModulatedPiSSA.from_checkpoint(model, tmp_path / "old.safetensors"), PAIRS, cs=[1])
    assert "does not say" in x.figure.axes[1].texts[0].get_text() and len(x.curve) == 2



@pytest.mark.parametrize("kind", ["lora", "pissa-unextracted"])
def test_without_a_page_there_is_a_figure(kind):
    model, tok = tiny_model()
    assert not page()
    x = explore(model, tok, adapter_of(kind, model), SAMPLES, cs=[-1, 1], calibrated=0.5)
    assert type(x) is Study and "figure" in repr(x) and x.curve["c"].tolist() == [-1, 0, 0.5, 1]
    kl, right, nll = x.figure.axes
    assert plt.fignum_exists(x.figure.number) and kl.lines and nll.lines
    assert right.lines if kind != "lora" else "no spectrum" in right.texts[0].get_text()
    assert not hooks(model)
    x.close(), plt.close(x.figure)


def test_a_fresh_adapter_is_drawn_too():
    model, tok = tiny_model()
    x = static(Study(model, tok, ModulatedLoRA(model, r=2), SAMPLES, [1]))
    x.figure.canvas.draw()
    assert not x.curve["kl_rev_max"].any()
    plt.close(x.figure)


def test_a_page_is_known_by_its_server(monkeypatch):
    shell = type("Shell", (), dict(kernel=object(), user_ns={}))()
    fake = type(sys)("IPython")
    fake.get_ipython = lambda: shell
    monkeypatch.setitem(sys.modules, "IPython", fake)
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    assert not page(), "a kernel that executes a notebook as a batch"
    monkeypatch.setenv("JPY_SESSION_NAME", "notebook.ipynb")
    assert page()
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert not page()
    monkeypatch.delenv("JPY_SESSION_NAME")
    monkeypatch.delitem(sys.modules, "ipywidgets")
    shell.user_ns["__vsc_ipynb_file__"] = "notebook.ipynb"
    assert page()
    del shell.__class__.kernel
    assert not page(), "a terminal"


def test_without_ipywidgets():
    code = """
import sys; sys.modules["ipywidgets"] = None
from modlab import ModulatedLoRA, explore, tiny_model
model, tok = tiny_model()
a, records = ModulatedLoRA(model, r=2), [dict(prompt="a", completion="bc")]
print(explore(model, tok, a, records, cs=[1]).figure is not None)
try: explore(model, tok, a, records, cs=[1], widgets=True)
except ImportError as e: print(e)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=None)
    assert done.stdout.splitlines() == ["True", "widgets=True needs ipywidgets; run: pip install ipywidgets"], done.stderr[-2000:]


# ---- the browser test, where there is no browser ----

@pytest.mark.parametrize("arguments, code", [([], 1), (["--if-possible"], 0)])
def test_without_a_browser_it_is_said(arguments, code, monkeypatch, capsys):
    monkeypatch.delenv("MODLAB_CHROMIUM", raising=False)
    monkeypatch.setattr(browser_test, "NAMES", ())
    monkeypatch.setattr(browser_test, "install_chromium", lambda: None)
    assert browser_test.main(arguments) == code and "NOT RUN" in capsys.readouterr().out


def test_with_a_browser_a_failure_is_a_failure(monkeypatch, tmp_path):
    monkeypatch.setenv("MODLAB_CHROMIUM", "a browser")
    monkeypatch.setattr(browser_test, "install_driver", lambda: None)
    (tmp_path / "test_it.py").write_text("def test(): assert False")
    assert browser_test.main(["--if-possible", str(tmp_path), "-q", "-p", "no:cacheprovider"]) == 1
