"""Is all that is made from notebooks in step with them, their outputs too, and is everything lint-free? Names what is not."""
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import test_notebooks
from lint_notebooks import ROOT, notebooks

BIN = Path(sys.executable).parent


def digests(root: Path) -> dict[Path, str]:
    "A hash for each file that export and clean may write."
    files = [*(root / "modlab").rglob("*.py"), *notebooks(root), root / "pyproject.toml"]
    return {p.relative_to(root): hashlib.sha256(p.read_bytes()).hexdigest() for p in files if p.exists()}


def changed_by(command: str, root: Path) -> list[Path]:
    "The files that a command of nbdev changes, makes or removes; the command's own failure is an error."
    before = digests(root)
    environment = {k: v for k, v in os.environ.items() if k != "IN_TEST"}  # with it, nbdev_export does nothing
    subprocess.run([BIN / command], cwd=root, check=True, env=environment)
    after = digests(root)
    return sorted(p for p in before.keys() | after.keys() if before.get(p) != after.get(p))


def main(root: Path = ROOT) -> int:
    "0 if nothing changed and no linter complained."
    problems = 0
    for command in ("nbdev_clean", "nbdev_export"):
        changed = changed_by(command, root)
        for path in changed: print(f"{command} changed {path}: it was out of step; look at the new one and commit it")
        problems += len(changed)
    for command in ([sys.executable, "tools/lint_notebooks.py"], [BIN / "ruff", "check", "--quiet", "."]):
        problems += subprocess.run(command, cwd=root).returncode != 0
    problems += test_notebooks.main([], root)
    print("check: in step and lint-free" if not problems else f"check: {problems} problems, see above", flush=True)
    return min(problems, 1)


if __name__ == "__main__": sys.exit(main())
