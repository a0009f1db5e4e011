"thin_svd on hard matrices against torch's float64 SVD; thin_svds: order, threads, faults, and a cache that is exact and bounded."
import threading

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from modlab.maths.svd import thin_svd, thin_svds

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


def test_order_threads_and_early_exit(monkeypatch):
    monkeypatch.setenv("MODLAB_SVD_CACHE", "0")
    weights = {f"l{n}": noise(5 + n % 7, 9, seed=n).float() for n in range(30)}
    before = torch.get_num_threads()
    found = dict(thin_svds(weights))
    assert list(found) == list(weights) and torch.get_num_threads() == before
    for n, W in weights.items(): assert torch.allclose(found[n][0] * found[n][1] @ found[n][2], W, atol=1e-5)
    run = thin_svds(weights)
    next(run); run.close()
    assert torch.get_num_threads() == before and dict(thin_svds({})) == {}
    fresh = []
    t = threading.Thread(target=lambda: fresh.append(torch.get_num_threads())); t.start(); t.join()
    assert fresh == [before], "a thread that the user starts later is not left with one core"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_entries_name_the_layer(bad):
    W = torch.ones(3, 4); W[1, 2] = bad
    with pytest.raises(ValueError, match=r"blocks\.1\.down: 1 of 12"):
        thin_svds({"blocks.0.up": torch.ones(2, 2), "blocks.1.down": W})  # at the call: no result was asked for yet


@pytest.mark.parametrize("W", [torch.ones(3), torch.ones(0, 3), torch.ones(2, 2, dtype=torch.int8), torch.ones(2, 2, 2)])
def test_no_float_matrix(W):
    with pytest.raises(ValueError, match=r"up: an SVD needs a float matrix"): thin_svd(W, "up")


def test_cache_is_exact_bounded_and_heals(tmp_path, monkeypatch):
    monkeypatch.setenv("MODLAB_CACHE", str(tmp_path))
    weights = {f"l{n}": (noise(64, 96, seed=n) if n else with_condition(1e9, 64, 96)).float() for n in range(6)}
    weights |= {"half": weights["l1"].bfloat16(), "double": noise(64, 96, seed=9), "transposed": noise(96, 64, seed=8).float().T}
    def run(gb, scale=1.0):
        monkeypatch.setenv("MODLAB_SVD_CACHE", str(gb))
        return [t for _, f in thin_svds({n: W * scale for n, W in weights.items()}) for t in f]
    files = lambda: list(tmp_path.rglob("*.pkl"))
    plain = run(0)
    assert not files(), "0 turns it off"
    for again in (run(1), run(1)): assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert len(files()) == len(weights)
    files()[0].write_bytes(b"cut short")
    assert all(torch.equal(a, b) for a, b in zip(plain, run(1), strict=True)), "a damaged file is computed again"
    assert min(f.stat().st_size for f in files()) > 1000
    size = sum(f.stat().st_size for f in files())
    for scale in (2.0, 3.0, 4.0): run(1.5 * size / 1e9, scale)
    assert size / 2 < sum(f.stat().st_size for f in files()) <= 1.5 * size


def test_what_is_kept_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("MODLAB_CACHE", str(tmp_path)); monkeypatch.delenv("MODLAB_SVD_CACHE", raising=False)
    W = {"a": noise(7, 9).float()}
    dict(thin_svds(W))
    monkeypatch.setattr("modlab.maths.svd.tall_svd", None)  # computing again would fail
    assert torch.equal(dict(thin_svds(W))["a"][1], dict(thin_svds({"b": W["a"].clone()}))["b"][1])
    with pytest.raises(TypeError): dict(thin_svds({"a": W["a"] + 1}))
    assert [f.name for f in tmp_path.iterdir()] == ["svd"]
