"""What is true of a weight now: it comes back bit for bit whatever happened meanwhile, or what happened is refused and named."""
import copy
import gc
import io
import itertools
import pickle
import threading
import warnings

import pytest
import torch
from models import DTYPES, adapter_of, build, changes, gap, logits, state, tokens
from torch import nn

from modlab import HistoryBake, ModulatedPiSSA, PiSSAHistoryBake, bake_, baked, restore
from modlab.maths.fingerprint import looks, print_of, same_look, same_weight
from modlab.model import changes as ways
from modlab.model.layers import dense_weight
from modlab.model.ledger import base_weight, check_unchanged, check_whole, extraction_ids, fingerprint, is_folded

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:extractions in force")]
FORMS = ("extracted", "folded", "both")
every_form = pytest.mark.parametrize("form", FORMS)


def changed(form, model):
    "A model with something in force, how to end it, and the layers concerned."
    a = adapter_of("pissa-extracted" if form != "folded" else "lora", model, r=4)
    if form == "extracted": return a.restore_base_W, a
    block = baked(model, [(a, 1.0)])
    block.__enter__()
    return lambda: block.__exit__(None, None, None), a


def ended(form, end, a):
    "The way back, step by step."
    end()
    if form == "both": a.restore_base_W()


def weights(model): return {n: p.detach().clone() for n, p in model.named_parameters()}


def same(model, wanted): return all(torch.equal(p, wanted[n]) for n, p in model.named_parameters())


# ---------------------------------------------------------------------------------------------- what somebody else does meanwhile
@every_form
@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_is_refused_while_something_is_in_force(form, assign):
    model, new = build(), build(seed=1).state_dict()
    base = weights(model)
    end, a = changed(form, model)
    before = state(model)
    block = {n.removeprefix("model.layers.1."): t for n, t in new.items()}
    outer = {f"module.{n}": t for n, t in new.items()}
    for root, part in ((model, new), (model.model.layers[1], block), (Wrapped(model), outer)):
        with pytest.raises(RuntimeError, match=r"load_state_dict would overwrite .*q_proj\.weight.*restore\(model\)"):
            root.load_state_dict(part, strict=False, assign=assign)
        assert not changes(before, model), "all or nothing"
    ended(form, end, a)
    assert all(torch.equal(layer.weight, base[f"{n}.weight"]) for n, layer in a.layers.items())
    model.load_state_dict(new, assign=assign)
    assert same(model, new), "and afterwards it is a model like any other"


@every_form
@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
                         ids=["itself", "deepcopy", "pickle"])
def test_nothing_watches_a_model_that_is_whole(form, copied):
    model = build()
    end, a = changed(form, model)
    twin = copied(model)
    assert watched(twin) >= {"", "model", "model.layers.0", *a.layers}
    if twin is model: ended(form, end, a)
    else: restore(twin)
    assert not watched(twin)


def watched(model):
    return {n for n, m in model.named_modules() if m._state_dict_pre_hooks or m._load_state_dict_pre_hooks}


def test_loading_what_the_ledger_does_not_concern_is_no_fault():
    model = build()
    adapter_of("pissa-extracted", model)
    part = {n: t for n, t in build(seed=1).state_dict().items() if "norm" in n or "embed" in n}
    model.load_state_dict(part, strict=False)
    assert part and all(torch.equal(model.get_parameter(n), t) for n, t in part.items())


@every_form
@pytest.mark.parametrize("write", [lambda w: w.mul_(1.5), lambda w: w[3].zero_(), lambda w: w[-1, -1].add_(0.5)],
                         ids=["all", "a row", "one value"])
def test_an_in_place_write_is_told_and_nothing_is_lost(form, write):
    model = build()
    base = weights(model)
    end, a = changed(form, model)
    with torch.no_grad(): write(model.model.layers[1].mlp.up_proj.weight)
    written = weights(model)
    for way_out in (end, lambda: restore(model)):
        with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\.up_proj.*force=True"): way_out()
        assert same(model, written)
    restore(model, force=True)
    assert same(model, base)


@every_form
def test_a_write_that_the_version_does_not_count_is_seen_too(form):
    model = build()
    end, _ = changed(form, model)
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1.01)
    with pytest.raises(RuntimeError, match="up_proj.*force=True"): end()


@every_form
def test_a_write_that_was_undone_is_none(form):
    model = build()
    base, (end, a) = weights(model), changed(form, model)
    w = model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        w.mul_(2)
        w.div_(2)
    ended(form, end, a)
    assert same(model, base)


@every_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_meanwhile_gives_back_the_base_in_the_new_dtype(form, dtype):
    model = build()
    end, a = changed(form, model)
    model.to(dtype)
    ended(form, end, a)
    assert same(model, weights(build().to(dtype))) and model.dtype == dtype


@every_form
def test_a_cast_there_and_back_is_no_write(form):
    model = build()
    base, (end, a) = weights(model), changed(form, model)
    model.to(torch.bfloat16).to(torch.float32)
    ended(form, end, a)
    assert all(torch.equal(layer.weight, base[f"{n}.weight"]) for n, layer in a.layers.items())


@every_form
def test_weights_that_move_are_followed(form):
    "Another storage with the same values is what a device gives."
    model = build()
    base, (end, a) = weights(model), changed(form, model)
    model._apply(torch.clone)
    for layer in a.layers.values(): layer.weight = nn.Parameter(layer.weight.detach().clone())
    ended(form, end, a)
    assert same(model, base)


def test_a_weight_that_cannot_be_written_any_more_is_named():
    model = build()
    a = adapter_of("pissa-extracted", model)
    model.model.layers[0].mlp.up_proj.to(torch.float8_e4m3fn)
    for way in (a.restore_base_W, lambda: restore(model, force=True)):
        with pytest.raises(RuntimeError, match=r"layers\.0\.mlp\.up_proj is quantised.*load the model anew"): way()


# ------------------------------------------------------------------------------------------------------------ saving the model
def test_a_part_of_the_weights_is_not_saved_as_the_whole(tmp_path):
    model = build()
    a = adapter_of("pissa-extracted", model)
    for save in (model.state_dict, lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(RuntimeError, match=r"q_proj holds only a part.*restore\(model\)"): save()
    with a(model, 1.0), pytest.raises(RuntimeError, match="only a part"): model.state_dict()
    restore(model)
    assert same(model, model.state_dict())


def test_folded_weights_are_whole_and_can_be_saved(tmp_path):
    from transformers import AutoModelForCausalLM
    model, ids = build(), tokens()
    p, a = adapter_of("pissa-extracted", model), adapter_of("lora", model)
    with baked(model, [(p, 0.5), (a, 1.0)]):
        wanted = logits(model, ids)
        model.save_pretrained(tmp_path)
    with baked(model, [(a, 1.0)]), pytest.raises(RuntimeError, match="only a part"): model.state_dict()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), ids), wanted)


# -------------------------------------------------------------------------------------------------------------------- copies
def pickled(model): return pickle.loads(pickle.dumps(model))


def torch_saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_form
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, torch_saved])
def test_a_copy_takes_the_ledger_along(form, copied):
    model = build()
    base, (end, a) = weights(model), changed(form, model)
    before, twin = state(model), copied(model)
    if form == "extracted":
        with pytest.raises(RuntimeError, match="part"): twin.state_dict()
    with pytest.raises(RuntimeError, match="load_state_dict"): twin.load_state_dict(base)
    restore(twin)
    assert same(twin, base) and not changes(before, model), "what happens to the copy does not happen to the original"
    twin.load_state_dict(twin.state_dict())
    if form != "extracted":
        with pytest.raises(RuntimeError, match="history in force holds.*leave its block"): restore(model)
    ended(form, end, a)
    assert same(model, base)


def test_a_copy_is_not_given_back_what_the_original_is():
    model = build()
    a = adapter_of("pissa-extracted", model)
    with a(model, 0.0):
        twin = copy.deepcopy(model)
        with pytest.raises(RuntimeError, match=r"restore\(model\)"): check_whole(twin)
    with PiSSAHistoryBake(model, [(a, 0.0)]): twin = copy.deepcopy(model)
    restore(twin)
    check_whole(twin)


# ------------------------------------------------------------------------------------------------------------------ any order
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_of_several_threads_leave_the_base(dtype):
    model = build(dtype=dtype)
    a, b = (adapter_of("lora", model, seed=n) for n in range(2))
    before, failures, start = state(model), [], threading.Barrier(2)
    before["trains"] = dict.fromkeys(before["trains"], False)

    def work(adapter):
        try:
            start.wait()
            for _ in range(20):
                with baked(model, [(adapter, 1.0)]): pass
        except BaseException as e: failures.append(e)
    threads = [threading.Thread(target=work, args=[x]) for x in (a, b)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not failures and not changes(before, model)


def test_a_block_is_left_from_another_thread():
    model = build()
    a = adapter_of("lora", model)
    before, block = state(model), baked(model, [(a, 1.0)])
    block.__enter__()
    t = threading.Thread(target=block.__exit__, args=(None, None, None))
    t.start()
    t.join()
    assert not changes(before, model)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_last_fold_to_go_hands_back_the_first_tensor(order):
    layer = nn.Linear(4, 3)
    W, address = layer.weight.detach().clone(), layer.weight.data_ptr()
    maps = [dict(layer=rank_one(n)) for n in range(3)]
    leave = [ways.folded(dict(layer=layer), m.get) for m in maps]
    left = set(range(3))
    for n in order:
        leave[n].close()
        left.remove(n)
        torch.testing.assert_close(layer.weight.data, W + sum((maps[k]["layer"].matrix() for k in left), torch.zeros(3, 4)))
    assert torch.equal(layer.weight, W) and layer.weight.data_ptr() == address
    assert not layer._state_dict_pre_hooks and not layer._load_state_dict_pre_hooks


def rank_one(n):
    from modlab import LowRank
    g = torch.Generator().manual_seed(n)
    return LowRank(torch.randn(1, 4, generator=g), torch.ones(1), torch.randn(3, 1, generator=g))


# ------------------------------------------------------------------------------------------------------------ a cell run twice
@pytest.mark.parametrize("collected", [False, True])
def test_a_cell_that_is_run_twice(tmp_path, collected):
    model, ids = build(), tokens()
    base, y = weights(model), logits(model, ids)
    p = ModulatedPiSSA(model, r=8, selection_score="s_only", init=(0.3, 0.1))
    if collected: p = gc.collect()
    with pytest.warns(UserWarning, match=r"restore\(model\)"):
        p = ModulatedPiSSA(model, r=8, selection_score="s_only", init=(0.3, 0.1))
    gc.collect()
    with pytest.raises(RuntimeError, match=r"not given back.*restore\(model\)"), p(model, 0.0): logits(model, ids)
    with pytest.raises(RuntimeError, match=r"not given back.*restore\(model\)"), PiSSAHistoryBake(model, [(p, 0.0)]):
        logits(model, ids)
    with pytest.raises(RuntimeError, match=r"restore\(model\)"): model.save_pretrained(tmp_path)
    restore(model)
    assert same(model, base) and torch.equal(logits(model, ids), y) and not p.extracted
    with p(model, 0.0): assert torch.equal(logits(model, ids), y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        q = ModulatedPiSSA(model, r=8, selection_score="s_only")
    assert q.extracted and not p.extracted, "the same directions under the same id, but another extraction"
    q.restore_base_W()
    assert same(model, base)


def test_a_round_that_is_loaded_in_its_order_is_no_mistake(tmp_path):
    model = build()
    rounds = [adapter_of("pissa-extracted", model, seed=n, r=4) for n in range(2)]
    for n, a in enumerate(rounds): a.save(tmp_path / f"{n}")
    fresh = build()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = [ModulatedPiSSA.from_checkpoint(fresh, tmp_path / f"{n}") for n in range(2)]
    with loaded[0](fresh, 0.0), loaded[1](fresh, 0.0): assert gap(logits(fresh, tokens()), logits(build(), tokens())) < 2**-16


# --------------------------------------------------------------------------------------------------------------------- restore
class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.module = inner


@pytest.mark.parametrize("wrap", [lambda m: m, Wrapped, nn.DataParallel, torch.compile],
                         ids=["plain", "wrapped", "parallel", "compiled"])
def test_restore_needs_nothing_but_the_model(wrap):
    model = build()
    base = state(model)
    base["trains"] = dict.fromkeys(base["trains"], False)
    ranges = (0.0, 1.0), (0.0, 1.0), (0.5, 1.0)
    rounds = [adapter_of("pissa-extracted", model, seed=n, r=4, layer_range=of) for n, of in enumerate(ranges)]
    restore(wrap(model))
    assert not changes(base, model) and not any(a.extracted for a in rounds)
    restore(wrap(model))
    assert not changes(base, model), "with nothing in force it does nothing"
    for a in rounds:
        with pytest.raises(RuntimeError, match="not extracted"): a.restore_base_W()


def test_restore_of_a_base_that_was_not_kept_is_the_round_trip():
    model = build()
    kept, gone = adapter_of("pissa-extracted", model), adapter_of("pissa-extracted", model, seed=3, keep_base=False)
    restore(model)
    assert same(model, weights(build())), "the older one was kept, and it is put back last"
    adapter_of("pissa-extracted", model, keep_base=False)
    restore(model)
    assert not same(model, weights(build())) and all(gap(p, weights(build())[n]) < 2**-20 for n, p in model.named_parameters())
    again = adapter_of("pissa-extracted", model, keep_base=False)
    with torch.no_grad(): next(iter(again.layers.values())).weight.mul_(2)
    with pytest.raises(RuntimeError, match="kept no base.*load the model anew"): restore(model, force=True)
    assert kept.extracted is gone.extracted is False and again.extracted


def test_restore_beside_a_history_is_refused():
    model = build()
    p = adapter_of("pissa-extracted", model)
    before = state(model)
    for make in (PiSSAHistoryBake, baked):
        with make(model, [(p, 1.0)]):
            inside = state(model)
            with pytest.raises(RuntimeError, match="history in force"): restore(model)
            assert not changes(inside, model)
    assert not changes(before, model)


def test_restore_waits_for_the_end_of_the_block():
    "The adapter itself may restore there: it knows what it has attached."
    model, ids = build(), tokens()
    y, a = logits(model, ids), adapter_of("pissa-extracted", model)
    with a(model, 0.0):
        before = state(model)
        with pytest.raises(RuntimeError, match="attached adapter.*leave its block"): restore(model)
        assert not changes(before, model)
        a.restore_base_W()
        assert torch.equal(logits(model, ids), y)
    check_whole(model)


@pytest.mark.parametrize("fails_in,fails_at", [*itertools.product(["fold", "swap_weight", "Entry"], [0, 4]), ("stamp", 0)])
@pytest.mark.parametrize("what", ["baked", "bake_", "extract"])
def test_an_error_on_the_way_leaves_nothing_changed(what, fails_in, fails_at, monkeypatch):
    model, calls, step = build(), [], getattr(ways, fails_in)
    a = adapter_of("lora", model)
    before = state(model)

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) == fails_at + 1: raise MemoryError("full")
        return step(*args, **kwargs)
    monkeypatch.setattr(ways, fails_in, fail)
    with pytest.raises(MemoryError):
        if what == "extract": adapter_of("pissa-extracted", model)
        elif what == "bake_": bake_(model, [(a, 1.0)])
        else: baked(model, [(a, 1.0)]).__enter__()
    monkeypatch.undo()
    assert not changes(before, model) and not any(map(is_folded, model.modules()))
    with baked(model, [(a, 1.0)]): pass
    assert not changes(before, model)


LOST = {"an adapter": lambda model: adapter_of("lora", model)(model, 1.0).__enter__(),
        "an extracted adapter": lambda model: adapter_of("pissa-extracted", model)(model, 1.0).__enter__(),
        "a history": lambda model: HistoryBake(model, [(adapter_of("lora", model), 1.0)]),
        "a history of rounds": lambda model: PiSSAHistoryBake(model, [(adapter_of("pissa-extracted", model), 1.0)]),
        "a fold": lambda model: changed("folded", model),
        "both": lambda model: changed("both", model)}


@pytest.mark.parametrize("lost", LOST)
def test_what_is_lost_is_told_and_ended(lost):
    "A block that is never left, a history whose variable is gone."
    model, ids = build(), tokens()
    before, base = state(model), logits(model, ids)
    kept = LOST[lost](model) if "fold" in lost or lost == "both" else [LOST[lost](model)] and None
    gc.collect()
    if lost in ("an adapter", "a history"):
        with pytest.warns(UserWarning, match=r"still attached.*restore\(model, force=True\)"): restore(model)
    else:
        with pytest.raises(RuntimeError, match=r"restore\(model, force=True\)"): restore(model)
    restore(model, force=True)
    assert torch.equal(logits(model, ids), base) and not [c for c in changes(before, model) if not c.startswith("trains")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        restore(model)
    if kept: kept[0]() # its way out, which is still there, does nothing
    assert torch.equal(logits(model, ids), base)
    with adapter_of("lora", model, seed=7)(model, 1.0): assert not torch.equal(logits(model, ids), base)


def test_blocks_that_were_ended_by_force_are_left_without_harm():
    model, ids = build(), tokens()
    base, a, b = logits(model, ids), adapter_of("lora", model), adapter_of("lora", model, seed=9)
    with a(model, 1.0):
        restore(model, force=True)
        assert not a.attached and torch.equal(logits(model, ids), base)
        with a(model, 2.0), b(model, 1.0): dosed = logits(model, ids)
    with a(model, 2.0), b(model, 1.0): assert torch.equal(logits(model, ids), dosed)
    assert not [c for c in changes(state(build()), model) if "hooks" in c]


def test_a_fold_that_finds_its_weight_overwritten_has_a_way_out():
    model, ids = build(), tokens()
    base, a = logits(model, ids), adapter_of("lora", model)
    with pytest.raises(RuntimeError, match=r"up_proj.*restore\(model, force=True\)"):
        with baked(model, [(a, 1.0)]): model.model.layers[1].mlp.up_proj.weight.data.mul_(1.5)
    restore(model, force=True)
    assert torch.equal(logits(model, ids), base) and not a.bakes
    with baked(model, [(a, 1.0)]), adapter_of("lora", model, seed=9)(model, 1.0): pass
    assert torch.equal(logits(model, ids), base)


@pytest.mark.parametrize("kind", ["lora", "pissa-extracted", "pissa-unextracted"])
def test_what_is_folded_for_good_says_so_when_it_acts_again(kind):
    model = build()
    a, other = adapter_of(kind, model), adapter_of("lora", model, seed=9)
    bake_(model, [(a, 1.0)])
    for again in (lambda: a(model, 1.0), lambda: baked(model, [(a, 1.0)]), lambda: HistoryBake(model, [(a, 1.0)])):
        with pytest.warns(UserWarning, match=f"{type(a).__name__} .{a.id}. is folded into .* for good already"):
            with again(): pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with other(model, 1.0): pass


# -------------------------------------------------------------------------------------------------------------------- for good
@pytest.mark.parametrize("kind", ["lora", "pissa-extracted", "pissa-unextracted"])
def test_the_same_adapter_is_folded_in_once(kind):
    model, ids = build(), tokens()
    a, b = adapter_of(kind, model), adapter_of("lora", model, seed=9)
    bake_(model, [(a, 1.0)])
    before, y = state(model), logits(model, ids)
    for history in ([(a, 1.0)], [(b, 1.0), (a, 0.5)]):
        with pytest.raises(RuntimeError, match="folded into it already.*again=True"): bake_(model, history)
        assert not changes(before, model)
    bake_(model, [(a, 1.0)], again=True)
    assert gap(logits(model, ids), y) > 0.01
    bake_(model, [(b, 1.0)])


def test_what_was_folded_for_good_is_the_base_from_now_on(tmp_path):
    model = build()
    p = adapter_of("pissa-extracted", model)
    bake_(model, [(p, 1.0)])
    after = weights(model)
    check_whole(model)
    restore(model)
    assert same(model, after) and not p.extracted and same(model, model.state_dict())
    for name, layer in p.layers.items(): assert fingerprint(layer) == print_of(after[f"{name}.weight"]) | dict(rounds=[])


# ---------------------------------------------------------------------------------------------------------------- fingerprints
def test_the_fingerprint_is_the_original_weights_whatever_is_in_force():
    model = build()
    name, layer = "model.layers.0.mlp.up_proj", build().model.layers[0].mlp.up_proj
    wanted = fingerprint(layer)
    p = adapter_of("pissa-extracted", model)
    q = adapter_of("pissa-extracted", model, seed=7, keep_base=False)
    with baked(model, [(p, 1.0), (q, 1.0)]): found = fingerprint(model.get_submodule(name))
    assert found == wanted | dict(rounds=[p.id, q.id]) and extraction_ids(model.get_submodule(name)) == [p.id, q.id]
    assert torch.equal(base_weight(model.get_submodule(name), p.id), layer.weight)


@pytest.mark.parametrize("bad", [[], [0.0] * 12, [float("inf")] * 12, [float("nan")] * 12, [1.0]])
def test_no_sample_matches_every_weight(bad):
    W = torch.arange(1.0, 13.0).reshape(3, 4)
    mark = print_of(W)
    other = mark | dict(sample=bad)
    assert same_weight(mark, mark) and not same_weight(other, mark) and not same_weight(mark, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_look_sees_a_single_value(dtype):
    W = build(dtype=dtype).model.layers[0].mlp.up_proj.weight.detach()
    seen = looks([W])[0]
    for at in ((0, 1), (5, 7), (-1, -2)):
        written = W.clone()
        written[at] += 0.25
        assert not same_look(seen, written, dtype)
    assert same_look(seen, W.clone(), dtype) and same_look(seen, W.double(), dtype)


def test_every_layer_is_asked_before_any_is_written():
    model = build()
    a = adapter_of("pissa-extracted", model)
    last = list(a.layers.values())[-1]
    with torch.no_grad(): last.weight.mul_(2)
    before = state(model)
    with pytest.raises(RuntimeError): a.restore_base_W()
    assert not changes(before, model)
    for name, layer in list(a.layers.items())[:-1]: check_unchanged(name, layer)
    assert not torch.equal(dense_weight(last), dense_weight(build().get_submodule(list(a.layers)[-1])))


def test_a_history_and_a_stack_are_whole():
    model = build()
    p = adapter_of("pissa-extracted", model)
    with pytest.raises(RuntimeError): check_whole(model)
    for make in (PiSSAHistoryBake, baked):
        with make(model, [(p, 1.0)]): check_whole(model)
        with pytest.raises(RuntimeError): check_whole(model)
    p.restore_base_W()
    with HistoryBake(model, [(p, 1.0)]): check_whole(model)
