"""Does a wheel work on its own? Built from a clean clone, installed alone, and put to the README's first example."""
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from lint_notebooks import ROOT

FENCE = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
HEADING = "## Which directions?" # what comes before it is the first example
WHERE = '''
import modlab, sys
from importlib.resources import files
assert "site-packages" in modlab.__file__ and files("modlab").joinpath("py.typed").is_file(), modlab.__file__
print("modlab", modlab.__version__, "from", modlab.__file__)
'''


def run(*command: object, cwd: Path, **more: str) -> str:
    "The output of a command that must succeed, away from whatever this checkout puts on the path."
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env={**env, **more}, capture_output=True, text=True)
    if done.returncode: sys.exit(f"{' '.join(map(str, command))[:200]}\nfailed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def first_example(readme: str) -> str:
    "The Python of the README up to its first result in words, as one script."
    cells = FENCE.findall(readme.partition(HEADING)[0])
    if len(cells) < 4: sys.exit(f"README.md: expected the first example above {HEADING!r}, found {len(cells)} Python blocks")
    return "import matplotlib; matplotlib.use('agg')\n" + "\n".join(cells)


def build(clone: Path, folder: Path) -> Path:
    "The wheel of a clone, by way of its source distribution, as a release would be made."
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, clone, cwd=folder)
    return next(folder.glob("*.whl"))


def environment(folder: Path) -> Path: # its Python
    "A new environment that sees the requirements of this one, but not the checkout that is installed in it."
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python, site = folder / "bin" / "python", next((folder / "lib").glob("python*")) / "site-packages"
    (site / "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def main(root: Path = ROOT) -> int:
    "0 if the wheel installs and the example runs; says how long each part took."
    start = time.perf_counter()
    def told(what: str) -> None: print(f"{time.perf_counter() - start:5.0f} s  {what}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run("git", "clone", "--quiet", "--no-hardlinks", root, folder / "clone", cwd=folder)
        told("cloned what is committed")
        wheel = build(folder / "clone", folder)
        told(f"built {wheel.name}, {wheel.stat().st_size / 1024:.0f} KB")
        python = environment(folder / "env")
        run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", wheel, cwd=folder)
        told("installed: " + run(python, "-c", WHERE, cwd=folder).strip())
        script = folder / "example.py"
        script.write_text(first_example((folder / "clone" / "README.md").read_text(encoding="utf-8")), encoding="utf-8")
        print(run(python, script, cwd=folder, HF_HUB_OFFLINE="1", TQDM_DISABLE="1"))
        told("ran the README's first example")
    return 0


if __name__ == "__main__": sys.exit(main())
