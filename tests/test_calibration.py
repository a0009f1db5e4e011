"Calibration: the streamed route against the stored one, after rounds, on offloaded weights; what is refused; merged statistics."
import math
import weakref
from dataclasses import replace
from fractions import Fraction

import hypothesis.strategies as st
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from hypothesis import given, settings
from models import adapter_of, build, changes, hooks, seeded, state
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as kinds
from transformers import PreTrainedTokenizerFast

from modlab.adapters.pissa import ModulatedPiSSA
from modlab.learn import activations
from modlab.learn.activations import _first_targets, capture_activations, capture_statistics
from modlab.maths.statistics import ProjectionStats, flaw, project
from modlab.maths.svd import thin_svd
from modlab.model import cache
from modlab.model.cache import directions
from modlab.model.layers import dense_weight, layer_shape
from modlab.model.targets import LoRAConfig, find_targets
from modlab.model.text import batches

pytestmark = pytest.mark.usefixtures("one_thread")
MODES = ("wanda", "act_only", "cho_rej_min_std")
PAIRS = [dict(prompt=f"{q}? ", cho=a, rej=b) for q, a, b in (
    ("How is the sea", "Arr, it be wild and salty, matey!", "It is calm today, Sir; quite calm."),
    ("Tea", "Grog, ye lubber!", "Earl Grey, if I may suggest."),
    ("Where to", "To the ends of the earth!", "To the drawing room."),
    ("Who goes there", "A pirate, arr.", "Your butler, Madam, with the post."), ("Late", "Never!", "Sir."))]
SAMPLES = [dict(prompt=p["prompt"], completion=p["cho"]) for p in PAIRS]
FIELDS = ("mean", "m2", "mean_abs")


def letters():
    "A tokenizer of 64 letters, for models whose vocabulary is 96."
    signs = [c for c in sorted(pre_tokenizers.ByteLevel.alphabet()) if c in "Ġ!,.?;" or c.isascii() and c.isalpha()]
    core = Tokenizer(kinds.BPE(vocab={t: n for n, t in enumerate(["<pad>", "<bos>", "<eos>", *signs])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


TOK = letters()


@pytest.fixture(scope="module")
def before_any_round():
    "Statistics of the tiny Llama, whose weights are the same in every test."
    return capture_statistics(build(), TOK, PAIRS[:2])


def noise(*shape, seed=0): return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def chosen(model, data, mode, **kw):
    a = ModulatedPiSSA(model, r=6, selection_score=mode, calibration_activations=data, extract=False, **kw)
    return {name: idx.tolist() for name, idx in a.chosen_idx.items()}


def close(a, b, **kw):
    assert a.count == b.count
    for field in FIELDS: torch.testing.assert_close(getattr(a, field), getattr(b, field), **kw)


# --- the two routes

@pytest.mark.parametrize("arch, dtype", [("llama", torch.float32), ("llama", torch.bfloat16), ("gpt2", torch.float32),
                                         ("opt", torch.float32), ("neox", torch.float32), ("phi3", torch.float32),
                                         ("gemma3", torch.float32), ("gemma3_vision", torch.float32), ("qwen3", torch.float16)])
def test_both_routes_choose_the_same_directions(arch, dtype):
    model = build(arch, dtype)
    X, streams = (f(model, TOK, PAIRS, batch_size=2) for f in (capture_activations, capture_statistics))
    assert list(X) == list(streams) == list(find_targets(model))
    for name, layer in find_targets(model).items():
        _, S, Vh = thin_svd(dense_weight(layer))
        for side in ("cho", "rej"):
            close(streams[name][side], project(X[name][side], Vh), rtol=1e-4, atol=1e-5)
            assert torch.equal(streams[name][side].S, S)
    for mode in MODES: assert chosen(model, X, mode) == chosen(model, streams, mode)
    assert chosen(model, streams, "act_only") != chosen(model, streams, "s_only"), "the text has a say"


def test_streamed_means_and_deviations_are_numpys():
    model = build()
    X, streams = capture_activations(model, TOK, PAIRS), capture_statistics(model, TOK, PAIRS, batch_size=1)
    for name, layer in find_targets(model).items():
        Vh = thin_svd(dense_weight(layer))[2].double().numpy()
        for side in ("cho", "rej"):
            P, got = X[name][side].double().numpy() @ Vh.T, streams[name][side]
            assert abs(got.mean.numpy() - P.mean(0)).max() < 1e-6 * abs(P).max()
            assert abs(got.std.numpy() - P.std(0, ddof=1)).max() < 1e-6 * abs(P).max()
            assert abs(got.mean_abs.numpy() - abs(P).mean(0)).max() < 1e-6 * abs(P).max()


def test_one_text():
    model = build()
    X, streams = capture_activations(model, TOK, SAMPLES), capture_statistics(model, TOK, SAMPLES)
    assert all(isinstance(of, ProjectionStats) for of in streams.values())
    for mode in ("wanda", "act_only"): assert chosen(model, X, mode) == chosen(model, streams, mode)
    with pytest.raises(ValueError, match=r"q_proj.*'cho_rej_min_std'.*cho.*rej.*ProjectionStats.*capture_statistics.*pairs"):
        chosen(model, streams, "cho_rej_min_std")


def test_a_function_scores_streamed_statistics_too():
    model, seen = build(), []
    streams = capture_statistics(model, TOK, PAIRS)
    chosen(model, streams, lambda S, stats: seen.append(stats) or stats["cho"].std)
    assert [of["rej"] for of in seen] == [of["rej"] for of in streams.values()], "the very objects"


@pytest.mark.parametrize("max_tokens, batch_size", [(2, 3), (7, 1), (40, 8), (41, 1), (60, 3), (10_000, 3), (None, 8)])
def test_a_limit_means_the_same_on_both_routes(max_tokens, batch_size):
    model, cfg = build(), LoRAConfig(targets=r"1\..*(q|down)_proj")
    X = capture_activations(model, TOK, PAIRS, cfg, max_tokens=max_tokens, batch_size=batch_size)
    streams = capture_statistics(model, TOK, PAIRS, cfg, max_tokens=max_tokens, batch_size=batch_size)
    everything = capture_activations(model, TOK, PAIRS, cfg, max_tokens=None, batch_size=batch_size)
    for name, of in X.items():
        for side, x in of.items():
            assert torch.equal(x, everything[name][side][:max_tokens]) and len(x) == min(max_tokens or math.inf, len(x))
            assert streams[name][side].count == len(x)
            close(streams[name][side], project(x, thin_svd(model.get_submodule(name).weight.data)[2]), rtol=1e-4, atol=1e-5)


def test_no_more_batches_are_run_than_needed():
    model, calls = build(), []
    find_targets(model) # a text is run once, to see which layers it reaches
    model.model.register_forward_pre_hook(lambda *args: calls.append(1))
    capture_statistics(model, TOK, PAIRS, max_tokens=len(PAIRS[0]["cho"]), batch_size=1)
    assert len(calls) == 2, "the first record is enough on either side"
    batch = next(batches(TOK, PAIRS, "cho"))
    for n in (0, 1, 50, 1000): assert _first_targets(batch, n).is_target.sum() == min(n, int(batch.is_target.sum()))
    assert torch.equal(_first_targets(batch, 50).is_target & batch.is_target, _first_targets(batch, 50).is_target)


@pytest.mark.parametrize("f", [capture_activations, capture_statistics])
def test_layers_that_share_an_input_share_the_read(f, monkeypatch):
    model, read, plain = build(), [], activations._completion_rows
    monkeypatch.setattr(activations, "_completion_rows", lambda x, *args: read.append(x.shape[-1]) or plain(x, *args))
    f(model, TOK, PAIRS)
    one = [n for n in find_targets(model) if n.endswith(("q_proj", "o_proj", "gate_proj", "down_proj"))]
    widths = [layer_shape(model.get_submodule(n))[1] for n in one]
    assert read == 2 * widths, "of seven layers a block, four read something of their own"


def test_nothing_of_a_token_is_kept(monkeypatch):
    "The rows of at most two inputs are there at a time, and none when it is over: memory does not grow with tokens."
    model, alive, most, plain = build(), [], [], activations._completion_rows
    def watched(*args):
        rows = plain(*args)
        most.append(1 + sum(r() is not None for r in alive))
        alive.append(weakref.ref(rows))
        return rows
    monkeypatch.setattr(activations, "_completion_rows", watched)
    streams = capture_statistics(model, TOK, PAIRS, batch_size=1)
    assert len(alive) == 2 * 16 * len(PAIRS) and max(most) <= 2 and not any(r() is not None for r in alive)
    for of in streams.values():
        assert all(t.untyped_storage().nbytes() == 8 * len(t) for s in of.values() for t in (s.mean, s.m2, s.mean_abs))


# --- rounds

@pytest.mark.parametrize("extract", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_round_is_scored_on_its_own_directions(extract, dtype):
    model = build(dtype=dtype)
    first = adapter_of("pissa-extracted" if extract else "pissa-unextracted", model)
    after = [] if extract else [first]
    with first(model, 0.0):
        X, streams = capture_activations(model, TOK, PAIRS), capture_statistics(model, TOK, PAIRS, after=after)
    for mode in MODES: assert chosen(model, X, mode, after=after) == chosen(model, streams, mode, after=after)


@pytest.mark.parametrize("how", ["taken before the extraction", "taken before the restoration", "without after", "with after",
                                 "another model"])
@pytest.mark.parametrize("mode", ["cho_rej_min_std", lambda S, stats: stats["cho"].std])
def test_statistics_of_other_directions_are_refused(how, mode, before_any_round):
    model, streams, after = build(), before_any_round, []
    if how == "taken before the extraction": adapter_of("pissa-extracted", model)
    elif how == "taken before the restoration":
        first = adapter_of("pissa-extracted", model)
        with first(model, 0.0): streams = capture_statistics(model, TOK, PAIRS)
        first.restore_base_W()
    elif how == "another model": model = build(seed=1)
    elif how == "without after": after = [adapter_of("pissa-unextracted", model)]
    else: streams = capture_statistics(model, TOK, PAIRS, after=[adapter_of("pissa-unextracted", model)])
    before, says = state(model.requires_grad_(False)), r"0\.self_attn\.q_proj: .*another weight.*same after=.*capture_statistics"
    with pytest.raises(ValueError, match=says):
        ModulatedPiSSA(model, r=6, selection_score=mode, calibration_activations=streams, after=after)
    assert not changes(before, model)


@pytest.mark.parametrize("score, r", [("s_only", 1), (lambda S, stats: -S, 1), (lambda S, stats: torch.arange(len(S)) % 7, 3)])
def test_even_a_small_round_is_seen_in_every_layer(score, r, before_any_round):
    model = build()
    first = ModulatedPiSSA(model, r=r, selection_score=score)
    for name, (_, S, _) in directions(find_targets(model)):
        assert "another weight" in flaw(before_any_round[name]["cho"], len(S), S), name
        assert not flaw(before_any_round[name]["cho"], len(S), first.spectrum[name])


def test_the_number_of_threads_does_not_make_it_another_weight():
    model, part = build(), dict(layer_range=(0.0, 0.25))
    with adapter_of("pissa-extracted", model)(model, 0.0): streams = capture_statistics(model, TOK, PAIRS, LoRAConfig(**part))
    torch.set_num_threads(2)  # the fixture sets it back
    assert ModulatedPiSSA(model, r=6, calibration_activations=streams, **part).extracted


def test_merging_keeps_the_spectrum_and_refuses_another():
    a, b = (ProjectionStats.of(noise(5, 3, seed=s)) for s in (0, 1))
    S = torch.tensor([3.0, 2, 1])
    known = replace(a, S=S)
    assert known.merge(b).S is S and b.merge(known).S is S and a.merge(b).S is None
    assert known.merge(replace(b, S=S * (1 + 1e-7))).S is S
    for other in (S + 1, S * (1 - 1e-5), S.flip(0)):
        with pytest.raises(ValueError, match="another weight"): known.merge(replace(b, S=other))


# --- offloaded weights

@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("place", ["cpu", "disk", "half"])
def test_offloaded_weights(arch, place, tmp_path):
    plain, model = build(arch), build(arch)
    if place == "disk": disk_offload(model, str(tmp_path), execution_device="cpu")
    else: cpu_offload(model.base_model if place == "half" else model, execution_device="cpu")
    assert model.device.type == "meta" and {p.device.type for p in model.base_model.parameters()} == {"meta"}
    X, streams = (f(model, TOK, PAIRS) for f in (capture_activations, capture_statistics))
    wanted = capture_activations(plain, TOK, PAIRS), capture_statistics(plain, TOK, PAIRS)
    for name in find_targets(plain):
        for side in ("cho", "rej"):
            assert torch.equal(X[name][side], wanted[0][name][side])
            close(streams[name][side], wanted[1][name][side], rtol=0, atol=0)
    assert chosen(model, streams, "wanda") == chosen(model, X, "wanda") == chosen(plain, X, "wanda")


# --- what is refused

def never(weights): raise AssertionError("decomposed")


def spoilt(streams, how):
    "Streamed statistics with something wrong in block 2's down projection."
    at = "model.layers.2.mlp.down_proj"
    out = {name: dict(of) for name, of in streams.items()}
    cho = out[at]["cho"]
    if how == "missing layer": del out[at]
    if how == "missing side": del out[at]["rej"]
    if how == "no sides": out[at] = {}
    if how == "one row": out[at]["cho"] = ProjectionStats.of(noise(1, 64))
    if how == "nan": out[at]["cho"] = replace(cho, mean_abs=cho.mean_abs * math.nan)
    if how == "inf": out[at]["rej"] = replace(cho, m2=cho.m2 / 0)
    if how == "narrow": out[at]["cho"] = ProjectionStats.of(noise(5, 63))
    if how == "a list": out[at]["cho"] = [cho]
    if how == "numbers": out[at] = 3.0
    return out


BAD = {"missing layer": r"1 of 28 layers.*down_proj", "missing side": r"\['cho'\].*pairs", "no sides": r"got \[\].*pairs",
       "one row": "at least 2 rows.* got 1", "nan": "NaN", "inf": "infinite", "narrow": "63 directions, the layer has 64",
       "a list": "a list, expected", "numbers": "float"}


@pytest.mark.parametrize("mode", [*MODES, lambda S, stats: stats["cho"].std])
@pytest.mark.parametrize("how", BAD)
def test_bad_statistics(how, mode, before_any_round, monkeypatch):
    model = build().requires_grad_(False)
    monkeypatch.setattr(cache, "in_order", never)
    streams, before = spoilt(before_any_round, how), state(model)
    with pytest.raises(ValueError, match=rf"model\.layers\.2\.mlp\.down_proj.*{BAD[how]}|{BAD[how]}") as e:
        ModulatedPiSSA(model, r=4, selection_score=mode, calibration_activations=streams)
    assert "model.layers.2.mlp.down_proj" in str(e.value) and "capture_statistics(model, tok, records, cfg)" in str(e.value)
    assert not changes(before, model)


def test_no_layers_at_all():
    with pytest.raises(ValueError, match="28 of 28 layers"):
        ModulatedPiSSA(build(), calibration_activations={})


@pytest.mark.parametrize("records, kw, says", [
    ([], {}, "no records"), ([dict(prompt="a", cho="b")], {}, "record 0"),
    ([*PAIRS, dict(prompt="a", completion="b")], {}, "record 5"),
    (PAIRS, dict(max_tokens=1), "max_tokens must be at least 2.*None for all, got 1"),
    (PAIRS, dict(cfg=LoRAConfig(targets="nothing")), "nothing"),
])
def test_bad_calls_are_refused_before_anything_is_decomposed(records, kw, says, monkeypatch):
    monkeypatch.setattr(cache, "in_order", never)
    with pytest.raises(ValueError, match=says): capture_statistics(build(), TOK, records, **kw)


def test_rounds_of_another_kind():
    model, other = build(), build()
    lora, extracted = adapter_of("lora", model), adapter_of("pissa-extracted", model)
    stranger = adapter_of("pissa-unextracted", other)
    for after, says in (([lora], r"after\[0\] is a ModulatedLoRA"), ([stranger], "built on this model"),
                        ([extracted], "extracted: .*leave it out")):
        with pytest.raises(ValueError, match=says): capture_statistics(model, TOK, PAIRS, after=after)
        with pytest.raises(ValueError, match=says): ModulatedPiSSA(model, selection_score="s_only", extract=False, after=after)


@pytest.mark.parametrize("f", [capture_activations, capture_statistics])
def test_a_layer_that_is_not_called(f):
    model = build()
    model.model.spare = torch.nn.Linear(4, 4)
    before = hooks(model)
    with pytest.raises(ValueError, match="model.spare was not called"): f(model, TOK, PAIRS, LoRAConfig(targets="spare"))
    assert "model.spare" not in f(model, TOK, PAIRS), "no text reaches it, so it is no target by default"
    assert hooks(model) == before


def test_a_model_that_computes_nan_is_found_on_the_way():
    model = build()
    model.model.layers[1].post_attention_layernorm.weight.data[3] = math.nan
    before = hooks(model)
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.gate_proj: .*NaN"): capture_statistics(model, TOK, PAIRS)
    assert hooks(model) == before


# --- merged statistics

@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(0, 20), min_size=3, max_size=3), st.floats(-1e6, 1e6), st.floats(1e-3, 1e3))
def test_merging_is_associative_and_commutative(seed, sizes, mean, std):
    a, b, c = (ProjectionStats.of(P) for P in (noise(sum(sizes), 4, seed=seed) * std + mean).split(sizes))
    # Float64 rounding: of the mean, relative to its size; of the deviations, what that can do to their squares.
    slack = dict(rtol=1e-9, atol=sum(sizes) * (1e-14 * abs(mean)) ** 2 + 1e-10 * std**2 + 1e-14 * abs(mean) * std * sum(sizes))
    for one, other in ((a.merge(b).merge(c), a.merge(b.merge(c))), (a.merge(b), b.merge(a)),
                       (c.merge(a.merge(b)), b.merge(c).merge(a))):
        assert one.count == other.count
        torch.testing.assert_close(one.mean, other.mean, rtol=1e-13, atol=1e-13 * std)
        torch.testing.assert_close(one.mean_abs, other.mean_abs, rtol=1e-13, atol=1e-13 * std)
        torch.testing.assert_close(one.m2, other.m2, **slack)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 200), st.floats(-1e5, 1e5), st.floats(1e-2, 1e2), st.data())
def test_any_split_gives_the_standard_deviation_of_torch(seed, n, mean, std, data):
    P = noise(n, 5, seed=seed) * std + mean
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=12)))
    total = ProjectionStats.of(P[:0])
    for lo, hi in zip([0, *cuts], [*cuts, n]): total = total.merge(ProjectionStats.of(P[lo:hi]))
    assert total.count == n
    for stats in (total, ProjectionStats.of(P)):
        torch.testing.assert_close(stats.std, P.std(0), rtol=1e-8, atol=1e-13 * abs(mean))
        torch.testing.assert_close(stats.mean, P.mean(0), rtol=1e-13, atol=1e-13 * std)
        torch.testing.assert_close(stats.mean_abs, P.abs().mean(0), rtol=1e-13, atol=1e-13 * std)


def exactly(parts):
    "Mean, M2 and mean magnitude, as fractions, of parts `(n, m, d)`: half of n rows are m + d, half m − d, all whole numbers."
    count = sum(n for n, _, _ in parts)
    mean = Fraction(sum(n * m for n, m, _ in parts), count)
    m2 = sum(n * (m * m + d * d) for n, m, d in parts) - count * mean**2
    return count, mean, m2, Fraction(sum(n // 2 * (abs(m + d) + abs(m - d)) for n, m, d in parts), count)


def stats_of(n, m, d):
    one = lambda x: torch.tensor([x], dtype=torch.float64)
    return ProjectionStats(n, one(float(m)), one(float(n * d * d)), one((abs(m + d) + abs(m - d)) / 2))


@pytest.mark.parametrize("mean", [0, 1000, -(10**7)])
@pytest.mark.parametrize("order", ["as it comes", "large last", "in pairs"])
def test_a_running_mean_over_a_hundred_million_tokens(mean, order):
    "A few vast parts and many small ones, the mean up to millions of deviations from zero; against fractions."
    g = seeded(0)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=g))
    parts = [(35_000_000, mean + 1, 2), (34_000_000, mean - 2, 1), (30_000_000, mean, 3)]
    parts += [(2 * draw(1, 1000), mean + draw(-3, 4), draw(0, 4)) for _ in range(1500)]
    queue = [stats_of(*p) for p in (parts[::-1] if order == "large last" else parts)]
    if order == "in pairs":
        while len(queue) > 1: queue = [a.merge(b) for a, b in zip(queue[::2], queue[1::2])] + queue[len(queue) // 2 * 2:]
    total = queue[0]
    for part in queue[1:]: total = total.merge(part)
    count, want, m2, magnitude = exactly(parts)
    assert total.count == count and 1e8 < count < 1.02e8
    assert abs(total.mean.item() - want) <= 1e-13 * abs(want) + 1e-13
    assert abs(total.mean_abs.item() - magnitude) <= 1e-13 * magnitude
    assert abs(total.m2.item() - m2) < 1e-8 * m2


def test_small_parts_move_a_large_mean_as_they_should():
    "Millions of merges of a few rows would take minutes; the last thousand of them show whether anything still arrives."
    start, part = stats_of(10**8, 10**6, 1), stats_of(2, 10**6 + 100, 1)
    total, sum32 = start, torch.tensor(float(10**8 * 10**6))
    for _ in range(1000): total, sum32 = total.merge(part), sum32 + 2 * (10**6 + 100)
    _, want, m2, _ = exactly([(10**8, 10**6, 1), (2000, 10**6 + 100, 1)])
    assert abs((total.mean.item() - start.mean.item()) - float(want - 10**6)) < 1e-5 * float(want - 10**6)
    assert abs(total.m2.item() - m2) < 1e-9 * m2
    assert sum32 == torch.tensor(float(10**8 * 10**6)), "a float32 sum does not move at all"


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), torch.nn.DataParallel])
def test_a_wrapped_model_is_captured_under_its_plain_names(wrap):
    model = build()
    plain, streams = capture_activations(model, TOK, PAIRS), capture_statistics(model, TOK, PAIRS)
    wrapped, streamed = capture_activations(wrap(model), TOK, PAIRS), capture_statistics(wrap(model), TOK, PAIRS)
    assert list(plain) == list(wrapped) == list(streamed)
    for name in plain:
        for side in ("cho", "rej"):
            assert torch.equal(plain[name][side], wrapped[name][side])
            assert all(torch.equal(getattr(streams[name][side], f), getattr(streamed[name][side], f)) for f in FIELDS)


def test_a_peft_model_is_captured_with_what_peft_adds():
    import peft
    model = build()
    plain = capture_activations(model, TOK, PAIRS)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    captured = capture_activations(wrapped, TOK, PAIRS)
    first, last = list(plain)[0], list(plain)[-1]
    assert list(captured) == list(plain) and torch.equal(captured[first]["cho"], plain[first]["cho"])
    assert not torch.allclose(captured[last]["cho"], plain[last]["cho"]), "the model that is used, with its PEFT adapter"


def test_a_model_that_lacks_directions_is_not_read(tiny):
    model, tok = tiny
    p = ModulatedPiSSA(model, r=4, selection_score="s_only")
    for capture in (capture_activations, capture_statistics):
        with pytest.raises(RuntimeError, match=r"not given back.*restore\(model\)"): capture(model, tok, PAIRS)
        with p(model, 0.0): assert capture(model, tok, PAIRS)
