"""What a forward pass without gradients computes from copies, beside the plain way; and the benchmark's own checks."""
import gc
import sys
import threading
from pathlib import Path

import pytest
import torch
from models import KINDS, adapter_of, build, gap, logits, tokens
from torch import nn

from modlab.maths.lowrank import LowRank
from modlab.model import copies
from modlab.model.copies import FastMap, Inputs, is_fresh

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import gpu_check
import tables

pytestmark = pytest.mark.usefixtures("one_thread")
BOUNDS = {torch.float32: 2**-20, torch.bfloat16: 2**-7}  # of the norm of what is added


@pytest.fixture
def narrow(monkeypatch):
    "The way of an accelerator, on this processor."
    monkeypatch.setattr(copies, "_narrows", lambda device: True)


def plainly(monkeypatch, f):
    with monkeypatch.context() as m:
        m.setattr(FastMap, "serves", lambda *args: False)
        m.setattr(FastMap, "narrows", lambda *args: False)
        return f()


@torch.no_grad()
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("rows", [False, True], ids=["one dose", "a dose per row"])
@pytest.mark.parametrize("fresh", [False, True])
def test_copies_add_what_the_map_adds_to_the_bound(dtype, tokens, rows, fresh, narrow):
    down, slope, up = torch.randn(16, 64) / 8, torch.rand(16) + 0.5, torch.randn(48, 16)
    c, x = torch.tensor([0.3, -1.7] if rows else 0.3), torch.randn(2, tokens, 64).to(dtype)
    m, y = FastMap(Inputs(), down, slope, None, up), torch.zeros(2, tokens, 48, dtype=dtype)
    assert m.serves(x, y)
    gain = c.double()[..., None] * slope.double()
    exact = LowRank(down.double(), gain, up.double())(x.double())
    for _ in range(2):
        out = m.add(x, y.clone(), c, fresh).double()
        assert (out - exact).norm() <= BOUNDS[dtype] * exact.norm()
    if dtype == torch.bfloat16: assert (m.narrow(x, y, c).double() - exact).norm() <= BOUNDS[dtype] * exact.norm()


@pytest.mark.parametrize("b, s", [(3, 7), (3, 20)], ids=["few tokens", "many"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt", "mixtral"])
def test_a_model_is_what_it_is_the_plain_way(arch, kind, b, s, monkeypatch):
    model, ids = build(arch), tokens(b, s)
    a = adapter_of(kind, model)
    for c in (0.7, torch.tensor([1.0, 0.0, -2.0])):
        with a(model, c):
            plain = plainly(monkeypatch, lambda: logits(model, ids))
            for _ in range(2): assert gap(logits(model, ids), plain) < 2**-16


@torch.no_grad()
def test_in_bfloat16_an_accelerator_gets_the_plain_logits_within_rounding(narrow, monkeypatch):
    model, ids = build(dtype=torch.bfloat16), tokens()
    a = adapter_of("lora", model)
    with a(model, torch.tensor([1.0, 0.0, -2.0])):
        fast, plain, alone = logits(model, ids), plainly(monkeypatch, lambda: logits(model, ids)), []
        for c in (1.0, 0.0, -2.0):
            a.set_coeff(c)
            alone.append(logits(model, ids))
    for n in range(3): assert torch.equal(fast[n], alone[n][n])
    assert torch.equal(fast[1], logits(model, ids)[1])
    model.float()
    with a(model, torch.tensor([1.0, 0.0, -2.0])): exact = logits(model, ids)
    errors = [(y.double() - exact).norm() / exact.norm() for y in (fast, plain)]
    assert not torch.equal(fast, plain) and errors[0] < 2.5 * errors[1]


@torch.no_grad()
def test_layers_that_share_an_input_share_a_product(monkeypatch):
    model, ids = build(), tokens(1, 2)
    a = adapter_of("lora", model)
    with a(model, 1.0):
        model(ids)
        (cell,) = a.hooks._cells.values()
        assert sorted(len(s.maps) for s in cell.inputs.stacks) == sorted([1, 1, 2, 3] * 4)
        products = []
        real = torch.mm
        monkeypatch.setattr(torch, "mm", lambda *args: products.append(1) or real(*args))
        model(ids)
        assert len(products) == 4 * 4 and all(s.memo is None for s in cell.inputs.stacks)


@torch.no_grad()
def test_an_input_that_is_written_in_between_is_seen():
    inputs, x = Inputs(), torch.randn(1, 2, 8)
    maps = [FastMap(inputs, torch.randn(2, 8), torch.ones(2), None, torch.randn(4, 2)) for _ in range(2)]
    y, c = torch.zeros(1, 2, 4), torch.tensor(1.0)
    for _ in range(2):
        maps[0].add(x, y, c, False)
        x.mul_(2)
        expected = LowRank(maps[1].down, maps[1].slope, maps[1].up)(x)
        assert torch.allclose(maps[1].add(x, y, c, False), expected, atol=1e-5)
    assert len(inputs.stacks) == 1


@torch.no_grad()
def test_what_a_graph_would_read_stays_where_it_is():
    model, ids = build(), tokens(1, 2)
    a = adapter_of("pissa-unextracted", model)
    with a(model, 1.0):
        for _ in range(2): model(ids)
        (cell,) = a.hooks._cells.values()
        where = lambda: [t.data_ptr() for s in cell.inputs.stacks for t in (s.gain, s.downT, *s.upT)]
        before, gains = where(), [s.gain.clone() for s in cell.inputs.stacks]
        a.set_coeff(2.0)
        assert where() == before and all(torch.equal(s.gain, 2 * g) for s, g in zip(cell.inputs.stacks, gains))
        for p in a.parameters(): p.mul_(3)
        a.set_coeff(1.0)
        assert where() == before and all(torch.allclose(s.gain, 3 * g) for s, g in zip(cell.inputs.stacks, gains))


def test_inference_mode_and_what_comes_after_it_agree():
    model, ids = build(), tokens(1, 2)
    a = adapter_of("lora", model)
    with a(model, 1.0):
        with torch.inference_mode(): first = model(ids).logits.clone()
        a.set_coeff(1.0)
        assert gap(logits(model, ids), first) < 2**-18
        loss = model(ids, labels=ids).loss
        loss.backward()
    assert all(p.grad is not None for p in a.parameters())


def test_threads_that_run_at_once_get_the_same_numbers():
    model, inputs = build(), [tokens(1, 2, seed=s) for s in range(4)]
    a, wrong = adapter_of("lora", model), []
    with a(model, 1.0): expected = [logits(model, ids) for ids in inputs]
    def run(n):
        for _ in range(20):
            if gap(logits(model, inputs[n]), expected[n]) > 2**-16: wrong.append(n)
    for _ in range(3):
        with a(model, 1.0):
            threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
            for t in threads: t.start()
            for t in threads: t.join()
    assert not wrong


def test_only_an_output_that_is_surely_new_is_written_in_place():
    class Kept(nn.Linear):
        def forward(self, x): return self.kept
    layer = nn.Linear(4, 4)
    assert is_fresh(layer) and not is_fresh(Kept(4, 4))
    layer.forward = lambda x: x
    assert not is_fresh(layer)


@torch.no_grad()
def test_nothing_of_an_input_is_kept():
    model = build()
    a = adapter_of("lora", model)
    with a(model, 1.0):
        for _ in range(2): model(tokens(1, 2))
        gc.collect()
        (cell,) = a.hooks._cells.values()
        assert all(s.memo is None for s in cell.inputs.stacks)


# ------------------------------------------------------------------------------------------------------------ the benchmark
@pytest.mark.parametrize("check", [c for c in gpu_check.CHECKS if c.__name__ in (
    "fresh_lora_is_no_op", "zero_is_the_base", "a_dose_per_row", "fast_is_plain", "exact_restore", "a_copy_is_plain")])
def test_the_checks_of_a_device_pass_here(check):
    assert gpu_check.checked(check, "cpu", torch.float32)["result"] == "ok"


def test_a_check_or_row_that_fails_is_a_row_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    def broken(device, dtype): raise RuntimeError("no such kernel")
    def missing(device, dtype): raise gpu_check.NotHere("a card")
    monkeypatch.setattr(gpu_check, "CHECKS", [broken, missing, lambda device, dtype: "fine"])
    monkeypatch.setattr(gpu_check, "measured", lambda name, *args, **kw: [dict(what=name, error="RuntimeError: out of memory")])
    assert gpu_check.main(["--small", "--device", "cpu", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "FAILED   broken" in said and "not here missing" in said and said.count("ok  ") == 2
    assert len(list(tmp_path.glob("*.csv"))) == 2 and len(list(tmp_path.glob("*.json"))) == 1


def test_a_file_of_rows_that_fails_is_one_row(): assert "No module" in tables.measured("rows_nothing")[0]["error"]
