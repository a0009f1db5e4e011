"""Rules that a machine can hold: all that is made from notebooks is in step, modules import downwards, versions are pinned."""
import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import api
import house
import lint_notebooks as lint
import pytest
import readme
import yaml
from jaxtyping import TypeCheckError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parent.parent
BOOK = lint.library()
MODULES = [lint.module_of(p) for p in BOOK] # from the first page of the book to the last
NOT_AT_RUNTIME = ["nbdev", "fastcore", "execnb", "ghapi", "IPython", "ipywidgets", "ipykernel", "jupyter_client", "jupyter_core",
                  "jupyterlab", "nbformat", "nbclient", "nbconvert", "jupytext", "pytest", "beartype", "peft", "bitsandbytes"]
PIN = re.compile(r"([A-Za-z0-9._-]+)==(\S+)( ; .+)?")


def settings() -> dict:
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


# ---- notebooks and package ----

def test_the_project_has_notebooks_at_all():
    places = {(p.parent.name[0], p.stem[:2]) for p in BOOK}
    assert BOOK and len(places) == len(BOOK), "two notebooks of one number in a chapter, or none"


def test_package_is_what_the_notebooks_export(tmp_path):
    for name in ("settings.ini", "pyproject.toml"): shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns(".*"))
    (tmp_path / "modlab").mkdir()
    for init in (ROOT / "modlab").rglob("__init__.py"):
        (tmp_path / init.relative_to(ROOT).parent).mkdir(exist_ok=True)
        shutil.copy(init, tmp_path / init.relative_to(ROOT))
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}  # with it, nbdev_export does nothing
    subprocess.run([Path(sys.executable).parent / "nbdev_export"], cwd=tmp_path, check=True, env=env)
    made, kept = ({p.relative_to(root).as_posix(): p.read_text() for p in (root / "modlab").rglob("*.py")}
                  for root in (tmp_path, ROOT))
    assert set(made) == set(kept), "a module without its notebook, or a notebook never exported"
    assert not [n for n in made if made[n] != kept[n]], "out of step with their notebooks: run nbdev_export"
    assert (tmp_path / "pyproject.toml").read_text() == (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("path", lint.notebooks(), ids=lambda p: p.stem)
def test_notebook_is_lint_free(path):
    assert not [p for p in lint.lint_notebook(path) if not p.startswith("remark")]


@pytest.mark.parametrize("source", [
    "#slow\nx = 1", "#| sloww\nx = 1", "#|slow\nx = 1", "# | slow\nx = 1", "# slow\nx = 1", "#hide", "#| slow, hide\nx = 1",
    "#| slow hide\nx = 1", "x = 1\n#| slow", "# why\n#| slow\nx = 1", "x = 1  #| slow", "#| eval:false\nx", "#export\nx = 1",
    "#| exprot\ndef f(): pass", "#! export\ndef f(): pass", "#| Slow\nx = 1", "#| slow: true\nx", "#| default_exp",
    "from os import *", "#| fig-alt:\nx"])
def test_lint_finds_what_nbdev_would_ignore(source):
    assert lint.lint_source(source)


@pytest.mark.parametrize("source", [
    "x = 1", "#| slow\nx = 1", "#| hide\n#| eval: false\nx = 1", "#| export\n# why\ndef f(a:int=1, # how many\n): pass",
    "%%time\n#| slow\nx", "# the |P| is absolute\nx = 1", "#| fig-alt: a curve\nx", "\n#| slow\nx", "y = a | b  # a | b"])
def test_lint_lets_good_cells_pass(source):
    assert not lint.lint_source(source)


def library(*code, title="# Demo\n\n> One sentence.", last="#| hide\nimport nbdev; nbdev.nbdev_export()"):
    middle = [new_code_cell(c) for c in code]
    return new_notebook(cells=[new_code_cell("#| default_exp demo"), new_markdown_cell(title), *middle, new_code_cell(last)])


def test_lint_knows_the_frame_of_a_library_notebook():
    assert not lint.lint_library(library("x = 1"), "demo")
    assert lint.lint_library(library("x = 1"), "other")
    assert lint.lint_library(library("#| default_exp demo"), "demo")
    assert lint.lint_library(library(title="# Demo"), "demo")
    assert lint.lint_library(library(last="x = 1"), "demo")
    assert lint.lint_library(library("#| export\n" + "x = 1\n" * 41), "demo")
    assert [p[:6] for p in lint.lint_library(library("#| export\n" + "x = 1\n" * 26), "demo")] == ["remark"]


@pytest.mark.parametrize("lines, methods, good", [(10, 7, True), (13, 4, False), (5, 20, False), (3, 30, False)])
def test_a_class_may_be_longer_where_its_methods_are_short(lines, methods, good):
    method = "    def f(self):\n" + "        x = 1\n" * lines
    problems = lint.lint_library(library("#| export\nclass A:\n" + method * methods), "demo")
    assert good == all(p.startswith("remark") for p in problems)


KERNEL = {"kernelspec": {"name": "python3", "display_name": "python3"}}


@pytest.mark.parametrize("own, cell, bad", [(KERNEL, {}, False), ({}, {}, True), (KERNEL, {"tags": []}, True),
                                            (KERNEL | {"jupytext": {}}, {}, True)])
def test_lint_knows_what_a_notebook_may_say_of_itself(own, cell, bad):
    assert lint.has_other_metadata(new_notebook(metadata=own, cells=[new_code_cell("x = 1", metadata=cell)])) == bad


def test_lint_wants_companion_notebooks_executed():
    def companion(outputs): return new_notebook(cells=[new_code_cell("fig, ax = plt.subplots()", outputs=outputs)])
    figure = new_output("display_data", data={"image/png": "AAAA"})
    verdict = new_output("stream", name="stdout", text="SURVIVES  a claim: 1 > 0\n")
    assert not lint.lint_companion(companion([figure, verdict]))
    assert lint.lint_companion(companion([verdict])) and lint.lint_companion(companion([figure]))


def test_readme_is_what_the_index_renders_to():
    text, images = readme.render(ROOT / "nbs" / "index.ipynb")
    assert (ROOT / "README.md").read_text(encoding="utf-8") == text, "run make readme"
    assert images, "the README shows a figure"
    assert {p.relative_to(ROOT).as_posix(): p.read_bytes() for p in (ROOT / readme.IMAGES).iterdir()} == images, "run make readme"


def test_readme_leads_to_pages_that_the_site_has():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = re.findall(rf"\]\({re.escape(readme.site())}/([\w/-]+)\.html\)", text)
    assert "names" in pages and "3_adapters/02_adapter" in pages
    books = {p.relative_to(ROOT / "nbs").with_suffix("").as_posix() for p in lint.notebooks()}
    written = books | {"names", "dependencies"} | {p.removesuffix(".md") for p in api.pages()}
    assert not {p for p in pages if p not in written}
    assert not [m for m in re.findall(r"\]\((?!\w+:|#)([^)\s]+)\)", text) if not (ROOT / m).exists()]


@pytest.mark.parametrize("text", ["see /root/.cache/x", "in /tmp/abc", "(/srv/a/b.py:3)", "'/home/me'", r"C:\Users"])
def test_absolute_paths_are_seen(text):
    assert lint.ABSOLUTE.search(text)


@pytest.mark.parametrize("text", ["https://a.org/b/c/d", "nbs/analysis/x.ipynb", "and/or/both", "</td></tr>", "alpha / r",
                                  "~/a/b/c", "../a/b/c/d"])
def test_other_slashes_are_not(text):
    assert not lint.ABSOLUTE.search(text)


def test_no_absolute_local_path_in_markdown():
    texts = {p.name: p.read_text(encoding="utf-8") for p in ROOT.glob("*.md")}
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md"} <= set(texts)
    assert not {n: m[0] for n, t in texts.items() for m in [lint.ABSOLUTE.search(t)] if m}


# ---- modules ----

# The stated exception: a method of one line imports a later chapter when it is called.
HANDED_OVER = {"learn.trainer": {"show.plots"}}


def imported(source: str, chapter: str = "maths") -> set[str]:
    "The modules of modlab that a source in a chapter imports, wherever the import stands: `maths.svd`; 'modlab' for the package."
    paths = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): paths |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = {0: "", 1: f"modlab.{chapter}", 2: "modlab"}[node.level]
            base = ".".join(filter(None, [start, node.module or ""]))
            whole = base == "modlab" or base.count(".") == 1 and base.startswith("modlab.") and base != "modlab.data"
            paths |= {f"{base}.{a.name}" for a in node.names} if whole else {base}
    return {p.removeprefix("modlab.") for p in paths if p.split(".")[0] == "modlab"}


@pytest.mark.parametrize("source", [
    "from modlab.maths.svd import f", "from .svd import f", "from . import svd", "from ..maths import svd",
    "import modlab.maths.svd as m", "def g():\n    from ..maths.svd import f"])
def test_imports_are_seen(source):
    assert imported(source) == {"maths.svd"} and imported("import torch, modlab") == {"modlab"}
    assert not imported("from torch import nn")


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_only_from_earlier_pages(module):
    chapter, name = module.split(".")
    seen = imported((ROOT / "modlab" / chapter / f"{name}.py").read_text(encoding="utf-8"), chapter)
    assert not {m for m in seen if m not in MODULES[:MODULES.index(module)]} - HANDED_OVER.get(module, set())


def test_modlab_imports_with_nothing_but_its_requirements():
    code = (f"import sys\nfor name in {NOT_AT_RUNTIME}: sys.modules[name] = None\n"
            f"import importlib, modlab\nfor m in {MODULES}: importlib.import_module('modlab.' + m)\nprint('imported')")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "imported", done.stderr[-2000:]


@pytest.mark.parametrize("module", MODULES)
def test_every_module_lists_names_that_it_has(module):
    part = importlib.import_module(f"modlab.{module}")
    assert part.__all__ and not [n for n in part.__all__ if not hasattr(part, n)]


def test_types_are_checked_under_test():
    from modlab.model.loading import tiny_model
    with pytest.raises(TypeCheckError): tiny_model(seed="0")


# ---- versions ----

def test_constraints_pin_every_line():
    lines = [x.strip() for x in (ROOT / "constraints.txt").read_text().splitlines()]
    assert not [x for x in lines if x and not x.startswith("#") and not PIN.fullmatch(x)]


def test_constraints_pin_every_requirement():
    pinned = {m[1].lower().replace("_", "-") for m in map(PIN.match, (ROOT / "constraints.txt").read_text().splitlines()) if m}
    wanted = [w for key, value in settings().items() if key.endswith("requirements") for w in value.split()]
    assert {"torch", "nbdev", "sphinx"} <= {re.split(r"[<>=!~]", w)[0] for w in wanted}
    assert not {re.split(r"[<>=!~]", w)[0].lower().replace("_", "-") for w in wanted} - pinned


def test_changelog_and_package_know_the_version():
    version = settings()["version"]
    assert re.search(rf"^## \[{re.escape(version)}\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert importlib.import_module("modlab").__version__ == version


def test_ci_runs_on_every_python_that_modlab_promises():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    job = workflow["jobs"]["run"]
    assert {"push", "pull_request"} <= workflow[True].keys()  # YAML takes `on` for a truth
    assert job["strategy"]["matrix"]["python"] == [f"3.{n}" for n in range(int(settings()["min_python"][2:]), 14)]
    assert job["steps"][-1] == {"run": ".ci/run"} and os.access(ROOT / ".ci" / "run", os.X_OK)


# ---- what an import costs ----

LATER = ["matplotlib", "seaborn", "gguf", "peft", "bitsandbytes", "ipywidgets", "IPython", "dask", "distributed", "scipy"]
# What torch and transformers load by themselves, for the parts of them that modlab stands on.
BASE = "import torch, transformers.modeling_utils, transformers.modeling_layers, transformers.generation.streamers\n"


def test_importing_modlab_loads_what_it_needs_at_once_and_no_more():
    code = (f"{BASE}import sys\nbefore = set(sys.modules)\nimport modlab\n"
            f"print([m for m in {LATER} if m in {{*sys.modules}} - before])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr[-2000:]


def test_importing_modlab_takes_less_than_two_seconds_of_the_processor_beyond_torch_and_transformers():
    code = BASE + "import time\nstart = time.process_time()\nimport modlab\nprint(time.process_time() - start)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 2


def test_what_modlab_imports_later_is_there_all_the_same():
    import modlab
    stated = house.House().exported()
    assert modlab._LATER and {n: f".{stated[n]}" for n in modlab._LATER} == modlab._LATER
    assert {n for n, module in stated.items() if module.startswith("show.")} == set(modlab._LATER)
    assert set(stated) <= set(dir(modlab)) & set(modlab.__all__) and modlab.explore is modlab.show.explore.explore
    with pytest.raises(AttributeError, match="plot_nothing"): getattr(modlab, "plot_" + "nothing")
