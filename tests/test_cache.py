"""Many decompositions: order, threads, faults; a cache on disk that is exact and bounded, and notices what it did not write."""
import os
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from rights import unprivileged

from modlab import ModulatedPiSSA, tiny_model
from modlab.model import cache
from modlab.model.cache import thin_svds

F64 = torch.float64


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def ill_conditioned(o, i):
    k = min(o, i)
    left, right = torch.linalg.qr(noise(o, k)).Q, torch.linalg.qr(noise(i, k, seed=1)).Q
    return left * torch.logspace(0, -9, k, dtype=F64) @ right.T


@pytest.fixture(autouse=True)
def no_memory(monkeypatch):
    "Every call starts as in a new process: what is in memory hides what is on the disk."
    cache._MEMORY.clear()
    monkeypatch.setattr(cache, "_forget", lambda limit: cache._MEMORY.clear())


@pytest.fixture
def on(tmp_path, monkeypatch):
    "The cache is on, in a folder of its own."
    monkeypatch.setenv("MODLAB_CACHE", str(tmp_path))
    monkeypatch.setenv("MODLAB_SVD_CACHE", "1")
    return tmp_path


def files(folder): return sorted(folder.rglob("*.safetensors"))


def equal(a, b): return all(torch.equal(x, y) for n in a for x, y in zip(a[n], b[n], strict=True))


def computing(monkeypatch, calls):
    "Count what is computed."
    plain = cache.thin_svd
    monkeypatch.setattr(cache, "thin_svd", lambda W, name="W": calls.append(name) or plain(W, name))
    return calls


# ---- many layers ----

def test_order_threads_and_early_exit(monkeypatch):
    monkeypatch.setenv("MODLAB_SVD_CACHE", "0")
    weights = {f"l{n}": noise(5 + n % 7, 9, seed=n).float() for n in range(30)}
    before = torch.get_num_threads()
    found = dict(thin_svds(weights))
    assert list(found) == list(weights) and torch.get_num_threads() == before
    for n, W in weights.items(): assert torch.allclose(found[n][0] * found[n][1] @ found[n][2], W, atol=1e-5)
    run = thin_svds(weights)
    next(run)
    run.close()
    assert torch.get_num_threads() == before and dict(thin_svds({})) == {}
    fresh = []
    t = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    t.start()
    t.join()
    assert fresh == [before], "a thread that the user starts later is not left with one core"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_entries_name_the_layer(bad):
    W = torch.ones(3, 4)
    W[1, 2] = bad
    with pytest.raises(ValueError, match=r"blocks\.1\.down: 1 of 12"):
        thin_svds({"blocks.0.up": torch.ones(2, 2), "blocks.1.down": W})  # at the call: no result was asked for yet


# ---- the cache ----

def test_cache_is_exact_bounded_and_heals(tmp_path, monkeypatch):
    monkeypatch.setenv("MODLAB_CACHE", str(tmp_path))
    weights = {f"l{n}": (noise(64, 96, seed=n) if n else ill_conditioned(64, 96)).float() for n in range(6)}
    weights |= {"half": weights["l1"].bfloat16(), "double": noise(64, 96, seed=9), "transposed": noise(96, 64, seed=8).float().T}
    def run(gb, scale=1.0):
        monkeypatch.setenv("MODLAB_SVD_CACHE", str(gb))
        return [t for _, f in thin_svds({n: W * scale for n, W in weights.items()}) for t in f]
    files = lambda: list(tmp_path.rglob("*.safetensors"))
    plain = run(0)
    assert not files(), "0 turns it off"
    for again in (run(1), run(1)): assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert len(files()) == len(weights)
    files()[0].write_bytes(b"cut short")
    with pytest.warns(UserWarning, match="computed again"): again = run(1)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True)), "a damaged file is computed again"
    assert min(f.stat().st_size for f in files()) > 1000
    size = sum(f.stat().st_size for f in files())
    for scale in (2.0, 3.0, 4.0): run(1.5 * size / 1e9, scale)
    assert size / 2 < sum(f.stat().st_size for f in files()) <= 1.5 * size


def test_what_is_kept_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("MODLAB_CACHE", str(tmp_path))
    monkeypatch.delenv("MODLAB_SVD_CACHE", raising=False)
    W = {"a": noise(7, 9).float()}
    dict(thin_svds(W))
    monkeypatch.setattr(cache, "thin_svd", None)  # computing again would fail
    assert torch.equal(dict(thin_svds(W))["a"][1], dict(thin_svds({"b": W["a"].clone()}))["b"][1])
    with pytest.raises(TypeError): dict(thin_svds({"a": W["a"] + 1}))
    assert [f.name for f in tmp_path.iterdir()] == ["svd"]


def test_every_flipped_bit_is_noticed_and_the_file_replaced(on):
    W = {"a": noise(3, 4).float()}
    plain = dict(thin_svds(W))
    path, = files(on)
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 3):  # 3 is prime to 8: every bit position comes up
        path.write_bytes(whole[:bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1:])
        with pytest.warns(UserWarning, match=f"{path.name}.*computed again"): assert equal(plain, dict(thin_svds(W)))
        assert path.read_bytes() == whole


@pytest.mark.parametrize("kind", ["another weight", "another version", "a pickle", "a folder"])
def test_what_it_did_not_write_under_this_key_is_not_read(on, kind, monkeypatch):
    W, other = {"a": noise(3, 4).float()}, {"a": noise(3, 4, seed=1).float()}
    plain = dict(thin_svds(W))
    path, = files(on)
    if kind == "another weight":
        dict(thin_svds(other))
        (next(f for f in files(on) if f != path)).replace(path)
    elif kind == "another version":
        monkeypatch.setattr(cache, "_ALGORITHM", 99)
        dict(thin_svds(W))
        (next(f for f in files(on) if f != path)).replace(path)
        monkeypatch.undo()
        monkeypatch.setenv("MODLAB_CACHE", str(on))
        monkeypatch.setenv("MODLAB_SVD_CACHE", "1")
    elif kind == "a pickle": torch.save(plain["a"], path)
    else:
        path.unlink()
        path.mkdir()
    with pytest.warns(UserWarning) as said: assert equal(plain, dict(thin_svds(W)))
    assert "computed again" in str(said[0].message)


def test_the_key_knows_values_shape_dtype_and_versions(monkeypatch):
    W = noise(4, 6)
    keys = [cache._key(w) for w in (W, W + 1e-15, W.float(), W.T, W.reshape(6, 4))]
    monkeypatch.setattr(torch, "__version__", "99")
    keys.append(cache._key(W))
    monkeypatch.undo()
    monkeypatch.setattr(cache, "_ALGORITHM", 99)
    keys.append(cache._key(W))
    monkeypatch.undo()
    assert len(set(keys)) == len(keys) and cache._key(W.T.contiguous().T) == keys[0]


def test_a_failed_write_leaves_no_file_by_the_final_name_and_warns_once(on, monkeypatch):
    weights = {f"l{n}": noise(5, 7, seed=n).float() for n in range(6)}
    plain = Path.write_bytes
    def half(path, data):
        plain(path, data[:100])
        raise OSError(28, "No space left")
    with monkeypatch.context() as m:
        m.setattr(Path, "write_bytes", half)
        with pytest.warns(UserWarning, match="cannot be written .*No space left") as said: kept = dict(thin_svds(weights))
    assert len(said) == 1 and not list((on / "svd").iterdir())
    assert equal(kept, dict(thin_svds(weights))) and len(files(on)) == 6


def test_old_leftovers_are_swept_and_young_ones_left(on):
    folder = on / "svd"
    (folder / "joblib" / "modlab").mkdir(parents=True)
    old, young = folder / "writing-old", folder / "writing-young"
    for path in (old, young): path.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * 3600,) * 2)
    dict(thin_svds({"a": torch.eye(3)}))
    assert not old.exists() and young.exists() and not (folder / "joblib").exists()


def test_what_was_read_last_is_kept(on, monkeypatch):
    weights = [{"a": noise(20, 30, seed=n).float()} for n in range(3)]
    for w in weights[:2]: dict(thin_svds(w))
    for path in files(on): os.utime(path, (1, 1))
    dict(thin_svds(weights[0]))  # a reading
    size = files(on)[0].stat().st_size
    monkeypatch.setenv("MODLAB_SVD_CACHE", str(2.5 * size / 1e9))
    dict(thin_svds(weights[2]))
    names = [cache._key(w["a"]) for w in weights]
    assert {f.stem for f in files(on)} == {names[0], names[2]}


@pytest.fixture
def public(monkeypatch):
    "A folder that every user may read, for the cache."
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        monkeypatch.setenv("MODLAB_CACHE", str(folder))
        monkeypatch.setenv("MODLAB_SVD_CACHE", "1")
        yield folder
        for path in [folder, *folder.rglob("*")]: path.chmod(0o755)


posix = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="rights of this kind are POSIX")


@posix
def test_a_read_only_folder_is_read_as_far_as_it_goes(public, monkeypatch):
    known, new = {"a": noise(5, 6).float()}, {f"b{n}": noise(5, 6, seed=n + 1).float() for n in range(5)}
    plain = dict(thin_svds(known))
    for path in [public, *public.rglob("*")]: path.chmod(0o555 if path.is_dir() else 0o444)
    calls = computing(monkeypatch, [])
    with unprivileged():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert equal(plain, dict(thin_svds(known))) and not calls
        with pytest.warns(UserWarning, match="cannot be written .*results are not kept") as said:
            found = dict(thin_svds(known | new))
    assert len(said) == 1 and len(calls) == 5 and equal(plain, found) and len(files(public)) == 1


@posix
def test_no_folder_at_all_is_one_warning(public, monkeypatch):
    monkeypatch.setenv("MODLAB_CACHE", str(public / "new"))
    public.chmod(0o555)
    with unprivileged(), pytest.warns(UserWarning, match="no folder for the SVD cache") as said:
        found = dict(thin_svds({"a": torch.eye(3)}))
    assert len(said) == 1 and torch.equal(found["a"][1], torch.ones(3)) and not list(public.iterdir())


CHILD = """
import sys, torch
from modlab.model import cache
cache._result_bytes = lambda weights: 0
g = torch.Generator().manual_seed(0)
weights = {str(n): torch.randn(12, 20, generator=g) for n in range(12)}
for turn in range(4): total = sum(S.sum().item() for _, (U, S, Vh) in cache.thin_svds(weights))
print(total)
"""


def test_several_processes_and_threads_share_it(on, monkeypatch):
    monkeypatch.setenv("MODLAB_SVD_CACHE", "0.00001")  # room for a few files, so that they are deleted while others read
    g = torch.Generator().manual_seed(0)
    weights = {str(n): torch.randn(12, 20, generator=g) for n in range(12)}
    monkeypatch.setattr(cache, "_result_bytes", lambda weights: 0)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "error::UserWarning:modlab", "-c", CHILD]
    children = [subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE) for _ in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with ThreadPoolExecutor(3) as pool: found = list(pool.map(lambda _: dict(thin_svds(weights)), range(6)))
    printed = {c.communicate(timeout=120)[0] for c in children}
    assert all(equal(found[0], f) for f in found) and all(c.returncode == 0 for c in children)
    assert printed == {f"{sum(S.sum().item() for U, S, Vh in found[0].values())}\n"} and not list(on.rglob("writing-*"))


# ---- the memory ----

def remembering(monkeypatch): monkeypatch.setattr(cache, "_forget", lambda limit: None)


def test_a_second_call_computes_and_reads_nothing(on, monkeypatch):
    remembering(monkeypatch)
    weights = {"a": torch.randn(9, 5), "b": torch.randn(4, 7)}
    first = dict(thin_svds(weights))
    first["a"][1].zero_()  # a caller may write into the values that it keeps
    for path in files(on): path.unlink()
    calls = computing(monkeypatch, [])
    again = dict(thin_svds(weights))
    assert not calls and not files(on) and again["a"][1].min() > 0 and torch.equal(again["b"][0], first["b"][0])
    weights["a"].data[0, 0] += 1e-6  # one entry of one weight, behind autograd's back
    dict(thin_svds(weights))
    assert len(calls) == 1


def test_the_memory_keeps_to_the_limit(on, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("MODLAB_CACHE", str(on))
    size = 4 * (64 + 8 + 64)
    monkeypatch.setenv("MODLAB_SVD_CACHE", str(2.5 * size / 1e9))
    cache._MEMORY.clear()
    for n in range(4): dict(thin_svds({"a": torch.eye(8) * (n + 1)}))
    assert len(cache._MEMORY) == 2
    calls = computing(monkeypatch, [])
    dict(thin_svds({"a": torch.eye(8) * 4}))
    assert not calls
    cache._MEMORY.clear()


@pytest.mark.parametrize("dtype, extract, computed", [(torch.float32, False, 0), (torch.float32, True, 0),
                                                     (torch.bfloat16, False, 0), (torch.bfloat16, True, 28)])
def test_a_second_round_follows_from_the_first(on, monkeypatch, dtype, extract, computed):
    "The plain twin is the decomposition of what is left. What was rounded in 16 bits is decomposed anew."
    remembering(monkeypatch)

    def rounds(calls):
        model, _ = tiny_model()
        model.to(dtype)
        make = lambda **kw: ModulatedPiSSA(model, r=8, selection_score="s_only", extract=extract, **kw)
        one = make()
        calls.clear()
        return make(**({} if extract else dict(after=[one])))
    calls = computing(monkeypatch, [])
    kept = rounds(calls)
    assert len(calls) == computed
    monkeypatch.setenv("MODLAB_SVD_CACHE", "0")
    plain = rounds([])
    for name in kept.layers:
        assert (kept.S[name] - plain.S[name]).abs().max() <= (1e-5 if dtype == torch.float32 else 2**-9) * plain.S[name].max()
        a, b = ((p.U[name] * p.S[name]) @ p.Vh[name] for p in (kept, plain))
        assert (a - b).norm() <= (1e-4 if dtype == torch.float32 else 2**-7) * b.norm()


def test_only_what_is_asked_for_is_computed_where_nothing_is_kept(on, monkeypatch):
    weights = {"a": torch.randn(40, 30), "b": torch.randn(20, 25)}
    whole = dict(thin_svds(weights, first=5))
    assert whole["a"][0].shape == (40, 30) and len(files(on)) == 2, "what is kept is kept whole"
    monkeypatch.setenv("MODLAB_SVD_CACHE", "0")
    first = dict(thin_svds(weights, first=5))
    assert first["a"][0].shape == (40, 5) and first["b"][1].shape == (20,) and torch.equal(first["a"][2], whole["a"][2][:5])
