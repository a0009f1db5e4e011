"""Files: what is saved comes back, in order, on its own base; and a load that fails has changed nothing."""

import pytest
import torch
from models import ARCHS, KINDS, adapter_of, build, changes, gap, half, logits, state, tokens
from safetensors.torch import load_file, save_file

from modlab import load_adapter, read_metadata
from modlab.model import format

pytestmark = pytest.mark.usefixtures("one_thread")
every_kind = pytest.mark.parametrize("kind", KINDS)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
named = dict(ids=lambda d: str(d)[6:])
C = torch.tensor([1.0, -2.0, 0.5])


def run(a, model, c=C):
    with a(model, c): return logits(model, tokens())


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("base, factors", [(FLOATS[0], None), (FLOATS[1], None), (FLOATS[1], FLOATS[1]), (FLOATS[0], FLOATS[2])],
                         ids=str)
@every_kind
def test_saved_and_loaded_gives_the_same_logits(tmp_path, arch, base, factors, kind):
    model, path = build(arch, base), tmp_path / "a.safetensors"
    a = half(kind, model, dtype=factors)
    with torch.no_grad():
        for p in a.parameters(): p.add_(torch.randn(p.shape) * 0.01)
    y = run(a, model)
    a.save(path)
    assert torch.equal(run(a, model), y)
    for load in (type(a).from_checkpoint, load_adapter):
        other, random = build(arch, base), torch.get_rng_state()
        b = load(other, str(path))
        assert torch.equal(torch.get_rng_state(), random), "a random draw"
        assert torch.equal(run(b, other), y) and type(b) is type(a) and b.cfg == a.cfg
        assert not any(p.requires_grad for p in other.parameters()) and all(p.requires_grad for p in b.parameters())
        assert [(n, p.dtype) for n, p in a.named_parameters()] == [(n, p.dtype) for n, p in b.named_parameters()]
        if kind != "lora":
            assert b.extracted == a.extracted and all(torch.equal(a.chosen_idx[n], b.chosen_idx[n]) for n in a.layers)


@every_kind
def test_a_loaded_adapter_saves_the_same_file(tmp_path, kind):
    first, second = tmp_path / "1", tmp_path / "2"
    adapter_of(kind, build()).save(first)
    load_adapter(build(), first).save(second)
    a, b = load_file(first), load_file(second)
    assert read_metadata(first) == read_metadata(second) and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_keys_are_plain_module_names_and_the_header_says_all(tmp_path):
    targets = (r"layers\.[0-9]{1,2}\..*[qv]_proj", "down_proj")
    a = adapter_of("lora", build(), targets=targets, alpha=12.0, layer_range=(0.25, 1.0))
    a.save(tmp_path / "a", extra_meta={"note": "a, b", "steps": [1, 2], "nested": {"x": None}})
    meta = read_metadata(tmp_path / "a")
    assert set(load_file(tmp_path / "a")) == {f"{t}.{n}" for t in "AB" for n in a.layers}
    for field, value in vars(a.cfg).items():
        stored = meta[field]
        assert (tuple(stored) if isinstance(stored, list) else stored) == (value if field != "dtype" else None), field
    assert meta["kind"] == "lora" and meta["format"] >= 1 and set(meta["fingerprint"]) == set(a.layers)
    assert (meta["note"], meta["steps"], meta["nested"]) == ("a, b", [1, 2], {"x": None})
    assert all(len(f["sample"]) <= 256 for f in meta["fingerprint"].values())


@pytest.mark.parametrize("key", ["kind", "r", "targets", "fingerprint", "format", "dtype", "layer_range", "extract",
                                 "selection_score", "id"])
def test_extra_meta_cannot_overwrite_a_reserved_key(tmp_path, key):
    a = adapter_of("pissa-unextracted", build())
    with pytest.raises(ValueError, match=key): a.save(tmp_path / "a", extra_meta={key: "mine"})
    assert not list(tmp_path.iterdir())


@every_kind
@pytest.mark.parametrize("made_on", FLOATS, **named)
@pytest.mark.parametrize("loaded_on", FLOATS, **named)
def test_the_same_model_in_another_float_dtype_is_recognised(tmp_path, kind, made_on, loaded_on, recwarn):
    adapter_of(kind, build("gpt2", made_on)).save(tmp_path / "a")
    load_adapter(build("gpt2", made_on).to(loaded_on), tmp_path / "a")
    assert not [w for w in recwarn if "base" in str(w.message)]


@pytest.mark.parametrize("kind", KINDS)
def test_another_base_is_refused_or_with_strict_false_warned_of(tmp_path, kind):
    model, path = build(seed=0), tmp_path / "a"
    a = adapter_of(kind, model)
    a.save(path)
    other, a_there = build(seed=1), None
    before = state(other)
    for load in (type(a).from_checkpoint, load_adapter):
        with pytest.raises(ValueError, match=rf"(?s){path}.*28 of 28.*q_proj.*strict=False"): load(other, path)
    assert not changes(before, other)
    with pytest.warns(UserWarning, match="28 of 28"): a_there = type(a).from_checkpoint(other, path, strict=False)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), a_there.parameters()))
    with a_there(other, 1.0): assert logits(other, tokens()).isfinite().all()


def test_one_changed_layer_is_named(tmp_path):
    adapter_of("lora", build()).save(tmp_path / "a")
    other = build()
    with torch.no_grad(): other.model.layers[2].mlp.up_proj.weight.mul_(1.1)
    with pytest.raises(ValueError, match=r"1 of 28.*model\.layers\.2\.mlp\.up_proj"): load_adapter(other, tmp_path / "a")


@every_kind
def test_loading_into_an_adapter_keeps_its_parameters(tmp_path, kind):
    model, ids = build(), tokens()
    a = adapter_of(kind, model)
    a.save(tmp_path / "a")
    y, params = run(a, model), list(a.parameters())
    optimizer = torch.optim.AdamW(a.parameters(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        with a(model, 1.0): model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert gap(run(a, model), y) > 2**-10
    a.load(tmp_path / "a")
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in a.parameters()] == [id(p) for p in params] == held
    assert torch.equal(run(a, model), y)


@pytest.mark.parametrize("before", KINDS[1:])
@pytest.mark.parametrize("stored", KINDS[1:])
def test_loading_switches_between_the_forms_of_pissa(tmp_path, before, stored):
    source, model = build(), build()
    theirs = adapter_of(stored, source, seed=1, layer_range=(0.0, 0.5))
    mine = adapter_of(before, model, seed=9, layer_range=(0.0, 0.5), init=(0.0, 0.0))
    theirs.save(tmp_path / "a")
    mine.load(tmp_path / "a")
    assert mine.extracted == theirs.extracted and torch.equal(run(mine, model), run(theirs, source))
    if mine.extracted: mine.restore_base_W()
    assert torch.equal(logits(model, tokens()), logits(build(), tokens()))


def test_loading_gives_a_legacy_born_adapter_what_it_lacked(tmp_path):
    a = adapter_of("pissa-unextracted", build())
    a.save(tmp_path / "new")
    flat = {k: v for k, v in load_file(tmp_path / "new").items() if k.partition(".")[0] not in ("chosen_idx", "spectrum")}
    flat = {f"{k.partition('.')[0]}.{k.partition('.')[2].replace('.', '__')}": v for k, v in flat.items()}
    meta = {"r": "6", "alpha": "6", "targets": "all-linear", "layer_range": "0.0,1.0", "kind": "pissa"}
    save_file(flat, tmp_path / "old", meta)
    b = load_adapter(build(), tmp_path / "old")
    b.load(tmp_path / "new")
    assert {n: t.tolist() for n, t in b.chosen_idx.items()} == {n: t.tolist() for n, t in a.chosen_idx.items()}


@every_kind
def test_a_write_that_is_killed_leaves_the_old_file(tmp_path, kind, monkeypatch):
    path = tmp_path / "a.safetensors"
    a = adapter_of(kind, build())
    a.save(path)
    old, real = path.read_bytes(), format.save_file
    def half(flat, filename, metadata=None):
        real(flat, filename, metadata=metadata)
        with open(filename, "r+b") as f: f.truncate(1000)
        raise KeyboardInterrupt
    monkeypatch.setattr(format, "save_file", half)
    with pytest.raises(KeyboardInterrupt): a.save(path)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]
    with pytest.raises(KeyboardInterrupt): a.save(tmp_path / "new")
    assert list(tmp_path.iterdir()) == [path]


def test_saving_where_no_file_can_be_written_is_an_oserror_that_names_it(tmp_path):
    a, long = adapter_of("lora", build()), tmp_path / ("n" * 300)
    with pytest.raises(OSError, match="folder.*create"): a.save(tmp_path / "none" / "a")
    with pytest.raises(OSError, match="nnn"): a.save(long)
    (tmp_path / "adapter.safetensors").mkdir()
    with pytest.raises(OSError, match=str(tmp_path)): a.save(tmp_path)
    assert [p.name for p in tmp_path.rglob("*")] == ["adapter.safetensors"]


@every_kind
def test_a_file_is_opened_once(tmp_path, kind, monkeypatch):
    adapter_of(kind, build()).save(tmp_path / "a")
    calls, real = [], format.safe_open
    monkeypatch.setattr(format, "safe_open", lambda *args: calls.append(args) or real(*args))
    load_adapter(build(), tmp_path / "a")
    assert len(calls) == 1


def test_shared_and_strided_tables_are_saved_whole(tmp_path):
    model = build()
    a = adapter_of("lora", model, targets=("q_proj",))
    first, second = list(a.layers)[:2]
    a.A[second] = a.A[first]
    a.B[first] = torch.nn.Parameter(torch.randn(6, 64).T)
    a.B[second] = torch.nn.Parameter(torch.randn(64, 12)[:, ::2])
    a.save(tmp_path / "a")
    b = load_adapter(build(), tmp_path / "a")
    for n in a.layers: assert torch.equal(a.A[n], b.A[n]) and torch.equal(a.B[n], b.B[n])


def test_a_full_disk_is_an_oserror_that_names_the_file(tmp_path):
    import resource
    a, limit = adapter_of("lora", build()), resource.getrlimit(resource.RLIMIT_FSIZE)
    a.save(tmp_path / "a")
    before = (tmp_path / "a").read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        with pytest.raises(OSError, match=str(tmp_path / "a")): a.save(tmp_path / "a")
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (tmp_path / "a").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a"]
