"""Contrast training and the gradient cosine on tiny models, against numbers by hand and against separate forwards."""
import math
import random

import pandas as pd
import pytest
import torch
from models import adapter_of, build, changes, seeded, state

from modlab import ContrastConfig, ModulatedLoRA, ModulatedPiSSA, collate, contrast, gradient_cosine, kl_curve, tiny_model
from modlab.learn.contrast import _COLUMNS as COLUMNS
from modlab.learn.contrast import _pair_losses as pair_losses
from modlab.learn.contrast import _push as push
from modlab.learn.contrast import _reader as reader
from modlab.learn.contrast import encode_pairs
from modlab.learn.loop import NonFiniteLoss
from modlab.learn.pcgrad import _pcgrad as pcgrad
from modlab.learn.pcgrad import without_conflict
from modlab.maths.divergence import kl_rev, token_nll

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = ("lora", "pissa-unextracted", "pissa-extracted")
LETTERS = [dict(prompt=f"{n}?", cho="a" * (3 + n % 4), rej="b" * (2 + n % 3)) for n in range(48)]
TRAIN, HELD_OUT = LETTERS[:36], LETTERS[36:]
QUICK = dict(lr=1e-3, epochs=2)

def fresh(kind, model): # a no-op
    if kind == "lora": return ModulatedLoRA(model, r=4, generator=seeded(0))
    return ModulatedPiSSA(model, r=24, selection_score="s_only", init=(0.0, 0.0), extract=kind == "pissa-extracted")

def slope(curve): return curve.margin.iloc[-1] - curve.margin.iloc[0]

def test_losses_are_what_plain_python_makes_of_them():
    nll, kl = torch.rand(2, 2, 5, generator=seeded(0)) * 4, torch.rand(2, 2, 5, generator=seeded(1))
    found = pair_losses(nll, kl, ContrastConfig(beta=0.7, lam=0.3))
    for n, ((cp, rp), (cm, rm)) in enumerate(nll.permute(2, 0, 1).tolist()):
        up, down = (math.log(1 + math.exp(-0.7 * m)) / 0.7 for m in (rp - cp, cm - rm))
        at_plus, at_minus = cp + up + 0.3 * kl[0, :, n].mean().item(), rm + down + 0.3 * kl[1, :, n].mean().item()
        wanted = dict(loss=(at_plus + at_minus) / 2, nll_cho=cp, nll_rej=rm, margin_plus=rp - cp, margin_minus=rm - cm,
                      push_plus=up, push_minus=down, kl=kl[:, :, n].mean().item())
        assert {k: found[k][n].item() for k in wanted} == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("loss, own, other, value, slopes", [
    ("logistic", 1.0, 1.0, math.log(2), (0.5, -0.5)), ("logistic", 60.0, 0.0, 60.0, (1.0, -1.0)),
    ("logistic", 0.0, 60.0, 0.0, (0.0, 0.0)), ("capped", 3.0, 4.0, -1.0, (0.0, -0.25)), ("capped", 3.0, 0.5, -0.5, (0.0, -1.0))])
def test_the_push_and_how_hard_it_pushes(loss, own, other, value, slopes):
    x = torch.tensor([[own], [other]], requires_grad=True)
    y = push(x[0], x[1], loss=loss)
    y.sum().backward()
    assert y.item() == pytest.approx(value, abs=1e-6) and x.grad.flatten().tolist() == pytest.approx(slopes, abs=1e-6)


def test_pcgrad_by_hand():
    g, h = [torch.tensor([2.0, 0.0]), torch.tensor([1.0])], [torch.tensor([-1.0, 3.0]), torch.tensor([0.0])]
    for one, two in ((g, h), (h, g)):
        first, second = pcgrad(one, two)  # g·h = -2, g·g = 5, h·h = 10: g + h/5 and h + 2g/5
        assert first.tolist() == pytest.approx([2 - 1 / 5 - 1 + 4 / 5, 3 / 5 + 3]) and second.item() == pytest.approx(1 + 2 / 5)
    assert [t.tolist() for t in pcgrad(g, g)] == [[4.0, 0.0], [2.0]], "no conflict: the plain sum"
    rest = [torch.tensor([-100.0, 0.0]), torch.tensor([0.0])]
    assert torch.equal(without_conflict([rest, g, h])[0], rest[0] + pcgrad(g, h)[0]), "the rest conflicts and is left as it is"


@pytest.mark.parametrize("kind", KINDS)
def test_one_batch_is_four_forwards_over_all_logits(kind):
    model, tok = tiny_model()
    a, pairs = adapter_of(kind, model), encode_pairs(tok, LETTERS[:5], 512)
    with torch.no_grad(), a(model, 0.0):
        nll, kl = reader(model, a, pairs, 0.8, 2)([4, 0, 3])
        for at, pair in enumerate((pairs[4], pairs[0], pairs[3])):
            for s, encoded in enumerate((pair.cho, pair.rej)):
                b = collate([encoded])
                answers = b.is_target[0, 1:]
                a.set_coeff(0.0)
                base = model(**b.inputs()).logits[0, :-1][answers]
                for d, c in enumerate((0.8, -0.8)):
                    a.set_coeff(c)
                    y = model(**b.inputs()).logits[0, :-1][answers]
                    alone = token_nll(y, b.input_ids[0, 1:][answers]).mean(), kl_rev(y, base).mean()
                    torch.testing.assert_close((nll[d, s, at], kl[d, s, at]), alone, atol=1e-5, rtol=1e-4)
    assert kl.min() > 1e-3, "the doses do something"


@pytest.mark.parametrize("kind, kwargs", [("lora", {}), ("lora", dict(loss="capped")), ("lora", dict(pcgrad=True)),
                                          ("pissa-unextracted", dict(lr=3e-2)), ("pissa-extracted", dict(lr=3e-2))])
def test_the_margin_rises_with_the_dose_on_pairs_not_seen(kind, kwargs):
    model, tok = tiny_model()
    a = fresh(kind, model)
    before = state(model)
    run = contrast(model, tok, a, TRAIN, ContrastConfig(**QUICK | kwargs))
    assert not changes(before, model) and run.adapter is a and not a.attached and all(p.grad is None for p in a.parameters())
    curve = kl_curve(model, tok, a, HELD_OUT, [-1.0, -0.5, 0.0, 0.5, 1.0])
    assert curve.margin.is_monotonic_increasing and slope(curve) > 2
    assert curve.nll.iloc[4] < curve.nll.iloc[2] - 0.3 and curve.nll_rej.iloc[0] < curve.nll_rej.iloc[2] - 0.3
    log = run.log
    assert tuple(log) == COLUMNS and (log.split == "train").sum() == 16 and log[log.split == "val"].epoch.tolist() == [-1, 0, 1]
    val, m0 = log[log.split == "val"], log.margin_plus.iloc[0]
    assert val.kl.iloc[0] < 1e-6 and abs(m0 - val.margin_minus.iloc[0]) < 1e-4 and "ContrastRun: 16 steps" in repr(run)
    assert (val.assign(up=-val.margin_plus)[["nll_cho", "nll_rej", "margin_minus", "up", "loss"]].diff()[1:] < 0).to_numpy().all()


def test_shuffled_labels_teach_nothing():
    model, tok = tiny_model()
    def learned(pairs):
        run = contrast(model, tok, fresh("lora", model), pairs, ContrastConfig(val_frac=0.0, **QUICK))
        return slope(kl_curve(model, tok, run.adapter, HELD_OUT, [-1.0, 1.0]))
    swapped = [set(random.Random(seed).sample(range(36), 18)) for seed in range(4)]
    controls = [learned([dict(p, cho=p["rej"], rej=p["cho"]) if n in of else p for n, p in enumerate(TRAIN)]) for of in swapped]
    real = learned(TRAIN)  # one control alone has its luck: half of 36 labels are longer or shorter answers too
    assert abs(sum(controls) / 4) < 0.15 * real and max(map(abs, controls)) < 0.5 * real


def test_the_kl_term_bounds_the_drift():
    model, tok = tiny_model()
    def drift(lam):
        run = contrast(model, tok, fresh("lora", model), TRAIN, ContrastConfig(lr=3e-3, epochs=2, lam=lam))
        return kl_curve(model, tok, run.adapter, HELD_OUT, [-1.0, 1.0]).kl_rev_mean.mean()
    assert 2 * drift(30.0) < drift(3.0) < drift(0.0)


def test_a_run_repeats_bit_for_bit_and_asks_no_global_random_state():
    def run(noise):
        model, tok = tiny_model()
        torch.manual_seed(noise)
        with torch.no_grad(): return contrast(model, tok, fresh("lora", model), TRAIN[:9], ContrastConfig(epochs=1))
    one, two = run(1), run(2)
    assert all(torch.equal(p, q) for p, q in zip(one.adapter.parameters(), two.adapter.parameters()))
    pd.testing.assert_frame_equal(one.log, two.log)


@pytest.mark.parametrize("kind", KINDS)
def test_known_cosines_of_a_no_op(kind):
    model, tok = tiny_model()
    a = fresh(kind, model)
    before = state(model)
    same = gradient_cosine(model, tok, a, [dict(p, rej=p["cho"]) for p in LETTERS[:5]], batch_size=2)
    margin = gradient_cosine(model, tok, a, LETTERS[:5], loss="margin", c=0.5, batch_size=3)
    assert (same.cosine + 1).abs().max() < 1e-4 and (margin.cosine - 1).abs().max() < 1e-4
    assert list(same) == ["name", "layer", "role", "cosine"] and same.layer.tolist()[-2:] == [3, "all"] and len(same) == 29
    assert not changes(before, model) and not a.attached and all(p.grad is None for p in a.parameters())


def test_the_cosine_of_gradients_by_hand():
    model, tok = tiny_model()
    a, both = adapter_of("lora", model), []
    for c, side in ((1.0, "cho"), (-1.0, "rej")):
        with a(model, c):
            sides = [getattr(p, side) for p in encode_pairs(tok, LETTERS[:3], 512)]
            nll = [token_nll(model(torch.tensor([ids])).logits[0, n - 1:-1], torch.tensor(ids[n:])).mean() for ids, n in sides]
            both.append(dict(zip(dict(a.named_parameters()), torch.autograd.grad(sum(nll), list(a.parameters())))))
    flat = lambda of, part: torch.cat([g.flatten() for name, g in of.items() if part in name])
    table = gradient_cosine(model, tok, a, LETTERS[:3], batch_size=2).set_index("name").cosine
    for name, part in (("model.layers.1.mlp.up_proj", ".layers.1.mlp.up_proj"), ("all", "")):
        by_hand = torch.cosine_similarity(*(flat(of, part) for of in both), dim=0).item()
        assert table[name] == pytest.approx(by_hand, abs=1e-4) and abs(by_hand) < 0.999


def test_a_zero_gradient_has_no_cosine_and_says_so(caplog):
    model, tok = tiny_model()
    model.model.layers[2].mlp.down_proj.weight.data.zero_()  # nothing flows back through it
    a, name = fresh("lora", model), "model.layers.2.mlp.up_proj"
    table = gradient_cosine(model, tok, a, LETTERS[:2]).set_index("name").cosine
    assert math.isnan(table[name]) and table.notna().sum() == 27 and "zero in 2 of 28" in caplog.text


def test_a_gradient_of_a_loss_that_is_no_number_is_refused():
    model, tok = tiny_model()
    model.get_input_embeddings().weight.data[tok("z").input_ids[0]] = math.nan
    a, pairs = fresh("lora", model), [*LETTERS[:4], dict(prompt="z", cho="a", rej="b"), LETTERS[5]]
    before = state(model)
    with pytest.raises(ValueError, match=r"loss of cho is not finite among the pairs \[4, 5\]"):
        gradient_cosine(model, tok, a, pairs, batch_size=2)
    assert not a.attached and not {k for k in changes(before, model) if "values" not in k}


@pytest.mark.parametrize("bad, match", [
    ([dict(prompt="?", cho="yes", rej="yes")], "pair 5: cho and rej are the same"),
    ([dict(prompt="?", cho="", rej="b")], "pair 5, cho"), ([dict(prompt="?", cho="a", rej=None)], "pair 5, rej"),
    ([dict(prompt="?" * 40, cho="a", rej="b")], "pair 5, cho.*max_len=32"),
    ([dict(prompt="?", cho="c" * 40 + "a", rej="c" * 40 + "b")], "pair 5.*same.*max_len=32"),
    ([dict(prompt=[dict(role="user", content="?")], cho="a", rej="b")], "pair 5, cho.*chat template"),
    ([dict(prompt=[dict(role="user")], cho="a", rej="b")], "pair 5, cho.*chat template"),
    ([dict(prompt="?", completion="a")], "record 5"), (slice(0, 2), "2 pairs are fewer than batch_size=4"),
    (slice(0, 0), "no records"), ([dict(prompt="?", cho="a", rej="b" * 60)], None)])
def test_bad_pairs_are_named_before_anything_starts(bad, match):
    model, tok = tiny_model()
    tok.chat_template = None
    a, cfg = fresh("lora", model), ContrastConfig(max_len=32)
    pairs = LETTERS[bad] if isinstance(bad, slice) else LETTERS[:5] + bad
    if match is None:  # a side that is merely cut
        assert len(contrast(model, tok, a, pairs, cfg).log)
        return
    before, B = state(model), {n: b.clone() for n, b in a.B.items()}
    with pytest.raises(ValueError, match=match): contrast(model, tok, a, pairs, cfg)
    assert not changes(before, model) and not a.attached and all(torch.equal(b, B[n]) for n, b in a.B.items())


def test_other_bad_input():
    model, tok = tiny_model()
    a = fresh("lora", model)
    for f in (contrast, gradient_cosine):
        with pytest.raises(ValueError, match="another model"): f(build(seed=1), tok, a, TRAIN)
        with pytest.raises(ValueError, match="expected pairs"): f(model, tok, a, [dict(prompt="?", completion="a")] * 9)
        with a(model), pytest.raises(RuntimeError, match="attached already"): f(model, tok, a, TRAIN)
    for bad in (dict(loss="kl"), dict(c=-1.0), dict(batch_size=0)):
        with pytest.raises(ValueError, match=next(iter(bad))): gradient_cosine(model, tok, a, TRAIN, **bad)
    for bad in (dict(C=0.0), dict(beta=-1.0), dict(lam=-0.1), dict(lam=math.inf), dict(loss="dpo"), dict(epochs=0)):
        with pytest.raises(ValueError, match=next(iter(bad))): ContrastConfig(**bad)


def test_a_loss_that_is_no_number_stops_with_the_last_good_state():
    model, tok = tiny_model()
    model.get_input_embeddings().weight.data[tok("z").input_ids[0]] = math.nan
    a, before, pairs = fresh("lora", model), state(model), [dict(prompt="z", cho="a", rej="b"), *LETTERS[:20]]
    with pytest.raises(NonFiniteLoss) as e: contrast(model, tok, a, pairs, ContrastConfig(val_frac=0.0))
    assert e.value.samples == [0] and len(e.value.log) == e.value.step - 1 > 0 and tuple(e.value.log) == COLUMNS
    assert all(p.isfinite().all() and p.grad is None for p in a.parameters()) and any(b.any() for b in a.B.values())
    assert not a.attached and not {k for k in changes(before, model) if "values" not in k}
