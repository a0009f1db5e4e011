"""`make demo`: which notebooks it runs, that it tells of its progress, and how it knows what they will take here."""
import json
import time
from pathlib import Path

import demo
import lint_notebooks as lint
import nbformat
import pace
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

COMPANIONS = [p for p in sorted((lint.ROOT / "nbs" / "analysis").glob("*.ipynb")) if p.stem not in lint.NOT_COMPANIONS]
RECORD = {"rates": {"float32": 100.0, "bfloat16": 10.0}, "at_most": ["slow"],
          "seconds": {"plain": {"float32": 60.0}, "half": {"float32": 30.0, "bfloat16": 30.0}, "slow": {"float32": 3600.0}}}


def test_every_companion_notebook_has_an_estimate():
    record = pace.recorded()
    assert {p.stem for p in COMPANIONS} == set(record["seconds"]) >= set(record["at_most"])
    assert set(record["rates"]) == set(pace.DTYPES) and demo.FIRST in record["seconds"]


def test_without_a_name_the_first_one_runs():
    stems = lambda names: [p.stem for p in demo.chosen(names, COMPANIONS)]
    assert stems([]) == ["demo"] and stems(["trait", "demo"]) == ["demo", "trait"] and len(stems(["all"])) == len(COMPANIONS)


@pytest.mark.parametrize("here, words", [
    ({"float32": 100.0, "bfloat16": 10.0}, ("about 60 s", "about 60 s", "at most 60 min")),
    ({"float32": 50.0, "bfloat16": 10.0}, ("about 2 min", "about 2 min", "at most 2.0 h")),
    ({"float32": 100.0, "bfloat16": 0.1}, ("about 60 s", "about 50 min", "at most 60 min"))])
def test_an_estimate_follows_the_rates_of_the_machine(here, words):
    assert tuple(pace.spoken(name, here, RECORD) for name in RECORD["seconds"]) == words
    assert pace.spoken("other", here, RECORD) == "time unknown"


def test_what_a_notebook_took_is_what_will_be_said_next_time(tmp_path):
    path, here = tmp_path / "pace.json", {"float32": 50.0, "bfloat16": 1.0}
    path.write_text(json.dumps(RECORD))
    for name in ("half", "slow", "new"): pace.write(name, 200.0, here, path)
    record = pace.recorded(path)
    assert all(abs(pace.seconds(name, here, record) - 200) < 1 for name in ("half", "slow", "new")) and not record["at_most"]
    assert record["seconds"]["half"]["float32"] == record["seconds"]["half"]["bfloat16"]


def test_rates_are_those_of_products():
    found = pace.rates(rows=16, width=64)
    assert set(found) == {"float32", "bfloat16"} and all(rate > 0 for rate in found.values())


def test_progress_is_told_all_the_time(capsys):
    first, last = [new_markdown_cell("# Title"), new_code_cell("x")], [new_code_cell("y"), new_code_cell("z")]
    nb = new_notebook(cells=[*first, new_markdown_cell("## Training\n\nlong"), *last])
    with demo.heartbeat(nb, beat=0.05) as hooks:
        hooks["on_cell_start"](cell=nb.cells[3], cell_index=3)
        time.sleep(0.4)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 3 and all("cell 2 of 3: Training" in line for line in lines) and demo.BEAT < 10
    time.sleep(0.15)
    assert not capsys.readouterr().out


@pytest.fixture
def project(tmp_path):
    "A project with one companion notebook, in which a cell fails."
    folder = tmp_path / "nbs" / "analysis"
    folder.mkdir(parents=True)
    code = [new_code_cell("print('SURVIVES  a claim: 1 > 0')"), new_code_cell("1 / 0")]
    nbformat.write(new_notebook(cells=[new_markdown_cell("# Why?\n\n> Because."), *code]), folder / "demo.ipynb")
    return tmp_path


def test_a_report_is_written_also_where_a_cell_fails(project, capsys):
    assert demo.main([], project) == 1
    out, err = capsys.readouterr()
    assert "to run, timed for this machine: demo about" in out and "RAISED" in out and "ZeroDivisionError" in err
    page = (project / "report" / "index.html").read_text()
    assert "a claim: 1 &gt; 0" in page and "ZeroDivisionError" in page


def test_an_unknown_name_is_told(project, capsys):
    assert demo.main(["nothing"], project) == 1
    assert "is called nothing; there are: demo" in capsys.readouterr().out and not (project / "report").exists()


def test_nothing_of_the_demo_is_computed_in_bfloat16():
    source = Path(lint.ROOT / "nbs" / "analysis" / "demo.ipynb").read_text(encoding="utf-8")
    assert "bfloat16" not in source and "float16" not in source
