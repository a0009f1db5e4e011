"""The reference pages: signatures, docstrings, and the notes that stand behind each parameter, read from the source of modlab."""
import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from lint_notebooks import ROOT, library, module_of

PACKAGE = ROOT / "modlab"
MARKDOWN = re.compile(r"([\\*_<>\[\]$|{}#~])")


@dataclass
class Param:
    "A parameter of a function, or a field of a class: what stands in the source about it."
    name: str
    type: str = ""
    default: str = ""
    note: str = ""
    kind: str = "" # "*", "**", "/" or "kw"


@dataclass
class Entry:
    "A public function, class, method or constant."
    name: str
    kind: str # function, class, method, classmethod, staticmethod, property, attribute or data
    doc: str = ""
    params: list[Param] = field(default_factory=list)
    returns: str = ""
    gives: str = "" # the note behind the return type
    members: list["Entry"] = field(default_factory=list)
    bases: list[str] = field(default_factory=list)


# ---- reading ----

def remarks(source: str) -> dict[int, str]:
    "Line -> the comment at its end."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}


def source_of(node: ast.AST | None) -> str:
    "The source of a node, with double quotes as it is written here; nothing for nothing."
    text = ast.unparse(node) if node else ""
    return text if '"' in text else text.replace("'", '"')


def type_of(node: ast.AST | None) -> str:
    "An annotation as text; a class that is named in a string, because it comes later, without its quotes."
    whole = isinstance(node, ast.Constant) and isinstance(node.value, str)
    text = node.value if whole else source_of(node)
    return re.sub(r'"([A-Z]\w*(?:\.\w+)?|\w+\.[A-Z]\w*)"', r"\1", text)


def params_of(f: ast.FunctionDef, notes: dict[int, str]) -> list[Param]:
    "The parameters in order, `self` and `cls` left out. The note on a line belongs to the last parameter that ends there."
    a, found = f.args, []
    plain = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(plain) - len(a.defaults)) + a.defaults
    rows = [(x, d, "") for x, d in zip(plain, defaults)] + [(a.vararg, None, "*")] * bool(a.vararg)
    rows += [(x, d, "kw") for x, d in zip(a.kwonlyargs, a.kw_defaults)] + [(a.kwarg, None, "**")] * bool(a.kwarg)
    last = {max(x.end_lineno, d.end_lineno if d else 0): x.arg for x, d, _ in rows}
    body, result = f.body[0].lineno, f.returns.end_lineno if f.returns else 0
    for x, d, kind in rows:
        line = max(x.end_lineno, d.end_lineno if d else 0)
        own = last[line] == x.arg and line != result and line < body
        default = source_of(d)
        found.append(Param(x.arg, type_of(x.annotation), default, notes.get(line, "") if own else "", kind))
    return [p for p in found if p.name not in ("self", "cls")]


def function(f: ast.FunctionDef, notes: dict[int, str], method: bool = False) -> Entry:
    "A function or method as an entry."
    decorators = {ast.unparse(d).split(".")[-1] for d in f.decorator_list}
    kind = next((k for k in ("property", "classmethod", "staticmethod") if k in decorators), "method" if method else "function")
    line = f.returns.end_lineno if f.returns else 0
    gives = notes.get(line, "") if line < f.body[0].lineno else ""
    doc = ast.get_docstring(f) or (notes.get(f.end_lineno, "") if f.lineno == f.end_lineno else "")  # a remark behind a one-liner
    return Entry(f.name, kind, doc, params_of(f, notes), type_of(f.returns), gives)


def fields_of(c: ast.ClassDef, notes: dict[int, str]) -> list[Param]:
    "The annotated names of a class body, private and class-level ones left out."
    rows = [n for n in c.body if isinstance(n, ast.AnnAssign) and not n.target.id.startswith("_")]
    return [Param(n.target.id, type_of(n.annotation), source_of(n.value), notes.get(n.end_lineno, ""))
            for n in rows]


def attribute(p: Param) -> Entry:
    "A field of a class that is no dataclass, as an entry of its own."
    return Entry(p.name, "attribute", p.note, returns=re.sub(r"^ClassVar\[(.*)\]$", r"\1", p.type))


def assigned(node: ast.stmt) -> dict[str, ast.AST]: # name -> its value
    "What an assignment defines; `a, b = 1, 2` defines two."
    if not isinstance(node, ast.Assign | ast.AnnAssign): return {}
    target = node.targets[0] if isinstance(node, ast.Assign) else node.target
    if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
        return {ast.unparse(t): v for t, v in zip(target.elts, node.value.elts)}
    return {ast.unparse(target): node.value}


class Sources:
    "All modules of the package, parsed."
    def __init__(self, folder: Path = PACKAGE):
        self.text = {".".join(p.relative_to(folder).with_suffix("").parts): p.read_text(encoding="utf-8")
                     for p in sorted(folder.rglob("*.py")) if not p.stem.startswith("_")}
        self.trees = {name: ast.parse(text) for name, text in self.text.items()}
        self.notes = {name: remarks(text) for name, text in self.text.items()}
        init = folder / "__init__.py"
        self.top = ast.parse(init.read_text(encoding="utf-8")) if init.exists() else None
        self.home = {n.name: (m, n) for m, tree in self.trees.items() for n in tree.body if isinstance(n, ast.ClassDef)}

    def public(self, module: str) -> list[str]:
        "`__all__` of a module, in the order of the source."
        for node in self.trees[module].body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__": return ast.literal_eval(node.value)
        return []

    def names(self) -> dict[str, str]: # public name -> module
        "Everything that modlab exports: what its `__init__.py` imports, or without one what the modules list."
        if self.top is None: return {name: module for module in self.trees for name in self.public(module)}
        rows = [n for n in self.top.body if isinstance(n, ast.ImportFrom) and n.level == 1]
        return {a.name: n.module for n in rows for a in n.names if n.module in self.trees}

    def ancestry(self, name: str) -> Iterator[str]:
        "A class and its bases within the package, nearest first."
        yield name
        for base in self.home[name][1].bases:
            if ast.unparse(base) in self.home: yield from self.ancestry(ast.unparse(base))

    def klass(self, name: str) -> Entry:
        "A class with its fields and its methods, those of private bases counted as its own."
        module, node = self.home[name]
        public, chain = self.names(), list(dict.fromkeys(self.ancestry(name)))
        theirs = {n for base in chain[1:] if base in public for n in self.ancestry(base)}
        own = [n for n in chain if n not in theirs]
        entry = Entry(name, "class", ast.get_docstring(node) or "", bases=[n for n in chain[1:] if n in public])
        plain = any("dataclass" in ast.unparse(d) for d in node.decorator_list)
        inits = [(self.home[n][0], f) for n in own for f in self.home[n][1].body
                 if isinstance(f, ast.FunctionDef) and f.name == "__init__"]
        kw = "kw" if any("kw_only=True" in ast.unparse(d) for d in node.decorator_list) else ""
        if inits: entry.params = params_of(inits[0][1], self.notes[inits[0][0]])
        elif plain: entry.params = [replace(p, kind=kw) for p in self.fields(chain)]
        entry.members = ([] if plain else [attribute(p) for p in self.fields(own) if p.note]) + list(self.methods(own))
        return entry

    def fields(self, classes: list[str]) -> list[Param]:
        "The annotated names of some classes, the farthest first; one that only changes a default keeps the note it had."
        found = {}
        for name in reversed(classes):
            for p in fields_of(self.home[name][1], self.notes[self.home[name][0]]):
                found[p.name] = replace(p, note=p.note or getattr(found.get(p.name), "note", ""))
        return list(found.values())

    def methods(self, classes: list[str]) -> Iterator[Entry]:
        "Public methods, and `__call__`, of some classes; a name once, where it is nearest and says what it does."
        seen = set()
        for name in classes:
            module, node = self.home[name]
            for f in node.body:
                if not isinstance(f, ast.FunctionDef) or f.name in seen or (f.name[0] == "_" and f.name != "__call__"): continue
                seen.add(f.name)
                yield function(f, self.notes[module], method=True)

    def entry(self, module: str, name: str) -> Entry:
        "The entry of one public name."
        for node in self.trees[module].body:
            if isinstance(node, ast.ClassDef) and node.name == name: return self.klass(name)
            if isinstance(node, ast.FunctionDef) and node.name == name: return function(node, self.notes[module])
            if name in assigned(node):
                note = self.notes[module].get(node.end_lineno, "")
                return Entry(name, "data", note, returns=source_of(assigned(node)[name]))
        raise ValueError(f"{name} is in __all__ of modlab.{module}, but nothing of that name is defined there")


# ---- writing ----

def markdown(text: str, names: dict[str, str] | None = None) -> str:
    "Plain text as Markdown: what stands in backticks is code, and a link where it is a public name; the rest means itself."
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(link(p, names or {}) if n % 2 else MARKDOWN.sub(r"\\\1", p) for n, p in enumerate(parts))


def link(code: str, names: dict[str, str]) -> str:
    "A span of code, made a link where it begins with a public name: `heal`, `HistoryBake.set_gate`, `stack(maps)`."
    found = re.fullmatch(r"`(?:modlab\.)?(([A-Za-z_]\w*)(?:\.\w+)*)(\(.*\))?`", code)
    if not found or found[2] not in names: return code
    return f"{{py:obj}}`{code.strip('`')} <modlab.{found[1]}>`"


def signature(e: Entry) -> str:
    "The signature as Python would write it."
    parts, starred = [], False
    for p in e.params:
        if p.kind == "kw" and not starred: parts.append("*"); starred = True
        if p.kind == "*": starred = True
        head = (p.kind if p.kind in ("*", "**") else "") + p.name + (f": {p.type}" if p.type else "")
        parts.append(head + (f" = {p.default}" if p.default else ""))
    return f"({', '.join(parts)})" + (f" -> {e.returns}" if e.returns else "")


def cell(code: str) -> str: return f"`{code}`".replace("|", r"\|") if code else ""


def table(params: list[Param], names: dict[str, str]) -> list[str]:
    "A table with a row a parameter, if any of them has something to say."
    if not any(p.note for p in params): return []
    star = lambda p: p.kind if p.kind in ("*", "**") else ""
    rows = [f"| `{star(p)}{p.name}` | {cell(p.type)} | {cell(p.default)} | {markdown(p.note, names)} |" for p in params]
    return ["| parameter | type | default | |", "|---|---|---|---|", *rows, ""]


def render(e: Entry, names: dict[str, str], owner: str = "") -> list[str]:
    "The Markdown of one entry: a directive of Sphinx's Python domain, and in it the docstring, the table and the members."
    directive = {"classmethod": "method", "staticmethod": "method"}.get(e.kind, e.kind)
    bare = e.kind in ("property", "attribute", "data") or (e.kind == "class" and not e.params)
    fence = ":::" if owner or not e.members else "::::"
    lines = [f"{fence}{{py:{directive}}} {owner}{e.name}{'' if bare else signature(e)}"]
    if e.kind in ("classmethod", "staticmethod"): lines.append(f":{e.kind}:")
    if e.kind in ("property", "attribute") and e.returns: lines.append(f":type: {e.returns}")
    if e.kind == "data": lines.append(f":value: {e.returns if len(e.returns) < 200 else e.returns[:200] + ' …'}")
    lines += ["", markdown(e.doc, names), ""]
    if e.bases: lines += ["Has all that " + ", ".join(f"{{py:obj}}`{b} <modlab.{b}>`" for b in e.bases) + " has.", ""]
    lines += table(e.params, names)
    if e.gives: lines += [f"**Gives** {markdown(e.gives, names)}", ""]
    for m in e.members: lines += render(m, names, f"{e.name}.")
    return [*lines, fence, ""]


def page(module: str, notebook: str, sources: Sources) -> str:
    "The reference page of one module."
    names, doc = sources.names(), ast.get_docstring(sources.trees[module]) or ""
    lines = [f"# {module}", "", f"> {markdown(doc, names)}", "",
             f"Explained and tested in [its notebook](../{notebook}.ipynb).", "", ":::{py:currentmodule} modlab", ":::", ""]
    listed = sources.public(module)
    for name in listed:
        if names.get(name) == module: lines += render(sources.entry(module, name), names)
    inner = [name for name in listed if names.get(name) != module]
    if inner: lines += ["## For other modules", "", f":::{{py:currentmodule}} modlab.{module}", ":::", ""]
    for name in inner: lines += render(sources.entry(module, name), names)
    return "\n".join(lines)


def index(notebooks: dict[str, str], sources: Sources) -> str:
    "The list of everything that modlab exports, a line each."
    names, lines = sources.names(), ["# Reference", "", "Everything here is imported from `modlab` itself. Shape letters: "
             "`b` batch, `s` sequence, `i` layer input, `o` layer output, `r` rank, `k = min(i, o)`, `n` tokens, "
             "`v` vocabulary.", ""]
    for module in notebooks:
        exported = [name for name in sources.public(module) if names.get(name) == module]
        lines += [f"## [{module}]({module}.md)", "", *["| | |", "|---|---|"] * bool(exported)]
        for name in exported:
            doc = sources.entry(module, name).doc.split("\n")[0]
            lines.append(f"| {link(f'`{name}`', names)} | {markdown(doc, names)} |")
        lines.append("")
    toc = ["```{toctree}", ":hidden:", "", *notebooks, "```", ""]
    return "\n".join(lines + toc)


def pages(sources: Sources | None = None, root: Path = ROOT) -> dict[str, str]: # path below the site's source -> text
    "Every reference page, for the notebooks that export something public."
    sources = sources or Sources()
    stems = {module_of(p): f"{p.parent.name}/{p.stem}" for p in library(root)}
    books = {module: stem for module, stem in stems.items() if module in sources.trees and sources.public(module)}
    made = {f"api/{module}.md": page(module, stem, sources) for module, stem in books.items()}
    return {"api/index.md": index(books, sources), **made}
