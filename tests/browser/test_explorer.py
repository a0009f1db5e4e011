"""The explorer as a user sees it: JupyterLab on the loopback, a real browser, a notebook run from its menu.

Started by `make browser-test`. MODLAB_ADAPTER=file goes through it with that adapter on the default model instead of the tiny
one, and MODLAB_SCREENSHOT=docs/screenshots/explore.png keeps a picture for the documentation."""
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from platformdirs import user_cache_dir
from playwright.sync_api import Page, expect, sync_playwright

expect.set_options(timeout=180_000)  # machines that build are often busy ones

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]
QUIET = '{"fetchNews": "false", "checkForUpdates": false, "doNotDisturbMode": true}'
TINY = """
import torch
from modlab import ModulatedPiSSA, explore, load_pairs, tiny_model
model, tok = tiny_model()
adapter = ModulatedPiSSA(model, r=16, selection_score="s_only", extract=False, init=(0.04, 0.4),
                         generator=torch.Generator().manual_seed(0))
strange = [n for n in range(len(tok)) if not tok.decode([n]).isascii() or not tok.decode([n]).isalpha()]
"""
REAL = """
import os
from modlab import explore, load_adapter, load_model, load_pairs
model, tok = load_model()
adapter, strange = load_adapter(model, os.environ["MODLAB_ADAPTER"]), None
"""
SETUP, TOKENS = (REAL, 60) if "MODLAB_ADAPTER" in os.environ else (TINY, 250)
SHOW = f"""
e = explore(model, tok, adapter, load_pairs('test')[:4], calibrated=0.6, max_new_tokens={TOKENS}, suppress_tokens=strange)
e
"""
HOOKS = "print('hooks', sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()), adapter.attached)"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(url: str, server: subprocess.Popen, seconds: float = 180) -> None:
    "Until the server answers; an error with its own words if it ends or does not."
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try: return urllib.request.urlopen(url, timeout=2).close()
        except OSError: time.sleep(0.2)
    raise RuntimeError(f"JupyterLab does not answer at {url} (exit code {server.poll()}); see its log")


@pytest.fixture
def lab(tmp_path):
    "The address of a JupyterLab of its own: nothing of the user's configuration, nothing left behind."
    port, home = free_port(), tmp_path / "home"
    settings = home / "lab" / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(QUIET)
    cache = os.environ.get("MODLAB_CACHE") or user_cache_dir("modlab")
    folders = {f"JUPYTER_{name}_DIR": str(home / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    folders |= {f"JUPYTERLAB_{name.upper()}_DIR": str(home / "lab" / name) for name in ("settings", "workspaces")}
    env = os.environ | folders | {"HOME": str(home), "IPYTHONDIR": str(home / "ipython"), "PYTHONPATH": str(ROOT),
                                  "TQDM_DISABLE": "1", "MODLAB_CACHE": cache}
    options = ["--no-browser", "--ip=127.0.0.1", f"--port={port}", "--IdentityProvider.token=", "--ServerApp.allow_root=True",
               f"--ServerApp.root_dir={tmp_path}", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdates"]
    with open(tmp_path / "server.log", "w") as log, subprocess.Popen(
            [sys.executable, "-m", "jupyter", "lab", *options], env=env, stdout=log, stderr=subprocess.STDOUT) as server:
        try:
            wait_for(f"http://127.0.0.1:{port}/api", server)
            yield f"http://127.0.0.1:{port}"
        finally: server.terminate()


@pytest.fixture
def page(tmp_path):
    "A fresh page in the browser, whose errors are collected in `page.errors`; its last look is kept as last.png."
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=os.environ["MODLAB_CHROMIUM"], args=FLAGS)
        page = browser.new_page(viewport=dict(width=1400, height=1250), device_scale_factor=1.5)
        page.errors = []
        page.on("console", lambda m: page.errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: page.errors.append(str(e)))
        try: yield page
        finally: page.screenshot(path=tmp_path / "last.png")
        browser.close()


def run_all(page: Page, lab: str, folder: Path, *cells: str) -> None:
    "Write a notebook, open it, run it from the menu."
    nb = new_notebook(cells=[new_code_cell(c.strip()) for c in cells])
    nb.metadata.kernelspec = dict(name="python3", display_name="Python 3", language="python")
    nbformat.write(nb, folder / "explorer.ipynb")
    page.goto(f"{lab}/lab/tree/explorer.ipynb?reset")
    expect(page.locator(".jp-Notebook")).to_be_visible()
    # Run before the kernel is there, and a dialog asks which one it should be.
    expect(page.get_by_role("button", name="Python 3 (ipykernel) | Idle")).to_be_visible()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.locator("li[data-command='runmenu:run-all']").click()


class Seen:
    "The parts of the explorer on a page."
    def __init__(self, page: Page):
        of = lambda css: page.locator(css).first
        self.handle, self.prompt, self.images = of(".widget-slider .noUi-handle"), of(".widget-textarea textarea"), page.locator(
            ".jp-OutputArea .widget-image")
        self.html = page.locator(".widget-html-content")
        self.reading, self.text, self.status = (self.html.filter(has_text=t) for t in ("KL mean", "steered, c", "…"))
        self.button = lambda name: page.locator("button.jupyter-button", has_text=re.compile(f"^{name}"))
        self.box = lambda name: page.locator(".widget-checkbox", has_text=name).locator("input")

    def doses(self) -> str: return self.images.nth(0).get_attribute("src")
    def spectrum(self) -> str: return self.images.nth(1).get_attribute("src")


def until(true, what: str, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not in {seconds} s: {what}"
        time.sleep(0.05)


def test_explorer(lab, page, tmp_path):
    run_all(page, lab, tmp_path, SETUP, SHOW, HOOKS)
    seen = Seen(page)
    expect(seen.text).to_contain_text("steered, c = +0.60")
    expect(seen.reading).to_contain_text("measured")
    expect(seen.status).to_have_count(0)  # neither writing nor measuring
    until(lambda: seen.images.count() == 2, "two figures")

    text, doses, spectrum = seen.text.inner_text(), seen.doses(), seen.spectrum()
    for _ in range(6): seen.handle.press("ArrowRight")
    expect(seen.text).to_contain_text("steered, c = +0.90")
    until(lambda: seen.doses() != doses, "the curve is drawn anew")
    expect(seen.reading).to_contain_text("c = +0.90")
    assert seen.text.inner_text() != text and seen.spectrum() == spectrum
    until(lambda: len(seen.text.inner_text()) > 60, "there is text")

    seen.box("wanda").check()
    until(lambda: seen.spectrum() != spectrum, "the spectrum is drawn with another score")
    expect(seen.reading).to_contain_text("measured")
    picture = ROOT / os.environ.get("MODLAB_SCREENSHOT", tmp_path / "explore.png")
    page.locator(".jp-OutputArea-output .widget-vbox").first.screenshot(path=picture)

    seen.box("chat").uncheck()
    seen.prompt.fill("")
    seen.button("Generate").click()
    expect(seen.html.filter(has_text="ValueError the prompt has no token")).to_be_visible()

    seen.prompt.fill("Once upon a time")
    seen.button("Generate").click()
    expect(seen.html.filter(has_text="writing …")).to_be_visible()
    doses = seen.doses()
    seen.handle.press("ArrowLeft")  # while it writes
    until(lambda: seen.doses() != doses, "the curve follows the slider")
    seen.button("Stop").click()
    expect(seen.status).to_have_count(0)
    stopped = seen.text.inner_text()
    time.sleep(1)
    assert seen.text.inner_text() == stopped

    seen.button("Close").click()
    expect(seen.html.filter(has_text="the model is free")).to_be_visible()
    page.locator(".jp-CodeCell .jp-InputArea-editor").last.click()
    page.keyboard.press("Control+Enter")
    expect(page.locator(".jp-OutputArea-output", has_text="hooks 0 False")).to_be_visible()
    assert not page.errors
