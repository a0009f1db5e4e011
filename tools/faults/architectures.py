"""Every class of language model in transformers that can be built small, against what has to hold on each of them."""
import functools
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__": sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers

import modlab
from faults import children, small

RIGHT = 1e-4 # of the largest logit: float32 through another batch or another order of sums, a few layers deep
RECORDS = [dict(prompt=f"{word} is", cho=" good and", rej=" bad,") for word in ("bread", "an old house", "it")]


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    "The largest difference as a share of the largest value."
    return ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-9)).item()


def seeded(seed: int) -> torch.Generator: return torch.Generator().manual_seed(seed)


def expect(truth: bool, told: str) -> None:
    if not truth: raise AssertionError(told)


class Case:
    "One model, its tokens and its logits."
    def __init__(self, kind: str, name: str):
        self.kind, self.name, self.model = kind, name, small.build(kind, name)
        self.ids = torch.randint(3, 100, (3, 8), generator=seeded(1))
        self.base = self.logits()
        expect(self.base.isfinite().all(), "the logits of the base are not finite")
        expect(torch.equal(self.base, self.logits()), "the base itself is not repeatable")
        self.weights = {n: p.detach().clone() for n, p in self.model.named_parameters()}

    def logits(self, model: torch.nn.Module | None = None) -> torch.Tensor:
        with torch.no_grad(): return (model or self.model)(input_ids=self.ids, **self.more()).logits

    def more(self) -> dict: return dict(decoder_input_ids=self.ids) if self.model.config.is_encoder_decoder else {}

    def lora(self) -> modlab.ModulatedLoRA:
        "A LoRA as training would leave it."
        a, g = modlab.ModulatedLoRA(self.model, r=4, generator=seeded(2)), seeded(3)
        with torch.no_grad():
            for B in a.B.values(): B.copy_(torch.randn(B.shape, generator=g) * 0.02)
        return a

    def at(self, a: modlab.Adapter, c: float | torch.Tensor) -> torch.Tensor:
        with a(self.model, c): return self.logits()

    def same_weights(self) -> None:
        changed = [n for n, p in self.model.named_parameters() if not torch.equal(p, self.weights[n])]
        expect(not changed, f"weights that are not the base bit for bit: {changed[:3]}")


def no_op(case: Case) -> None:
    a = modlab.ModulatedLoRA(case.model, r=4)
    expect(torch.equal(case.at(a, 1.5), case.base), "a fresh LoRA changes the logits")


def backward(case: Case) -> None:
    case.model(input_ids=case.ids, **case.more()).logits.log_softmax(-1)[..., 5].sum().backward()


def trains(case: Case) -> None:
    "No target is a layer that does not run, and gradients pass where they pass in the base."
    a, called = case.lora(), set()
    for name, layer in a.layers.items(): layer.register_forward_pre_hook(lambda m, x, name=name: called.add(name))
    try:
        with a(case.model, 1.0): backward(case)
    except RuntimeError:
        with torch.enable_grad(): expect(not plain_trains(case), "the base has a gradient, and the factors have none")
    idle = sorted(set(a.layers) - called)
    expect(not idle, f"{len(idle)} of {len(a.layers)} layers that do not run: {idle[:2]}")


def plain_trains(case: Case) -> bool:
    "Does the base pass a gradient at all, as it stands here?"
    for p in case.model.parameters(): p.requires_grad_(p.is_floating_point())
    try: backward(case)
    except RuntimeError: return False
    return True


def extracted(case: Case) -> None:
    p = modlab.ModulatedPiSSA(case.model, r=4, selection_score="s_only", generator=seeded(4))
    off = gap(case.at(p, 0.0), case.base)
    expect(off < RIGHT, f"extracted, c = 0 is off by {off:.2g}")
    expect(gap(case.at(p, 2.0), case.base) > RIGHT, "c = 2 does nothing")
    p.restore_base_W()
    case.same_weights()
    expect(torch.equal(case.logits(), case.base), "restored, and other logits")


def rows(case: Case) -> None:
    a, c = case.lora(), torch.tensor([0.0, 1.0, -1.0])
    alone = [case.at(a, float(x))[n] for n, x in enumerate(c)]
    together = case.at(a, c)
    for n, y in enumerate(alone): expect(gap(together[n], y) < RIGHT, f"row {n} is off by {gap(together[n], y):.2g}")


def folded(case: Case) -> None:
    a = case.lora()
    hooked = case.at(a, 1.0)
    expect(gap(hooked, case.base) > RIGHT, "c = 1 does nothing")
    with modlab.baked(case.model, [(a, 1.0)]): off = gap(case.logits(), hooked)
    expect(off < RIGHT, f"hooked and folded differ by {off:.2g}")
    case.same_weights()


def captured(case: Case) -> None:
    X = modlab.capture_activations(case.model, tokenizer(), RECORDS)
    expect(all(len(side["cho"]) > 1 for side in X.values()), "no rows")


def curve(case: Case) -> None:
    table = modlab.kl_curve(case.model, tokenizer(), case.lora(), RECORDS, [0.0, 1.0])
    kl = table.set_index("c").kl_rev_mean
    expect(kl[0.0] == 0, f"KL {kl[0.0]:.2g} at c = 0")
    expect(kl[1.0] > 1e-6, f"KL {kl[1.0]:.2g} at c = 1")


def peft_and_back(case: Case) -> None:
    import peft
    a = case.lora()
    hooked = case.at(a, 1.0)
    with tempfile.TemporaryDirectory() as folder:
        modlab.to_peft(a, folder)
        back = gap(case.at(modlab.from_peft(case.model, folder), 1.0), hooked)
        there = gap(case.logits(peft.PeftModel.from_pretrained(case.model, folder)), hooked)
    expect(there < RIGHT, f"PEFT is off by {there:.2g}")
    expect(back < RIGHT, f"back from PEFT it is off by {back:.2g}")


CHECKS = {"no-op": no_op, "trains": trains, "c = 0 and restore": extracted, "per row": rows, "hook = fold": folded,
          "capture": captured, "kl_curve": curve, "PEFT": peft_and_back}


@functools.cache
def tokenizer() -> transformers.PreTrainedTokenizerBase: return modlab.tiny_model()[1]


def outcome(case: Case, check: Callable[[Case], None]) -> str:
    "`held`, `refused: words` or `failed: words`."
    try: check(case)
    except AssertionError as e: return f"failed: {e}"
    except (ValueError, RuntimeError, OSError) as e:
        ours = any("modlab" in f.f_code.co_filename for f in [last_frame(e)])
        return f"{'refused' if ours else 'failed'}: {type(e).__name__}: {e}"[:400]
    except Exception as e: return f"failed: {type(e).__name__}: {e}"[:400]
    return "held"


def last_frame(e: BaseException):
    "Where it was raised: an error that comes from modlab's own lines is a refusal."
    tb = e.__traceback__
    while tb.tb_next: tb = tb.tb_next
    return tb.tb_frame


def model_case(kind: str, name: str) -> dict[str, str]:
    "All checks on one class of models, each on a model of its own."
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = {}
    for label, check in CHECKS.items():
        try: case = Case(kind, name)
        except Exception as e: return {"built": f"no: {type(e).__name__}: {e}"[:300]}
        found[label] = outcome(case, check)
    return found


def run(budget_s: float, full: bool, out: Path) -> dict:
    "The table: a row for each class that can be built small."
    transformers.logging.set_verbosity_error()
    cases, deadline = small.cases(), time.monotonic() + budget_s
    tasks = [(name, functools.partial(model_case, kind, name)) for kind, name in cases]
    table, unbuilt = [], {}
    for done in children.run_all(tasks, timeout=120, deadline=deadline):
        found = done.value if done.ok else {"all": f"failed: {done.how}: {done.error}"}
        if "built" in found: unbuilt[done.name] = found["built"]
        else: table.append(dict(name=done.name, **found))
    return summary(table, unbuilt, len(cases), out)


def summary(table: list[dict], unbuilt: dict[str, str], planned: int, out: Path) -> dict:
    "Counts, and one row for each result in other words than `held`."
    results = [(row["name"], check, words) for row in table for check, words in row.items() if check != "name"]
    count = Counter(words.partition(":")[0] for _, _, words in results)
    rows = [dict(model=name, check=check, outcome=words.partition(": ")[0], words=words.partition(": ")[2],
                 **({"error": words} if words.startswith("failed") else {}))
            for name, check, words in results if words != "held"]
    return dict(name="architectures", planned=(planned - len(unbuilt)) * len(CHECKS), tried=len(results), held=count["held"],
                refused=count["refused"], failed=count["failed"], rows=rows, models=len(table), unbuilt=unbuilt)


def main() -> int:
    "On its own: `python tools/faults/architectures.py [MODEL …]`."
    os.environ.update(MODLAB_SVD_CACHE="0", HF_HUB_OFFLINE="1")
    children.warm()
    if sys.argv[1:]:
        kinds = {name: kind for kind, name in small.cases()}
        transformers.logging.set_verbosity_error()
        for name in sys.argv[1:]: print(name, *(f"\n  {k:18} {v}" for k, v in model_case(kinds[name], name).items()))
        return 0
    result = run(1e9, True, Path("."))
    for row in result.pop("rows"): print(*row.values(), sep=" | ")
    print(result)
    return int(result["failed"] > 0)


if __name__ == "__main__": sys.exit(main())
