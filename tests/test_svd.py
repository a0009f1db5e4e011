"thin_svd on hard matrices against torch's float64 SVD."
import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from modlab.maths.svd import deflated, first_svd, thin_svd

F64 = torch.float64


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def with_condition(cond, o, i, seed=0):
    k = min(o, i)
    left, right = torch.linalg.qr(noise(o, k, seed=seed)).Q, torch.linalg.qr(noise(i, k, seed=seed + 1)).Q
    return left * torch.logspace(0, -torch.log10(torch.tensor(cond, dtype=F64)).item(), k, dtype=F64) @ right.T


def check(W):
    "Everything that thin_svd promises for one matrix."
    U, S, Vh = thin_svd(W)
    k = min(W.shape)
    assert U.shape == (W.shape[0], k) and S.shape == (k,) and Vh.shape == (k, W.shape[1])
    assert U.dtype == S.dtype == Vh.dtype == torch.float32 and U.device == W.device
    assert (S >= 0).all() and (S.diff() <= 0).all()
    assert (Vh.amax(1) >= -Vh.amin(1)).all()
    U, S, Vh, W = U.to(F64), S.to(F64), Vh.to(F64), W.to(F64)
    eye, reference = torch.eye(k, dtype=F64), torch.linalg.svdvals(W)
    assert (U.T @ U - eye).abs().max() < 1e-5 and (Vh @ Vh.T - eye).abs().max() < 1e-5
    assert (U * S @ Vh - W).norm() <= 2e-6 * W.norm()
    assert (S - reference).abs().max() <= 1e-6 * reference[0]


@pytest.mark.parametrize("shape", [(70, 30), (30, 70), (50, 50), (120, 97), (1, 6), (6, 1), (1, 1)])
@pytest.mark.parametrize("cond", [1.0, 99.0, 101.0, 1e4, 1e6, 1e8, 1e12, 1e18])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.usefixtures("one_thread")
def test_conditions_scales_and_shapes(shape, cond, scale): check((with_condition(cond, *shape) * scale).float())


def emptied(W, r):
    "What is left of W when its r leading directions are taken out, in float32."
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return W - U[:, :r] * S[:r] @ Vh[:r]


HARD = {
    "zero": torch.zeros(9, 5), "identity": torch.eye(8), "minus identity": -torch.eye(8), "ones": torch.ones(7, 12),
    "rank 1": (noise(20, 1) @ noise(1, 31)).float(), "rank 3": (noise(40, 3) @ noise(3, 16)).float(),
    "columns twice": noise(30, 8).repeat(1, 2).float(), "rows thrice": noise(6, 20).repeat(3, 1).float(),
    "zero rows": torch.cat([noise(5, 12), torch.zeros(9, 12)]), "zero column": noise(12, 12) * (torch.arange(12) != 3),
    "one entry": torch.eye(10, 14) * (torch.arange(14) == 4), "graded": (noise(24, 24) * torch.logspace(-30, 8, 24)).float(),
    "tiny": (noise(6, 9) * 1e-35).float(), "largest floats": torch.full((3, 4), 1e38) * torch.eye(3, 4),
    "emptied": emptied(noise(32, 48).float(), 8),
}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", HARD)
def test_hard_matrices(name): check(HARD[name])


@pytest.mark.usefixtures("one_thread")
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 24), st.integers(1, 24), st.integers(0, 24), st.integers(-25, 25), st.integers(0, 99))
def test_any_rank_and_scale(o, i, rank, exponent, seed):
    check((noise(o, rank, seed=seed) @ noise(rank, i, seed=seed + 100) * 10.0**exponent).float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_any_float_dtype(dtype): check(noise(20, 33).to(dtype))


def test_leading_subspace_and_emptied_directions():
    W = with_condition(1e3, 60, 40).float()
    U, S, Vh = thin_svd(W)
    f = torch.linalg.svd(W.double(), full_matrices=False)
    for r in (1, 10, 39):  # by projector: signs are arbitrary
        assert torch.allclose(Vh[:r].T @ Vh[:r], (f.Vh[:r].T @ f.Vh[:r]).float(), atol=1e-5)
        assert torch.allclose(U[:, :r] @ U[:, :r].T, (f.U[:, :r] @ f.U[:, :r].T).float(), atol=1e-4)
    left = thin_svd(W - U[:, :10] * S[:10] @ Vh[:10])[1]
    assert (left <= 1e-5 * left[0]).sum() == 10, "what was taken out is recognisably empty"


@pytest.mark.parametrize("W", [torch.ones(3), torch.ones(0, 3), torch.ones(2, 2, dtype=torch.int8), torch.ones(2, 2, 2)])
def test_no_float_matrix(W):
    with pytest.raises(ValueError, match=r"up: an SVD needs a float matrix"): thin_svd(W, "up")


@pytest.mark.parametrize("cond", [3, 90, 1e4, 1e9])
@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (48, 48), (9, 1)])
@pytest.mark.parametrize("r", [1, 8, 39, 100])
def test_the_first_directions_are_those_of_the_whole(cond, shape, r):
    "The plain twin is `thin_svd`: the same set, the same projector within 1e-5, values within 1e-6 of the largest."
    W = with_condition(cond, *shape, seed=3).float()
    (U, S, Vh), (U1, S1, Vh1) = thin_svd(W), first_svd(W, r)
    r = min(r, *shape)
    assert U1.shape == (shape[0], r) and Vh1.shape == (r, shape[1]) and S1.shape == S.shape
    assert U1.dtype == S1.dtype == Vh1.dtype == torch.float32
    assert (S1 - S).abs().max() <= 1e-6 * S[0] and (S1 >= 0).all()
    clear = r == len(S) or S[r - 1] - S[r] > 1e-5 * S[0]  # or the border between first and rest is rounding
    if clear and S[r - 1] > 1e-6 * S[0]:
        assert (Vh1.T @ Vh1 - Vh[:r].T @ Vh[:r]).norm() < 1e-4 and (U1 @ U1.T - U[:, :r] @ U[:, :r].T).norm() < 1e-4
    assert (U1 * S1[:r] @ Vh1 - U[:, :r] * S[:r] @ Vh[:r]).norm() <= 1e-5 * S.norm()
    assert (U1.T @ U1 - torch.eye(r)).abs().max() < 1e-4 and (Vh1.amax(1) >= -Vh1.amin(1)).all()


def test_no_first_direction():
    with pytest.raises(ValueError, match="up: 0 directions"): first_svd(torch.ones(3, 3), 0, "up")
    with pytest.raises(ValueError, match="up: an SVD needs"): first_svd(torch.ones(3), 1, "up")


@pytest.mark.parametrize("shape", [(40, 64), (64, 40)])
@pytest.mark.parametrize("taken", [[0], [39, 3, 4], list(range(40))])
def test_what_is_left_is_decomposed_already(shape, taken):
    "The plain twin is the SVD of the difference."
    svd = U, S, Vh = thin_svd(with_condition(50, *shape).float())
    left = deflated(svd, Vh[taken])
    W = (U.double() * S.double() @ Vh.double()) - U[:, taken].double() * S[taken].double() @ Vh[taken].double()
    plain, n = thin_svd(W), 40 - len(taken)
    assert (left[1] - plain[1]).abs().max() <= 1e-6 * S[0] and (left[1][n:] == 0).all()
    assert (left[2][:n].T @ left[2][:n] - plain[2][:n].T @ plain[2][:n]).norm() < 1e-4
    assert (left[0] * left[1] @ left[2] - W.float()).norm() <= 1e-5 * S[0]
    assert left[2].flip(0)[:len(taken)].sort(0).values.equal(Vh[taken].sort(0).values)


def test_directions_of_another_matrix_are_none_of_it():
    svd = thin_svd(noise(30, 20).float())
    assert deflated(svd, thin_svd(noise(30, 20, seed=1).float())[2][:2]) is None
    assert deflated(svd, svd[2][[4, 4]]) is None, "one direction cannot be taken twice"
