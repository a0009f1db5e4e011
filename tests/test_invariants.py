"""What holds for every adapter on every architecture in every dtype."""
import pytest
import torch
from models import ARCHS, DEVICE, DTYPES, KINDS, MORE, build, changes, gap, half, hooks, logits, seeded, state, tokens

from modlab import ModulatedLoRA, adapters
from modlab.model.calls import put
from modlab.model.layers import dense_weight

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*fused expert")]
# Every architecture in float32. The narrow types for those that differ in what they do with them: Conv1D, flattened tokens,
# norms that compute in float32 (Gemma); float16, which few use on a CPU, for two.
NARROW = {torch.float32: (*ARCHS, *MORE), torch.bfloat16: ("llama", "gpt2", "opt", "gemma3"), torch.float16: ("llama", "opt")}
CASES = [(a, d) for d in DTYPES for a in NARROW[d]]
matrix = [pytest.mark.parametrize("arch, dtype", CASES, ids=lambda x: str(x).removeprefix("torch."))]
# Two ways of computing one thing differ by rounding, relative to the largest logit: about 2^-23 (float32), 2^-10 (float16) and
# 2^-8 (bfloat16) a layer, in weights and activations, summed over at most 28 layers. The adapters here move logits by more.
TOLERANCE = {torch.float32: 2**-16, torch.float16: 2**-6, torch.bfloat16: 2**-4}
ABLE = {torch.float32: 2**-20, torch.float16: 2**-9, torch.bfloat16: 2**-6}  # the same of one layer


def across(*more):
    "Apply the matrix, and more."
    def mark(test):
        for p in [*matrix, *more]: test = p(test)
        return test
    return mark


every_kind = pytest.mark.parametrize("kind", KINDS)
untouched = pytest.mark.parametrize("kind", [k for k in KINDS if k != "pissa-extracted"])


@across()
def test_fresh_lora_is_a_no_op_at_every_c(arch, dtype):
    model, ids = build(arch, dtype), tokens()
    base, fresh = logits(model, ids), ModulatedLoRA(model, r=4)
    for c in (0.0, 1.0, -3.5, 1e4, torch.tensor([0.5, -2.0, 1e4])):
        with fresh(model, c): assert torch.equal(logits(model, ids), base)


@across(untouched)
def test_c_zero_is_the_base_bit_for_bit(arch, dtype, kind):
    model, ids = build(arch, dtype), tokens()
    base, a = logits(model, ids), half(kind, model)
    for c in (0.0, 0, torch.zeros(3), torch.tensor(0.0), torch.tensor([0.0, 1.0, 0.0])):
        with a(model, c): y = logits(model, ids)
        zero = [True] * 3 if not isinstance(c, torch.Tensor) or c.ndim == 0 else (c == 0).tolist()
        assert [torch.equal(y[n], base[n]) for n in range(3)] == zero


@across()
def test_extracted_form_at_c_zero_is_the_base_up_to_rounding(arch, dtype):
    model, ids = build(arch, dtype), tokens()
    base, a = logits(model, ids), half("pissa-extracted", model)
    assert gap(logits(model, ids), base) > 2 * TOLERANCE[dtype], "nothing was extracted"
    with a(model, 0.0): assert gap(logits(model, ids), base) < TOLERANCE[dtype]
    a.restore_base_W()
    with a(model, 0.0): assert torch.equal(logits(model, ids), base)


@across()
def test_both_pissa_forms_are_one_function(arch, dtype):
    ids, model, other = tokens(), build(arch, dtype), build(arch, dtype)
    base, inside, outside = logits(model, ids), half("pissa-unextracted", model), half("pissa-extracted", other)
    assert all(torch.equal(inside.delta_s[n], outside.delta_s[n]) for n in inside.layers)
    for c in (1.0, -2.0, torch.tensor([1.0, -0.5, 2.0])):
        with inside(model, c), outside(other, c): y, z = logits(model, ids), logits(other, ids)
        assert gap(z, y) < TOLERANCE[dtype] < gap(y, base)
    outside.restore_base_W()  # and from now on it is the other form, to the bit
    with inside(model, 1.0), outside(other, 1.0): assert torch.equal(logits(model, ids), logits(other, ids))
    name = next(iter(inside.layers))
    assert torch.equal(inside.delta(name, 0.7), outside.delta(name, 0.7))


@across(every_kind)
def test_linear_in_c_at_the_layer(arch, dtype, kind):
    model = build(arch, dtype)
    a = half(kind, model)
    for name, layer in list(a.layers.items())[:3]:
        x = torch.randn(2, 5, a.factors(name, 0.0).down.shape[1], generator=seeded(4)).to(DEVICE, dtype)
        with torch.no_grad(), a(model):
            y = {c: (a.set_coeff(c), layer(x).double())[1] for c in (0.0, 1.0, 2.0, -1.5, 0.25)}
        zero, one, largest = y[0.0], y[1.0], max(out.abs().max() for out in y.values())
        for c, out in y.items(): assert (out - zero - c * (one - zero)).abs().max() <= ABLE[dtype] * (1 + abs(c)) * largest
        assert (one - zero).abs().max() > 4 * ABLE[dtype] * largest, "c did nothing at all"


@across(every_kind)
def test_layer_output_is_weight_plus_delta(arch, dtype, kind):
    model = build(arch, dtype)
    a = half(kind, model)
    for name, layer in list(a.layers.items())[-4:]:
        W, x = dense_weight(layer), torch.randn(5, a.factors(name, 0.0).down.shape[1], generator=seeded(4)).to(DEVICE, dtype)
        expected = x.double() @ (W.double() + a.delta(name, -1.5).double()).T + (0 if layer.bias is None else layer.bias.double())
        with torch.no_grad(), a(model, -1.5): y = layer(x)
        assert y.dtype == dtype and gap(y, expected) < 2 * ABLE[dtype]


@across(every_kind)
def test_a_rows_own_c_is_a_run_at_that_c(arch, dtype, kind):
    model, ids, cs = build(arch, dtype), tokens(), [1.0, 0.0, -2.5]  # exact in every dtype, so that equal means equal
    a = half(kind, model)
    with a(model, torch.tensor(cs)) as inside:
        together = logits(model, ids)
        alone = []
        for c in cs:
            inside.set_coeff(c)
            alone.append(logits(model, ids))
    for n in range(3): assert torch.equal(together[n], alone[n][n])
    assert not torch.equal(alone[0][2], alone[2][2])


@pytest.mark.parametrize("factors", DTYPES, ids=str)
@every_kind
def test_rows_at_a_dose_that_bfloat16_does_not_hold(kind, factors):
    model, ids = build(), tokens()
    a = half(kind, model, dtype=factors)
    with a(model, torch.tensor([0.3, -1.7, 0.1])): y = logits(model, ids)
    for n, c in enumerate((0.3, -1.7, 0.1)):
        with a(model, c): assert torch.equal(y[n], logits(model, ids)[n])


@across(every_kind)
def test_leaving_restores_everything(arch, dtype, kind):
    model, ids = build(arch, dtype), tokens()
    a = half(kind, model)
    before, y = state(model), logits(model, ids)
    with a(model, 2.0) as inside:
        assert inside is a and a.attached and a.c == 2.0 and hooks(model)
        logits(model, ids)
    assert not changes(before, model) and not a.attached and a.c == 0
    with pytest.raises(ZeroDivisionError), a(model, torch.tensor([1.0, 2.0, 3.0])): _ = 1 / 0
    with pytest.raises(ValueError, match="2 doses.*3 rows"), a(model, torch.ones(2)): logits(model, ids)
    assert not changes(before, model) and not a.attached and isinstance(a.c, float) and a.c == 0
    assert torch.equal(logits(model, ids), y)


@every_kind
def test_an_exception_while_attaching_leaves_no_hook(kind, monkeypatch):
    model = build()
    a, before = half(kind, model), state(model)
    def fail(module, slot, item):
        if module is list(a.layers.values())[5]: raise MemoryError("no hook for you")
        put(module, slot, item)
    monkeypatch.setattr(adapters.hooks, "put", fail)
    with pytest.raises(MemoryError), a(model): pass
    assert not changes(before, model) and not a.attached and a.c == 0
    monkeypatch.undo()
    with a(model): assert a.attached


@across(every_kind)
def test_only_the_adapter_trains(arch, dtype, kind):
    model = build(arch, dtype)
    a, before = half(kind, model), state(model)
    assert not any(p.requires_grad for p in model.parameters())
    names, params = zip(*a.named_parameters())
    assert len(set(names)) == len(names) and list(map(id, params)) == list(map(id, a.parameters()))
    optimizer, old = torch.optim.SGD(a.parameters(), lr=0.1), [p.detach().clone() for p in params]
    with a(model, torch.tensor([1.0, -1.0, 0.5])): model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in params)
    assert all(p.dtype == torch.float32 for p in params), "a parameter of 16 bits cannot take small steps"
    assert not [n for n, p in model.named_parameters() if p.grad is not None]
    optimizer.step()
    assert all(not torch.equal(p, q) for p, q in zip(params, old)) and not changes(before, model)


@across(pytest.mark.parametrize("kind", KINDS[1:]))
def test_a_direction_is_ablated_at_minus_S_over_c(arch, dtype, kind):
    model, c = build(arch, dtype), 0.7
    a = half(kind, model)
    base = build(arch, dtype)
    with torch.no_grad():
        for n, d in a.delta_s.items(): d[1:3] = -a.S[n][1:3] / c
    for name, layer in a.layers.items():
        U, S, Vh = (getattr(a, t)[name].double() for t in ("U", "S", "Vh"))
        gain = torch.einsum("or,oi,ri->r", U, dense_weight(layer).double() + a.delta(name, c).double(), Vh)
        kept = torch.einsum("or,oi,ri->r", U, dense_weight(base.get_submodule(name)).double(), Vh)
        small = ABLE[dtype] * S.max()
        assert (kept - S).abs().max() < small and gain[1:3].abs().max() < small < S[2]
        rest = [0, 3, 4, 5]
        assert (gain[rest] - (S + c * a.delta_s[name].double())[rest]).abs().max() < small
