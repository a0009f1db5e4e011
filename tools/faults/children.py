"""Work in processes that are forked from this one, which has imported everything: each with a time limit, and each may die."""
import os
import pickle
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Outcome:
    "How a child ended."
    name: str
    how: str # "returned", "raised", "timed out", or "died": by a signal, or without a word
    value: Any = None # what the function returned
    error: str = "" # the last line of what it raised, or the signal
    trace: str = ""
    seconds: float = 0.0

    @property
    def ok(self) -> bool: return self.how == "returned"


@dataclass
class Child:
    "A running child."
    name: str
    pid: int
    pipe: int # what it sends comes here
    start: float = field(default_factory=time.monotonic)
    sent: bytes = b""

    @property
    def seconds(self) -> float: return time.monotonic() - self.start

    def kill(self, number: int = signal.SIGKILL) -> None:
        "Send a signal, unless the child is gone already."
        with suppress(ProcessLookupError): os.kill(self.pid, number)

    def read(self) -> bool:
        "Take what has come; true at the end."
        part = os.read(self.pipe, 1 << 16)
        self.sent += part
        return not part

    def wait(self, timeout: float | None = None) -> Outcome:
        "Until the child ends. One that does not within `timeout` seconds is killed."
        while True:
            left = None if timeout is None else max(0.0, timeout - self.seconds)
            if not select.select([self.pipe], [], [], left)[0]:
                self.kill()
                return self.outcome(timed_out=True)
            if self.read(): return self.outcome()

    def outcome(self, timed_out: bool = False) -> Outcome:
        "What is known of a child that has ended, or was just killed."
        os.close(self.pipe)
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        if timed_out: return Outcome(self.name, "timed out", error=f"after {self.seconds:.0f} s", seconds=self.seconds)
        if status == 0 and self.sent:
            how, value, error, trace = pickle.loads(self.sent)
            return Outcome(self.name, how, value, error, trace, self.seconds)
        return Outcome(self.name, "died", error=f"exit status {status}", seconds=self.seconds)


def result_of(f: Callable[[], Any]) -> bytes:
    "What a child sends home."
    try: return pickle.dumps(("returned", f(), "", ""))
    except BaseException as e:
        return pickle.dumps(("raised", None, f"{type(e).__name__}: {e}"[:500], traceback.format_exc()[-4000:]))


def start(f: Callable[[], Any], name: str = "") -> Child:
    "Fork a child that runs `f` and sends home what it returns, which must be picklable."
    sys.stdout.flush()
    sys.stderr.flush()
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid:
        os.close(theirs)
        return Child(name, pid, ours)
    os.close(ours)
    try:
        with os.fdopen(theirs, "wb") as pipe: pipe.write(result_of(f))
    finally: os._exit(0) # no clean-up of what belongs to the parent


def run(f: Callable[[], Any], timeout: float, name: str = "") -> Outcome:
    "Run `f` in a child."
    return start(f, name).wait(timeout)


def run_all(tasks: Iterable[tuple[str, Callable[[], Any]]], # (name, function)
            timeout: float, # of each, in seconds
            deadline: float = float("inf"), # by `time.monotonic()`: no child starts later
            workers: int = 2) -> Iterator[Outcome]: # in the order in which they end
    "Run tasks in children, several at a time."
    todo, running = iter(tasks), {}
    while True:
        while len(running) < workers and time.monotonic() < deadline:
            if (task := next(todo, None)) is None: break
            child = start(task[1], task[0])
            running[child.pipe] = child
        if not running: return
        ready = select.select(list(running), [], [], 0.1)[0]
        yield from [running.pop(pipe).outcome() for pipe in ready if running[pipe].read()]
        late = [pipe for pipe, child in running.items() if child.seconds > timeout]
        for pipe in late: running[pipe].kill()
        yield from [running.pop(pipe).outcome(timed_out=True) for pipe in late]


def warm(threads: int = 1) -> None:
    "Import what every child needs. One thread in each: a pool of threads does not survive a fork."
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401

    import modlab  # noqa: F401
    torch.set_num_threads(threads)
