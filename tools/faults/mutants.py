"""How a file is spoilt: its bytes, the values in its header or configuration, its tables. Everything follows from a seed."""
import json
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

Mutant = tuple[str, str, Callable[[Path], None]] # (what kind of damage, what exactly, what does it to a file)
NOTHING = object() # in the place of a value: the field is not there
HANGS = "^(([a-z0-9_.])+)+!$"
VALUES = [NOTHING, None, True, False, 0, -1, 1, 3, 2.5, -0.0, 1e308, 10**30, float("nan"), float("inf"), -float("inf"), "", "x",
          "1", "\ud83d", HANGS, "(", "a" * 5000, [], ["x"], [1], [None], [[]], [HANGS], ["("], [0.0, 1.0], [float("nan"), 1.0],
          {}, {"x": 1}, {"x": None}, {"": {}}, "float16", "int64", "lora", "pissa", "LORA"]


def shown(value: object) -> str: return "nothing" if value is NOTHING else repr(value)[:40]


# ---- bytes, of any file ----

def cut(rng: random.Random) -> Mutant:
    "Only a part is left."
    share = rng.choice([0.0, rng.random(), rng.random() ** 4, 1 - rng.random() ** 4])
    def apply(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(data[:min(int(share * len(data)), len(data) - 1)])
    return "cut off", f"to {share:.3f}", apply


def flip(rng: random.Random) -> Mutant:
    "A bit is another one; half of them near the beginning, where headers are."
    share, bit = rng.random() ** rng.choice([1, 6]), rng.randrange(8)
    def apply(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[min(int(share * len(data)), len(data) - 1)] ^= 1 << bit
        path.write_bytes(data)
    return "a flipped bit", f"{bit} at {share:.4f}", apply


def overwrite(rng: random.Random) -> Mutant:
    "A stretch of bytes is something else: zeros, as a page that was never written, or noise."
    share, n, noise = rng.random() ** rng.choice([1, 4]), rng.choice([1, 2, 8, 512, 4096]), rng.random() < 0.5
    def apply(path: Path) -> None:
        data = bytearray(path.read_bytes())
        start = min(int(share * len(data)), len(data) - 1)
        part = data[start:start + n]
        data[start:start + n] = rng.randbytes(len(part)) if noise else bytes(len(part))
        path.write_bytes(data)
    return "overwritten bytes", f"{n} {'random' if noise else 'zero'} at {share:.4f}", apply


def move(rng: random.Random) -> Mutant:
    "Bytes too many: at the end, or in the middle, so that what follows has moved."
    share, n = rng.choice([1.0, rng.random()]), rng.choice([1, 7, 100])
    def apply(path: Path) -> None:
        data = path.read_bytes()
        at = int(share * len(data))
        path.write_bytes(data[:at] + rng.randbytes(n) + data[at:])
    return "bytes too many", f"{n} at {share:.3f}", apply


def bytewise(rng: random.Random) -> Iterator[Mutant]:
    while True: yield rng.choice([cut, flip, flip, flip, overwrite, move])(rng)


# ---- fields ----

def paths_in(tree: object, depth: int = 3) -> list[tuple]:
    "Where there are values in nested dicts and lists: keys from the outside in. Of many alike the first two."
    if depth == 0: return []
    items = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    kept = items if len(items) <= 30 and depth == 3 else items[:2]
    return [path for key, value in kept for path in [(key,), *((key, *p) for p in paths_in(value, depth - 1))]]


def put(tree: object, path: tuple, value: object) -> object:
    "The tree with another value in one place."
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    key, *rest = path
    if rest: copy[key] = put(copy[key], tuple(rest), value)
    elif value is NOTHING: del copy[key]
    else: copy[key] = value
    return copy


def fields(rng: random.Random, tree: object, write: Callable[[Path, object], None]) -> Iterator[Mutant]:
    "Every field with every value, in random order."
    pairs = [(path, value) for path in paths_in(tree) for value in VALUES]
    rng.shuffle(pairs)
    for path, value in pairs:
        name = ".".join(map(str, path))
        yield "another value", f"{name[:60]} = {shown(value)}", lambda p, path=path, value=value: write(p, put(tree, path, value))


def write_json(path: Path, value: object) -> None: path.write_text(json.dumps(value), encoding="utf-8")


# ---- a safetensors file ----

def header_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as f: return f.metadata() or {}


def write_header(path: Path, header: dict, sealed: str = "crc32") -> None:
    "The same tables under another header, as somebody else's program would write it: without checksums."
    save_file(load_file(path), path, {k: json.dumps(v) for k, v in header.items() if k != sealed})


def write_tables(path: Path, change: Callable[[dict], dict], sealed: str = "crc32") -> None:
    "Other tables under the same header, without checksums."
    save_file(change(load_file(path)), path, {k: v for k, v in header_of(path).items() if k != sealed})


def special(value: float) -> Callable[[torch.Tensor, random.Random], torch.Tensor]:
    def change(t: torch.Tensor, rng: random.Random) -> torch.Tensor:
        t = t.clone() if t.is_floating_point() else t.float()
        t.view(-1)[rng.randrange(t.numel())] = value
        return t
    return change


CHANGES = {
    "NaN": special(float("nan")), "infinite": special(float("inf")), "minus infinite": special(-float("inf")),
    "a row less": lambda t, rng: t[1:].clone(), "no row": lambda t, rng: t[:0].clone(),
    "one axis more": lambda t, rng: t[None].clone(),
    "one axis": lambda t, rng: t.flatten().clone(), "the last axis cut": lambda t, rng: t[..., :-1].clone(),
    "transposed": lambda t, rng: t.T.contiguous(), "a number": lambda t, rng: torch.tensor(1.0),
    "whole numbers": lambda t, rng: t.to(torch.int64), "bytes": lambda t, rng: t.to(torch.uint8),
    "bools": lambda t, rng: t.bool(),
    "float64": lambda t, rng: t.double(), "float16": lambda t, rng: t.half(), "complex": lambda t, rng: t.to(torch.complex64),
    "negative": lambda t, rng: -t.abs() - 1, "huge": lambda t, rng: t.double() * 1e300}


def tables(rng: random.Random, names: list[str]) -> Iterator[Mutant]:
    "One table of another shape, type or value; one too few, too many, or under another name."
    def lose(key: str) -> Callable: return lambda flat: {k: t for k, t in flat.items() if k != key}
    def add(key: str) -> Callable: return lambda flat: flat | {key: torch.ones(3)}
    def rename(key: str, new: str) -> Callable: return lambda flat: {(new if k == key else k): t for k, t in flat.items()}
    def alter(key: str, how: str, seed: int) -> Callable:
        return lambda flat: flat | {key: CHANGES[how](flat[key], random.Random(seed))}
    found = []
    for key in names:
        table, _, layer = key.partition(".")
        found += [("another table", f"{key}: {how}", alter(key, how, rng.random())) for how in CHANGES]
        found += [("a table too few", key, lose(key)), ("a table too many", key, add(f"{table}.{layer}.x")),
                  ("a table too many", key, add(f"extra.{layer}")),
                  ("a table renamed", key, rename(key, f"{table}.{layer[::-1]}")),
                  ("a table renamed", key, rename(key, layer)), ("a table too many", "no name", add(""))]
    rng.shuffle(found)
    for kind, what, change in found: yield kind, what, lambda p, change=change: write_tables(p, change)


def raw_header(rng: random.Random) -> Iterator[Mutant]:
    "What a safetensors file says of where its tables lie."
    def edit(change: Callable[[dict], object]) -> Callable[[Path], None]:
        def apply(path: Path) -> None:
            data = path.read_bytes()
            n, = struct.unpack("<Q", data[:8])
            text = json.dumps(change(json.loads(data[8:8 + n]))).encode()
            path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + n:])
        return apply
    first = lambda h: next(k for k in h if k != "__metadata__")
    changes = {"no metadata": lambda h: {k: v for k, v in h.items() if k != "__metadata__"}, "null": lambda h: None,
               "a list": lambda h: [], "metadata of numbers": lambda h: h | {"__metadata__": {"format": 1}},
               "metadata null": lambda h: h | {"__metadata__": None},
               "nested": lambda h: h | {"__metadata__": h["__metadata__"] | {"note": "[" * 100_000}},
               "not JSON": lambda h: h | {"__metadata__": h["__metadata__"] | {"r": "{]"}}}
    for key, value in [("dtype", "F8"), ("dtype", "I64"), ("shape", [-1]), ("shape", [2**40]), ("shape", None),
                       ("data_offsets", [0, 1]), ("data_offsets", [5, 2]), ("data_offsets", [0, 2**60])]:
        changes[f"{key} = {value}"] = lambda h, key=key, value=value: h | {first(h): h[first(h)] | {key: value}}
    found = list(changes.items())
    rng.shuffle(found)
    for what, change in found: yield "where tables lie", what, edit(change)
