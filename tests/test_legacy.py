"""Files of the earlier implementation, made by hand here: `.` written `__` in keys, metadata as plain strings, no fingerprint."""
import pytest
import torch
from models import adapter_of, build, changes, gap, logits, seeded, state, tokens
from safetensors.torch import save_file

from modlab import ModulatedLoRA, ModulatedPiSSA, load_adapter, read_metadata
from modlab.model.layers import layer_shape
from modlab.model.targets import LoRAConfig, find_targets

pytestmark = pytest.mark.usefixtures("one_thread")
META = dict(r="4", alpha="8.0", targets="q_proj,down_proj", layer_range="0.0,1.0")


def flat(tables): return {f"{t}.{n.replace('.', '__')}": v.contiguous() for t, of in tables.items() for n, v in of.items()}


def lora_file(path, model, dtype=torch.float32, names=None, **meta):
    layers = {n: model.get_submodule(n) for n in names or find_targets(model, LoRAConfig(targets=("q_proj", "down_proj")))}
    g = seeded(3)
    A = {n: torch.randn(4, layer_shape(layer)[1], generator=g).to(dtype) * 0.1 for n, layer in layers.items()}
    B = {n: torch.randn(layer_shape(layer)[0], 4, generator=g).to(dtype) * 0.1 for n, layer in layers.items()}
    save_file(flat({"A": A, "B": B}), path, META | meta)
    return A, B


def pissa_file(path, model, dtype=torch.float32, names=None, **meta):
    names = names or list(find_targets(model, LoRAConfig(targets=("q_proj", "down_proj"))))
    tables = {t: {} for t in ("U", "S", "Vh", "delta_s")}
    for n in names:
        U, S, Vh = torch.linalg.svd(model.get_submodule(n).weight.detach().double(), full_matrices=False)
        for t, v in zip(tables, (U[:, 2:6], S[2:6], Vh[2:6], torch.tensor([0.3, -0.2, 0.1, 0.5]))): tables[t][n] = v.to(dtype)
    save_file(flat(tables), path, META | dict(kind="pissa", selection_score="wanda") | meta)
    return tables


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("load", [load_adapter, ModulatedLoRA.from_checkpoint])
def test_lora(tmp_path, dtype, load):
    model = build()
    A, B = lora_file(tmp_path / "a", model, dtype)
    a = load(model, tmp_path / "a")
    assert type(a) is ModulatedLoRA and list(a.layers) == list(find_targets(model, LoRAConfig(targets=("q_proj", "down_proj"))))
    assert (a.cfg.r, a.cfg.alpha, a.cfg.targets, a.cfg.layer_range) == (4, 8.0, ("q_proj", "down_proj"), (0.0, 1.0))
    for n in a.layers:
        assert a.A[n].dtype == a.B[n].dtype == dtype and torch.equal(a.A[n], A[n]) and torch.equal(a.B[n], B[n])
        assert gap(a.delta(n, 3.0).float(), 3.0 * 8 / 4 * B[n].float() @ A[n].float()) < 2**-6  # bfloat16 rounds each product


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pissa_is_extracted(tmp_path, dtype):
    model, base = build(), build()
    tables = pissa_file(tmp_path / "a", model, dtype)
    a = load_adapter(model, tmp_path / "a")
    assert type(a) is ModulatedPiSSA and a.extracted and a.cfg.selection_score == "wanda"
    assert {p.dtype for p in a.parameters()} == {dtype}
    for t, of in tables.items():
        for n, v in of.items(): assert torch.equal(getattr(a, t)[n], v)
    assert gap(logits(model, tokens()), logits(base, tokens())) > 2**-6, "nothing was extracted"
    with a(model, 0.0): y = logits(model, tokens())
    assert gap(y, logits(base, tokens())) < (2**-16 if dtype == torch.float32 else 2**-5)  # rounding of the factors' dtype
    for n, d in tables["delta_s"].items():
        moved = (a.delta(n, 2.0) - a.delta(n, 0.0)).float()
        expected = 2.0 * (tables["U"][n] * d).float() @ tables["Vh"][n].float()
        assert gap(moved, expected) < (2**-18 if dtype == torch.float32 else 2**-4)
    a.restore_base_W()
    assert torch.equal(logits(model, tokens()), logits(base, tokens()))


@pytest.mark.parametrize("write", [lora_file, pissa_file])
def test_a_range_that_lost_a_block_loads_as_it_was(tmp_path, write):
    "int(0.29 · 100) is 28: the file lacks a block that its own range selects now. What it has is what is loaded."
    model = build()
    names = list(find_targets(model, LoRAConfig(targets=("q_proj", "down_proj"), layer_range=(0.0, 0.5))))
    write(tmp_path / "a", model, names=names, layer_range="0.0,0.75")
    a = load_adapter(model, tmp_path / "a")
    assert list(a.layers) == names
    a.save(tmp_path / "b")
    b = load_adapter(build(), tmp_path / "b")
    assert list(b.layers) == names and read_metadata(tmp_path / "b")["format"] == 1


@pytest.mark.parametrize("targets", [r"layers\.(?:\d{1,2})\.self_attn\.q_proj,down_proj", r"(q|x{2,3})_proj,down_proj",
                                     "q_proj, down_proj"])
def test_patterns_that_a_comma_tore_apart_do_not_stop_it(tmp_path, targets):
    model = build()
    lora_file(tmp_path / "a", model, targets=targets)
    expected = list(find_targets(model, LoRAConfig(targets=("q_proj", "down_proj"))))
    assert list(load_adapter(model, tmp_path / "a").layers) == expected


@pytest.mark.parametrize("write", [lora_file, pissa_file])
def test_that_there_is_no_fingerprint_is_said_once(tmp_path, write, caplog):
    write(tmp_path / "a", build())
    load_adapter(build(), tmp_path / "a")
    assert len([r for r in caplog.records if "fingerprint" in r.getMessage()]) == 1


@pytest.mark.parametrize("write", [lora_file, pissa_file])
def test_it_saves_as_a_file_of_today(tmp_path, write):
    model = build()
    write(tmp_path / "old", model)
    a = load_adapter(model, tmp_path / "old")
    a.save(tmp_path / "new")
    other = build()
    b = load_adapter(other, tmp_path / "new")
    with a(model, 1.0), b(other, 1.0): assert torch.equal(logits(model, tokens()), logits(other, tokens()))


def test_into_an_adapter_that_is_there(tmp_path):
    model = build()
    A, _ = lora_file(tmp_path / "a", model)
    a = ModulatedLoRA(model, r=4, targets=("q_proj", "down_proj"))
    params = list(map(id, a.parameters()))
    a.load(tmp_path / "a")
    assert list(map(id, a.parameters())) == params and all(torch.equal(a.A[n], A[n]) for n in A) and a.cfg.alpha == 8.0


def test_directions_of_another_base_are_refused_without_a_fingerprint(tmp_path):
    pissa_file(tmp_path / "a", build(seed=0))
    other = build(seed=1)
    before = state(other)
    with pytest.raises(ValueError, match=r"8 of 8 weights.*q_proj"): load_adapter(other, tmp_path / "a")
    assert not changes(before, other)


def test_a_second_time_is_refused(tmp_path):
    model = build()
    pissa_file(tmp_path / "a", model)
    load_adapter(model, tmp_path / "a")
    before = state(model)
    with pytest.raises((ValueError, RuntimeError), match="already"): load_adapter(model, tmp_path / "a")
    assert not changes(before, model)


@pytest.mark.parametrize("meta", [dict(r="four"), dict(layer_range="0.0;1.0"), dict(alpha="x"), dict(alpha="-1"), dict(r="0"),
                                  dict(kind="dora")], ids=str)
def test_a_header_that_makes_no_sense_is_an_error_that_names_the_file(tmp_path, meta):
    model = build()
    lora_file(tmp_path / "a", model, **meta)
    before = state(model)
    with pytest.raises((OSError, ValueError), match=str(tmp_path / "a")): load_adapter(model, tmp_path / "a")
    assert not changes(before, model)


def test_layers_that_the_model_lacks_are_counted(tmp_path):
    lora_file(tmp_path / "a", build())
    other = build("opt")
    before = state(other)
    with pytest.raises(ValueError, match="8 would be dropped.*another kind of model"): load_adapter(other, tmp_path / "a")
    assert not changes(before, other)
    a = adapter_of("lora", build(), targets=("q_proj",), r=4)
    with pytest.raises(ValueError, match="4 would be dropped.*down_proj"): a.load(tmp_path / "a")
