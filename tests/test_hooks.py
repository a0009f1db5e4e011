"""How a call is changed: seen by compiled graphs, right in a recomputed block, absent from copies, safe beside other threads."""
import copy
import gc
import inspect
import io
import pickle
import subprocess
import sys
import threading
import warnings
import weakref
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from models import KINDS, adapter_of, build, changes, gap, half, hooks, logits, seeded, state, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

from modlab import ModulatedLoRA
from modlab.adapters.hooks import Adder, Hooks, LowRankAdder
from modlab.model import calls
from modlab.model.alone import here_only
from modlab.model.calls import ADDERS, _adders_of, is_swapped, put, take
from modlab.model.layers import is_linear
from modlab.model.rows import _batch_shape, text_models

pytestmark = pytest.mark.usefixtures("one_thread")
every_kind = pytest.mark.parametrize("kind", KINDS)

# ------------------------------------------------------------------------------------------------------------------ compiled
COMPILED = """
import sys, torch
from modlab import HistoryBake, PiSSAHistoryBake
from models import adapter_of, build, gap, logits, tokens
from torch._dynamo.testing import CompileCounter
torch.set_num_threads(1)
torch.set_grad_enabled(False)
kind, when = sys.argv[1:]
model, ids, count = build(), tokens(), CompileCounter()
a, b = adapter_of(kind, model, layer_range=(0.25, 0.75)), adapter_of("lora", model, seed=7, r=3, targets=("q_proj",))
compiled = torch.compile(model, backend=count, fullgraph=True) if when == "before" else None
def same(): return gap(compiled(input_ids=ids).logits, logits(model, ids)) < 1e-5
def say(what, right): print("]", what, count.frame_count, right)
if when == "before" and kind != "pissa-extracted": say("plain", same())
for turn in range(3):
    with a(model, 1.0):
        if compiled is None: compiled = torch.compile(model, backend=count, fullgraph=True)
        say("dosed", all((a.set_coeff(c), same())[1] for c in [1.0, 0.5, -3.0, 7.0, 2.0, 11.0, -0.25, 1e3, 5.0, 6.0]))
    if kind != "pissa-extracted": say("plain", same())
for turn in range(2):
    with a(model, torch.tensor([1.0, -2.0, 0.5])):
        say("rows", same())
        a.set_coeff(torch.zeros(3))
        say("rows", same())
for turn in range(2):
    with a(model, -1.0), b(model, 2.0): say("two", same())
    with a(model, 3.0): say("dosed", same())
    stack = PiSSAHistoryBake if kind == "pissa-extracted" else HistoryBake
    with stack(model, [(a, 0.5), (b, 2.0)]): say("history", same())
for turn in range(2):
    with a(model, torch.tensor([1.0, -2.0, 0.5])), b(model, torch.tensor([0.5, 0.0, 1.0])): say("rows-of-two", same())
"""


@pytest.mark.parametrize("kind, when", [("pissa-unextracted", "before"), ("lora", "after"), ("pissa-extracted", "after")])
def test_a_compiled_model_is_steered_every_time_with_one_graph_per_state(kind, when):
    "In a process of its own: the compiler cannot look into functions that check their types, as they do under test."
    done = subprocess.run([sys.executable, "-c", COMPILED, kind, when], cwd=Path(__file__).parent, capture_output=True, text=True)
    lines = [x.split()[1:] for x in done.stdout.splitlines() if x.startswith("]")]
    assert lines and all(right == "True" for *_, right in lines), done.stdout + done.stderr[-3000:]
    states, seen = 0, set()
    for what, count, _ in lines:
        states += what not in seen
        seen.add(what)
        assert int(count) <= states, f"{what}: {count} graphs for {states} states"


# ------------------------------------------------------------------------------------------------------------- checkpointing
def switch(model, on, reentrant):
    name = "enable" if on else "disable"
    call = getattr(model, f"activation_checkpointing_{name}", None) or getattr(model, f"gradient_checkpointing_{name}")
    takes = "activation" if hasattr(model, f"activation_checkpointing_{name}") else "gradient"
    if on: call(**{f"{takes}_checkpointing_kwargs": dict(use_reentrant=reentrant)})
    else: call()


def gradients(kind, arch, how, reentrant=None):
    "Of a loss at +1 and one at -2 together; `how` says when the backward pass runs."
    model, ids = build(arch).train(), tokens()
    a = half(kind, model)
    for m in model.modules():
        if isinstance(m, nn.Dropout): m.p = 0.0
    if reentrant is not None and how != "inside": switch(model, True, reentrant)
    if reentrant: model.get_input_embeddings().register_forward_hook(lambda m, args, y: y.requires_grad_())
    with a(model, 1.0):
        if reentrant is not None and how == "inside": switch(model, True, reentrant)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        a.set_coeff(torch.tensor([-2.0, 0.5, 0.0]))
        loss = loss + model(input_ids=ids.flip(0), labels=ids, use_cache=False).loss
        if how == "inside":
            a.set_coeff(5.0)
            loss.backward()
    if how == "left": loss.backward()
    if how == "attached again":
        with a(model, torch.tensor([7.0, 7.0, 7.0])): loss.backward()
    assert not hooks_of_modlab(model)
    return torch.cat([p.grad.flatten() for p in a.parameters()])


def hooks_of_modlab(model): return [n for n, m in model.named_modules() if is_swapped(m) or set(vars(m)) & {ADDERS}]


@pytest.mark.parametrize("how", ["inside", "left", "attached again"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind, arch", [("lora", "llama"), ("pissa-extracted", "llama"), ("lora", "gpt2"),
                                        ("pissa-unextracted", "opt")])
def test_a_block_is_recomputed_at_the_dose_of_its_forward(kind, arch, how, reentrant):
    expected = gradients(kind, arch, how)
    assert gap(gradients(kind, arch, how, reentrant), expected) < 2**-16 and expected.abs().max() > 0


# A user's own checkpoint, around whatever they like.
def part(layer): return lambda h: h + layer.mlp(layer.post_attention_layernorm(h))


def in_turn(parts, run, h):
    for f in parts: h = run(f, h)
    return h


def plainly(f, *args): return f(*args)


OWN = {"blocks": lambda model, run, h: in_turn(map(part, model.model.layers), run, h),
       "a part of a block": lambda model, run, h: in_turn([lambda h, m=m.mlp: h + run(m, h) for m in model.model.layers],
                                                          plainly, h),
       "many blocks": lambda model, run, h: run(lambda h: in_turn(map(part, model.model.layers), plainly, h), h),
       "one in another": lambda model, run, h: run(lambda h: in_turn(map(part, model.model.layers), run, h), h),
       "the model": lambda model, run, h: run(lambda h: model(inputs_embeds=h).logits, h),
       "a layer": lambda model, run, h: run(model.model.layers[1].mlp.up_proj, h)}
WHEN = ("inside", "left", "attached again", "another one", "attached since", "plain since")


def own_gradients(kind, who, when, run):
    "Of a loss at one dose and one at a dose per row together, for the adapter and for the input."
    model = build()
    a, b = half(kind, model), half("lora", model, seed=9)
    leaf = torch.randn(3, 5, 64, generator=seeded(3)).requires_grad_()
    def loss(): return OWN[who](model, run, leaf * 1.0).square().mean()
    if when == "attached since":
        if a.extracted: a.restore_base_W()
        total = loss()
        with a(model, 2.0), b(model, 1.0): total.backward()
        return [leaf.grad]
    with a(model, 1.0):
        total = loss()
        if when == "plain since": a.set_coeff(0.0)
        else: a.set_coeff(torch.tensor([-2.0, 0.5, 0.0]))
        if who == "the model" or when == "plain since": total = total + loss()
        if when == "inside":
            a.set_coeff(5.0)
            total.backward()
    if when in ("left", "plain since"): total.backward()
    if when == "attached again":
        with a(model, torch.tensor([7.0, 7.0, 7.0])): total.backward()
    if when == "another one":
        with b(model, 3.0): total.backward()
    assert not hooks(model)
    return [leaf.grad, *(p.grad for p in a.parameters() if p.grad is not None)]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("who", OWN)
@pytest.mark.parametrize("kind", KINDS[:2])
def test_a_checkpoint_of_the_users_own_is_recomputed_at_the_dose_of_its_forward(kind, who, reentrant):
    for when in WHEN:
        expected = own_gradients(kind, who, when, plainly)
        found = own_gradients(kind, who, when, partial(checkpoint, use_reentrant=reentrant))
        assert len(found) == len(expected) and any(g.abs().max() > 0 for g in expected)
        assert all(gap(g, e) < 2**-14 for g, e in zip(found, expected) if e.abs().max() > 0), when


def test_what_is_kept_for_the_backward_pass_goes_with_the_graph():
    model, leaf = build(), torch.randn(1, 3, 64).requires_grad_()
    a = half("lora", model)
    with a(model, 1.0): total = OWN["blocks"](model, partial(checkpoint, use_reentrant=False), leaf * 1.0).sum()
    gone = weakref.ref(a.B[next(iter(a.B))])
    del a, total
    for _ in range(2): gc.collect() # the graph first, then what it held
    assert gone() is None


def test_without_gradients_nothing_looks_for_a_checkpoint(monkeypatch):
    model, ids = build(), tokens()
    a, looked = half("lora", model), []
    monkeypatch.setattr(calls, "_frames", lambda: looked.append(1) or [])
    with a(model, 1.0): logits(model, ids), model(input_ids=ids)
    assert not looked, "nor where PyTorch says that nobody watches"


def test_a_forward_of_a_hook_within_a_backward_pass_is_a_forward_like_any_other():
    model, ids, seen = build(), tokens(), []
    a, leaf = half("lora", model), torch.ones(1, requires_grad=True)
    with a(model, 1.0):
        y = leaf * 2
        y.register_hook(lambda g: seen.append(logits(model, ids)))
        y.sum().backward()
        assert torch.equal(seen[0], logits(model, ids))


def test_another_adapter_that_comes_later_has_no_part_in_the_recomputation():
    model, ids = build().train(), tokens()
    a, b = half("lora", model), half("lora", model, seed=9)
    def run(checkpointed):
        switch(model, checkpointed, False)
        for p in a.parameters(): p.grad = None
        with a(model, 1.0): loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        with b(model, 3.0): loss.backward()
        return torch.cat([p.grad.flatten() for p in a.parameters()])
    assert gap(run(True), run(False)) < 2**-16


def test_what_the_user_set_stays_where_it_was():
    model = build()
    a = adapter_of("lora", model)
    with a(model):
        switch(model, True, False)
        block = model.model.layers[0]
        mine = vars(block)["_gradient_checkpointing_func"]
    assert block._gradient_checkpointing_func is mine and block.gradient_checkpointing
    with a(model): del block._gradient_checkpointing_func
    assert not hasattr(block, "_gradient_checkpointing_func")
    assert type(block).forward is type(model.model.layers[1]).forward


# -------------------------------------------------------------------------------------------------------------------- copies
COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "copy": copy.copy,
          "old pickle": lambda m: pickle.loads(pickle.dumps(m, protocol=1))}


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [*COPIES, "torch.save"])
def test_a_copy_is_plain(way):
    model, ids = build(), tokens()
    base, a = logits(model, ids), adapter_of("lora", model)
    with a(model, 1.0):
        twin = COPIES.get(way, saved)(model if way != "copy" else model.lm_head)
        if way == "copy": assert not is_swapped(twin) and not set(vars(twin)) & {ADDERS}; return
        assert not hooks(twin) and torch.equal(logits(twin, ids), base) and not torch.equal(logits(model, ids), base)
    assert type(twin) is type(model) and [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]


def test_a_copied_pair_of_model_and_adapter_is_detached():
    model, ids = build(), tokens()
    a = adapter_of("lora", model)
    with a(model, 1.0):
        y = logits(model, ids)
        b = copy.deepcopy(a)
        assert not b.attached and b.c == 0 and not hooks(b.model)
    with b(b.model, 1.0): assert torch.equal(logits(b.model, ids), y)


class Own(nn.Linear):
    "A layer that says itself how it is copied."
    def __deepcopy__(self, memo):
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        return new


def test_a_layer_that_copies_itself_is_plain_too():
    layer = Own(4, 4)
    item = Hooks({}, lambda *args: None)
    put(layer, ADDERS, item)
    twin = copy.deepcopy(layer)
    take(layer, ADDERS, item)
    assert type(twin) is type(layer) is Own and not set(vars(twin)) & {ADDERS}


# ------------------------------------------------------------------------------------------------------------------- threads
def test_attaching_and_leaving_beside_plain_forwards_breaks_neither():
    model, ids, errors, stop = build(), tokens(1, 3), [], threading.Event()
    base, a, b = logits(model, ids), adapter_of("lora", model), adapter_of("pissa-unextracted", model, seed=9)
    def forwards():
        while not stop.is_set():
            try: assert logits(model, ids).isfinite().all()
            except Exception as e: errors.append(repr(e))
    def attaching(adapter, n):
        try:
            for _ in range(n):
                with adapter(model, 1.0): pass
        except Exception as e: errors.append(repr(e))
    others = [threading.Thread(target=forwards) for _ in range(2)]
    both = [threading.Thread(target=attaching, args=(x, 500)) for x in (a, b)]
    for t in others + both: t.start()
    for t in both: t.join()
    stop.set()
    for t in others: t.join()
    assert not errors, Counter(errors)
    assert not hooks(model) and torch.equal(logits(model, ids), base)


def test_two_adapters_leave_in_any_order():
    model, ids = build(), tokens()
    base, a, b = logits(model, ids), adapter_of("lora", model), adapter_of("lora", model, seed=9)
    first, second = a(model, 1.0), b(model, 1.0)
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    with_b = logits(model, ids)
    second.__exit__(None, None, None)
    assert torch.equal(logits(model, ids), base) and not hooks(model)
    with b(model, 1.0): assert torch.equal(logits(model, ids), with_b)


def test_here_only_acts_in_its_thread_with_a_dose_per_row():
    model, ids, there = build(), tokens(), []
    base, a = logits(model, ids), adapter_of("lora", model)
    with here_only(), a(model, torch.tensor([1.0, 0.0, 2.0])):
        other = threading.Thread(target=lambda: there.append(logits(model, ids[:2])))
        model.model.layers[1].register_forward_pre_hook(lambda *args: other.start() if not other.ident else None)
        y = logits(model, ids)
        other.join()
    assert torch.equal(there[0], base[:2]) or gap(there[0], base[:2]) < 2**-16
    assert torch.equal(y[1], base[1]) and not torch.equal(y[0], base[0])


# ----------------------------------------------------------------------------------------------------------------- what it costs
class Counting(dict):
    "A dictionary that counts how often it is asked."
    asked = 0
    def __getitem__(self, key):
        Counting.asked += 1
        return super().__getitem__(key)
    def get(self, key, default=None):
        Counting.asked += 1
        return super().get(key, default)


@every_kind
def test_nothing_is_looked_up_during_a_forward(kind, monkeypatch):
    model, ids = build(), tokens()
    a = adapter_of(kind, model)
    for table in a.tables: setattr(a, table, Counting(getattr(a, table)))
    a.layers = Counting(a.layers)
    walks = []
    with a(model, 1.0), torch.no_grad():
        model(ids)
        for walk in ("modules", "named_modules"):
            real = getattr(nn.Module, walk)
            monkeypatch.setattr(nn.Module, walk, lambda self, *args, real=real: walks.append(1) or real(self, *args))
        Counting.asked = 0
        model(ids)
        model(ids)
        assert Counting.asked == 0 and not walks
        monkeypatch.undo()


def test_a_float_zero_returns_the_very_output():
    model = build()
    a = adapter_of("lora", model)
    layer, x = next(iter(a.layers.values())), torch.randn(2, 64)
    with a(model, 0.0):
        y = torch.ones(2, 64)
        assert _adders_of(layer)[0].add(x, y) is y


@every_kind
def test_an_optimizer_step_inside_the_block_is_seen(kind):
    model, ids = build(), tokens()
    a = adapter_of(kind, model)
    with a(model, 1.0):
        y = logits(model, ids)
        with torch.no_grad():
            for p in a.parameters(): p.mul_(2)
        inside = logits(model, ids)
    with a(model, 1.0): assert torch.equal(logits(model, ids), inside) and not torch.equal(inside, y)


@pytest.mark.parametrize("how", [dict(fused=True), dict(foreach=True), dict(foreach=False)], ids=lambda how: "-".join(how))
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
@every_kind
def test_every_kind_of_optimizer_is_seen(kind, optimizer, how):
    model, ids = build(), tokens()
    a = adapter_of(kind, model)
    with a(model, 1.0):
        with torch.no_grad(): before = logits(model, ids)
        step = optimizer(a.parameters(), lr=0.1, **how)
        model(ids).logits.square().mean().backward()
        step.step()
        with torch.no_grad(): inside = logits(model, ids)
    with a(model, 1.0), torch.no_grad(): again = logits(model, ids)
    assert torch.equal(again, inside) and not torch.equal(inside, before)


@every_kind
def test_a_file_that_is_loaded_inside_the_block_is_seen(kind, tmp_path):
    model, ids = build(), tokens()
    a = adapter_of(kind, model)
    a.save(tmp_path / "a")
    with a(model, 1.0): y = logits(model, ids)
    with torch.no_grad():
        for p in a.parameters(): p.mul_(2)
    with a(model, 1.0):
        if kind == "pissa-extracted":
            with pytest.raises(RuntimeError, match="leave the with block"): a.load(tmp_path / "a")
            return
        a.load(tmp_path / "a")
        assert gap(logits(model, ids), y) < 2**-18


# ------------------------------------------------------------------------------------------------------ hooks of the user's own
def times_three(layer):
    "An instance attribute `forward`, as some libraries set it."
    own = layer.forward
    layer.forward = lambda x: own(x) * 3


PATCHES = {"nothing": lambda layer: None, "by hand": times_three,
           "offloaded": lambda layer: cpu_offload(layer, execution_device="cpu"),
           "hooked": lambda layer: add_hook_to_module(layer, ModelHook()),
           "unhooked": lambda layer: remove_hook_from_module(add_hook_to_module(layer, ModelHook()))}
every_patch = pytest.mark.parametrize("patch", PATCHES)
every_time = pytest.mark.parametrize("when", ["before", "inside"])


def one_layer(kind="lora", patch="nothing"):
    "A model, an adapter, one of its layers, an input for it, and what comes out of it with nothing attached and at dose 1."
    model = build()
    a = adapter_of(kind, model, layer_range=(0.25, 0.75))
    name, layer = next((n, m) for n, m in a.layers.items() if n.endswith("up_proj"))
    PATCHES[patch](layer)
    x = torch.randn(2, 7, layer.in_features, generator=seeded(3))
    plain = layer(x)
    with a(model, 1.0): dosed = layer(x)
    assert gap(dosed, plain + x @ a.delta(name, 1.0).T) < 2**-16 and gap(dosed, plain) > 2**-10
    return model, a, layer, x, plain, dosed


@torch.no_grad()
@every_time
@every_kind
def test_a_hook_sees_the_dosed_output_and_has_the_last_word(kind, when):
    model, a, layer, x, plain, dosed = one_layer(kind)
    seen = []
    def register(): layer.register_forward_hook(lambda m, args, y: seen.append(y) or y * 2)
    if when == "before": register()
    with a(model, 1.0):
        if when == "inside": register()
        assert torch.equal(layer(x), dosed * 2) and torch.equal(seen[-1], dosed)
    assert torch.equal(layer(x), plain * 2) and torch.equal(seen[-1], plain)


@torch.no_grad()
@every_time
@every_kind
def test_what_a_pre_hook_changes_is_what_the_adapter_reads(kind, when):
    model, a, layer, x, plain, dosed = one_layer(kind)
    def register(): layer.register_forward_pre_hook(lambda m, args: args[0] / 2)
    if when == "before": register()
    with a(model, 1.0):
        if when == "inside": register()
        assert torch.equal(layer(x * 2), dosed)
    assert torch.equal(layer(x * 2), plain)


@torch.no_grad()
def test_a_pre_hook_may_change_a_keyword():
    model, a, layer, x, plain, dosed = one_layer()
    layer.register_forward_pre_hook(lambda m, args, kw: (args, dict(input=kw["input"] / 2)), with_kwargs=True)
    with a(model, 1.0): assert torch.equal(layer(input=x * 2), dosed)


@torch.no_grad()
@every_time
def test_the_next_layer_gets_what_a_hook_returns(when):
    model, a, layer, *_ = one_layer()
    mlp, seen = next(m for m in model.modules() if getattr(m, "up_proj", None) is layer), []
    def register(): layer.register_forward_hook(lambda m, args, y: y * 0)
    if when == "before": register()
    mlp.down_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with a(model, torch.tensor([1.0, -2.0, 0.5])):
        if when == "inside": register()
        model(tokens())
    assert seen[0].abs().max() == 0


@torch.no_grad()
def test_a_hook_sees_what_all_adapters_add():
    model, a, layer, x, plain, dosed = one_layer()
    b, seen = adapter_of("lora", model, seed=9), []
    layer.register_forward_hook(lambda m, args, y: seen.append(y))
    with b(model, 2.0): alone = layer(x)
    with a(model, 1.0), b(model, 2.0): both = layer(x)
    with b(model, 2.0), a(model, 1.0): layer(x)
    assert torch.equal(seen[1], both) and gap(both, dosed + alone - plain) < 2**-16 and gap(seen[2], both) < 2**-16


@torch.no_grad()
@every_patch
def test_a_forward_that_is_set_inside_the_block_is_dosed_once(patch):
    model, a, layer, x, plain, dosed = one_layer()
    more = 2 * plain if patch == "by hand" else 0
    with a(model, 1.0):
        PATCHES[patch](layer)
        assert gap(layer(x), dosed + more) < 2**-20
    for _ in range(2):
        assert gap(layer(x), plain + more) < 2**-20
        with a(model, 1.0): assert gap(layer(x), dosed + more) < 2**-20
    assert not is_swapped(layer) and not set(vars(layer)) & {ADDERS}


@torch.no_grad()
@pytest.mark.parametrize("patch", ["hooked", "unhooked"])
def test_a_copy_of_a_layer_that_was_patched_inside_the_block_computes_with_its_own_weight(patch):
    model, a, layer, x, plain, dosed = one_layer()
    with a(model, 1.0):
        PATCHES[patch](layer)
        twin = copy.deepcopy(layer)
    twin.weight.zero_()
    assert not twin(x).any() and gap(layer(x), plain) < 2**-20


@torch.no_grad()
@every_patch
def test_replicas_are_dosed_and_a_layer_stays_linear(patch):
    model, a, layer, x, plain, dosed = one_layer("lora", patch)
    with a(model, 1.0):
        replica = layer._replicate_for_data_parallel()
        replica._parameters = layer._parameters
        assert torch.equal(replica(x), dosed) and is_linear(layer)
        if patch == "nothing": assert torch.equal(layer.forward(x), dosed)
    assert torch.equal(layer(x), plain)


@torch.no_grad()
@pytest.mark.parametrize("patch", list(PATCHES)[1:])
def test_hooks_of_a_layer_with_a_forward_of_its_own_come_first(patch):
    "A limit, said in the notebook: the output is right, and the hook sees it before anything is added."
    model, a, layer, x, plain, dosed = one_layer("lora", patch)
    seen = []
    with a(model, 1.0):
        layer.register_forward_hook(lambda m, args, y: seen.append(y))
        assert torch.equal(layer(x), dosed) and torch.equal(seen[0], plain)


class Projection(nn.Linear):
    "Linear by what it inherits, not by its name."


def test_a_linear_layer_of_another_name_stays_linear():
    layer = Projection(3, 3)
    put(layer, ADDERS, Hooks)
    assert is_swapped(layer) and is_linear(layer) and type(layer).forward is not nn.Linear.forward
    take(layer, ADDERS, Hooks)
    assert type(layer) is Projection and is_linear(layer)


HOOKED = """
import sys, torch
from models import gap, logits, tokens
from test_hooks import PATCHES, one_layer
from torch._dynamo.testing import CompileCounter
torch.set_num_threads(1)
torch.set_grad_enabled(False)
what, ids, count, seen = sys.argv[1], tokens(), CompileCounter(), []
model, a, layer, *_ = one_layer("lora", what if what in PATCHES else "nothing")
if what == "pre-hook": layer.register_forward_pre_hook(lambda m, args: args[0] * 2)
def register(): return layer.register_forward_hook(lambda m, args, y: y.clamp(min=0))
if what == "before": register()
compiled = torch.compile(model, backend=count, fullgraph=what != "offloaded")
def say(state): print("]", state, count.frame_count, gap(compiled(input_ids=ids).logits, logits(model, ids)) < 1e-5)
for turn in range(4):
    say("plain")
    with a(model, 1.0):
        handle = register() if what == "inside" else None
        for c in (1.0, -2.0, 0.5):
            a.set_coeff(c)
            say("dosed")
        if handle: handle.remove()
"""


@pytest.mark.parametrize("what", ["before", "inside", "pre-hook", *list(PATCHES)[1:]])
def test_a_compiled_model_agrees_with_hooks_and_patches(what):
    "Logits of the compiled model are those of the model itself, of which the tests above speak."
    done = subprocess.run([sys.executable, "-c", HOOKED, what], cwd=Path(__file__).parent, capture_output=True, text=True)
    lines = [x.split()[1:] for x in done.stdout.splitlines() if x.startswith("]")]
    assert len(lines) == 16 and all(right == "True" for *_, right in lines), done.stdout + done.stderr[-3000:]
    if what != "offloaded": assert int(lines[-1][1]) == 2, done.stdout


# --------------------------------------------------------------------------------------------------------------------- rows
def images(model, ids, n):
    ids = ids.clone()
    ids[:, :2] = 1
    vision = model.config.vision_config
    per_image = model.config.mm_tokens_per_image
    b = len(ids)
    text = torch.cat([torch.full((b, per_image * n // b), model.config.image_token_id), ids], 1)
    pixels = torch.randn(n, 3, vision.image_size, vision.image_size, generator=seeded(3))
    return dict(input_ids=text, pixel_values=pixels, token_type_ids=(text == model.config.image_token_id).long())


@pytest.mark.parametrize("targets", ["language", "vision"])
def test_doses_are_never_dealt_out_by_image(targets):
    model = build("gemma3_vision")
    pattern = "language_model.*q_proj" if targets == "language" else "vision_tower.*q_proj"
    a = adapter_of("lora", model, targets=(pattern,), exclude=())
    call = images(model, tokens(2), 2)
    with torch.no_grad(): base = model(**call).logits
    with torch.no_grad(), a(model, torch.tensor([0.0, 1.0])):
        if targets == "vision":
            with pytest.raises(ValueError, match="rows of .*vision_tower.* unknown"): model(**call)
            return
        y = model(**call).logits
    assert torch.equal(y[0], base[0]) and not torch.equal(y[1], base[1])


def test_the_models_that_tell_the_rows_hold_the_token_embedding():
    model = build("gemma3_vision")
    names = {n for n, m in model.named_modules() for t in text_models(model) if t is m}
    assert "model.language_model" in names and not [n for n in names if "vision" in n]
    assert _batch_shape((torch.ones(2, 3, 8, 8),), {}) is None and _batch_shape((torch.ones(2, 3),), {}) == (2, 3)
    assert _batch_shape((), dict(input_ids=torch.ones(2, 3), pixel_values=None)) == (2, 3)
    assert text_models(nn.Linear(2, 2))[0].in_features == 2


# ---------------------------------------------------------------------------------------------------------------- in and out
def test_a_call_without_with_says_so():
    model = build()
    a, before = adapter_of("lora", model), state(model)
    with pytest.warns(UserWarning, match="without with.*nothing was attached"): a(model, 1.0)
    assert not changes(before, model) and not a.attached
    with pytest.warns(UserWarning, match="without with"):  # a notebook keeps, and shows, what a cell ends with
        shown = repr(a(model, 1.0))
    assert "detached" in shown and "with adapter(model, c)" in shown
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with a(model, 1.0): pass
        with pytest.raises(ValueError, match="finite"), a(model, float("nan")): pass


class Final(nn.Linear):
    "A class that takes no subclass."
    def __init_subclass__(cls): raise TypeError("this class is final")


def test_a_class_that_cannot_change_is_refused_by_name():
    layer = Final(3, 3)
    with pytest.raises(RuntimeError, match="nothing can be attached to a Final.*this class is final"): put(layer, ADDERS, Hooks)
    assert type(layer) is Final and not set(vars(layer)) & {ADDERS}


def test_names_and_forward_are_those_of_the_plain_class():
    model = build()
    shown, a = repr(model), adapter_of("lora", model)
    kinds = {n: (type(m).__name__, type(m).__module__, type(m).__qualname__) for n, m in model.named_modules()}
    with a(model):
        assert repr(model) == shown and all(isinstance(m, type(m).__mro__[1]) for m in model.modules())
        assert kinds == {n: (type(m).__name__, type(m).__module__, type(m).__qualname__) for n, m in model.named_modules()}
        for m in filter(is_swapped, model.modules()):
            plain, adds = type(m).__mro__[1].forward, m in a.layers.values()
            assert inspect.signature(type(m).forward) == inspect.signature(plain) and (type(m).forward is plain) == (not adds)
            assert not adds or type(m).forward.__wrapped__ is plain


def test_ids_are_of_twelve_digits_and_travel_with_files(tmp_path):
    model = build()
    a, b = adapter_of("lora", model), adapter_of("lora", model)
    assert a.id != b.id and all(len(x.id) == 12 and int(x.id, 16) >= 0 for x in (a, b))
    a.save(tmp_path / "a")
    assert ModulatedLoRA.from_checkpoint(build(), tmp_path / "a").id == a.id
    b.load(tmp_path / "a")
    assert b.id == a.id


class Derived(Adder):
    def bind(self): self.cell = self.hooks.cell(torch.device("cpu"), torch.float32)
    def add(self, x, y): return y + self.cell.dose.c


def test_anything_with_an_add_can_be_attached_and_a_gate_is_asked():
    model, ids, gate = build(), tokens(), [0.0]
    layers = {"head": model.lm_head}
    base = logits(model, ids)
    with Hooks(layers, Derived).attach(model, 2.0): assert torch.equal(logits(model, ids), base + 2)
    with Hooks(layers, Derived, gate=lambda: gate[0]).attach(model):
        assert torch.equal(logits(model, ids), base)
        gate[0] = 1.0
        assert torch.equal(logits(model, ids), base + 1)


def test_a_slope_that_is_computed_gets_its_gradient():
    model, theta = build(), nn.Parameter(torch.ones(2))
    out = model.lm_head.out_features
    parts = lambda: (torch.ones(2, 64), theta * 3, None, torch.ones(out, 2))
    hooks_ = Hooks({"head": model.lm_head}, lambda name, layer, h: LowRankAdder(name, layer, h, parts))
    model.requires_grad_(False)
    with hooks_.attach(model, 1.0):
        for _ in range(2): model(tokens()).logits.sum().backward()
    assert theta.grad is not None and theta.grad.abs().min() > 0
