"""A grid runs what is missing: after a failure, an interruption or an edit, beside another process, on a cluster."""
import importlib.util
import json
import logging
import math
import multiprocessing
import os
import re
import signal
import threading
import time
from functools import partial
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from rights import unprivileged

from modlab import grid


def noted(n, log):
    "Leaves a line at each call, so that a test can count them."
    with open(log, "a") as file: file.write(f"{n}\n")
    time.sleep(0.05)
    return dict(square=n * n)


def lines(log): return sorted(int(x) for x in log.read_text().split())


def settings(log, n=5): return [dict(n=k, log=str(log)) for k in range(n)]


def files(folder): return sorted(p.suffix or p.name for p in folder.iterdir())


def module(path, text):
    "A module from a file, as it would be after an edit and a fresh import."
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


# ---- what is run again ----

def test_each_run_is_done_once_and_the_table_is_that_of_the_files(tmp_path):
    log, folder = tmp_path / "log", tmp_path / "a" / "b"
    first = grid(noted, settings(log, 3), folder)
    more = grid(noted, settings(log, 5)[::-1], str(folder))
    assert lines(log) == [0, 1, 2, 3, 4] and files(folder) == [".json"] * 5
    assert first.columns.tolist() == ["n", "log", "square", "error"] and more[::-1][:3].reset_index(drop=True).equals(first)


def test_a_setting_that_is_there_twice_is_run_once(tmp_path):
    log = tmp_path / "log"
    assert grid(noted, settings(log, 2) * 2, tmp_path / "runs").square.tolist() == [0, 1, 0, 1] and lines(log) == [0, 1]


def test_an_edited_or_renamed_function_starts_anew(tmp_path):
    text = "def f(x):\n    return dict(y=x + 1)\n"
    edits = [text, text.replace("+ 1", "+ 2"), text.replace("def f", "def g"), "import math\n\n\n" + text]
    values = []
    for n, edit in enumerate(edits):
        made = module(tmp_path / f"edit{n}.py", edit)
        values.append(grid(getattr(made, "g" if "def g" in edit else "f"), [dict(x=1)], tmp_path / "runs").y[0])
    assert values == [2, 3, 2, 2] and len(files(tmp_path / "runs")) == 3  # where a function stands does not count


@pytest.mark.parametrize("one, other, alike", [
    (dict(a=1, b=2), dict(b=2, a=1), True), (dict(a=1), dict(a=1.0), False), (dict(a=1), dict(a=True), False),
    (dict(a=1), dict(a="1"), False), (dict(a=None), dict(a="None"), False), (dict(a=(1, 2)), dict(a=[1, 2]), True),
    (dict(a=np.float64(0.1)), dict(a=0.1), True), (dict(a=np.int64(3)), dict(a=3), True), (dict(a=Path("x")), dict(a="x"), True),
    (dict(a=torch.float16), dict(a=torch.bfloat16), False), (dict(a=0.1), dict(a=math.nextafter(0.1, 1)), False),
    (dict(a=torch.tensor([1.0])), dict(a=torch.tensor([2.0])), False), (dict(a=dict(x=1, y=2)), dict(a=dict(y=2, x=1)), True)])
def test_settings_are_told_apart(tmp_path, one, other, alike):
    def f(a, b=0): return dict(seen=1)
    grid(f, [one, other], tmp_path)
    assert len(files(tmp_path)) == (1 if alike else 2)


# ---- what comes back ----

def test_values_come_back_as_they_went(tmp_path):
    values = [0.1 + 0.2, math.nan, -math.inf, 2**60, "naïve €", None, True, [1, [2]], np.float32(0.1), torch.tensor(3)]
    def f(n): return dict(value=values[n])
    seen = grid(f, [dict(n=n) for n in range(len(values))], tmp_path).value.tolist()
    wanted = [*values[:8], float(np.float32(0.1)), 3]
    assert all(a == b or (a != a and b != b) for a, b in zip(seen, wanted)) and len(seen) == len(wanted)


def test_tables_keep_their_rows_and_a_named_index(tmp_path):
    def f(seed):
        if seed == 0: return pd.DataFrame(dict(c=[0.0, 1.0], seed=7))
        return pd.Series({"p95": 1.0, "max": 2.0}, name="kl").rename_axis("stat").to_frame()
    table = grid(f, [dict(seed=0), dict(seed=1)], tmp_path)
    assert len(table) == 4 and table.stat.tolist()[2:] == ["p95", "max"] and table.c.tolist()[:2] == [0.0, 1.0]
    assert table.seed.tolist() == [7, 7, 1, 1]  # a result's own column stands


@pytest.mark.parametrize("result, said", [
    (3, "returned a int"), (dict(a=object()), "a object cannot be kept"), (dict(error=0.1), "'error' is for failed runs"),
    (pd.DataFrame({("a", "b"): [1]}), "keys must be str")])
def test_a_result_that_cannot_be_kept_is_a_failed_run(tmp_path, result, said, caplog):
    def f(n): return result
    table = grid(f, [dict(n=1)], tmp_path)
    assert said in table.error[0] and table.n.tolist() == [1] and not list(tmp_path.glob("*.json"))


# ---- failures, interruptions ----

def test_a_failed_run_is_told_and_tried_again(tmp_path, caplog):
    log, marker = tmp_path / "log", tmp_path / "marker"
    def f(n, log):
        noted(n, log)
        if n == 1 and not marker.exists(): raise KeyError("not today")
        return dict(n2=n)
    caplog.set_level(logging.WARNING, "modlab")
    first = grid(f, settings(log, 3), tmp_path / "runs")
    marker.touch()
    second = grid(f, settings(log, 3), tmp_path / "runs")
    assert first.error.tolist()[1] == "KeyError: 'not today'" and first.error.notna().sum() == 1 and second.error.isna().all()
    assert lines(log) == [0, 1, 1, 2] and "Traceback" in caplog.text and "not today" in caplog.text


@pytest.fixture
def ctrl_c():
    "An interruption is a KeyboardInterrupt, also where the one who started pytest had it ignored."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted_at(n, log, at):
    noted(n, log)
    if n == at: signal.raise_signal(signal.SIGINT)
    return dict(n2=n)


def test_an_interruption_keeps_what_is_done(tmp_path, ctrl_c):
    log, runs = tmp_path / "log", [dict(n=n, log=str(tmp_path / "log"), at=3) for n in range(5)]
    with pytest.raises(KeyboardInterrupt): grid(interrupted_at, runs, tmp_path / "runs")
    assert len(list((tmp_path / "runs").glob("*.json"))) == 3
    with pytest.raises(KeyboardInterrupt): grid(interrupted_at, runs, tmp_path / "runs")
    assert lines(log) == [0, 1, 2, 3, 3] and not list((tmp_path / "runs").glob("*.part"))


def test_processes_give_the_table_that_one_gives(tmp_path):
    log = tmp_path / "log"
    factor = 3
    def inside(n, log): return noted(n, log) | dict(times=n * factor, process=os.getpid())
    alone, spread = (grid(inside, settings(log, 4), tmp_path / str(n), n_jobs=n) for n in (1, 2))
    assert os.getpid() not in spread.process.tolist() and alone.process.tolist() == [os.getpid()] * 4
    assert alone.drop(columns="process").equals(spread.drop(columns="process")) and lines(log) == [0, 0, 1, 1, 2, 2, 3, 3]


def slow_square(n, log):
    time.sleep(0.8)
    return noted(n, log)


def test_an_interruption_reaches_the_workers(tmp_path, ctrl_c):
    log = tmp_path / "log"
    grid(noted, settings(tmp_path / "warm", 2), tmp_path / "warm runs", n_jobs=2)  # the workers are up
    threading.Timer(2.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt): grid(slow_square, settings(log, 40), tmp_path / "runs", n_jobs=2)
    kept = len(list((tmp_path / "runs").glob("*.json")))
    assert 1 <= kept <= 8
    few = [s for s in settings(log, 40) if s["n"] < 2]
    assert grid(slow_square, few, tmp_path / "runs").square.tolist() == [0, 1]


def ends_its_process(n, here):
    if n == 2 and os.getpid() != here: os._exit(1)
    return dict(n2=n)


def test_a_worker_that_dies_is_told_and_what_is_finished_is_kept(tmp_path):
    runs = [dict(n=n, here=os.getpid()) for n in range(3)]
    with pytest.raises(RuntimeError, match="worker process"): grid(ends_its_process, runs, tmp_path, n_jobs=2)
    assert grid(ends_its_process, runs, tmp_path).n2.tolist() == [0, 1, 2]


# ---- several processes ----

def test_two_processes_share_a_folder(tmp_path):
    log, context = tmp_path / "log", multiprocessing.get_context("fork")
    workers = [context.Process(target=grid, args=(noted, settings(log, 8), tmp_path / "runs")) for _ in range(2)]
    for worker in workers: worker.start()
    for worker in workers: worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0] and lines(log) == list(range(8))
    assert files(tmp_path / "runs") == [".json"] * 8


def kills_its_worker(n, marker):
    if n == 3 and not os.path.exists(marker):
        open(marker, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return dict(square=n * n, process=os.getpid())


def test_a_cluster_that_loses_a_worker_finishes(tmp_path):
    from dask.distributed import Client, LocalCluster
    quiet = dict(dashboard_address=None, silence_logs=logging.CRITICAL, local_directory=str(tmp_path))
    with LocalCluster(n_workers=2, threads_per_worker=1, **quiet) as cluster, Client(cluster), joblib.parallel_config("dask"):
        started = {worker.pid for worker in cluster.workers.values()}
        table = grid(kills_its_worker, [dict(n=n, marker=str(tmp_path / "marker")) for n in range(8)], tmp_path / "runs")
        lost = started - {worker.pid for worker in cluster.workers.values()}
    assert table.square.tolist() == [n * n for n in range(8)] and table.error.isna().all()
    assert len(lost) == 1 and os.getpid() not in table.process.tolist()


# ---- what is refused ----

class Callable:
    def __call__(self, x): return dict(y=x)
    def method(self, x): return dict(y=x)


made_up: dict = {}
exec("def without_source(x): return dict(y=x)", made_up)


@pytest.mark.parametrize("f", [lambda x: dict(y=x), Callable(), Callable().method, partial(noted, log="x"), print, Callable,
                               made_up["without_source"]])
def test_what_has_no_source_of_its_own_is_refused(tmp_path, f):
    with pytest.raises(ValueError, match="with def|source of"): grid(f, [dict(x=1)], tmp_path)
    assert not files(tmp_path)


@pytest.mark.parametrize("bad, said", [
    (dict(n=1, log="x"), "got one dict"), ([], "empty"), ([3], "one of them is 3"),
    ([dict(n=1)], "missing a required argument: 'log'"),
    ([dict(n=1, log="x", m=2)], "unexpected keyword argument 'm'"), ([dict(n={1}, log="x")], "a set cannot be kept"),
    ([dict(n=object(), log="x")], "a object cannot be kept"), ([dict(n={(1, 2): 3}, log="x")], "keys must be str"),
    ([{1: 2}], "cannot be run with {1: 2}")])
def test_bad_settings_are_told_before_anything_runs(tmp_path, bad, said):
    with pytest.raises(ValueError, match=re.escape(said)): grid(noted, bad, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("text", ["", '{"rows": 3', "[]", '{"rows": [{"square": 4}]}', '{"setting": 1, "rows": [2]}'])
def test_a_file_that_is_no_run_is_named(tmp_path, text):
    log = tmp_path / "log"
    grid(noted, settings(log, 2), tmp_path / "runs")
    file = sorted((tmp_path / "runs").iterdir())[0]
    file.write_text(text)
    said = f"{file.name}: not the file of a run.*delete it"
    with pytest.raises(ValueError, match=said): grid(noted, settings(log, 2), tmp_path / "runs")
    file.unlink()
    assert grid(noted, settings(log, 2), tmp_path / "runs").square.tolist() == [0, 1]


def test_a_folder_that_cannot_be_used_is_an_error_of_files(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"): grid(noted, settings(tmp_path / "log"), tmp_path / "file")
    (closed := tmp_path / "closed").mkdir()
    tmp_path.chmod(0o755)
    with unprivileged(), pytest.raises(OSError, match="closed"): grid(noted, settings(tmp_path / "log"), closed)
    assert not (tmp_path / "log").exists() and not files(closed)


def test_a_file_says_what_it_is(tmp_path):
    grid(noted, settings(tmp_path / "log", 1), tmp_path / "runs")
    run = json.loads(next((tmp_path / "runs").iterdir()).read_text())
    assert run == dict(function="noted", setting=dict(n=0, log=str(tmp_path / "log")), rows=[dict(square=0)])


def test_what_a_killed_run_left_is_swept_once_it_is_old(tmp_path):
    for age in (0, 7200):
        half = tmp_path / f".noted-{age}.aa.part"
        half.write_text("{")
        os.utime(half, (time.time() - age,) * 2)
    grid(noted, settings(tmp_path / "log", 1), tmp_path)
    assert [p.name for p in tmp_path.glob(".*.part")] == [".noted-0.aa.part"]
