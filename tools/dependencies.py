"""How big each dependency is where it is installed: read from the environment, and written into docs/dependencies.md."""
import re
import sys
from configparser import ConfigParser
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from lint_notebooks import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PAGE = Path("docs") / "dependencies.md"
ROW = re.compile(r"^\| `([\w.-]+)` \|(.*)\|[^|]*\|[^|]*\|$", re.M)
KINDS = ("requirements", "dev_requirements", "docs_requirements")


def requirements(root: Path = ROOT) -> dict[str, str]: # canonical name -> the key of settings.ini that asks for it
    "What settings.ini asks for."
    parser = ConfigParser(delimiters=["="])
    parser.read(root / "settings.ini", encoding="utf-8")
    return {canonicalize_name(Requirement(r).name): kind for kind in KINDS for r in parser["DEFAULT"][kind].split()}


def installed(name: str) -> Distribution:
    "A package of this environment."
    try: return distribution(name)
    except PackageNotFoundError as e: raise SystemExit(f"{name} is not installed here; run: make setup docs") from e


def asked_for(name: str) -> set[str]:
    "What a package itself asks for on this platform, extras left out."
    wanted = map(Requirement, installed(name).requires or [])
    return {canonicalize_name(r.name) for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})}


def closure(name: str) -> set[str]:
    "A package and everything that it brings along."
    found, ahead = set(), {canonicalize_name(name)}
    while ahead:
        found |= ahead
        ahead = set().union(*map(asked_for, ahead)) - found
    return found


def size(name: str) -> int: # bytes
    "What a package's files take up, compiled ones of Python aside."
    paths = [Path(f.locate()) for f in installed(name).files or [] if f.suffix != ".pyc"]
    return sum(p.stat().st_size for p in paths if p.is_file())


def megabytes(n: int) -> str: return f"{n / 2**20:.{0 if n >= 10 * 2**20 else 1 if n >= 2**20 else 2}f}"


def table(text: str) -> str:
    "The page with the last two columns of every row made anew: MB of the package, and MB with all that it brings along."
    def row(m: re.Match) -> str:
        whole = sum(map(size, closure(m[1])))
        return f"| `{m[1]}` |{m[2]}| {megabytes(size(m[1]))} | {megabytes(whole)} |"
    return ROW.sub(row, text)


def total(kind: str, root: Path = ROOT) -> tuple[int, int]: # packages, bytes
    "Everything that one key of settings.ini brings along."
    every = set().union(*(closure(name) for name, key in requirements(root).items() if key == kind))
    return len(every), sum(map(size, every))


def totals(text: str, root: Path = ROOT) -> str:
    "The page with its sums made anew."
    for kind in KINDS:
        count, taken = total(kind, root)
        text = re.sub(rf"(<!-- {kind} -->).*", rf"\1 Together, with all that they bring along: {count} packages, "
                      rf"{megabytes(taken)} MB.", text)
    return text


def main(root: Path = ROOT) -> int:
    "Write the sizes into the page."
    text = (root / PAGE).read_text(encoding="utf-8")
    (root / PAGE).write_text(totals(table(text), root), encoding="utf-8")
    print(f"{PAGE}: {len(ROW.findall(text))} packages measured")
    return 0


if __name__ == "__main__": sys.exit(main())
