"Scores, choices and streamed statistics against plain NumPy in float64."
import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from modlab import capture_statistics
from modlab.maths.scores import GRADIENT_SCORES, SCORES, chance_overlap, choose, overlap, selection_scores, tail_depth
from modlab.maths.statistics import GradientStats, ProjectionStats, project
from modlab.maths.svd import thin_svd

seeds = st.integers(0, 2**31)


def noise(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 12), st.integers(1, 12), st.integers(2, 40), st.integers(2, 40), st.sampled_from([0.0, 3.0, 1000.0]))
def test_scores_are_numpys(seed, o, i, n_cho, n_rej, mean):
    _, S, Vh = thin_svd(noise(o, i, seed=seed))
    X = {"cho": noise(n_cho, i, seed=seed + 1) + mean, "rej": 2 * noise(n_rej, i, seed=seed + 2) - mean}
    P = {side: x.numpy().astype(np.float64) @ Vh.numpy().astype(np.float64).T for side, x in X.items()}
    s, P_all = S.numpy().astype(np.float64), np.concatenate(list(P.values()))
    expected = {"s_only": s, "act_only": np.abs(P_all).mean(0), "wanda": s * np.abs(P_all).mean(0),
                "cho_rej_min_std": np.minimum(P["cho"].std(0, ddof=1), P["rej"].std(0, ddof=1))}
    stats = {side: project(x, Vh, "layer") for side, x in X.items()}
    assert set(expected) == set(SCORES) - set(GRADIENT_SCORES)
    alive = s > 1e-5 * s[0]
    for mode, want in expected.items():
        scores = selection_scores(S, mode, stats).numpy()
        np.testing.assert_allclose(scores[alive], want[alive], rtol=1e-4, atol=1e-6 * (1 + mean))
        assert (scores[~alive] == -np.inf).all()
    # The product is float32: where a mean of 1000 cancels, its rounding is all there is.
    one = project(torch.cat(list(X.values())), Vh)
    for mode in ("wanda", "act_only"):
        once, twice = selection_scores(S, mode, one), selection_scores(S, mode, stats)
        torch.testing.assert_close(once, twice, rtol=1e-4, atol=1e-6 * (1 + mean))


@settings(max_examples=40, deadline=None)
@given(seeds, st.lists(st.integers(0, 30), min_size=1, max_size=8), st.floats(-1e6, 1e6))
def test_merged_parts_are_the_whole(seed, cuts, mean):
    P = noise(sum(cuts), 4, seed=seed).double() + mean
    total = ProjectionStats.of(P[:0])
    for part in P.split(cuts): total = total.merge(ProjectionStats.of(part))
    assert total.count == len(P)
    if len(P) < 2: return
    np.testing.assert_allclose(total.mean, P.numpy().mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(total.std, P.numpy().std(0, ddof=1), rtol=1e-6)
    np.testing.assert_allclose(total.mean_abs, np.abs(P.numpy()).mean(0), rtol=1e-12, atol=1e-12)


def test_projection_in_parts_is_the_projection_at_once():
    Vh, X = torch.linalg.qr(noise(64, 64)).Q[:48], noise(50_000, 64, seed=1) * 3 + 1  # 48 directions: two parts
    P, stats = X.double() @ Vh.double().T, project(X, Vh)
    assert len(X) > 2**21 // 48 and stats.count == len(X)
    torch.testing.assert_close(stats.std, P.std(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(stats.mean_abs, P.abs().mean(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(project(X[:99].bfloat16(), Vh).std, P[:99].std(0), rtol=2e-2, atol=0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=20), st.integers(1, 25))
def test_choice_is_the_stable_top_in_ascending_order(scores, r):
    want = sorted(sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:r])
    assert choose(torch.tensor(scores, dtype=torch.float64), r).tolist() == want


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 40), st.integers(1, 40))
def test_depth_and_overlap(seed, r, extra):
    k = r + extra
    pick = torch.randperm(k, generator=torch.Generator().manual_seed(seed))[:r]
    mirrored = k - 1 - pick
    assert 0 <= tail_depth(pick, k) <= 1 and math.isclose(tail_depth(pick, k) + tail_depth(mirrored, k), 1, abs_tol=1e-9)
    assert tail_depth(torch.arange(r), k) == 0 and tail_depth(torch.arange(extra, k), k) == 1
    assert overlap(pick, pick.flip(0)) == 1 and overlap(pick, mirrored) == len(set(pick.tolist()) & set(mirrored.tolist())) / r
    assert chance_overlap(r, k) == r / k and math.isnan(tail_depth(torch.arange(k), k))


def test_emptied_directions_rank_last_in_every_mode():
    S = torch.tensor([2.0, 1.0, 3e-5, 2e-5, 1e-7, 0.0])
    loud = ProjectionStats.of(noise(50, 6) * torch.tensor([1.0, 1, 1, 100, 100, 100]))
    pulls = GradientStats.of(noise(9, 6) * torch.tensor([1.0, 1, 1, 100, 100, 100]), noise(9, 6, seed=1))
    modes = [*SCORES, lambda S, stats: stats["cho"].mean_abs]
    for mode in modes:
        scores = selection_scores(S, mode, {"cho": loud, "rej": loud, "gradients": pulls})
        assert scores[:3].isfinite().all() and (scores[3:] == -math.inf).all(), mode
        assert choose(scores, 4).tolist() == [0, 1, 2, 3], "the threshold itself is emptied; ties to the lower index"


@pytest.mark.parametrize("mode, stats, says", [
    ("loudest", None, "unknown selection score 'loudest'"), (None, None, "unknown selection score None"),
    ("wanda", None, "got NoneType"), ("act_only", torch.ones(3, 3), "got Tensor"),
    ("wanda", {"cho": 1}, r"a dict with \['cho'\]"),
    ("cho_rej_min_std", ProjectionStats.of(torch.ones(4, 3)), "pass {'cho': project"),
    ("act_only", ProjectionStats.of(torch.ones(1, 3)), "at least 2 rows .* got 1"),
    ("wanda", ProjectionStats.of(torch.ones(4, 2)), "of 2 directions, the layer has 3"),
    ("act_only", ProjectionStats.of(torch.full((4, 3), math.nan)), "NaN or infinite"),
    ("grad_abs", None, "needs gradients of pairs, got NoneType; pass what capture_gradients"),
    ("taylor", ProjectionStats.of(torch.ones(4, 3)), "needs gradients of pairs, got ProjectionStats"),
    ("act_only", GradientStats.of(*torch.ones(2, 4, 3)), "needs projection statistics .* got GradientStats"),
    ("grad_snr", GradientStats.of(*torch.ones(2, 1, 3)), "at least 2 pairs, got 1"),
    ("grad_fisher", GradientStats.of(*torch.ones(2, 4, 2)), "of 2 directions, the layer has 3"),
    ("grad_abs", GradientStats.of(*torch.full((2, 4, 3), math.inf)), "NaN or infinite"),
    (lambda S, stats: S[1:], None, r"shape \(3,\) .* got shape \(2,\)"), (lambda S, stats: S * math.nan, None, "got NaN"),
    (lambda S, stats: stats["cho"].mean, None, "the score <lambda> raised TypeError: .*; its stats were None"),
    (lambda S, stats: stats.std, {"cho": 1, "rej": 2}, r"raised AttributeError: .* a dict with \['cho', 'rej'\]"),
])
def test_refusals_name_the_layer_and_what_to_pass(mode, stats, says):
    with pytest.raises(ValueError, match=rf"blocks\.0\.up: .*{says}"):
        selection_scores(torch.tensor([3.0, 2, 1]), mode, stats, "blocks.0.up")


@pytest.mark.parametrize("X", [torch.ones(4, 7), torch.ones(5), torch.ones(4, 5).long(), torch.full((4, 5), math.inf)])
def test_bad_activations(X):
    with pytest.raises(ValueError, match=r"up: calibration activations .*\(n, 5\)"): project(X, torch.eye(5)[:3], "up")


def test_what_capture_returns_prints_no_tensor(tiny):
    pairs = [dict(prompt="Tea? ", cho="With milk.", rej="Never.")] * 2
    streams = capture_statistics(*tiny, pairs)
    one = ProjectionStats.of(noise(7, 5))
    assert repr(one) == "ProjectionStats(7 rows on 5 directions)" and len(repr(streams)) < 150 * len(streams)
    assert "tensor" not in repr(streams) and one == one and one != ProjectionStats.of(noise(7, 5)), "compared as objects"
