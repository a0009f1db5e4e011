"""Committed outputs are those that the cells give: what the comparison finds, what it lets pass, and what is run at all."""
import json

import fresh
import nbformat
import pytest
import test_notebooks as runner
from nbformat.v4 import new_code_cell, new_notebook, new_output


def stream(text, name="stdout"): return new_output("stream", name=name, text=text)


def value(plain, html=None):
    more = {"text/html": html} if html else {}
    return new_output("execute_result", data={"text/plain": plain} | more)


TABLE = "<table border='1'><tr><th>role</th><th>kl</th></tr><tr><td>q_proj</td><td>{}</td></tr></table>"


@pytest.mark.parametrize("old, new", [
    ("kl 0.125 nats", "kl 0.135 nats"), ("84 layers", "85 layers"), ("rank 16", "rank 16.5"),
    ("FAILS  a claim", "SURVIVES  a claim"),
    ("a b c", "a b"), ("a b", "a b c"), ("x = 1", "x = -1"), ("1, 2", "1, 3"), ("nan", "0.0"), ("True", "False"),
    ("c must be finite, got nan", "c must be finite, got inf"), ("1e-3", "3e-3"),
    ("['a', 'b']", "['b', 'a']"), ("0.1408", "0.1597"),
    ("step_1", "step_2"), ("it is 12", "it is 12 nats"), ("1.0e+05", "1.2e+05"), ("5,376 parameters", "5,377 parameters")])
def test_a_changed_word_or_number_is_found(old, new):
    for a, b in ((old, new), (new, old)):
        found = fresh.differences([stream(a)], [stream(b)])
        assert len(found) == 1 and a in found[0] and b in found[0]
        assert fresh.differences([value(a)], [value(b)])
        assert fresh.differences([value("t", f"<b>{a}</b>")], [value("t", f"<b>{b}</b>")])


@pytest.mark.parametrize("old, new", [
    ("12 s", "340 s"), ("3.2 ms per token", "41 ms per token"), ("93 MB", "1.2 GB"), ("took 0.8 seconds", "took 12.25 seconds"),
    ("1.5e-08", "-3.2e-07"), ("0.0", "1e-7"), ("0.51230", "0.51241"), ("tensor(0.1408)", "tensor(0.1409)"), ("0.5", "0.6"),
    ("10.860107421875", "10.860106468200684"), ("a   b\n  c", "a b c"), ("<f at 0x7f3a91c2d0>", "<f at 0x7fffa1b2c3>"),
    ("in /tmp/ab12/x.py", "in /var/folders/q/x.py"), ("round 8ae540445065 is", "round d70ceb1fa951 is"),
    ("name   layer \\\n----", "name layer \\\n--------"), ("\x1b[31mred\x1b[0m", "red"), ("1.00e+05 x", "1.001e+05 x")])
def test_what_differs_between_machines_is_not(old, new):
    assert not fresh.differences([stream(old)], [stream(new)]) and not fresh.differences([value(old)], [value(new)])


def test_one_unit_of_the_last_digit_shown_is_rounding():
    assert fresh.same_text("0.12", "0.13") and not fresh.same_text("0.12", "0.14") and not fresh.same_text("12", "13")


def test_a_missing_and_a_new_output_are_found():
    shown, printed = value("0.5"), stream("a line\n")
    for old, new in (([], [shown]), ([shown], []), ([], [printed]), ([printed], []), ([printed], [printed, shown]),
                     ([shown, shown], [shown]), ([value("t")], [value("t", "<b>t</b>")])):
        assert len(fresh.differences(old, new)) == 1
    assert "no output" in fresh.differences([], [shown])[0]
    assert not fresh.differences([printed, shown], [stream("a "), stream("line\n"), shown])
    assert not fresh.differences([], [stream("\n")])


def test_tables_are_compared_by_their_words_and_numbers():
    old = value("t", TABLE.format("0.1250"))
    assert not fresh.differences([old], [value("t", TABLE.replace("border='1'", "class='x'").format("0.1251"))])
    assert fresh.differences([old], [value("t", TABLE.format("0.1350"))])
    assert fresh.differences([old], [value("t", TABLE.replace("q_proj", "k_proj").format("0.1250"))])
    assert "<td>" not in fresh.differences([old], [value("t", TABLE.format("9.0"))])[0]


def test_warnings_and_the_order_of_a_figure_are_no_difference():
    figure = new_output("display_data", data={"text/plain": "<Figure size 640x480 with 1 Axes>", "image/png": "A"})
    result = value("x")
    assert not fresh.differences([result, figure], [figure, result])
    assert not fresh.differences([], [stream("a warning", "stderr")])
    assert fresh.differences([result, figure], [result])


def notebook(tmp_path, name, *cells):
    "A notebook below a root of its own; cells as (source, outputs)."
    path = tmp_path / "nbs" / f"{name}.ipynb"
    path.parent.mkdir(exist_ok=True)
    nbformat.write(new_notebook(cells=[new_code_cell(source, outputs=list(outputs)) for source, outputs in cells]), path)
    return path


@pytest.fixture
def light(monkeypatch):
    "Nothing is imported first; outputs are compared on every Python."
    monkeypatch.setattr(runner, "HEAVY", ())
    monkeypatch.setattr(runner, "COMPARES", True)


def test_notebooks_are_run_and_compared(tmp_path, light, capsys):
    good = notebook(tmp_path, "good", ("x = 2", []), ("print(x)\nx + 1", [stream("2\n"), value("3")]), ("x; # why", []),
                    ("#| slow\n1 / 0", []), ("#| eval: false\n1 / 0", []), ("#| notest\nprint(1)", [stream("of old")]),
                    ("import os; os.path.basename(os.getcwd())", [value("'nbs'")]))
    stale = notebook(tmp_path, "stale", ("y = 3", []), ("#| export\ny + 1", [value("5")]))
    broken = notebook(tmp_path, "broken", ("z = 1 / 0", []), ("print('never')", []))
    found = runner.run_all([good, stale, broken], tmp_path)
    assert found[good] == []
    assert len(found[stale]) == 1 and "cell 1, 'y + 1', shows another output" in found[stale][0]
    assert "committed: (text/plain) 5" in found[stale][0] and "now: (text/plain) 4" in found[stale][0]
    assert len(found[broken]) == 1 and "cell 0 fails" in found[broken][0] and "ZeroDivisionError" in found[broken][0]
    assert "nbs/stale.ipynb: cell 1" in capsys.readouterr().out


def test_what_has_passed_is_not_run_again_until_something_changes(tmp_path, light, monkeypatch):
    path, ran = notebook(tmp_path, "a", ("1 + 1", [value("2")])), []
    (tmp_path / ".venv").mkdir()
    (tmp_path / "modlab").mkdir()
    monkeypatch.setattr(runner, "run_all", lambda paths, root: ran.extend(paths) or {p: [] for p in paths})
    def runs(*arguments):
        ran.clear()
        assert runner.main(list(arguments), tmp_path) == 0
        return len(ran)
    assert [runs(), runs(), runs("--again")] == [1, 0, 1]
    (tmp_path / "modlab" / "m.py").write_text("x = 1")
    assert [runs(), runs()] == [1, 0]
    notebook(tmp_path, "a", ("1 + 2", [value("3")]))
    assert [runs(), runs()] == [1, 0]
    monkeypatch.setenv("MODLAB_TEST_DEVICE", "cuda")
    assert runs() == 1
    (tmp_path / runner.PASSED).write_text('{"nbs/a.ip')
    assert [runs(), len(json.loads((tmp_path / runner.PASSED).read_text()))] == [1, 1]
    monkeypatch.setattr(runner, "run_all", lambda paths, root: {p: ["a problem"] for p in paths})
    path.write_text(path.read_text() + " ")
    assert [runner.main([], tmp_path), runner.main([], tmp_path)] == [1, 1]


def test_where_older_versions_are_pinned_cells_are_run_alone(tmp_path, light, monkeypatch):
    monkeypatch.setattr(runner, "COMPARES", False)
    stale, broken = notebook(tmp_path, "stale", ("4", [value("5")])), notebook(tmp_path, "broken", ("1 / 0", []))
    found = runner.run_all([stale, broken], tmp_path)
    assert found[stale] == [] and "ZeroDivisionError" in found[broken][0]


def test_a_process_that_dies_is_a_failure(tmp_path, light):
    good, killed = notebook(tmp_path, "good", ("1", [value("1")])), notebook(tmp_path, "killed", ("import os; os._exit(1)", []))
    found = runner.run_all([good, killed], tmp_path)
    assert found[good] == [] and "did not end" in found[killed][0]


def test_no_notebook_at_all_is_no_success(tmp_path): assert runner.main([], tmp_path) == 1
