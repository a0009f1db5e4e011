"""Writers that are interrupted: `kill -9` at random moments, a full disk, a folder that is read-only, two processes on one path.
The old content or the new one is there afterwards, whole, and the next use leaves nothing else."""
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from faults import children, damage

LIMIT = 60.0 # seconds for one case
ABOUT = ("Every function that writes is killed with SIGKILL at a random moment, given a disk that is full after some bytes (a "
         "small tmpfs, or a limit on the size of files), a folder that it may only read, and a second process on the same path. "
         "Right: the old content or the new one is there, whole; what fails says so as an OSError with the path, or as a warning "
         "where the file is no more than a convenience; and once it is old, the next use removes what a killed process left.")


@dataclass
class Writer:
    "A function that writes, of which there are two contents to tell apart."
    name: str
    write: Callable[[Path, int], None] # content 0 or 1 into a folder
    read: Callable[[Path], int | None] # which of them is there, whole; None: neither, where that is no loss. Else AssertionError
    kept: set[str] # names of what may be in the folder after a use
    refuses: bool = True # is a file that cannot be written an error (or a warning)?
    shared: bool = True # may two processes write at once (or is the second refused)?
    keeps: bool = False # would it be a loss if neither content were there?
    joined: Callable[[Path, int], None] | None = None # what two processes do at once, where that is not `write`


# ---- the writers ----

def adapter(n: int) -> object:
    "Two adapters of different ranks, so that no part of one fits the other."
    from modlab import ModulatedLoRA
    a = ModulatedLoRA(damage.build(), r=3 + 4 * n, targets=("q_proj",))
    with torch.no_grad():
        for B in a.B.values(): B.fill_(1.0 + n)
    return a


MADE: dict[int, object] = {} # made once, before any fork


def which(tables: dict, prefix: str = "") -> int:
    "The number of the adapter of which these are all the tables."
    ranks = {len(t) for k, t in tables.items() if ".lora_A" in k or k.startswith("A.")}
    found = {n for n in MADE if ranks == {3 + 4 * n}}
    assert len(found) == 1, "of neither, or of both"
    n, = found
    up = [t for k, t in tables.items() if ".lora_B" in k or k.startswith("B.")]
    assert len(tables) == 8 and len(up) == 4 and all(len(t.unique()) == 1 for t in up), "not whole"
    return n


def read_saved(folder: Path) -> int | None:
    from modlab import load_adapter
    path = folder / damage.ADAPTER
    if not path.exists(): return None
    load_adapter(damage.build(), path)
    return which(load_file(path))


def read_peft(folder: Path) -> int | None:
    from modlab import from_peft
    if not (folder / "adapter").exists(): return None
    from_peft(damage.build(), folder / "adapter")
    assert (folder / "adapter" / "notes.txt").exists() or not (folder / "with notes").exists(), "the user's own file is gone"
    return which(load_file(folder / "adapter" / damage.WEIGHTS))


def write_peft(folder: Path, n: int) -> None:
    from modlab import to_peft
    to_peft(MADE[n], folder / "adapter")


WEIGHTS = [torch.randn(3, 40, 60, generator=torch.Generator().manual_seed(n)) for n in range(2)]


def decomposed(folder: Path, n: int) -> dict:
    from modlab.model.cache import thin_svds
    os.environ.update(MODLAB_CACHE=str(folder), MODLAB_SVD_CACHE="1")
    return dict(thin_svds({str(k): W for k, W in enumerate(WEIGHTS[n])}))


def write_svds(folder: Path, n: int) -> None:
    for path in folder.rglob("*.safetensors"): path.unlink(missing_ok=True)
    decomposed(folder, n)


def read_svds(folder: Path) -> None:
    from modlab import thin_svd
    for n in range(2):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "computed again") # a file under its final name is whole
            found = decomposed(folder, n)
        for k, W in enumerate(WEIGHTS[n]): assert damage.same(found[str(k)], thin_svd(W)), "another decomposition"


def write_model(folder: Path, n: int) -> None:
    gone = folder / f"gone-{os.getpid()}"
    with suppress(OSError): (folder / "smollm2-135m-instruct").rename(gone)
    shutil.rmtree(gone, ignore_errors=True)
    damage.with_cache(folder, damage.default_model)


def read_model(folder: Path) -> None:
    for path in folder.glob("gone-*"): shutil.rmtree(path) # ours
    there = (folder / "smollm2-135m-instruct").exists()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        damage.check_model(folder, None, "")
    assert not (there and any("converted again" in str(w.message) for w in said)), "a half under the final name"


RESULT: list[dict] = [] # of an uninterrupted run


def write_run(folder: Path, n: int) -> None:
    from modlab.learn import loop
    loop._SAVE_EVERY = 0.0 # after every step
    got = damage.healed(folder / damage.RUN)
    assert all(damage.same(got[k], RESULT[0][k]) for k in got), "it went on to something else"


def read_run(folder: Path) -> None: write_run(folder, 0)


def convert_together(folder: Path, n: int, turns: int = 5) -> None:
    "The model is asked for where it is not there yet."
    for k in range(turns):
        (folder / f"gone-{k}").mkdir(exist_ok=True)
        damage.check_model(folder / f"gone-{k}", None, "")


WRITERS = [Writer("save", lambda folder, n: MADE[n].save(folder / damage.ADAPTER), read_saved, {damage.ADAPTER}, keeps=True),
           Writer("to_peft", write_peft, read_peft, {"adapter", "with notes"}, keeps=True),
           Writer("cache of decompositions", write_svds, read_svds, {"svd"}, refuses=False),
           Writer("conversion of the model", write_model, read_model, {"smollm2-135m-instruct", "smollm2-135m-instruct.lock"},
                  joined=convert_together),
           Writer("file of a run", write_run, read_run, {damage.RUN}, shared=False)]


# ---- what happens to them ----

def silently(f: Callable[[], object]) -> object:
    damage.hush()
    with damage.quiet(): return f()


def in_child(f: Callable[[], object]) -> None:
    "Nothing is written by this process itself: what it has open or locked, all later children would have."
    outcome = children.run(lambda: silently(f), LIMIT)
    assert outcome.ok, f"{outcome.how}: {outcome.error}\n{outcome.trace[-600:]}"


def aged(folder: Path) -> None:
    "Everything in it is two days old."
    for path in [folder, *folder.rglob("*")]:
        with suppress(OSError): os.utime(path, (time.time() - 172_800,) * 2, follow_symlinks=False)


def whole(writer: Writer, folder: Path, before: int | None) -> None:
    "The old content or the new one is there, and a later use leaves nothing else."
    found = writer.read(folder)
    assert found is not None or before is None or not writer.keeps, "what was there before is gone"
    aged(folder)
    writer.write(folder, 1)
    left = {p.name for p in folder.iterdir()} | {p.name for p in folder.rglob("writing-*")} - {"with notes"}
    assert left <= writer.kept, f"left behind: {sorted(left - writer.kept)}"
    writer.read(folder)


def checked(writer: Writer, folder: Path, before: int | None) -> None:
    "The same in a child."
    in_child(lambda: whole(writer, folder, before))


def started(writer: Writer, folder: Path) -> children.Child:
    "A child that writes one content after the other for ever. It has begun when this returns."
    there, ours = os.pipe()
    def work() -> None:
        os.write(ours, b"!")
        while True:
            for n in (1, 0): writer.write(folder, n)
    child = children.start(lambda: silently(work))
    os.read(there, 1)
    for pipe in (there, ours): os.close(pipe)
    return child


def kill(writer: Writer, folder: Path, rng: random.Random, seconds: float) -> None:
    "SIGKILL at a random moment of a few writes."
    before = rng.choice([None, 0])
    if before is not None:
        in_child(lambda: writer.write(folder, before))
        if writer.name == "to_peft":
            for path in (folder / "adapter" / "notes.txt", folder / "with notes"): path.write_text("mine")
    if writer.name == "file of a run" and before is not None: (folder / damage.RUN).unlink() # or there is nothing left to do
    child = started(writer, folder)
    time.sleep(rng.random() * 2.5 * seconds)
    child.kill(signal.SIGKILL)
    outcome = child.wait(LIMIT)
    assert outcome.how == "died", f"the writer failed by itself: {outcome.error}"
    checked(writer, folder, before)


@contextmanager
def full_disk(folder: Path, size: int) -> Iterator[None]:
    "Room for so many bytes: on a disk of its own where that may be mounted, else in each file."
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def mounted(folder: Path, size: int) -> bool:
    "A disk of that size in the folder, if this system allows it."
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={max(size, 4096)}", "tmpfs", str(folder)], capture_output=True)
    return done.returncode == 0


def told(writer: Writer, f: Callable[[], object], folder: Path) -> str:
    "What comes of a write that cannot be: an OSError with the path, or a warning where the file is a convenience."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try: f()
        except Exception as e:
            assert isinstance(e, OSError) and str(folder) in str(e), f"{type(e).__name__}: {e}"
            return "refused"
    assert writer.refuses or any(str(folder) in str(w.message) for w in said), "nothing was written, and nothing said"
    return "written" if writer.refuses else "warned"


def fill(writer: Writer, folder: Path, rng: random.Random, seconds: float) -> None:
    "A full disk, at some byte of the write."
    in_child(lambda: writer.write(folder, 0))
    if writer.name == "file of a run": (folder / damage.RUN).unlink()
    if writer.name == "cache of decompositions":
        for path in folder.rglob("*.safetensors"): path.unlink()
    if writer.name == "conversion of the model": shutil.rmtree(folder / "smollm2-135m-instruct")
    size = rng.choice([0, 100, 1000, 2000, 3000])
    def attempt() -> None:
        damage.hush()
        with full_disk(folder, size): told(writer, lambda: writer.write(folder, 1), folder)
    outcome = children.run(attempt, LIMIT)
    assert outcome.ok, f"{outcome.how}: {outcome.error}\n{outcome.trace[-600:]}"
    checked(writer, folder, 0)


def fill_small_disk(writer: Writer, folder: Path, rng: random.Random, seconds: float) -> None:
    "The same on a disk of its own, where the whole of it counts."
    small = folder / "disk"
    small.mkdir()
    if not mounted(small, 4096 * rng.choice([1, 2, 5, 10, 40])): return fill(writer, folder, rng, seconds)
    try:
        def attempt() -> None:
            damage.hush()
            told(writer, lambda: writer.write(small, 1), small)
            left = {p.name for p in small.iterdir()} | {p.name for p in small.rglob("writing-*")}
            assert left <= writer.kept, f"left behind: {sorted(left - writer.kept)}"
        outcome = children.run(attempt, LIMIT)
    finally: subprocess.run(["umount", str(small)], capture_output=True)
    assert outcome.ok, f"{outcome.how}: {outcome.error}\n{outcome.trace[-600:]}"


def read_only(writer: Writer, folder: Path, rng: random.Random, seconds: float) -> None:
    "A folder that may only be read, by a process without a superuser's rights."
    there = rng.random() < 0.5
    if there: in_child(lambda: writer.write(folder, 0))
    before = sorted((str(p), p.stat().st_size) for p in folder.rglob("*"))
    for path in [folder, *folder.rglob("*")]: path.chmod(0o555 if path.is_dir() else 0o444)
    def attempt() -> None:
        damage.hush()
        if os.geteuid() == 0: os.setuid(65534)
        if writer.name in ("conversion of the model", "cache of decompositions"): # they go on without
            with damage.quiet(): writer.read(folder)
        else: assert told(writer, lambda: writer.write(folder, 1), folder) == "refused", "it was written"
    outcome = children.run(attempt, LIMIT)
    for path in [folder, *folder.rglob("*")]: path.chmod(0o755)
    assert outcome.ok, f"{outcome.how}: {outcome.error}\n{outcome.trace[-600:]}"
    assert sorted((str(p), p.stat().st_size) for p in folder.rglob("*")) == before, "something has changed"


def two(writer: Writer, folder: Path, rng: random.Random, seconds: float) -> None:
    "Two processes on one path, for some writes each."
    end = time.monotonic() + 0.3 + 3 * seconds
    def work(n: int) -> Counter:
        ends = Counter()
        while time.monotonic() < end:
            try: (writer.joined or writer.write)(folder, n)
            except OSError as e:
                if writer.shared or "another run" not in str(e): raise
                ends["refused"] += 1
            else: ends["written"] += 1
        return ends
    tasks = [(str(n), lambda n=n: silently(lambda: work(n))) for n in range(2)]
    outcomes = list(children.run_all(tasks, LIMIT))
    assert all(o.ok for o in outcomes), "; ".join(f"{o.error}\n{o.trace[-600:]}" for o in outcomes if not o.ok)
    assert sum((o.value for o in outcomes), Counter())["written"], "nobody got through"
    checked(writer, folder, None)


# ---- the part of `make faults` ----

CASES = {"kill -9": (kill, 200), "full disk": (fill, 60), "small disk": (fill_small_disk, 25),
         "read-only folder": (read_only, 20),
         "two processes": (two, 20)} # name -> (what is done, how often in a full run, over all writers)


def warm() -> None:
    children.warm()
    if not MADE: MADE.update({n: adapter(n) for n in range(2)})
    if not RESULT: RESULT.append(children.run(lambda: silently(lambda: damage.healed(None)), LIMIT).value)


def seconds_of(writer: Writer) -> float:
    "How long a write takes."
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        outcome = children.run(lambda: [silently(lambda: writer.write(Path(name), 0)), time.monotonic(),
                                        silently(lambda: writer.write(Path(name), 1)), time.monotonic()], LIMIT)
    assert outcome.ok, outcome.trace
    return max(0.005, outcome.value[3] - outcome.value[1])


def tried(writer: Writer, case: str, n: int, seconds: float) -> dict:
    "One case, in a folder of its own."
    row = dict(writer=writer.name, event=case, n=n)
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        os.chmod(name, 0o755)
        (folder := Path(name) / "there").mkdir()
        try: CASES[case][0](writer, folder, random.Random(f"{writer.name} {case} {n}"), seconds)
        except AssertionError as e: return row | dict(end="failed", error=str(e)[:1500])
    return row | dict(end="held")


def planned(full: bool, writers: list[Writer]) -> list[tuple[Writer, str, int]]:
    "All cases, the writers and events in turn."
    share = 1.0 if full else 0.25
    counts = {case: max(1, round(n * share / len(writers))) for case, (_, n) in CASES.items()}
    return [(w, case, n) for n in range(max(counts.values())) for case in CASES if n < counts[case] for w in writers]


def summary(rows: list[dict]) -> list[dict]:
    "One row per writer and event, then every failure."
    counts = Counter((r["writer"], r["event"], r["end"]) for r in rows)
    pairs = dict.fromkeys((r["writer"], r["event"]) for r in rows)
    ends = [dict(writer=w, event=e, **{end: counts[w, e, end] for end in ("held", "failed")}) for w, e in sorted(pairs)]
    return ends + [{k: r[k] for k in ("writer", "event", "n", "error")} for r in rows if r["end"] == "failed"]


def run(budget_s: float, full: bool, out: Path, writers: list[Writer] = WRITERS) -> dict:
    "Every writer and every event in turn, until the time is over."
    end = time.monotonic() + budget_s
    warm()
    seconds, todo, rows = {w.name: seconds_of(w) for w in writers}, planned(full, writers), []
    for writer, case, n in todo:
        if time.monotonic() > end: break
        rows.append(tried(writer, case, n, seconds[writer.name]))
    ends = Counter(r["end"] for r in rows)
    (out / "kills.json").write_text(json.dumps(rows, indent=1))
    counts = {end: ends[end] for end in ("held", "failed")}
    return dict(name="kills", about=ABOUT, planned=len(todo), tried=len(rows), **counts, rows=summary(rows))
