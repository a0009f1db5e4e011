"""The page of names: it speaks of everything that modlab and PEFT's LoRA have, and of nothing that they have not."""
import ast
import importlib
import inspect
import re
from pathlib import Path

import api
import peft
import pytest
from models import build
from peft.tuners.lora import LoraLayer, LoraModel
from torch import nn

import modlab

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "names.md").read_text(encoding="utf-8")
SPAN = re.compile(r"`([^`]+)`")
VARIABLES = {"model", "tok", "samples", "history", "adapter"}


def column(n: int, heading: str | None = None) -> list[str]:
    "The code spans in a column of the page's tables, of those whose first heading is `heading` if it is given."
    spans, first = [], None
    for line in PAGE.splitlines():
        cells = [c.strip() for c in line.strip().strip("|").split("|")] if line.startswith("|") else None
        if cells is None: first = None
        elif first is None: first = cells[0]
        elif heading in (None, first) and n < len(cells): spans += SPAN.findall(cells[n])
    return spans


SOURCES = api.Sources()
OURS = column(1)


@pytest.fixture(scope="module")
def adapters():
    model = build()
    return modlab.ModulatedLoRA(model, r=2), modlab.ModulatedPiSSA(model, r=2, selection_score="s_only", extract=False)


def attribute_exists(owner: str, name: str, adapters) -> bool:
    if owner == "adapter": return any(hasattr(a, name) for a in adapters)
    return hasattr(named(owner), name)


def named(name: str) -> object:
    "What is called so: exported by modlab, or a helper that one of its modules lists; None if there is no such thing."
    if hasattr(modlab, name): return getattr(modlab, name)
    homes = [module for module in SOURCES.trees if name in SOURCES.public(module)]
    return getattr(importlib.import_module(f"modlab.{homes[0]}"), name) if homes else None


def flaws(span: str, adapters) -> list[str]:
    "What a piece of code asks for that modlab does not have: names, attributes, arguments."
    found = []
    for node in ast.walk(ast.parse(span)):
        if isinstance(node, ast.Name) and named(node.id) is None and node.id not in VARIABLES: found.append(node.id)
        if isinstance(node, ast.Attribute) and not attribute_exists(ast.unparse(node.value), node.attr, adapters):
            found.append(ast.unparse(node))
        if isinstance(node, ast.Call): found += [k.arg for k in node.keywords if k.arg not in arguments(node.func, adapters)]
    return found


def arguments(called: ast.expr, adapters) -> set[str]:
    "The names of the arguments that something called takes: `adapter`, a method of one, or a public name."
    owner, _, name = ast.unparse(called).rpartition(".")
    if name == "adapter": found = adapters
    elif owner == "adapter": found = [getattr(a, name) for a in adapters if hasattr(a, name)]
    else: found = [getattr(named(owner), name, lambda: None) if owner else named(name) or (lambda: None)]
    return {p for f in found for p in inspect.signature(f).parameters}


def test_the_page_has_its_tables(): assert len(OURS) > 100 and len(column(0, "PEFT")) > 100


@pytest.mark.parametrize("span", ["ModulatedLorra(model)", "adapter.nothing", "LoRAConfig(rank=3)", "HistoryBake.undo",
                                  "adapter(model, dose=1)", "adapter.save('a', extra=1)"])
def test_what_does_not_exist_is_seen(span, adapters): assert flaws(span, adapters)


@pytest.mark.parametrize("span", sorted(set(OURS)))
def test_what_the_page_says_of_modlab_exists(span, adapters): assert not flaws(span, adapters)


def test_every_public_name_is_on_the_page():
    said = {n.id for span in SPAN.findall(PAGE) if re.match(r"[A-Za-z_(\[]", span) for n in names_in(span)}
    assert not set(api.Sources().names()) - said, "a new public name: say in docs/names.md what it is called elsewhere"


def names_in(span: str) -> list[ast.Name]:
    try: return [n for n in ast.walk(ast.parse(span)) if isinstance(n, ast.Name)]
    except SyntaxError: return []


def public(kind: type) -> set[str]: return {n for n in dir(kind) if not n.startswith("_") and not hasattr(nn.Module, n)}


def test_every_name_of_a_peft_lora_is_on_the_page():
    fields = set(peft.LoraConfig.__dataclass_fields__)
    assert not (fields | public(peft.PeftModel) | public(LoraModel) | public(LoraLayer)) - set(SPAN.findall(PAGE))


def test_what_the_page_says_of_peft_exists():
    known = set(peft.LoraConfig.__dataclass_fields__) | set(peft.__all__)
    known |= {n for kind in (peft.PeftModel, LoraModel, LoraLayer) for n in dir(kind)}
    said = {re.split(r"[=.(]", span)[0] for span in column(0, "PEFT")}
    assert not said - known
