"""Lifecycle: random sequences of everything that can be done with adapters and a model, each step held to the float64 oracle."""
import copy
import json
import pickle
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.internal.conjecture import engine
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from models import KINDS, changes, gap, hooks, logits, state
from torch import nn

from faults import children
from faults.oracle import IDS, ROWS, TARGETS, Block, Kept, Oracle, deltas, made
from modlab import HistoryBake, PiSSAHistoryBake, bake_, baked, load_adapter, restore

ABOUT = """A hypothesis state machine draws sequences of 50 steps out of: make an adapter (LoRA, PiSSA extracted or not), attach,
nest, dose, dose per row, leave in any order and from any thread, raise inside a block, fold (`baked`), stack (`HistoryBake`,
`PiSSAHistoryBake`), gate, fold for good, train on, save and load, restore, restore by force, copy, cast, `load_state_dict`,
forwards of other threads. After each step the logits are those of a float64 twin, or the call is refused where it has to be; a
weight that nothing is in force on is the base bit for bit; no class is swapped and no hook left where nothing is attached."""
STEPS, LENGTH = 10_000, 50
REFUSALS = (RuntimeError, ValueError, OSError)
which, number = st.integers(0, 5), st.integers(0, 99)
dose = st.one_of(st.sampled_from([0.0, 1.0, -1.0]), st.floats(-2, 2, width=16))
doses = st.one_of(dose, st.tuples(dose, dose))
COUNTS = Counter() # of steps, by name; of refusals; of forwards


def as_c(c) -> float | torch.Tensor: return torch.tensor(c) if isinstance(c, tuple) else float(c)


def per_row(c) -> list[float]: return list(c) if isinstance(c, tuple) else [float(c)] * ROWS


def guards(model: nn.Module) -> list[str]:
    "Modules on which saving or loading of weights is watched."
    kinds = ("_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_state_dict_hooks")
    return [n for n, m in model.named_modules() if any(getattr(m, k, None) for k in kinds)]


class Lifecycle(RuleBasedStateMachine):
    arch, first = "llama", "lora"

    @initialize(n=number)
    def begin(self, n):
        self.oracle = Oracle(self.arch)
        self.model = self.oracle.model
        self.kept, self.open, self.order, self.generation, self.dtype = [], [], [], 0, torch.float32
        self.make(self.first, n)

    # ---------------------------------------------------------------- what is known of the state
    def at(self, i: int) -> Kept: return self.kept[i % len(self.kept)]

    def folds(self) -> list[Block]: return [b for b in self.open if b.what == "fold"]

    def holders(self, k: Kept) -> list[Block]: return [b for b in self.open if b.what != "attach" and k in b.members]

    def folded(self) -> set[str]: return {name for b in self.folds() for name in b.maps}

    def changed(self) -> set[str]:
        "Weights that something is in force on."
        return {f"{name}.weight" for name in self.folded() | {n for k in self.order for n in k.a.layers}}

    def given_back(self, k: Kept) -> bool: return k.attached or bool(self.holders(k))

    def lacking(self) -> bool: return any(not self.given_back(k) for k in self.order)

    def rounds(self, k: Kept) -> dict: return {n: [o.a.id for o in self.order if n in o.a.layers] for n in k.a.layers}

    # ---------------------------------------------------------------- refusals change nothing
    @contextmanager
    def refused_if(self, refused: bool):
        "The block must be refused if it has to be, with nothing changed; otherwise it must work."
        before = state(self.model) if refused else None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        except REFUSALS as e:
            if not refused: raise
            COUNTS["refused"] += 1
            assert str(e) and not (found := changes(before, self.model)), found
        else: assert not refused, "this had to be refused"

    # ---------------------------------------------------------------- making and attaching
    @precondition(lambda self: len(self.kept) < 4)
    @rule(kind=st.sampled_from(KINDS), n=number)
    def make(self, kind, n):
        targets, extract = TARGETS[self.arch][n % 3], kind == "pissa-extracted"
        refused = extract and any(t in name for t in targets for name in self.folded())
        with self.refused_if(refused):
            a = made(kind, self.model, self.arch, n)
            k = Kept(a, {}, self.generation, extracted=extract)
            k.rounds = self.rounds(k)
            self.kept.append(k)
            if extract: self.order.append(k)

    @rule(i=which)
    def forget(self, i):
        "A variable goes; what its adapter did stays only if it is extracted."
        k = self.at(i)
        if len(self.kept) > 1 and not (k.attached or k.extracted or self.holders(k)): self.kept.remove(k)

    @rule(i=which, c=doses)
    def attach(self, i, c):
        k = self.at(i)
        with self.refused_if(k.attached or bool(self.holders(k))):
            block = k.a(self.model, as_c(c))
            block.__enter__()
            self.open.append(Block("attach", [k], partial(block.__exit__, None, None, None), doses=per_row(c)))
            k.attached = True

    @rule(i=which, c=doses)
    def set_dose(self, i, c):
        k = self.at(i)
        with self.refused_if(not k.attached):
            k.a.set_coeff(as_c(c))
            next(b for b in self.open if b.what == "attach" and k in b.members).doses = per_row(c)

    @rule(i=which, c=st.sampled_from([float("nan"), float("inf"), torch.ones(2, 2)]))
    def bad_dose(self, i, c):
        with self.refused_if(True): self.at(i).a(self.model, c).__enter__()

    @rule(i=which, elsewhere=st.booleans())
    @precondition(lambda self: self.open)
    def leave(self, i, elsewhere):
        block = self.open.pop(i % len(self.open))
        for k in block.members: k.attached = k.attached and block.what != "attach"
        thread = threading.Thread(target=block.leave)
        if not elsewhere:
            block.leave()
            return
        thread.start()
        thread.join()

    @rule(i=which, c=doses)
    def raise_inside(self, i, c):
        k = self.at(i)
        before = state(self.model)
        with self.refused_if(k.attached or bool(self.holders(k))):
            try:
                with k.a(self.model, as_c(c)): raise KeyError("inside")
            except KeyError: pass
        assert not changes(before, self.model)

    # ---------------------------------------------------------------- histories
    def history(self, i, j, c, d) -> list: return [(self.at(i), c), (self.at(j), d)]

    def clash(self, history) -> bool:
        "Is there an adapter that would count twice?"
        return any(k.attached or (k.extracted and self.holders(k)) for k, _ in history)

    def maps(self, history) -> dict:
        total = {}
        for k, c in history:
            for name, m in deltas(k.a).items(): total[name] = total.get(name, 0) + c * m
        return total

    def enter(self, what, history, make):
        members = list(dict.fromkeys(k for k, _ in history))
        item = make(self.model, [(k.a, c) for k, c in history])
        if what == "fold": item.__enter__()
        leave = item.remove if what == "stack" else lambda: item.__exit__(None, None, None)
        self.open.append(Block(what, members, leave, self.maps(history), item=item))

    @rule(i=which, j=which, c=dose, d=dose)
    def fold(self, i, j, c, d):
        history = self.history(i, j, c, d)
        with self.refused_if(self.clash(history)): self.enter("fold", history, baked)

    @rule(i=which, j=which, c=dose, d=dose, extracted=st.booleans())
    def stack(self, i, j, c, d, extracted):
        history = self.history(i, j, c, d)
        any_out = any(k.extracted for k, _ in history)
        twice = any(self.holders(k) for k, _ in history) and not extracted
        with self.refused_if(self.clash(history) or any_out != extracted or twice):
            self.enter("stack", history, PiSSAHistoryBake if extracted else HistoryBake)

    @rule(i=which, on=st.one_of(st.booleans(), st.tuples(st.booleans(), st.booleans())))
    @precondition(lambda self: any(b.what == "stack" for b in self.open))
    def gate(self, i, on):
        stacks = [b for b in self.open if b.what == "stack"]
        block = stacks[i % len(stacks)]
        block.item.set_gate(lambda: torch.tensor(on) if isinstance(on, tuple) else on)
        rows = tuple(map(float, on)) if isinstance(on, tuple) else on
        if not isinstance(block.item, PiSSAHistoryBake): block.doses = per_row(rows)

    @rule(i=which, j=which, c=dose, d=dose, again=st.booleans())
    def fold_for_good(self, i, j, c, d, again):
        history = self.history(i, j, c, d)
        layers = {name for k, _ in history for name in k.a.layers}
        members = {k for k, _ in history}
        held = {n for k in self.order if self.holders(k) for n in k.a.layers}
        missing = {n for k in self.order if k not in members for n in k.a.layers}
        twice = not again and any(k.baked & layers for k in members)
        refused = any(k.attached or self.holders(k) for k in members) or layers & (self.folded() | held | missing) or twice
        with self.refused_if(bool(refused)):
            bake_(self.model, [(k.a, c) for k, c in history], again=again)
            self.adopt(self.maps(history), members)

    def adopt(self, maps, members):
        "The folded weights are the base from now on, if they are what they must be."
        values = {f"{name}.weight": self.model.get_submodule(name).weight for name in maps}
        for name, m in maps.items():
            W, got = self.oracle.candidates[f"{name}.weight"][-1].double(), values[f"{name}.weight"].double()
            wanted = W + (m if got.shape == m.shape and isinstance(self.model.get_submodule(name), nn.Linear) else m.T)
            assert gap(got, wanted) < self.oracle.tolerance, name
        self.oracle.replaced(values)
        self.generation += 1
        for k in members:
            k.baked |= set(maps)
            if k.extracted: self.order.remove(k)
            k.extracted = False

    # ---------------------------------------------------------------- the numbers of an adapter
    @rule(i=which, n=number)
    def train_on(self, i, n):
        "In place, as an optimiser does it; histories keep their snapshots."
        g = torch.Generator().manual_seed(n)
        with torch.no_grad():
            for p in self.at(i).a.parameters(): p.add_(torch.randn(p.shape, generator=g) * 0.02)

    def in_the_way(self, k: Kept) -> bool:
        "Can the extraction of this adapter not be put back now?"
        if k not in self.order: return False
        layers = set(k.a.layers)
        later = self.order[self.order.index(k) + 1:]
        return bool(self.holders(k)) or bool(layers & self.folded()) or any(layers & set(o.a.layers) for o in later)

    @rule(i=which, n=number)
    def save_and_load(self, i, n):
        k = self.at(i)
        with tempfile.TemporaryDirectory() as folder:
            k.a.save(Path(folder) / "a.safetensors")
            kept = {name: p.detach().clone() for name, p in k.a.named_parameters()}
            self.train_on(i, n)
            now = {name: p.detach().clone() for name, p in k.a.named_parameters()}
            own = k.a.id if k.extracted else ""
            rounds = {name: [r for r in ids if r != own] for name, ids in self.rounds(k).items()}
            refused = k.extracted and (k.attached or self.in_the_way(k)) or rounds != {n: k.rounds[n] for n in rounds}
            if k.base != self.generation or self.folded() & set(k.a.layers):
                self.may_load(k, folder, now)
                return
            with self.refused_if(refused): k.a.load(Path(folder) / "a.safetensors")
            wanted = now if refused else kept
            assert all(torch.equal(p, wanted[name]) for name, p in k.a.named_parameters())

    def may_load(self, k, folder, now):
        "On another base, or a folded one, it depends on the numbers: loaded whole, or refused with nothing changed."
        before = state(self.model)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                k.a.load(Path(folder) / "a.safetensors", strict=False)
        except REFUSALS: assert not changes(before, self.model) and all(torch.equal(p, now[n]) for n, p in k.a.named_parameters())

    @rule(i=which)
    @precondition(lambda self: len(self.kept) < 4)
    def load_anew(self, i):
        k = self.at(i)
        if k.base != self.generation or self.folded() & set(k.a.layers) or k.attached: return
        with tempfile.TemporaryDirectory() as folder:
            k.a.save(Path(folder) / "a.safetensors")
            with self.refused_if(self.rounds(k) != k.rounds):
                new = Kept(load_adapter(self.model, folder), k.rounds, self.generation, baked=set(k.baked))
                self.kept.append(new)

    # ---------------------------------------------------------------- the way back
    @rule(i=which)
    def restore_one(self, i):
        k = self.at(i)
        if k.a.kind == "lora": return
        with self.refused_if(not k.extracted or self.in_the_way(k)):
            k.a.restore_base_W()
            self.put_back(k)

    def put_back(self, k):
        self.order.remove(k)
        k.extracted = False

    @rule()
    def restore_all(self):
        used = any(b.what == "fold" or any(k.extracted for k in b.members) for b in self.open)
        with self.refused_if(used):
            restore(self.model)
            for k in list(self.order): self.put_back(k)

    @rule()
    def restore_by_force(self):
        "Everything ends, and what is left afterwards leaves without harm."
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            restore(self.model, force=True)
        left, self.open = self.open, []
        for b in left:
            for k in b.members: k.attached = False
            b.leave()
        for k in list(self.order): self.put_back(k)

    # ---------------------------------------------------------------- the model itself
    @rule(dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]))
    def cast(self, dtype):
        if dtype == self.dtype: return
        self.model.to(dtype)
        self.oracle.cast(dtype, self.changed())
        self.dtype = dtype
        self.generation += 1

    @rule(n=number, assign=st.booleans())
    def load_weights(self, n, assign):
        g = torch.Generator().manual_seed(n)
        values = {name: (t[-1] * (1 + 0.05 * torch.randn(t[-1].shape, generator=g))).to(self.dtype)
                  for name, t in self.oracle.candidates.items()}
        with self.refused_if(bool(self.changed())):
            self.model.load_state_dict(values, assign=assign, strict=False)
            self.oracle.replaced(values)
            self.generation += 1

    @rule()
    def save_weights(self):
        given = {k for b in self.folds() for k in b.members}
        with self.refused_if(any(k not in given for k in self.order)):
            saved, now = self.model.state_dict(), dict(self.model.named_parameters())
            assert all(torch.equal(saved[name], p) for name, p in now.items())

    @rule(way=st.sampled_from([copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]))
    def copied(self, way):
        twin = way(self.model)
        assert not hooks(twin)
        given = {k for b in self.folds() for k in b.members}
        if any(k not in given for k in self.order):
            try: logits(twin, IDS)
            except RuntimeError: COUNTS["refused"] += 1
            # without anything attached nothing runs before the forward, so only attaching, saving and measuring refuse
        else: assert gap(logits(twin, IDS), self.oracle.logits(self.folds())) < self.oracle.tolerance
        restore(twin)
        assert not self.oracle.wrong(set(), twin) and not guards(twin)

    @rule(i=which, c=dose)
    def beside_other_threads(self, i, c):
        "Attached and left twenty times beside forwards of another thread."
        k, errors, stop = self.at(i), [], threading.Event()
        if self.lacking() or k.attached or k.extracted or self.holders(k): return

        def forwards():
            while not stop.is_set():
                try: assert logits(self.model, IDS).isfinite().all()
                except Exception as e: errors.append(repr(e))
        thread = threading.Thread(target=forwards)
        thread.start()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(20):
                with k.a(self.model, c): pass
        stop.set()
        thread.join()
        assert not errors, errors[:3]

    # ---------------------------------------------------------------- what always holds
    @invariant()
    def right(self):
        COUNTS["steps"] += 1
        assert not self.oracle.wrong(self.changed())
        if not self.open: assert not hooks(self.model)
        if not self.changed(): assert not guards(self.model)
        for k in self.kept: assert (k.a.attached, k.a.extracted) == (k.attached, k.extracted)
        if self.lacking():
            if not any(b.what != "fold" for b in self.open): return # then nothing of modlab runs in a forward
            with self.refused_if(True): logits(self.model, IDS)
            return
        COUNTS["forwards"] += 1
        got, wanted = logits(self.model, IDS), self.oracle.logits(self.open)
        assert gap(got, wanted) < self.oracle.tolerance, f"{gap(got, wanted):.3g} off"

    def teardown(self):
        if not hasattr(self, "open"): return
        while self.open: self.open.pop().leave()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            restore(self.model)
        assert not self.oracle.wrong(set()) and not hooks(self.model) and not guards(self.model)


def steps(arch: str, kind: str, count: int, seconds: float, number: int = 0) -> dict:
    "Run sequences until there were `count` steps, or no time is left."
    machine = type(f"{arch}_{kind}", (Lifecycle,), dict(arch=arch, first=kind))
    COUNTS.clear()
    engine.MAX_SHRINKING_SECONDS = 60
    end, sequences, error = time.monotonic() + seconds, 0, ""
    while COUNTS["steps"] < count and time.monotonic() < end and not error:
        examples = max(1, min(20, (count - COUNTS["steps"]) // LENGTH))
        chosen = settings(max_examples=examples, stateful_step_count=LENGTH, deadline=None, database=None, print_blob=False,
                          report_multiple_bugs=False, phases=(Phase.generate, Phase.shrink),
                          suppress_health_check=list(HealthCheck))
        try: run_state_machine_as_test(seed(1000 * number + sequences)(machine), settings=chosen)
        except BaseException as e:
            error = "\n".join([*getattr(e, "__notes__", []), traceback.format_exc()[-3000:]])
        sequences += examples
    return dict(COUNTS) | dict(sequences=sequences, trace=error)


def row(name: str, count: int, o: children.Outcome) -> dict:
    "One line of the table."
    found = o.value or {}
    error = found.get("trace", "") or o.error
    numbers = {key: found.get(key, 0) for key in ("steps", "forwards", "refused", "sequences")}
    model, first = name.split()
    return dict(model=model, first=first, planned=count, **numbers, held=not error) | (dict(error=error) if error else {})


def run(budget_s: float, full: bool, out: Path) -> dict:
    "Two models, three kinds to begin with, each in a process of its own."
    cases = [(arch, kind) for kind in KINDS for arch in TARGETS]
    count = -(-STEPS // len(cases))
    each = min(budget_s * 2 / len(cases), 7200.0)
    tasks = [(f"{arch} {kind}", partial(steps, arch, kind, count, each * 0.9, n)) for n, (arch, kind) in enumerate(cases)]
    rows = [row(o.name, count, o) for o in children.run_all(tasks, each + 120)]
    (out / "rows.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    for r in rows: r.update(dict(error=r["error"].strip().splitlines()[-1]) if "error" in r else {})
    tried, failed = sum(r["steps"] for r in rows), sum(not r["held"] for r in rows)
    return dict(name="lifecycle", about=ABOUT, planned=count * len(cases), tried=tried, held=tried - failed, failed=failed,
                refused=sum(r["refused"] for r in rows), rows=rows)
