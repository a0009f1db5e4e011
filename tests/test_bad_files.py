"""Files that are no adapter, not this adapter, or not whole: an error that names the file, and nothing has changed."""
import json
import re
import struct

import pytest
import torch
from models import KINDS, adapter_of, build, changes, logits, state, tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from modlab import ModulatedLoRA, ModulatedPiSSA, load_adapter, read_metadata
from modlab.adapters.adapter import Adapter

pytestmark = pytest.mark.usefixtures("one_thread")
every_kind = pytest.mark.parametrize("kind", KINDS)
CLASS = {"lora": ModulatedLoRA, "pissa-extracted": ModulatedPiSSA, "pissa-unextracted": ModulatedPiSSA}


LOADS = ("load_adapter", "from_checkpoint", "load")


def everything(a):
    "What a failed load must not change in an adapter."
    tables = {t: {n: (id(v), v.detach().clone()) for n, v in getattr(a, t).items()} for t in a.tables}
    return tables, a.cfg, a.c, a.attached, getattr(a, "extracted", None)


def alike(x, y):
    tables = [[(n, i) for n, (i, _) in of.items()] for t in (x, y) for of in t[0].values()]
    values = all(torch.equal(v, y[0][t][n][1]) for t, of in x[0].items() for n, (_, v) in of.items())
    return tables[:len(tables) // 2] == tables[len(tables) // 2:] and values and x[1:] == y[1:]


def refused(path, error, says, kind="lora", ways=("load_adapter", "from_checkpoint", "load", "read_metadata"), **kw):
    model, mine = build(), None
    calls = {"load_adapter": lambda: load_adapter(model, path),
             "from_checkpoint": lambda: CLASS[kind].from_checkpoint(model, path),
             "read_metadata": lambda: read_metadata(path), "load": lambda: mine.load(path)}
    for way in ways:
        if way == "load" and mine is None: mine = adapter_of(kind, model, seed=11, **kw)
        before, own = state(model), mine and everything(mine)
        with pytest.raises(error) as e: calls[way]()
        assert str(path) in str(e.value), f"{way} does not name the file: {e.value}"
        missing = [s for s in says if not re.search(s, str(e.value))]
        assert not missing, f"{way}: {missing} not in {e.value}"
        assert not changes(before, model) and (mine is None or alike(own, everything(mine))), way
    with mine(model, 1.0) if mine else torch.no_grad(): assert logits(model, tokens()).isfinite().all()


@every_kind
def test_no_such_file(tmp_path, kind):
    refused(tmp_path / "none.safetensors", FileNotFoundError, ["no such file"], kind)
    refused(tmp_path, OSError, [], kind)


@every_kind
@pytest.mark.parametrize("cut", [0, 4, 200, -1, 0.5], ids=lambda c: f"to {c}")
def test_a_truncated_file(tmp_path, kind, cut):
    path = tmp_path / "a"
    adapter_of(kind, build()).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:int(len(whole) * cut) if isinstance(cut, float) else cut])
    refused(path, OSError, ["complete|cut off"], kind)


@pytest.mark.parametrize("content", [b"not a tensor in sight " * 20, b"\x80\x04pickle" * 9, struct.pack("<Q", 3) + b"{]}"])
def test_something_else_altogether(tmp_path, content):
    path = tmp_path / "a"
    path.write_bytes(content)
    refused(path, OSError, ["safetensors"])


W = {"model.layers.0.self_attn.q_proj.weight": torch.ones(4, 4)}
PEFT = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 4)}


@pytest.mark.parametrize("tensors, header", [(W, None), (W, {"format": "pt"}), (PEFT, {"format": "pt"}),
                                             (W, {"format": "1"}), (W, {"format": "[]"}),
                                             (W, {"r": "4"}), ({"A.x": torch.ones(2, 2)}, {"format": "np", "kind": "lora"})])
def test_a_foreign_safetensors_file(tmp_path, tensors, header):
    "Such as a model's own weights, or an adapter of PEFT, which both say `format: pt`."
    save_file(tensors, tmp_path / "model.safetensors", header)
    refused(tmp_path / "model.safetensors", OSError, ["no modlab adapter|not a modlab"])


def rewrite(path, header=(), drop=(), **tensors):
    "The same file with other header entries or tensors, as another program would write it: without checksums."
    with safe_open(path, "pt") as f: meta = {k: v for k, v in f.metadata().items() if k != "crc32"}
    flat = {k: v for k, v in load_file(path).items() if not any(re.search(d, k) for d in drop)} | tensors
    save_file(flat, path, {**meta, **{k: json.dumps(v) for k, v in dict(header).items()}})


@every_kind
def test_a_file_without_a_name_of_its_own(tmp_path, kind):
    adapter_of(kind, build()).save(tmp_path / "a")
    rewrite(tmp_path / "a", dict(id=""))
    refused(tmp_path / "a", OSError, ["id"])


@every_kind
def test_a_file_of_the_future(tmp_path, kind):
    adapter_of(kind, build()).save(tmp_path / "a")
    rewrite(tmp_path / "a", {"format": 99})
    refused(tmp_path / "a", OSError, ["99", "upgrade"], kind)


@every_kind
@pytest.mark.parametrize("header", [{"dtype": "int64"}, {"r": 0}, {"layer_range": [0.9, 0.1]},
                                    {"alpha": -1.0}], ids=str)
def test_a_header_of_nonsense(tmp_path, kind, header):
    adapter_of(kind, build()).save(tmp_path / "a")
    rewrite(tmp_path / "a", header)
    refused(tmp_path / "a", (OSError, ValueError), [], kind, LOADS)


@every_kind
def test_an_unknown_kind(tmp_path, kind):
    adapter_of(kind, build()).save(tmp_path / "a")
    rewrite(tmp_path / "a", {"kind": "dora"})
    refused(tmp_path / "a", OSError, ["dora", "lora"], kind, ["load_adapter"])
    refused(tmp_path / "a", ValueError, ["dora", CLASS[kind].kind], kind, ["from_checkpoint", "load"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", KINDS)
def test_an_adapter_of_the_other_kind(tmp_path, kind, other):
    if CLASS[kind] is CLASS[other]: assert CLASS[kind].kind in Adapter.kinds; return
    adapter_of(other, build()).save(tmp_path / "a")
    refused(tmp_path / "a", ValueError, [CLASS[kind].kind, CLASS[other].kind, "load_adapter"], kind, ["from_checkpoint", "load"])


@every_kind
@pytest.mark.parametrize("lost", [r"^(B|S)\.", r"^(A|delta_s)\.model\.layers\.1\.mlp\.up_proj", "layers.2"])
def test_tables_that_are_incomplete(tmp_path, kind, lost):
    adapter_of(kind, build()).save(tmp_path / "a")
    rewrite(tmp_path / "a", drop=[lost])
    says = ["7 would stay empty", "layers.2"] if lost == "layers.2" else ["incomplete"]
    refused(tmp_path / "a", ValueError if lost == "layers.2" else OSError, says, kind, LOADS)


@every_kind
def test_a_table_too_many(tmp_path, kind):
    adapter_of(kind, build()).save(tmp_path / "a")
    rewrite(tmp_path / "a", **{"gate.model.layers.0.mlp.up_proj": torch.ones(3)})
    refused(tmp_path / "a", (OSError, ValueError), ["gate"], kind, LOADS)


@every_kind
def test_factors_of_another_shape(tmp_path, kind):
    adapter_of(kind, build()).save(tmp_path / "a")
    key = "A" if kind == "lora" else "Vh"
    rewrite(tmp_path / "a", **{f"{key}.model.layers.3.mlp.up_proj": torch.ones(6, 63)})
    refused(tmp_path / "a", (OSError, ValueError), [r"layers\.3\.mlp\.up_proj", "63"], kind, LOADS)


@every_kind
def test_a_gain_of_another_length(tmp_path, kind):
    if kind == "lora": key, t = "B", torch.ones(128, 5)
    else: key, t = "delta_s", torch.ones(5)
    adapter_of(kind, build()).save(tmp_path / "a")
    rewrite(tmp_path / "a", **{f"{key}.model.layers.3.mlp.up_proj": t})
    refused(tmp_path / "a", (OSError, ValueError), [r"layers\.3\.mlp\.up_proj"], kind, LOADS)


@every_kind
def test_other_targets_are_counted(tmp_path, kind):
    adapter_of(kind, build(), layer_range=(0.0, 0.5)).save(tmp_path / "a")
    refused(tmp_path / "a", ValueError, ["7 would be dropped", "7 would stay empty", "from_checkpoint"], kind, ["load"],
            layer_range=(0.25, 0.75))
    refused(tmp_path / "a", ValueError, ["0 would be dropped", "14 would stay empty"], kind, ["load"])


@every_kind
def test_another_rank(tmp_path, kind):
    adapter_of(kind, build(), r=5).save(tmp_path / "a")
    refused(tmp_path / "a", ValueError, [r"\(5", r"\(6", "from_checkpoint"], kind, ["load"])


@every_kind
def test_another_base_model(tmp_path, kind):
    adapter_of(kind, build(seed=1)).save(tmp_path / "a")
    refused(tmp_path / "a", ValueError, ["28 of 28", "q_proj", "strict=False"], kind, LOADS)


@every_kind
def test_a_model_of_other_names(tmp_path, kind):
    adapter_of(kind, build("opt"), targets=("fc1",)).save(tmp_path / "a")
    refused(tmp_path / "a", ValueError, ["fc1"], kind, ["load_adapter", "from_checkpoint"])
    refused(tmp_path / "a", ValueError, ["2 would be dropped", "28 would stay empty"], kind, ["load"])


@pytest.mark.parametrize("kind", KINDS)
def test_onto_a_weight_that_is_already_extracted(tmp_path, kind):
    adapter_of(kind, build()).save(tmp_path / "a")
    model = build()
    first, before = adapter_of("pissa-extracted", model, seed=4, r=3), None
    before = state(model)
    for call in (lambda: load_adapter(model, tmp_path / "a"),
                 lambda: CLASS[kind].from_checkpoint(model, tmp_path / "a", strict=False)):
        with pytest.raises(RuntimeError, match=rf"{tmp_path / 'a'}.*1 extraction.*restore_base_W"): call()
    assert not changes(before, model)
    first.restore_base_W()
    assert load_adapter(model, tmp_path / "a").layers


def test_an_extracted_adapter_without_its_base_cannot_load(tmp_path):
    a = adapter_of("pissa-extracted", build())
    a.save(tmp_path / "a")
    refused(tmp_path / "a", RuntimeError, ["restore_base_W"], "pissa-extracted", ["load"], keep_base=False)


@pytest.mark.parametrize("extra", [{"x": object()}, {"x": torch.ones(2)}], ids=["object", "tensor"])
def test_extra_meta_that_is_no_json(tmp_path, extra):
    a = adapter_of("lora", build())
    with pytest.raises(ValueError, match="extra_meta"): a.save(tmp_path / "a", extra_meta=extra)
    assert not list(tmp_path.iterdir())


# ---- values that pass for something else ----

@pytest.mark.parametrize("kind, key", [("lora", "A"), ("lora", "B"), ("pissa-extracted", "U"), ("pissa-extracted", "S"),
                                       ("pissa-unextracted", "delta_s"), ("pissa-unextracted", "spectrum")])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite(tmp_path, kind, key, value):
    adapter_of(kind, build()).save(tmp_path / "a")
    name = f"{key}.model.layers.1.mlp.up_proj"
    t = load_file(tmp_path / "a")[name].clone()
    t.view(-1)[1] = value
    rewrite(tmp_path / "a", **{name: t})
    refused(tmp_path / "a", OSError, ["NaN or infinite", re.escape(name)], kind, LOADS)


@pytest.mark.parametrize("header", [{"scale": None}, {"scale": {"x": "1"}}, {"fingerprint": None}, {"kind": ["x"]}, {"dtype": 3},
                                    {"r": []}, {"r": 2.5}, {"targets": "q"}, {"layer_range": [0.1]}, {"id": 7}, {"alpha": "x"},
                                    {"extract": "yes"}, {"init": None}, {"exclude": [1]}, {"selection_score": 1}], ids=str)
def test_a_header_value_of_another_type(tmp_path, header):
    adapter_of("pissa-extracted", build()).save(tmp_path / "a")
    rewrite(tmp_path / "a", header)
    refused(tmp_path / "a", OSError, [next(iter(header)), "makes no sense"], "pissa-extracted", LOADS)


@pytest.mark.parametrize("how", ["none", "infinite", "empty", "null", "short", "a layer less"])
def test_a_fingerprint_that_would_match_every_base(tmp_path, how):
    adapter_of("lora", build(seed=1)).save(tmp_path / "a")
    prints = read_metadata(tmp_path / "a")["fingerprint"]
    for name, mark in prints.items():
        sample = {"infinite": [float("inf")] * 256, "empty": [], "short": mark["sample"][:1]}.get(how, mark["sample"])
        prints[name] = None if how == "null" else mark | dict(sample=sample)
    if how == "none": prints = {}
    if how == "a layer less": prints.pop(name)
    rewrite(tmp_path / "a", {"fingerprint": prints})
    refused(tmp_path / "a", OSError, ["fingerprint"], "lora", LOADS)


@pytest.mark.parametrize("table", ["spectrum", "chosen_idx"])
def test_an_optional_table_that_is_there_in_part(tmp_path, table):
    adapter_of("pissa-extracted", build()).save(tmp_path / "a")
    rewrite(tmp_path / "a", drop=[rf"^{table}\.model\.layers\.1\.mlp\.up_proj"])
    refused(tmp_path / "a", OSError, ["incomplete", table], "pissa-extracted", LOADS)


def test_a_pattern_that_would_take_for_ever_is_not_searched_for(tmp_path):
    a = adapter_of("lora", build())
    a.save(tmp_path / "a")
    rewrite(tmp_path / "a", {"targets": ["^(([a-z0-9_.])+)+!$"]})
    assert list(load_adapter(build(), tmp_path / "a").layers) == list(a.layers)


def test_a_header_that_is_nested_without_end(tmp_path):
    adapter_of("lora", build()).save(tmp_path / "a")
    with safe_open(tmp_path / "a", "pt") as f: meta = f.metadata()
    save_file(load_file(tmp_path / "a"), tmp_path / "a", {**meta, "note": "[" * 100_000})
    refused(tmp_path / "a", OSError, ["makes no sense"], "lora", LOADS)
