"""The page of dependencies lists what settings.ini asks for, and everything that comes along is pinned."""
import re
from collections import Counter
from pathlib import Path

import dependencies
import pytest
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
ROWS = {canonicalize_name(m[1]): m[0] for m in dependencies.ROW.finditer(PAGE)}


def test_each_requirement_is_listed_exactly_once():
    listed = Counter(canonicalize_name(m[1]) for m in dependencies.ROW.finditer(PAGE))
    assert listed == Counter(dependencies.requirements().keys())


@pytest.mark.parametrize("name", sorted(ROWS))
def test_a_row_says_what_for_what_else_and_how_big(name):
    what, instead, alone, whole = [c.strip() for c in ROWS[name].split("|")[2:-1]]
    assert what and instead and 0 < float(alone) <= float(whole)


def test_every_sum_is_there():
    assert len(re.findall(r"^<!-- \w+ --> Together, .*: \d+ packages, \d+ MB\.$", PAGE, re.M)) == len(dependencies.KINDS)


def test_sizes_are_read_from_the_files():
    assert dependencies.size("torch") > 100 * dependencies.size("tqdm") > 0
    assert {"numpy", "pandas", "seaborn", "python-dateutil"} <= dependencies.closure("seaborn")
    own = dependencies.megabytes(dependencies.size("packaging"))
    assert dependencies.table("| `packaging` | versions | none | | |") == f"| `packaging` | versions | none | {own} | {own} |"


def test_a_package_that_is_not_there_is_named():
    with pytest.raises(SystemExit, match="no-such-thing is not installed here; run: make setup docs"):
        dependencies.size("no-such-thing")


@pytest.mark.parametrize("kind", ["requirements", "dev_requirements"])
def test_what_comes_along_is_pinned_too(kind):
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(re.split(r"==", x)[0]) for x in pins if "==" in x}
    asked = [name for name, key in dependencies.requirements().items() if key == kind]
    assert not set().union(*map(dependencies.closure, asked)) - pinned
