"""Try what can go wrong, within a budget of time, and say how much of it held: `make faults`."""
import argparse
import importlib.util
import json
import os
import sys
import time
from pathlib import Path

os.environ.update(MODLAB_SVD_CACHE="0", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="agg")
os.environ.setdefault("OMP_NUM_THREADS", "1") # before torch: children are forked

from faults import children, page

PARTS = dict(lifecycle=5, damage=4, kills=4, architectures=5, memory=2) # part -> its share of the time


def present(wanted: list[str]) -> dict[str, int]:
    "The parts that are there, with their shares."
    if unknown := set(wanted) - PARTS.keys(): raise SystemExit(f"no part {sorted(unknown)}; there are {list(PARTS)}")
    return {p: n for p, n in PARTS.items() if (not wanted or p in wanted) and importlib.util.find_spec(f"faults.{p}")}


def line(result: dict) -> str:
    "One part in one line."
    refused = f", {result['refused']} refused in words" if result.get("refused") else ""
    return (f"{result['name']:14}{result['tried']:6} of {result['planned']} tried: {result['held']} held{refused}, "
            f"{result['failed']} failed, {result['seconds']:.0f} s")


def run(parts: dict[str, int], budget_s: float, full: bool, out: Path) -> list[dict]:
    "All parts in turn. What one does not use of its share, the later ones have."
    results, end = [], time.monotonic() + budget_s
    for n, (name, share) in enumerate(parts.items()):
        start, shares = time.monotonic(), list(parts.values())[n:]
        mine = (end - start) * share / sum(shares)
        print(f"{name}: " + ("all of it" if full else f"up to {mine / 60:.1f} minutes"), flush=True)
        result = importlib.import_module(f"faults.{name}").run(float("inf") if full else mine, full, out / name)
        results.append(result | {"seconds": time.monotonic() - start})
        print(line(results[-1]), flush=True)
        for row in [r for r in result["rows"] if r.get("error")][:20]: print("    " + page.told(row), flush=True)
    return results


def main() -> int:
    "1 if anything failed."
    parser = argparse.ArgumentParser(prog="make faults", description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all of them if none is named")
    parser.add_argument("--full", action="store_true", help="the counts of the page, however long they take; writes the page")
    parser.add_argument("--budget", type=float, default=20.0, metavar="MIN", help="minutes for everything (20)")
    parser.add_argument("--out", type=Path, default=Path("report/faults"), help="where logs and figures go")
    args = parser.parse_args()
    children.warm()
    parts = present(args.parts)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in parts: (args.out / name).mkdir(exist_ok=True)
    results = run(parts, args.budget * 60, args.full, args.out)
    found = page.stamped(results, args.full)
    (args.out / "faults.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if args.full: page.keep(found)
    print(f"{sum(r['tried'] for r in results)} tried, {sum(r['failed'] for r in results)} failed; {args.out / 'faults.json'}")
    return int(any(r["failed"] for r in results))


if __name__ == "__main__": sys.exit(main())
