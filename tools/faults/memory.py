"""Memory: thousands of attach, bake, sweep and training steps, after which there are as many tensors as before."""
import gc
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from faults import children

ABOUT = ("Each kind of work is done again and again in a process of its own. It holds if the number of live tensors does not "
         "grow between the end of the first tenth and the end, and the memory of the process by less than 8 MiB.")
COUNTS = {"attach and leave": 1000, "bake and leave": 1000, "stack and remove": 1000, "extract and restore": 1000,
          "kl_curve": 1000, "heal, steps": 500}
SLACK_MIB = 8.0


def resident() -> float:
    "MiB that this process has in memory."
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def tensors() -> int:
    "How many tensors the garbage collector knows."
    import torch
    gc.collect()
    return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())


def setting():
    "A tiny model, its tokenizer, a LoRA that does something, and a few pairs."
    from models import adapter_of

    from modlab import load_pairs, tiny_model
    model, tok = tiny_model()
    return model, tok, adapter_of("lora", model, r=2), load_pairs()[:2]


def attach(model, tok, a, pairs) -> None:
    with a(model, 1.0): model(input_ids=tok("a", return_tensors="pt").input_ids)


def bake(model, tok, a, pairs) -> None:
    from modlab import baked
    with baked(model, [(a, 1.0)]): model(input_ids=tok("a", return_tensors="pt").input_ids)


def stack(model, tok, a, pairs) -> None:
    from modlab import HistoryBake
    with HistoryBake(model, [(a, 1.0)]): model(input_ids=tok("a", return_tensors="pt").input_ids)


def extract(model, tok, a, pairs) -> None:
    from modlab import ModulatedPiSSA
    p = ModulatedPiSSA(model, r=2, selection_score="s_only", targets=("q_proj",), layer_range=(0.0, 0.5))
    with p(model, 1.0): model(input_ids=tok("a", return_tensors="pt").input_ids)
    p.restore_base_W()


def sweep(model, tok, a, pairs) -> None:
    from modlab import kl_curve
    kl_curve(model, tok, a, pairs[:1], [0.0, 1.0])


WORK = {"attach and leave": attach, "bake and leave": bake, "stack and remove": stack, "extract and restore": extract,
        "kl_curve": sweep}


def repeated(work: Callable, count: int, seconds: float) -> dict:
    "How tensors and memory grew over `count` repetitions, or over as many as there was time for."
    parts, end = setting(), time.monotonic() + seconds
    first, done = max(count // 10, 1), 0
    for done in range(1, count + 1):
        work(*parts)
        if done == first: before = tensors(), resident()
        if done > first and time.monotonic() > end: break
    return dict(done=done, tensors=tensors() - before[0], mib=round(resident() - before[1], 1))


class Steps:
    "Looks at the memory after the first tenth of the steps of an optimiser, and after the last that there was time for."
    def __init__(self, count: int, seconds: float):
        self.first, self.count, self.end, self.done, self.marks = max(count // 10, 1), count, time.monotonic() + seconds, 0, []

    def __call__(self, optimiser, args, kwargs) -> None:
        self.done += 1
        late = time.monotonic() > self.end and self.done > self.first
        if self.done in (self.first, self.count) or late: self.marks.append((tensors(), resident()))
        if late: raise TimeoutError


def trained(count: int, seconds: float) -> dict:
    "The same for the steps of one `heal`."
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from modlab import HealConfig, heal
    model, tok, _, pairs = setting()
    sample, steps = dict(prompt="Who is there?", completion=pairs[0]["cho"][:20]), Steps(count, seconds)
    handle = register_optimizer_step_post_hook(steps)
    with suppress(TimeoutError): heal(model, tok, [sample] * 20, HealConfig(epochs=-(-count // 20), val_frac=0.0, r=2, alpha=2.0))
    handle.remove()
    (t0, m0), (t1, m1) = steps.marks[0], steps.marks[-1]
    return dict(done=steps.done, tensors=t1 - t0, mib=round(m1 - m0, 1))


def row(what: str, count: int, outcome: children.Outcome) -> dict:
    found = outcome.value or {}
    held = outcome.ok and found["tensors"] <= 0 and found["mib"] < SLACK_MIB
    return dict(what=what, planned=count, **found, held=held, **({} if held else dict(error=outcome.error or "it grew")))


def run(budget_s: float, full: bool, out: Path) -> dict:
    "Each kind of work in a process of its own, two at a time."
    counts = COUNTS if full else {what: count // 5 for what, count in COUNTS.items()}
    each = min(budget_s * 2 / len(counts), 3600.0)
    tasks = [(what, partial(repeated, WORK[what], n, each * 0.9) if what in WORK else partial(trained, n, each * 0.9))
             for what, n in counts.items()]
    rows = [row(o.name, counts[o.name], o) for o in children.run_all(tasks, each + 60)]
    (out / "rows.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    held = sum(r["held"] for r in rows)
    return dict(name="memory", about=ABOUT, planned=len(counts), tried=len(rows), held=held, failed=len(rows) - held, rows=rows)
