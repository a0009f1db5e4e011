"""How every row of the benchmark is measured: two ways of the same work, run in turn, and the ratio taken pair by pair.

Machines drift, so the two sides run one after the other, several times; the row holds the median ratio, its lowest and highest,
the ratio that is to be reached, and the ratio at the limit: what the operations or bytes that ours must have would take at the
rate that this machine reaches in the same run. A file `rows_<name>.py` has `rows(model, tok, rounds) -> list[dict]`.
"""
import statistics
import time
from collections.abc import Callable

import torch


def settle() -> None:
    "Wait until the accelerator has done what it was given."
    if torch.cuda.is_available(): torch.cuda.synchronize()


def seconds(f: Callable[[], object]) -> float:
    settle()
    start = time.perf_counter()
    f()
    settle()
    return time.perf_counter() - start


def ratio_of(ours: float, theirs: float, over: bool) -> float: return ours / theirs if over else theirs / ours


def row(what: str, peer: str, ours: Callable, theirs: Callable, rounds: int = 3,
        limit: float | Callable[[float], float] | None = None,  # seconds that ours must have, or a function of the peer's seconds
        reach: float | None = None,  # the ratio to reach
        over: bool = False,  # True: ours over the peer, a cost, the lower the better; False: how many times as fast ours is
        ) -> dict:
    "Run the two in turn, after one run of each that does not count."
    for f in (ours, theirs): f()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
    ratios = [ratio_of(a, b, over) for a, b in pairs]
    ours_s, theirs_s = (statistics.median(side) for side in zip(*pairs))
    least = limit(theirs_s) if callable(limit) else limit
    return told(dict(what=what, peer=peer, modlab_s=ours_s, peer_s=theirs_s, kind="over" if over else "times as fast",
                     ratio=statistics.median(ratios), lowest=min(ratios), highest=max(ratios),
                     limit=None if least is None else ratio_of(least, theirs_s, over), reach=reach))


def told(made: dict) -> dict:
    "Say the row, and whether it reaches what it should."
    if made["reach"] is not None:
        made["reached"] = made["ratio"] <= made["reach"] if made["kind"] == "over" else made["ratio"] >= made["reach"]
    limit, reach = (f"{made[k]:.2f}" if made[k] is not None else "–" for k in ("limit", "reach"))
    print(f"{made['what']} / {made['peer']}: {made['ratio']:.2f} ({made['lowest']:.2f} to {made['highest']:.2f}), "
          f"limit {limit}, to reach {reach}", flush=True)
    return made


def flops_per_second(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, n: int = 1024) -> float:
    "The rate of a square matrix product, the best of five."
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    a @ b
    return 2 * n**3 / min(seconds(lambda: a @ b) for _ in range(5))


def bytes_per_second(device: torch.device | str = "cpu", n: int = 2**26) -> float:
    "The rate at which memory is read, of `n` bytes or more than any cache holds, the best of five."
    a = torch.randn(n // 4, device=device)
    a.sum()
    return n / min(seconds(a.sum) for _ in range(5))
