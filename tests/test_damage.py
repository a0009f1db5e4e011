"""Files that are spoilt and writers that are interrupted: the short form of `make faults`, and each defect that it has found."""
import json
import os
import re
import resource
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from faults import damage, kills, mutants
from models import adapter_of, build, changes, state
from safetensors.torch import load_file

from modlab import from_peft, load_adapter, load_model, load_pairs, read_metadata, tiny_model, to_peft
from modlab.learn.runfile import RunFile
from modlab.model import default

pytestmark = pytest.mark.usefixtures("one_thread")
def header_of(path): return {k: json.loads(v) for k, v in mutants.header_of(path).items()}


EVERY = pytest.mark.parametrize("family", damage.FAMILIES, ids=lambda f: f.name)


@EVERY
def test_mutants_of_every_kind_of_file(tmp_path, family):
    found = damage.run(float("inf"), True, tmp_path, [replace(family, share=5)], seed=3)
    assert found["tried"] == found["planned"] == 5 and not found["failed"], [r for r in found["rows"] if "error" in r]
    assert found["held"] + found["refused"] == 5


@pytest.mark.parametrize("writer", kills.WRITERS, ids=lambda w: w.name)
def test_every_writer_is_interrupted(tmp_path, writer, monkeypatch):
    monkeypatch.setattr(kills, "CASES", {case: (f, 1) for case, (f, _) in kills.CASES.items()})
    found = kills.run(float("inf"), True, tmp_path, [writer])
    assert found["tried"] == found["planned"] == 5 and not found["failed"], [r for r in found["rows"] if "error" in r]


# ---- do they see it? ----

def test_a_reader_that_lets_damage_pass_is_found(tmp_path):
    "Without checksums a flipped bit is another number."
    def flipped(folder, rng): yield from ((damage.ADAPTER, m) for m in iter(lambda: mutants.flip(rng), None))
    def unsealed(folder):
        known = damage.FAMILIES[0].make(folder)
        mutants.write_header(folder / damage.ADAPTER, header_of(folder / damage.ADAPTER))
        return known
    family = replace(damage.FAMILIES[0], spoil=flipped, share=12, make=unsealed)
    found = damage.run(float("inf"), True, tmp_path, [family])
    assert found["failed"] and any("other values" in r["error"] for r in found["rows"] if "error" in r)


def test_a_writer_that_is_not_atomic_is_found(tmp_path, monkeypatch):
    def slow(folder, n):
        with (folder / "a").open("w") as f:
            for _ in range(50):
                f.write(str(n) * 10)
                f.flush()
                time.sleep(0.001)
    def read(folder):
        text = (folder / "a").read_text() if (folder / "a").exists() else "0" * 500
        assert text in ("0" * 500, "1" * 500), "neither"
        return int(text[0])
    monkeypatch.setattr(kills, "CASES", {"kill -9": (kills.kill, 4)})
    found = kills.run(float("inf"), True, tmp_path, [kills.Writer("slow", slow, read, {"a"}, keeps=True)])
    assert found["failed"] and any("neither" in r["error"] for r in found["rows"] if "error" in r)


# ---- by hand ----

def flip(path, at, bit=0):
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def test_a_flipped_bit_in_a_number_is_noticed(tmp_path):
    a, path = adapter_of("lora", build(), r=2, targets="q_proj"), tmp_path / "a"
    a.save(path)
    flip(path, -1, bit=5)
    assert all(t.isfinite().all() for t in load_file(path).values()), "as good as any other number"
    model = build()
    before = state(model)
    for load in (lambda: load_adapter(model, path), lambda: a.load(path)):
        with pytest.raises(OSError, match=f"{path}: damaged, its tables"): load()
    assert not changes(before, model) and read_metadata(path)["r"] == 2


def test_a_flipped_digit_in_the_header_is_noticed(tmp_path):
    adapter_of("lora", build(), r=2, targets="q_proj").save(tmp_path / "a", extra_meta=dict(steps=100))
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes().replace(b'"steps":"100"', b'"steps":"900"'))
    for read in (read_metadata, lambda path: load_adapter(build(), path)):
        with pytest.raises(OSError, match="a: damaged, its header"): read(tmp_path / "a")


def test_a_file_without_checksums_loads_as_before(tmp_path):
    a, path = adapter_of("lora", build(), r=2, targets="q_proj"), tmp_path / "a"
    a.save(path)
    mutants.write_header(path, header_of(path))
    assert "crc32" not in mutants.header_of(path) and load_adapter(build(), path).cfg == a.cfg
    with pytest.raises(ValueError, match="crc32"): a.save(path, extra_meta=dict(crc32=[1, 2]))


@pytest.mark.parametrize("header", [dict(format=0), dict(format=-3), dict(format=True), dict(format=1.0), dict(scale={}),
                                    dict(crc32=[1])], ids=str)
def test_a_header_that_would_switch_a_check_off(tmp_path, header):
    path = tmp_path / "a"
    adapter_of("lora", build(), r=2, targets="q_proj").save(path)
    mutants.write_header(path, header_of(path) | header, sealed="")
    with pytest.raises(OSError, match=str(path)): load_adapter(build(), path)


def test_scales_of_some_layers_alone_are_refused(tmp_path):
    a, path = adapter_of("lora", build(), r=2, targets="q_proj"), tmp_path / "a"
    a.save(path)
    name = next(iter(a.scale))
    mutants.write_header(path, header_of(path) | dict(scale={name: 3.0}))
    with pytest.raises(OSError, match="no scale for 3 of its layers"): load_adapter(build(), path)


def test_what_a_killed_writer_left_is_swept_once_it_is_old(tmp_path):
    a = adapter_of("lora", build(), r=2, targets="q_proj")
    left = [tmp_path / ".a.safetensors.123.part", tmp_path / ".b.safetensors.123.part", tmp_path / ".a.safetensors.124.part",
            tmp_path / "peft" / ".peft.half-0123", tmp_path / ".peft.half-4567"]
    for path in left[3:]: path.mkdir(parents=True)
    for path in left[:3]: path.write_text("half")
    for path in [*left[:2], *left[3:]]: os.utime(path, (0, 0))
    a.save(tmp_path / "a.safetensors")
    to_peft(a, tmp_path / "peft")
    assert [p.exists() for p in left] == [False, True, True, False, False], "another file's, and a young one, are left alone"


@contextmanager
def small_files(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 300, 3000])
def test_a_full_disk_names_the_folder_of_an_adapter(tmp_path, size):
    a, path = adapter_of("lora", build(), r=2, targets="q_proj"), tmp_path / "peft"
    to_peft(a, path, 0.5)
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    with small_files(size), pytest.raises(OSError, match=f"{path}: it cannot be written"): to_peft(a, path)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before and os.listdir(tmp_path) == ["peft"]


@pytest.fixture
def converted(tmp_path, monkeypatch):
    "The default model is the tiny one, and its cache a folder of its own."
    monkeypatch.setenv("MODLAB_CACHE", str(tmp_path))
    monkeypatch.setattr(default, "_gguf_file", lambda: Path("no.gguf"))
    monkeypatch.setattr(default, "_convert", damage.convert)
    return tmp_path / default._DEFAULT_MODEL


def test_a_full_disk_names_the_folder_of_the_default_model(converted):
    with small_files(20_000), pytest.raises(OSError, match=f"{converted}: .*cannot be written there .*MODLAB_CACHE"): load_model()
    assert not converted.exists() and not list(converted.parent.glob("converting-*"))


@pytest.mark.parametrize("spoil", [lambda p: flip(p / "model.safetensors", -1), lambda p: (p / "tokenizer.json").unlink(),
                                   lambda p: (p / "config.json").write_text(""), lambda p: (p / "modlab.json").write_text("[]"),
                                   lambda p: (p / "added.txt").write_text("x")],
                         ids=["a bit", "missing", "empty", "the list", "more"])
def test_a_damaged_default_model_is_converted_again(converted, spoil, recwarn):
    load_model()
    assert not [w for w in recwarn if "converted again" in str(w.message)]
    spoil(converted)
    with pytest.warns(UserWarning, match=f"{converted} is not what was written there"): model, tok = load_model()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), tiny_model()[0].parameters())) and tok("é").input_ids
    assert default._is_whole(converted) and not list(converted.parent.glob("converting-*"))


def test_a_flipped_bit_in_the_state_of_a_run_is_noticed(tmp_path):
    state = dict(identity=dict(lr=0.1), step=3, rows=[dict(loss=float("nan"))], adapter={"A.q": torch.ones(50)})
    path = tmp_path / "run.pt"
    with RunFile(path) as file:
        file.write(state)
        assert file.read(dict(lr=0.1), ["step", "adapter"])["step"] == 3
    at = path.read_bytes().index(torch.ones(50).numpy().tobytes())
    flip(path, at + 3)
    assert torch.load(path)["adapter"]["A.q"][0] != 1, "torch reads it without a word"
    with pytest.raises(OSError, match=f"{path}: damaged"): RunFile(path).read(dict(lr=0.1), ["step"])


LINE = json.dumps(dict(prompt="Thé ?", cho="là", rej="ici"), ensure_ascii=False)


@pytest.mark.parametrize("data, says", [
    ((LINE + "\n" + LINE).encode("latin-1"), "line 1: not UTF-8"), (LINE.encode() + b"\n\n\xff", "line 3: not UTF-8"),
    (b"[" * 100_000, "line 1: not JSON"), (LINE.encode() + b'\n{"split": 3}', "line 2: split is 3"),
    (b'{"split": ["train"]}', "line 1: split is"), (b"{'prompt': 1}", "line 1: not JSON")])
def test_a_file_of_records_names_file_and_line(tmp_path, data, says):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(f"{path}, {says}")) as e: load_pairs(path=path)
    assert type(e.value) is ValueError


def test_records_without_a_split_and_with_a_mark_of_byte_order(tmp_path):
    records, path = [dict(prompt="a", cho="b", rej="c", split=split) for split in (None, "train", "test")], tmp_path / "my.jsonl"
    records.append(dict(prompt="d", cho="e", rej="f"))
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8-sig")
    assert load_pairs(path=path) == records and load_pairs("train", path=path) == [records[1]]
    with pytest.raises(ValueError, match=r"'dev'; there are \['test', 'train'\]"): load_pairs("dev", path=path)


@pytest.mark.parametrize("name", ["runs/knight", Path("owner/name")], ids=str)
def test_a_path_is_not_asked_for_on_the_hub(tmp_path, monkeypatch, name):
    "Whatever is to be loaded: an adapter, a PEFT folder or a model."
    from modlab.model import format
    from modlab.share import folder
    def asked(*args, **kw): raise AssertionError("the Hub was asked")
    for module, f in ((format, "hf_hub_download"), (folder, "snapshot_download")): monkeypatch.setattr(module, f, asked)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for load in (load_adapter, from_peft, lambda model, name: read_metadata(name), lambda model, name: load_model(name)):
        with pytest.raises(OSError, match=f"{name}.*no such f"): load(build(), name)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_factors_of_peft_that_are_no_floats(tmp_path, dtype):
    to_peft(adapter_of("lora", build(), r=2, targets="q_proj"), tmp_path)
    mutants.write_tables(tmp_path / damage.WEIGHTS, lambda flat: flat | {(key := next(iter(flat))): flat[key].to(dtype)})
    model = build()
    before = state(model)
    with pytest.raises(OSError, match=f"{tmp_path}: 1 factors hold values that are not finite floats"): from_peft(model, tmp_path)
    assert not changes(before, model)


@pytest.mark.parametrize("factor, dtype", [(1e300, torch.float64), (1e25, torch.float32)], ids=str)
def test_a_spectrum_so_large_that_its_norm_overflows_is_no_match(tmp_path, factor, dtype):
    "Infinite in the adapter's dtype, or when it is squared."
    path = tmp_path / "a"
    adapter_of("pissa-extracted", build(), targets="q_proj").save(path)
    name = "S.model.layers.1.self_attn.q_proj"
    mutants.write_tables(path, lambda flat: flat | {name: flat[name].to(dtype) * factor})
    model = build()
    before = state(model)
    with pytest.raises((OSError, ValueError), match=str(path)): load_adapter(model, path)
    assert not changes(before, model)
