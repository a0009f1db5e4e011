"""The proof in its short form: the machinery of `make faults`, and each part of it for a few seconds."""
import os
import signal
import time

import pytest
import torch
from faults import children, lifecycle, memory, page

from modlab.adapters.hooks import as_dose


def test_a_child_says_how_it_ended():
    assert children.run(lambda: 6 * 7, 20).value == 42
    raised = children.run(lambda: 1 // 0, 20)
    assert (raised.how, raised.error) == ("raised", "ZeroDivisionError: integer division or modulo by zero") and not raised.ok
    assert children.run(lambda: os._exit(3), 20).error == "exit status 3"
    late = children.run(lambda: time.sleep(60), 0.3)
    assert late.how == "timed out" and late.seconds < 10
    child = children.start(lambda: time.sleep(60))
    child.kill(signal.SIGKILL)
    assert child.wait(10).error == "exit status -9"


def test_children_run_beside_each_other_and_stop_at_the_deadline():
    tasks = [(f"n{n}", lambda n=n: time.sleep(0.1 * (n == 0)) or n) for n in range(3)]
    outcomes = list(children.run_all(tasks, 20))
    assert sorted(o.value for o in outcomes) == [0, 1, 2]
    assert not list(children.run_all(tasks, 20, deadline=time.monotonic()))
    both = [("long", lambda: time.sleep(60)), ("short", lambda: 1)]
    assert [(o.name, o.how) for o in children.run_all(both, 1)] == [("short", "returned"), ("long", "timed out")]


def test_the_page_has_a_section_per_part(tmp_path):
    result = dict(name="memory", planned=2, tried=2, held=1, failed=1, seconds=60.0, rows=[dict(what="a|b", held=True, mib=1.25)])
    (tmp_path / "docs").mkdir()
    found = page.stamped([result], full=True)
    facts = {k: v for k, v in found.items() if k != "parts"}
    (tmp_path / page.FIGURES).write_text(page.json.dumps(dict(parts=[result | facts])))
    text = page.text(tmp_path)
    assert "## Memory" in text and "| a\\|b | yes | 1.25 |" in text and "| Memory | 2 | 2 | 1 | 0 | 1 |" in text


@pytest.mark.parametrize("arch, kind", [("llama", "pissa-extracted"), ("gpt2", "lora")])
def test_a_hundred_and_fifty_steps_of_a_lifecycle(arch, kind, one_thread):
    found = lifecycle.steps(arch, kind, 150, 60.0, number=1)
    assert not found["trace"], found["trace"]
    assert found["forwards"] > 50 and found["refused"] > 0


def test_the_oracle_sees_a_wrong_dose(monkeypatch, one_thread):
    "A machine that cannot fail proves nothing."
    from modlab.adapters import hooks
    monkeypatch.setattr(hooks, "as_dose", lambda c: as_dose(c) * 1.01)
    assert "off" in lifecycle.steps("llama", "lora", 200, 60.0)["trace"]


@pytest.mark.parametrize("what", memory.WORK)
def test_memory_does_not_grow(what, one_thread):
    found = memory.repeated(memory.WORK[what], 12, 20.0)
    assert found["done"] == 12 and found["tensors"] <= 0 and found["mib"] < memory.SLACK_MIB


def test_a_leak_is_seen(one_thread):
    kept = []
    assert memory.repeated(lambda model, tok, a, pairs: kept.append(torch.ones(3)), 12, 20.0)["tensors"] > 5
