"""Histories: the stack is the sum of its adapters, folding changes no bit once it is over, and refusals leave the model alone."""
import copy
import gc
import itertools
from contextlib import ExitStack

import pytest
import torch
from models import ARCHS, DTYPES, adapter_of, build, changes, gap, half, logits, seeded, state, tokens
from transformers import AutoModelForCausalLM

from modlab import HistoryBake, ModulatedLoRA, PiSSAHistoryBake, bake_, bake_report, baked
from modlab.model.calls import _adders_of
from modlab.model.layers import dense_weight
from modlab.model.ledger import is_folded

pytestmark = pytest.mark.usefixtures("one_thread")
# Rounding relative to the largest logit: about 2^-23, 2^-10 and 2^-8 for each of at most 28 layers.
TOLERANCE = {torch.float32: 2**-15, torch.float16: 2**-5, torch.bfloat16: 2**-3}
every_arch = pytest.mark.parametrize("arch", ARCHS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


def first_targets(arch): return {"llama": "q_proj|up_proj", "gpt2": "c_attn"}.get(arch, "fc|dense|qkv|gate|up|proj")


def mixed(model, arch="llama", extract=False):
    "Mixed kinds and ranks on different layers; one adapter twice; one dose is zero."
    a = adapter_of("lora", model, seed=3, r=3)
    b = adapter_of("pissa-extracted" if extract else "pissa-unextracted", model, seed=4, r=5)
    c = adapter_of("lora", model, seed=5, r=2, targets=first_targets(arch), dtype=model.dtype)
    d = adapter_of("lora", model, seed=6, r=4)
    return [(a, 0.5), (b, -0.7), (c, 1.5), (a, 0.25), (d, 0.0)]


def one_by_one(model, history, ids):
    "Each adapter attached once, at the sum of its doses."
    total = {}
    for a, c in history: total[a] = total.get(a, 0.0) + c
    with ExitStack() as stack:
        for a, c in total.items(): stack.enter_context(a(model, c))
        return logits(model, ids)


@every_arch
@every_dtype
@pytest.mark.parametrize("extract", [False, True])
def test_stack_and_fold_are_the_rounds_one_by_one(arch, dtype, extract):
    model, ids = build(arch, dtype), tokens()
    base, history = logits(model, ids), mixed(model, arch, extract)
    before, wanted = state(model), one_by_one(model, history, ids)
    apart = TOLERANCE[dtype] * 2**0.5  # either side has a rounding error of its own
    assert gap(wanted, base) > 2 * TOLERANCE[dtype], "the history does nothing"
    with (PiSSAHistoryBake if extract else HistoryBake)(model, history) as bake:
        assert gap(logits(model, ids), wanted) < apart
        assert all(len(_adders_of(layer)) == 1 for layer in bake.layers.values())
    with baked(model, history): assert gap(logits(model, ids), wanted) < apart
    assert not changes(before, model)


@every_dtype
def test_a_hundred_blocks_with_exceptions_change_no_bit(dtype):
    model = build("llama", dtype)
    history = mixed(model, extract=True)
    before = state(model)
    for n in range(100):
        with pytest.raises(ZeroDivisionError), baked(model, history), baked(model, [(history[0][0], -1.0)]):
            _ = 1 / (n - n)
    assert not changes(before, model)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_nested_blocks_are_the_sum(arch):
    model, ids = build(arch), tokens()
    a, b = adapter_of("lora", model, seed=3), adapter_of("lora", model, seed=4, targets=first_targets(arch))
    with baked(model, [(a, 1.0), (b, -2.0)]): wanted = logits(model, ids)
    with baked(model, [(a, 1.0)]):
        outer = logits(model, ids)
        with baked(model, [(b, -1.0)]), baked(model, [(b, -1.0)]): assert gap(logits(model, ids), wanted) < 2**-15
        assert torch.equal(logits(model, ids), outer)


def test_folded_weights_are_rounded_once_from_float32():
    model = build("gpt2", torch.bfloat16)
    a, base = adapter_of("lora", model, r=3), {}
    for name, layer in a.layers.items(): base[name] = dense_weight(layer).double()
    with baked(model, [(a, 0.7)]):
        for name, layer in a.layers.items():
            exact = base[name] + a.delta(name, 0.7).double()
            nearest = dense_weight(layer) == exact.bfloat16()  # all but what float32 puts on the other side of a tie
            assert nearest.double().mean() > 0.999


def tensor_bytes():
    gc.collect()
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if isinstance(t, torch.Tensor)}
    return sum(held.values())


def test_folding_holds_one_extra_copy_of_the_targeted_weights():
    model = build()
    a = adapter_of("pissa-unextracted", model, r=32)
    weights, before = sum(layer.weight.nbytes for layer in a.layers.values()), tensor_bytes()
    with baked(model, [(a, 1.0)]): inside = tensor_bytes()
    assert inside - before == weights and tensor_bytes() == before


def test_gates():
    model, ids = build(), tokens()
    a, base = adapter_of("lora", model), logits(model, ids)
    with a(model, 1.0): wanted = logits(model, ids)
    with HistoryBake(model, [(a, 1.0)]) as bake:
        for gate, rows in ((lambda: False, (0, 0, 0)), (lambda: True, (1, 1, 1)),
                           (lambda: torch.tensor([True, False, True]), (1, 0, 1)), (lambda: torch.tensor(False), (0, 0, 0))):
            bake.set_gate(gate)
            y = logits(model, ids)
            assert all(torch.equal(y[n], (wanted if on else base)[n]) for n, on in enumerate(rows))
        def fail(): raise KeyError("no answer")
        for bad, error in ((fail, KeyError), (lambda: None, ValueError), (lambda: 1.0, ValueError),
                           (lambda: torch.ones(3), ValueError), (lambda: torch.tensor([True, False]), ValueError)):
            bake.set_gate(bad)
            with pytest.raises(error): logits(model, ids)
            assert bake.attached
        with pytest.raises(ValueError, match="function"): bake.set_gate(True)
        bake.set_gate(lambda: True)
        assert torch.equal(logits(model, ids), wanted)
    assert torch.equal(logits(model, ids), base) and not bake.attached
    bake.remove()  # twice is once


def test_a_history_in_force_is_not_put_in_force_again():
    model, ids = build(), tokens()
    a, b, base = adapter_of("lora", model, seed=3), adapter_of("lora", model, seed=4), logits(model, ids)
    with a(model, 1.0): wanted = logits(model, ids)
    bake = HistoryBake(model, [(a, 1.0)])
    with pytest.raises(RuntimeError, match="count twice.*remove"): bake = HistoryBake(model, [(b, 1.0), (a, 1.0)])
    assert torch.equal(logits(model, ids), wanted) and not b.bakes
    with HistoryBake(model, [(b, 1.0)]): pass
    bake.remove()
    assert torch.equal(logits(model, ids), base)
    with baked(model, [(a, 1.0)]), pytest.raises(RuntimeError, match="count twice.*baked"): HistoryBake(model, [(a, 1.0)])


def test_a_gate_of_another_adapters_dose():
    model, ids = build(), tokens()
    kept, new, base = adapter_of("lora", model, seed=3), adapter_of("lora", model, seed=4), logits(model, ids)
    with HistoryBake(model, [(kept, 1.0)]) as bake:
        bake.set_gate(lambda: new.c != 0.0)
        assert torch.equal(logits(model, ids), base)
        with new(model, torch.tensor([0.0, 1.0, 0.0])): y = logits(model, ids)
    with kept(model, 1.0), new(model, 1.0): both = logits(model, ids)
    assert torch.equal(y[0], base[0]) and torch.equal(y[2], base[2]) and gap(y[1], both[1]) < 2**-15


def test_extracted_rounds_are_always_on_and_say_so_once(caplog):
    model, ids = build(), tokens()
    base = logits(model, ids)
    p = adapter_of("pissa-extracted", model, r=8)
    with PiSSAHistoryBake(model, [(p, 0.0)]) as bake:
        for _ in range(2): bake.set_gate(lambda: False)
        assert gap(logits(model, ids), base) < 2**-15
    assert sum("always on" in r.message for r in caplog.records) == 1
    assert gap(logits(model, ids), base) > 0.1, "W_res alone is something else"


def test_an_extracted_adapter_twice_gives_its_directions_back_once():
    model, other, ids = build(), build(), tokens()
    out, inside = adapter_of("pissa-extracted", model), adapter_of("pissa-unextracted", other)
    with inside(other, 0.5): wanted = logits(other, ids)
    for make in (PiSSAHistoryBake, baked):
        with make(model, [(out, 1.5), (out, -1.0)]): assert gap(logits(model, ids), wanted) < 2**-15


def test_training_on_does_not_leak_in_and_refusals_protect_the_state():
    model, ids = build(), tokens()
    a, p = adapter_of("lora", model), adapter_of("pissa-extracted", model)
    with PiSSAHistoryBake(model, [(a, 1.0), (p, 1.0)]):
        y = logits(model, ids)
        for B in a.B.values(): B.data.mul_(3)
        p.delta_s[next(iter(p.layers))].data.zero_()
        assert torch.equal(logits(model, ids), y)
        before = state(model)
        for refused in (lambda: a(model).__enter__(), p.restore_base_W, lambda: baked(model, [(p, 1.0)]).__enter__(),
                        lambda: bake_(model, [(p, 1.0), (a, 1.0)])):
            with pytest.raises(RuntimeError, match="in force|history"): refused()
        assert not changes(before, model)
    with baked(model, [(p, 1.0)]):
        with pytest.raises(ValueError, match="inside a baked block"): adapter_of("pissa-extracted", model)
        assert ModulatedLoRA(model).base[next(iter(p.layers))]["rounds"] == [p.id]
    p.restore_base_W()


def test_what_is_built_inside_a_block_knows_the_original_weight(tmp_path):
    model = build()
    with baked(model, [(adapter_of("lora", model), 1.0)]): new = adapter_of("lora", model, seed=7)
    new.save(tmp_path / "a")
    ModulatedLoRA.from_checkpoint(build(), tmp_path / "a")


BAD = {"empty": (lambda a, m: [], ValueError, "empty"), "no pair": (lambda a, m: [a], ValueError, r"\(adapter, c\)"),
       "nan": (lambda a, m: [(a, float("nan"))], ValueError, "finite"),
       "rows": (lambda a, m: [(a, torch.ones(2))], ValueError, "one number"),
       "text": (lambda a, m: [(a, "1")], ValueError, "number"),
       "other model": (lambda a, m: [(a, 1.0), (adapter_of("lora", build()), 1.0)], ValueError, "another model"),
       "attached": (lambda a, m: [(a, 1.0)], RuntimeError, "attached")}


@pytest.mark.parametrize("make", [HistoryBake, PiSSAHistoryBake, baked, bake_, bake_report], ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", BAD)
def test_bad_histories(make, case):
    model = build()
    a = adapter_of("pissa-extracted" if make is PiSSAHistoryBake else "lora", model)
    build_history, error, match = BAD[case]
    history, before = build_history(a, model), state(model)
    def run():
        got = make(model, history)
        if make is baked: got.__enter__()
    if case == "attached":
        with a(model), pytest.raises(error, match=match): run()
    else:
        with pytest.raises(error, match=match): run()
    assert not changes(before, model)


def test_tied_weights_and_wrong_classes_are_refused():
    tied = build("gpt2")
    head = adapter_of("lora", tied, targets="lm_head", exclude=())
    before = state(tied)
    for make in (lambda: baked(tied, [(head, 1.0)]).__enter__(), lambda: bake_(tied, [(head, 1.0)])):
        with pytest.raises(ValueError, match="lm_head is tied"): make()
    with HistoryBake(tied, [(head, 1.0)]): assert not torch.equal(logits(tied, tokens()), logits(build("gpt2"), tokens()))
    assert not changes(before, tied)
    model = build()
    p = adapter_of("pissa-extracted", model)
    with pytest.raises(ValueError, match="PiSSAHistoryBake"): HistoryBake(model, [(p, 1.0)])
    p.restore_base_W()
    with pytest.raises(ValueError, match="use HistoryBake"): PiSSAHistoryBake(model, [(p, 1.0)])
    with HistoryBake(model, [(p, 1.0)]): pass


def test_overflow_is_named_and_undone():
    model = build(dtype=torch.float16)
    a, before = adapter_of("lora", model), state(model)
    for make in (lambda: baked(model, [(a, 1e7)]).__enter__(), lambda: bake_(model, [(a, 1e7)])):
        with pytest.raises(ValueError, match=r"layers\.0.*not finite in torch.float16"): make()
        assert not changes(before, model) and not any(map(is_folded, model.modules()))
    with baked(model, [(a, 1.0)]): pass


@every_dtype
def test_blocks_are_left_in_any_order(dtype):
    model, ids = build(dtype=dtype), tokens()
    history, wanted = [(adapter_of("lora", model, seed=n), 1.0) for n in range(3)], {}
    for part in itertools.chain(*(itertools.combinations(range(3), n) for n in (1, 2))):
        with baked(model, [history[n] for n in part]): wanted[part] = logits(model, ids)
    before = state(model)
    for order in itertools.permutations(range(3)):
        blocks, left = [baked(model, [entry]) for entry in history], {0, 1, 2}
        for block in blocks: block.__enter__()
        for n in order:
            blocks[n].__exit__(None, None, None)
            left.remove(n)
            if left: assert gap(logits(model, ids), wanted[tuple(sorted(left))]) < TOLERANCE[dtype]
        assert not changes(before, model)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("extract", [False, True])
def test_for_good(tmp_path, arch, extract):
    model, ids = build(arch), tokens()
    history = mixed(model, arch, extract)
    with baked(model, history): wanted = logits(model, ids)
    bake_(model, history)
    assert torch.equal(logits(model, ids), wanted) and not state(model)["rounds"] and not any(a.has_offset for a, _ in history)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), ids), wanted)
    with history[1][0](model, 0.0): assert torch.equal(logits(model, ids), wanted)
    adapter_of("pissa-extracted", model, r=4).restore_base_W()
    assert torch.equal(logits(model, ids), wanted), "a baked model is a base like any other"


def test_a_round_that_is_left_out_is_named():
    model = build()
    p, q = adapter_of("pissa-extracted", model), adapter_of("pissa-extracted", model, seed=5)
    before = state(model)
    with pytest.raises(RuntimeError, match=f"round {p.id} is extracted.*restore_base_W"): bake_(model, [(q, 1.0)])
    assert not changes(before, model)
    bake_(model, [(p, 0.0), (q, 0.0)])
    assert gap(logits(model, tokens()), logits(build(), tokens())) < 2**-15


@every_dtype
def test_the_report_is_what_folding_loses(dtype):
    model = build("gpt2", dtype)
    a, p = adapter_of("lora", model, r=3), adapter_of("pissa-extracted", model, r=4)
    history = [(a, 0.3), (p, -0.2)]
    before, table = state(model), bake_report(model, history).set_index("name")
    assert not changes(before, model) and list(table.index) == list(a.layers)
    assert (table.how == "fold").all() and (table["rank"] == 7).all()
    weights = {n: dense_weight(m).double().clone() for n, m in a.layers.items()}
    with baked(model, history):
        for name, layer in a.layers.items():
            delta = a.delta(name, 0.3).double() + p.factors(name, -0.2).matrix().double()
            dose = delta - p.factors(name, 0.0).matrix().double()
            lost = (dense_weight(layer).double() - weights[name] - delta).norm()
            for column, size in (("error", delta), ("dose_error", dose)):
                assert table.loc[name, column] == pytest.approx((lost / size.norm()).item(), rel=0.05, abs=2**-22)
            assert table.loc[name, "size"] == pytest.approx((delta.norm() / weights[name].norm()).item(), rel=1e-4)


def test_a_fresh_adapter_loses_nothing():
    model = build(dtype=torch.bfloat16)
    table = bake_report(model, [(ModulatedLoRA(model, generator=seeded(0)), 1.0)])
    assert (table[["size", "error", "dose_error"]] == 0).all().all()


def test_per_row_doses_of_a_new_adapter_over_a_stack_on_a_copy():
    "A deep copy of the model is a model like any other: histories of the original do not fit it, and say so."
    model = build()
    a = half("lora", model)
    with pytest.raises(ValueError, match="another model"): HistoryBake(copy.deepcopy(model), [(a, 1.0)])
