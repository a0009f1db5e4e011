"""The reference pages: what stands behind a parameter in the source is in the page, and so is everything public."""
import ast

import api
import pytest

import modlab

SOURCE = '''
"A module."
__all__ = ["dose", "Kind", "Plain", "LIMIT"]
LIMIT = 3 # how many

def dose(x:"Tensor", # what is *dosed*
         c:float=1.0, scale:int=2, # of both
         *, slow:bool=False, # a keyword
         **more) -> dict: # name -> number
    "Dose `x`, see `Kind`."
    return {} # nothing

def one(a:int): return a # not a note of a

class Hidden:
    label: str # how it is called
    def shared(self, a:int) -> int: return a # comes from below

class Kind(Hidden):
    "A kind."
    def __init__(self, r:int=1): self.r = r # not a note of r
    @property
    def wide(self) -> int:
        "How wide."
        return 1
    def _secret(self): pass

@dataclass(frozen=True, kw_only=True)
class Plain:
    "Settings."
    r: int = 4 # rank
'''


@pytest.fixture
def sources(tmp_path):
    (tmp_path / "demo.py").write_text(SOURCE)
    return api.Sources(tmp_path)


def test_notes_go_to_the_parameter_that_ends_on_their_line(sources):
    e = sources.entry("demo", "dose")
    assert {p.name: p.note for p in e.params} == dict(x="what is *dosed*", c="", scale="of both", slow="a keyword", more="")
    assert [p.default for p in e.params] == ["", "1.0", "2", "False", ""]
    assert e.gives == "name -> number"
    assert api.signature(e) == "(x: Tensor, c: float = 1.0, scale: int = 2, *, slow: bool = False, **more) -> dict"


def test_a_remark_behind_the_body_is_no_note_of_a_parameter():
    tree, notes = ast.parse(SOURCE), api.remarks(SOURCE)
    one = next(f for f in tree.body if getattr(f, "name", "") == "one")
    assert [p.note for p in api.params_of(one, notes)] == [""]


def test_a_class_has_the_methods_of_its_private_bases(sources):
    e = sources.entry("demo", "Kind")
    assert [(m.name, m.kind, m.doc) for m in e.members] == [
        ("label", "attribute", "how it is called"), ("wide", "property", "How wide."), ("shared", "method", "comes from below")]
    assert [(p.name, p.note) for p in e.params] == [("r", "")]


def test_fields_and_constants(sources):
    assert api.signature(sources.entry("demo", "Plain")) == "(*, r: int = 4)"
    assert (sources.entry("demo", "LIMIT").returns, sources.entry("demo", "LIMIT").doc) == ("3", "how many")


def test_two_constants_on_a_line(tmp_path):
    (tmp_path / "demo.py").write_text('__all__ = ["A", "B"]\nA, B = "first", (2, 3) # both\n')
    found = [api.Sources(tmp_path).entry("demo", name) for name in "AB"]
    assert [(e.returns, e.doc) for e in found] == [('"first"', "both"), ("(2, 3)", "both")]


def test_text_is_itself_and_names_are_links(sources):
    text = "\n".join(api.render(sources.entry("demo", "dose"), sources.names()))
    assert r"what is \*dosed\*" in text and "see {py:obj}`Kind <modlab.Kind>`" in text and "**Gives** name -\\> number" in text


def test_a_name_without_a_definition_is_an_error(sources):
    with pytest.raises(ValueError, match="nowhere is in __all__ of modlab.demo"): sources.entry("demo", "nowhere")


def test_everything_public_has_its_place_in_the_reference():
    pages = api.pages()
    index = pages.pop("api/index.md")
    sources = api.Sources()
    assert len(sources.names()) >= 40
    for name, module in sources.names().items():
        assert getattr(modlab, name) is not None and f"<modlab.{name}>" in index
        assert f" {name}" in pages[f"api/{module}.md"]
    for module in sources.trees:
        for name in sources.public(module): assert f" {name}" in pages[f"api/{module}.md"]


def test_the_index_has_what_modlab_exports_and_a_page_all_that_a_module_lists(tmp_path):
    (tmp_path / "chapter").mkdir()
    (tmp_path / "chapter" / "demo.py").write_text(SOURCE)
    (tmp_path / "__init__.py").write_text("from .chapter.demo import dose, Kind")
    sources = api.Sources(tmp_path)
    assert sources.names() == {"dose": "chapter.demo", "Kind": "chapter.demo"}
    page, index = api.page("chapter.demo", "1_chapter/00_demo", sources), api.index({"chapter.demo": "00_demo"}, sources)
    assert "modlab.dose" in index and "LIMIT" not in index and "Plain" not in index
    assert page.index("{py:function} dose") < page.index("## For other modules") < page.index("{py:class} Plain")


def test_a_real_note_and_a_real_default_are_in_the_page():
    page = api.pages()["api/adapters.lora.md"]
    assert "| `alpha` | `float` | `32.0` | the update is scaled by alpha / r |" in page and "alpha: float = 32.0" in page
