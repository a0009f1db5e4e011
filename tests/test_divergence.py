"""Divergences against their definition in NumPy, float64."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modlab import aggregate, kl_fwd, kl_rev, token_nll
from modlab.maths.divergence import AGGREGATES, barrier, divergences, log_probs


def probabilities(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@given(st.integers(0, 10**6), st.floats(0.01, 20.0),
       st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
@settings(max_examples=40, deadline=None)
def test_both_directions_are_the_definition(seed, scale, dtype):
    rng = np.random.default_rng(seed)
    a, b = (torch.tensor(rng.normal(size=(3, 5, 40)) * scale).to(dtype) for _ in range(2))
    p, q = (probabilities(x.double().numpy()) for x in (a, b))
    expected = (p * (np.log(p) - np.log(q))).sum(-1)
    for got in (kl_rev(a, b), kl_fwd(b, a)):
        assert got.shape == (3, 5) and got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        np.testing.assert_allclose(got.double().numpy(), expected, rtol=1e-4, atol=1e-5)
    assert (kl_rev(a, a) == 0).all() and (kl_fwd(a, a) == 0).all()


def test_words_that_cannot_come():
    never = torch.tensor([[1.0, 2.0, -torch.inf]], requires_grad=True)
    other = torch.tensor([[0.5, 0.5, 0.5]])
    p, q = torch.tensor([1.0, 2.0]).double().softmax(0), torch.full((3,), 1 / 3).double()
    assert kl_rev(never, other).item() == pytest.approx((p * (p / q[:2]).log()).sum().item(), rel=1e-5)
    assert kl_fwd(never, other).item() == float("inf")
    kl_rev(never, other).sum().backward()
    assert never.grad.isfinite().all()


def test_aggregates_are_their_formulas():
    kl = torch.rand(4, 50, generator=torch.Generator().manual_seed(0)) ** 3
    x = kl.double().numpy().ravel()
    expected = dict(mean=x.mean(), rmse=np.sqrt((x**2).mean() + 1e-8), p95=np.quantile(x, 0.95), max=x.max())
    assert set(expected) == set(AGGREGATES)
    for how, value in expected.items(): assert aggregate(kl, how).item() == pytest.approx(value, rel=1e-5)
    assert aggregate(torch.zeros(5), "rmse").item() == pytest.approx(1e-4)
    assert [barrier(torch.tensor(v), 0.5).item() for v in (0.0, 0.5, 0.7)] == pytest.approx([0, 0, 0.2])
    for how in ("median", "None", ""):
        with pytest.raises(ValueError, match="mean, rmse, p95, max"): aggregate(kl, how)
    with pytest.raises(ValueError, match="no tokens"): aggregate(torch.zeros(0))


def test_nll_is_minus_the_log_probability():
    logits = torch.randn(6, 11, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    ids = torch.arange(6)
    expected = -np.log(probabilities(logits.double().numpy())[range(6), range(6)])
    np.testing.assert_allclose(token_nll(logits, ids).double().numpy(), expected, rtol=1e-5)


@given(st.integers(0, 10**6), st.floats(0.01, 20.0), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
@settings(max_examples=40, deadline=None)
def test_all_three_at_once_are_the_three_apart(seed, scale, dtype):
    g = torch.Generator().manual_seed(seed)
    a, b = ((torch.randn(7, 40, generator=g) * scale).to(dtype) for _ in range(2))
    ids = torch.randint(40, (7,), generator=g)
    got = divergences(log_probs(a), log_probs(b), ids)
    torch.testing.assert_close(got, torch.stack([kl_rev(a, b), kl_fwd(a, b), token_nll(a, ids)]), rtol=1e-5, atol=1e-6)
    assert (divergences(log_probs(a), log_probs(a), ids)[:2] == 0).all()
