"""Damaged files: mutants of every kind of file that modlab reads. Each one loads with the values that it holds, or is refused
with its name in an error of the right kind, soon, and with model and adapter as they were."""
import json
import logging
import os
import random
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import torch
from safetensors.torch import load_file

from faults import children, mutants
from faults.mutants import Mutant

LIMIT = 20.0 # seconds for one mutant
REFUSALS = (ValueError, RuntimeError, OSError)
ABOUT = ("A file of each kind is spoilt: cut off, a bit flipped, bytes overwritten or inserted, a field of its header with a "
         "value of another type or meaning, a table too few, too many, of another shape or with NaN. Right: it loads with what "
         "it holds, or ValueError, RuntimeError or OSError that names it, in 20 seconds, with model and adapter as they were.")


@dataclass
class Family:
    "A kind of file."
    name: str
    share: int # of the mutants of a full run
    make: Callable[[Path], object] # writes a good one into a folder; what it returns goes to `check`
    spoil: Callable[[Path, random.Random], Iterator[tuple[str, Mutant]]] # (file in the folder, mutant)
    check: Callable[[Path, object, str], str] # "held" or "refused" for a spoilt folder, or AssertionError


def refusal(e: Exception, *names: Path | str) -> str:
    "It is of the right kind, and says which file it is about."
    other = RecursionError | NotImplementedError | UnicodeError
    assert isinstance(e, REFUSALS) and not isinstance(e, other), f"{type(e).__name__}: {e}"
    assert any(str(name) in str(e) for name in names), f"the file is not named: {type(e).__name__}: {e}"
    return "refused"


def hush() -> None:
    "This process, a child, says nothing from here on. (What it prints may go to a file, on a disk that is full.)"
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2): os.dup2(nowhere, stream)
    logging.disable(logging.CRITICAL)


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def everything(model: torch.nn.Module, adapter: object) -> list:
    "What a refused load must leave as it was: identities and copies."
    kept = [(n, p, p.data, p.requires_grad) for n, p in model.named_parameters()]
    tables = [(t, n, v) for t in adapter.tables for n, v in getattr(adapter, t).items()]
    meta = dict(adapter.meta(), cfg=adapter.cfg, c=adapter.c, attached=adapter.attached, extracted=adapter.extracted)
    values = [(n, id(p), d.data_ptr(), d.clone(), g) for n, p, d, g in kept]
    values += [(t, n, id(v), v.detach().clone()) for t, n, v in tables]
    return [values, meta, [n for n, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks]]


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor): return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, list | tuple): return len(a) == len(b) and all(map(same, a, b))
    return a == b


# ---- adapter files ----

ADAPTER = "a.safetensors"
SMALL = dict(r=3, targets=("q_proj", "down_proj"), layer_range=(0.0, 0.5))


def build() -> torch.nn.Module:
    from modlab import tiny_model
    model = tiny_model()[0]
    for p in model.parameters(): p.requires_grad_(False) # so that freezing is no change
    return model


def adapter_of(kind: str, model: torch.nn.Module, seed: int = 2) -> object:
    from modlab import ModulatedLoRA, ModulatedPiSSA
    g = torch.Generator().manual_seed(seed)
    if kind != "lora":
        return ModulatedPiSSA(model, **SMALL, selection_score="s_only", extract=kind == "extracted PiSSA", generator=g)
    a = ModulatedLoRA(model, **SMALL, generator=g)
    with torch.no_grad():
        for B in a.B.values(): B.copy_(torch.randn(B.shape, generator=g) * 0.1)
    return a


def make_adapter(kind: str) -> Callable:
    def make(folder: Path) -> dict:
        a = adapter_of(kind, build())
        a.save(folder / ADAPTER, extra_meta=dict(note="mine"))
        return dict(kind=type(a), tables=load_file(folder / ADAPTER), header=mutants.header_of(folder / ADAPTER), cfg=a.cfg)
    return make


def spoil_adapter(folder: Path, rng: random.Random) -> Iterator[tuple[str, Mutant]]:
    header = {k: json.loads(v) for k, v in mutants.header_of(folder / ADAPTER).items()}
    sources = [mutants.bytewise(rng), mutants.fields(rng, header, mutants.write_header),
               mutants.tables(rng, sorted(load_file(folder / ADAPTER))), mutants.raw_header(rng)]
    for n in count():
        for source in ([*sources[:3], sources[3]] if n % 8 == 0 else sources[:3]):
            if (m := next(source, None)) is not None: yield ADAPTER, m


def holds(adapter: object, path: Path) -> None:
    "The adapter has the file's tables and what its header says."
    flat, header = load_file(path), {k: json.loads(v) for k, v in mutants.header_of(path).items()}
    for table in adapter.tables:
        for name, t in getattr(adapter, table).items():
            if f"{table}.{name}" not in flat: continue
            assert same(t.detach(), flat[f"{table}.{name}"].to(t.dtype)), f"{table}.{name} is not what the file holds"
    assert {k.partition(".")[2] for k in flat} == set(adapter.layers), "other layers"
    for key, value in header.items():
        if key in ("init", "layer_range"): value = [float(v) for v in value]  # whole numbers are numbers
        mine = adapter.meta().get(key, getattr(adapter.cfg, key, None))
        if key in {*adapter.meta(), *vars(adapter.cfg)} - {"dtype"}:
            assert mine == (tuple(value) if isinstance(value, list) else value), f"{key} is {mine}, the file says {value}"


def check_adapter(kind: str) -> Callable:
    def check(folder: Path, good: dict, damage: str) -> str:
        from modlab import load_adapter, read_metadata, restore
        path, model, ends = folder / ADAPTER, build(), []
        mine = adapter_of(kind, model, seed=5)
        for way in (read_metadata, lambda p: load_adapter(model, p), lambda p: good["kind"].from_checkpoint(model, p), mine.load):
            if mine.extracted and way != mine.load: mine.restore_base_W()
            before, random_state = everything(model, mine), torch.get_rng_state()
            try: got = way(path)
            except Exception as e:
                ends.append(refusal(e, path))
                assert same(everything(model, mine), before), f"changed, though refused: {e}"
            else:
                ends.append("held")
                adapter = mine if way == mine.load else got
                if way is read_metadata: assert json.dumps(got["kind"]) == mutants.header_of(path)["kind"]
                elif damage in BYTES: assert intact(adapter, good), "damaged, and loaded with other values"
                else: holds(adapter, path)
                with torch.no_grad(), adapter(model, 1.0) if way is not read_metadata else torch.no_grad():
                    model(torch.arange(5)[None])
                restore(model)
                if way == mine.load: break
                assert same(everything(model, mine)[0], before[0]), "the base did not come back"
            assert torch.equal(torch.get_rng_state(), random_state), "a random draw"
        return "refused" if "refused" in ends else "held"
    return check


BYTES = ("cut off", "a flipped bit", "overwritten bytes", "bytes too many")


def intact(adapter: object, good: dict) -> bool:
    "Is everything as it was saved?"
    tables = {f"{t}.{n}": v.detach() for t in adapter.tables for n, v in getattr(adapter, t).items()}
    if adapter.cfg != good["cfg"] or tables.keys() != good["tables"].keys(): return False
    return all(same(tables[k], good["tables"][k]) for k in tables)


# ---- PEFT folders ----

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def make_peft(folder: Path) -> None:
    from modlab import to_peft
    to_peft(adapter_of("lora", build()), folder)


def spoil_peft(folder: Path, rng: random.Random) -> Iterator[tuple[str, Mutant]]:
    config = json.loads((folder / CONFIG).read_text())
    values, tables = mutants.fields(rng, config, mutants.write_json), mutants.tables(rng, sorted(load_file(folder / WEIGHTS)))
    raw = mutants.bytewise(rng)
    sources = [(CONFIG, values), (WEIGHTS, tables), (CONFIG, raw), (WEIGHTS, raw), (CONFIG, values)]
    while True:
        for name, source in sources:
            if (m := next(source, None)) is not None: yield name, m


def check_peft(folder: Path, good: None, damage: str) -> str:
    "Where modlab reads a folder, PEFT reads the same numbers out of it and gives each layer the same scale."
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    from modlab import from_peft
    model = build()
    mine = adapter_of("lora", model)
    before = everything(model, mine)
    try: a = from_peft(model, folder)
    except Exception as e:
        refusal(e, folder)
        assert same(everything(model, mine), before), f"changed, though refused: {e}"
        return "refused"
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    said = {key: value for key, value in config.items() if value is not None or not key.endswith("_pattern")}
    (folder / "adapter_config.json").write_text(json.dumps(said), encoding="utf-8")  # PEFT stumbles over a null there
    theirs = PeftModel.from_pretrained(build(), folder)
    layers = {n.removeprefix("base_model.model."): m for n, m in theirs.named_modules() if isinstance(m, LoraLayer)}
    for name in a.layers:
        m = layers[name]
        assert same(a.A[name].detach(), m.lora_A["default"].weight.detach()), f"another A of {name} than PEFT's"
        assert same(a.B[name].detach(), m.lora_B["default"].weight.detach()), f"another B of {name} than PEFT's"
        assert a.scale[name] == m.scaling["default"], f"scale {a.scale[name]} where PEFT has {m.scaling['default']}"
    return "held"


# ---- records ----

PAIRS = "pairs.jsonl"


def make_pairs(folder: Path) -> None:
    splits = ["test", "train", "train"] * 3
    records = [dict(prompt=f"Où est {n}? \u2028 é", cho="là", rej="ici", split=splits[n]) for n in range(8)]
    records[3]["prompt"] = [dict(role="user", content="Tea?")]
    (folder / PAIRS).write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")


def spoil_pairs(folder: Path, rng: random.Random) -> Iterator[tuple[str, Mutant]]:
    records = [json.loads(line) for line in (folder / PAIRS).read_text(encoding="utf-8").split("\n") if line]
    def write(path: Path, tree: list) -> None: path.write_text("\n".join(json.dumps(r) for r in tree), encoding="utf-8")
    texts = {"Latin-1": lambda p: p.write_bytes(p.read_text(encoding="utf-8").replace("\u2028", "").encode("latin-1")),
             "UTF-16": lambda p: p.write_text(p.read_text(encoding="utf-8"), encoding="utf-16"),
             "a BOM": lambda p: p.write_text(p.read_text(encoding="utf-8"), encoding="utf-8-sig"),
             "one list": lambda p: p.write_text(json.dumps(records)), "a deep one": lambda p: p.write_text("[" * 100_000),
             "CSV": lambda p: p.write_text("prompt,cho,rej\na,b,c\n"), "empty": lambda p: p.write_text(""),
             "a huge number": lambda p: p.write_text('{"prompt": ' + "1" * 5000 + "}")}
    yield from ((PAIRS, ("another encoding", what, apply)) for what, apply in texts.items())
    values, raw = mutants.fields(rng, records, write), mutants.bytewise(rng)
    while True:
        for source in (values, raw):
            if (m := next(source, None)) is not None: yield PAIRS, m


def check_pairs(folder: Path, good: None, damage: str) -> str:
    from modlab import batches, load_pairs, tiny_model
    path, ends = folder / PAIRS, []
    for split in (None, "train"):
        try: got = load_pairs(split, path=path)
        except Exception as e:
            ends.append(refusal(e, path))
            continue
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
        lines = [r for r in lines if split is None or r.get("split") == split]
        assert json.dumps(got) == json.dumps(lines), "other records than the file holds"
        ends.append("held")
        try: list(batches(tiny_model()[1], got, "cho"))
        except Exception as e: refusal(e, "record")
    return "refused" if "refused" in ends else "held"


# ---- the file of a run ----

RUN = "run.pt"
SAMPLES = [dict(prompt=f"Q{n}?", completion="yes and no"[:3 + n % 7]) for n in range(8)]


def healed(path: Path | None, stop: bool = False) -> dict:
    "What a run of two epochs learns; with `stop` it is broken off after the first."
    from modlab import HealConfig, heal, tiny_model
    from modlab.learn import loop
    model, tok = tiny_model()
    cfg = HealConfig(min_train=4, r=2, epochs=2, lr=1e-2, batch_size=4, layer_range=(0.0, 0.25), seed=1)
    plain = loop._one_epoch
    def until(run, epoch, *rest):
        if stop and epoch == 1: raise KeyboardInterrupt
        plain(run, epoch, *rest)
    loop._one_epoch = until
    try: return {n: p.detach() for n, p in heal(model, tok, SAMPLES, cfg, resume=path).adapter.named_parameters()}
    except KeyboardInterrupt: return {}
    finally: loop._one_epoch = plain


def make_run(folder: Path) -> dict:
    healed(folder / RUN, stop=True)
    assert (folder / RUN).exists()
    return healed(None)


def spoil_run(folder: Path, rng: random.Random) -> Iterator[tuple[str, Mutant]]:
    state = torch.load(folder / RUN, weights_only=True)
    def write(path: Path, tree: object) -> None: torch.save(tree, path)
    values, raw = mutants.fields(rng, state, write), mutants.bytewise(rng)
    while True:
        for source in (raw, values, raw):
            if (m := next(source, None)) is not None: yield RUN, m


def check_run(folder: Path, good: dict, damage: str) -> str:
    path = folder / RUN
    try: got = healed(path)
    except Exception as e: return refusal(e, path)
    if damage in BYTES:
        assert got.keys() == good.keys() and all(same(got[n], good[n]) for n in good), "it went on to something else"
    assert all(t.isfinite().all() for t in got.values()), "it went on to something that is not finite"
    return "held"


# ---- caches ----

WEIGHT = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))


def with_cache(folder: Path, what: Callable[[], object]) -> object:
    os.environ.update(MODLAB_CACHE=str(folder), MODLAB_SVD_CACHE="1")
    with quiet(): return what()


def decomposed() -> tuple:
    from modlab.model.cache import thin_svds
    return dict(thin_svds({"a": WEIGHT}))["a"]


def make_svd(folder: Path) -> tuple: return with_cache(folder, decomposed)


def spoil_svd(folder: Path, rng: random.Random) -> Iterator[tuple[str, Mutant]]:
    file = next(folder.rglob("*.safetensors"))
    values, raw, name = mutants.tables(rng, sorted(load_file(file))), mutants.bytewise(rng), str(file.relative_to(folder))
    while True:
        for source in (raw, values):
            if (m := next(source, None)) is not None: yield name, m


def check_svd(folder: Path, good: tuple, damage: str) -> str:
    assert all(map(same, with_cache(folder, decomposed), good)), "another decomposition"
    assert all(map(same, with_cache(folder, decomposed), good)), "another decomposition the second time"
    return "held"


def convert(source: Path, folder: Path) -> None:
    "In the place of the real conversion, which takes ten seconds."
    from modlab import tiny_model
    for part in tiny_model(): part.save_pretrained(folder)


def default_model() -> tuple:
    from modlab import load_model
    from modlab.model import default
    default._convert, default._gguf_file = convert, lambda: Path("no.gguf")
    return load_model()


def make_model(folder: Path) -> None: with_cache(folder, default_model)


def spoil_model(folder: Path, rng: random.Random) -> Iterator[tuple[str, Mutant]]:
    where = next(p.parent for p in folder.rglob("config.json"))
    files = sorted(str(p.relative_to(folder)) for p in where.iterdir())
    raw, lose = mutants.bytewise(rng), lambda p: p.unlink()
    values = mutants.fields(rng, json.loads((where / "config.json").read_text()), mutants.write_json)
    for name in files: yield name, ("a file too few", name, lose)
    while True:
        for name in files: yield name, next(raw)
        for m in islice(values, 2): yield str((where / "config.json").relative_to(folder)), m


def check_model(folder: Path, good: None, damage: str) -> str:
    "The cache holds what can be made again: it always loads, and always the same."
    from modlab import tiny_model
    model, tok = with_cache(folder, default_model)
    plain, plain_tok = tiny_model()
    assert same([*model.state_dict().values()], [*plain.state_dict().values()]), "other weights"
    ids = torch.arange(12)[None]
    with torch.no_grad(): assert same(model(ids).logits, plain(ids).logits), "other logits"
    asked = [(t("Tea é?").input_ids, t.chat_template) for t in (tok, plain_tok)]
    assert asked[0] == asked[1], "another tokenizer"
    return "held"


FAMILIES = [Family("LoRA file", 300, make_adapter("lora"), spoil_adapter, check_adapter("lora")),
            Family("extracted PiSSA file", 300, make_adapter("extracted PiSSA"), spoil_adapter, check_adapter("extracted PiSSA")),
            Family("PiSSA file", 200, make_adapter("PiSSA"), spoil_adapter, check_adapter("PiSSA")),
            Family("PEFT folder", 400, make_peft, spoil_peft, check_peft),
            Family("pairs", 250, make_pairs, spoil_pairs, check_pairs),
            Family("file of a run", 250, make_run, spoil_run, check_run),
            Family("cached decomposition", 150, make_svd, spoil_svd, check_svd),
            Family("cached model", 150, make_model, spoil_model, check_model)]


# ---- the part of `make faults` ----

def prepared(family: Family, out: Path, n: int, seed: int) -> tuple[object, Iterator[tuple[str, Mutant]]]:
    "A good file of a kind, what is known of it, and `n` mutants to make of it."
    good = out / "good" / family.name.replace(" ", "-")
    shutil.rmtree(good, ignore_errors=True)
    good.mkdir(parents=True)
    made = children.run(lambda: hush() or family.make(good), LIMIT)
    assert made.ok, f"{made.error}\n{made.trace}"
    return made.value, islice(family.spoil(good, random.Random(f"{family.name} {seed}")), n)


def tried(family: Family, known: object, out: Path, name: str, mutant: Mutant) -> dict:
    "One mutant, in a child."
    kind, what, apply = mutant
    folder = out / "spoilt" / family.name.replace(" ", "-")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(out / "good" / folder.name, folder)
    row = dict(file=family.name, damage=kind, what=f"{Path(name).name}: {what}")
    try: apply(folder / name)
    except Exception as e: return row | dict(end="held", note=f"cannot be made: {e}") # such a file cannot be
    def check() -> str:
        hush()
        with quiet(): return family.check(folder, known, kind)
    outcome = children.run(check, LIMIT)
    if outcome.ok: return row | dict(end=outcome.value)
    return row | dict(end="failed", error=outcome.error or outcome.how, trace=outcome.trace[-800:])


def summary(rows: list[dict]) -> list[dict]:
    "One row per kind of file and of damage, then every failure."
    counts = Counter((r["file"], r["damage"], r["end"]) for r in rows)
    kinds = dict.fromkeys((r["file"], r["damage"]) for r in rows)
    ends = [dict(file=f, damage=d, **{e: counts[f, d, e] for e in ("held", "refused", "failed")}) for f, d in sorted(kinds)]
    return ends + [{k: r[k] for k in ("file", "damage", "what", "error")} for r in rows if r["end"] == "failed"]


def run(budget_s: float, full: bool, out: Path, families: list[Family] = FAMILIES, seed: int = 0) -> dict:
    "All families in turn, a few mutants at a time, until the time is over."
    children.warm()
    end, share = time.monotonic() + budget_s, 1.0 if full else 0.25
    plan = {f.name: max(1, round(f.share * share)) for f in families}
    ready, rows = {f.name: (f, *prepared(f, out, plan[f.name], seed)) for f in families}, []
    while ready and time.monotonic() < end:
        for name, (family, known, todo) in list(ready.items()):
            some = list(islice(todo, 5))
            if not some: del ready[name]
            rows += [tried(family, known, out, *item) for item in some]
    ends = Counter(r["end"] for r in rows)
    (out / "damage.json").write_text(json.dumps(rows, indent=1))
    counts = {end: ends[end] for end in ("held", "refused", "failed")}
    return dict(name="damage", about=ABOUT, planned=sum(plan.values()), tried=len(rows), **counts, rows=summary(rows))
