"""Notebooks in git, as `make hooks` sets it up: two people's cells merge into a notebook, and a diff is a diff of source."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output
from notebook_source import source

ROOT = Path(__file__).resolve().parent.parent
AS = {f"GIT_{who}_{what}": "a@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
ALONE = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}


def git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, env={**os.environ, **AS, **ALONE})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def notebook(first: str = "x = 1", last: str = "y = 2", count: int = 1):
    cells = [new_code_cell(source, id=f"cell-{n}", execution_count=count, outputs=[new_output("stream", text=f"{source}\n")])
             for n, source in enumerate((first, "z = 3", last))]
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel})


@pytest.fixture
def repository(tmp_path):
    "One notebook in git, with the project's own attributes and configuration."
    for name in (".gitattributes", ".gitconfig", "settings.ini"): shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    (tmp_path / ".gitignore").write_text(".venv\ntools\n")
    nbformat.write(notebook(), tmp_path / "a.ipynb")
    git(tmp_path, "init", "-q", "-b", "main")
    git(tmp_path, "config", "--local", "include.path", "../.gitconfig")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "one")
    return tmp_path


def commit(repository: Path, **change) -> None:
    nbformat.write(notebook(**change), repository / "a.ipynb")
    git(repository, "commit", "-qam", "a change")


def test_two_branches_merge_into_a_notebook_though_both_executed_it(repository):
    git(repository, "checkout", "-qb", "other")
    commit(repository, first="x = 10", count=7)
    git(repository, "checkout", "-q", "main")
    commit(repository, last="y = 20", count=9)
    git(repository, "merge", "-q", "--no-edit", "other")
    merged = nbformat.read(repository / "a.ipynb", as_version=4)
    assert [c.source for c in merged.cells] == ["x = 10", "z = 3", "y = 20"]


def test_what_is_no_notebook_is_compared_as_it_is():
    assert source('<<<<<<< ours\n{}') == '<<<<<<< ours\n{}' and source("[1]") == "[1]"
    assert source(nbformat.writes(notebook())).splitlines()[:2] == ["# %%", "x = 1"]


def test_a_diff_shows_source_and_nothing_of_the_outputs(repository):
    nbformat.write(notebook(first="x = 10", count=7), repository / "a.ipynb")
    changed = [x for x in git(repository, "diff").splitlines() if x[:1] in "+-" and x[:3] not in ("+++", "---")]
    assert changed == ["-x = 1", "+x = 10"]
    nbformat.write(notebook(count=8), repository / "a.ipynb")
    assert not [x for x in git(repository, "diff").splitlines() if x[:1] in "+-" and x[:3] not in ("+++", "---")]
