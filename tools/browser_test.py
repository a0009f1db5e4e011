"""The browser test, with what it needs: a Python driver into the environment, Debian's Chromium where it may be installed."""
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec

from lint_notebooks import ROOT

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")


def browser() -> str | None:
    "Chromium: the one in MODLAB_CHROMIUM, or the first of its usual names."
    return os.environ.get("MODLAB_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


def install_chromium() -> None:
    "From Debian's packages, where there are such and this user may; a failure shows in that there is still no browser."
    if not shutil.which("apt-get") or os.geteuid() != 0: return
    print("installing Debian's chromium", flush=True)
    env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
        subprocess.run(["apt-get", "-qq", *command], env=env, stdout=subprocess.DEVNULL)


def install_driver() -> None:
    "playwright, as pinned; it brings a browser of its own only if asked, and is not."
    if find_spec("playwright"): return
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", "constraints.txt",
                    "playwright"], cwd=ROOT, check=True)


def main(arguments: list[str]) -> int:
    "pytest's exit code; without a browser 1, or 0 with --if-possible."
    if not browser(): install_chromium()
    if not browser():
        print("browser test NOT RUN: there is no Chromium here, and it could not be installed; install it (on Debian: "
              "apt-get install chromium) or name one in MODLAB_CHROMIUM", flush=True)
        return 0 if "--if-possible" in arguments else 1
    install_driver()
    rest = [a for a in arguments if a != "--if-possible"]
    return subprocess.run([sys.executable, "-m", "pytest", *(rest or ["tests/browser"])], cwd=ROOT,
                          env=os.environ | {"MODLAB_CHROMIUM": browser()}).returncode


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
