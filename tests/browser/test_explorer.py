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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from platformdirs import user_cache_dir
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

expect.set_options(timeout=180_000)  # machines that build are often busy ones

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]
NOTEBOOK = '{"windowingMode": "none"}'  # keep cells that are scrolled out of sight on the page
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
HOOKS = """
from modlab.model.calls import is_swapped
left = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + is_swapped(m) for m in model.modules())
print('hooks', left, adapter.attached)
"""
ANY = """
from modlab import ModulatedPiSSA, explore, load_pairs, tiny_model
from models import adapter_of
from test_legacy import pissa_file

def show(kind, records=load_pairs('test')[:4]):
    model, tok = tiny_model()
    strange = [n for n in range(len(tok)) if not tok.decode([n]).isascii() or not tok.decode([n]).isalpha()]
    if kind == 'old-file': pissa_file('old.safetensors', model)
    old = kind == 'old-file'
    adapter = ModulatedPiSSA.from_checkpoint(model, 'old.safetensors') if old else adapter_of(kind, model)
    return explore(model, tok, adapter, records, cs=[-2, -1, 1, 2], max_new_tokens=20, suppress_tokens=strange)
"""
KINDS = {"lora": "show('lora')", "pissa-extracted": "show('pissa-extracted')", "pissa-unextracted": "show('pissa-unextracted')",
         "old-file": "show('old-file')", "lora-without-records": "show('lora', None)",
         "pissa-without-records": "show('pissa-unextracted', None)"}


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tmp_path_factory.mktemp("lab")


@pytest.fixture(scope="module")
def lab(folder):
    "The address of a JupyterLab of its own: nothing of the user's configuration, nothing left behind."
    port, home = free_port(), folder / "home"
    settings = home / "lab" / "settings" / "@jupyterlab"
    for extension, name, text in (("apputils", "notification", QUIET), ("notebook", "tracker", NOTEBOOK)):
        (settings / f"{extension}-extension").mkdir(parents=True)
        (settings / f"{extension}-extension" / f"{name}.jupyterlab-settings").write_text(text)
    cache = os.environ.get("MODLAB_CACHE") or user_cache_dir("modlab")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    folders = {f"JUPYTER_{name}_DIR": str(home / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    folders |= {f"JUPYTERLAB_{name.upper()}_DIR": str(home / "lab" / name) for name in ("settings", "workspaces")}
    env = os.environ | folders | {"HOME": str(home), "IPYTHONDIR": str(home / "ipython"), "PYTHONPATH": paths,
                                  "TQDM_DISABLE": "1", "MODLAB_CACHE": cache}
    options = ["--no-browser", "--ip=127.0.0.1", f"--port={port}", "--IdentityProvider.token=", "--ServerApp.allow_root=True",
               f"--ServerApp.root_dir={folder}", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdates"]
    with open(folder / "server.log", "w") as log, subprocess.Popen(
            [sys.executable, "-m", "jupyter", "lab", *options], env=env, stdout=log, stderr=subprocess.STDOUT) as server:
        try:
            wait_for(f"http://127.0.0.1:{port}/api", server)
            yield f"http://127.0.0.1:{port}"
        finally: server.terminate()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=os.environ["MODLAB_CHROMIUM"], args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def fresh_page(browser: Browser, last: Path) -> Iterator[Page]:
    "A page whose errors are collected in `page.errors`; its last look is kept."
    page = browser.new_page(viewport=dict(width=1400, height=1250), device_scale_factor=1.5)
    page.errors = []
    page.on("console", lambda m: page.errors.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: page.errors.append(str(e)))
    try: yield page
    finally:
        page.screenshot(path=last)
        page.close()


@pytest.fixture
def page(browser, tmp_path):
    with fresh_page(browser, tmp_path / "last.png") as page: yield page


def open_notebook(page: Page, lab: str, path: Path, *cells: str) -> None:
    "Write a notebook and open it."
    nb = new_notebook(cells=[new_code_cell(c.strip()) for c in cells])
    nb.metadata.kernelspec = dict(name="python3", display_name="Python 3", language="python")
    nbformat.write(nb, path)
    page.goto(f"{lab}/lab/tree/{path.name}?reset")
    expect(page.locator(".jp-Notebook")).to_be_visible()
    # Run before the kernel is there, and a dialog asks which one it should be.
    expect(page.get_by_role("button", name="Python 3 (ipykernel) | Idle")).to_be_visible()


def run_all(page: Page) -> None:
    "Run the notebook from the menu."
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.locator("li[data-command='runmenu:run-all']").click()


def run_cell(page: Page, n: int) -> Locator:
    "Run the cell of this number as a user does; the cell."
    cell = page.locator(".jp-CodeCell").nth(n)
    cell.locator(".jp-InputArea-editor").click()
    page.keyboard.press("Control+Enter")
    return cell


@pytest.fixture(scope="module")
def book(browser, lab, folder):
    "A page with a notebook of one cell per kind of adapter, none of which has run."
    with fresh_page(browser, folder / "last.png") as page:
        open_notebook(page, lab, folder / "kinds.ipynb", ANY, *KINDS.values())
        run_cell(page, 0)
        yield page


class Seen:
    "The parts of the explorer on a page, or in one cell of it."
    def __init__(self, place: Page | Locator):
        def first(css: str) -> Locator: return place.locator(css).first
        self.handle, self.prompt = first(".widget-slider .noUi-handle"), first(".widget-textarea textarea")
        self.images, self.picker = place.locator(".jp-OutputArea .widget-image"), first(".widget-dropdown select")
        self.html = place.locator(".widget-html-content")
        self.reading, self.text, self.status = (self.html.filter(has_text=t) for t in ("KL mean", "steered, c", "…"))
        self.button = lambda name: place.locator("button.jupyter-button", has_text=re.compile(f"^{name}"))
        self.box = lambda name: place.locator(".widget-checkbox", has_text=name).locator("input")

    def doses(self) -> str: return self.images.nth(0).get_attribute("src")
    def spectrum(self) -> str: return self.images.nth(1).get_attribute("src")


def until(true, what: str, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not in {seconds} s: {what}"
        time.sleep(0.05)


def test_explorer(lab, page, folder, tmp_path):
    open_notebook(page, lab, folder / "explorer.ipynb", SETUP, SHOW, HOOKS)
    run_all(page)
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
    run_cell(page, 2)
    expect(page.locator(".jp-OutputArea-output", has_text="hooks 0 False")).to_be_visible()
    assert not page.errors


def shown(part: Locator, wanted: bool) -> None:
    "Is it on the page, with a size that can be seen, or is it not?"
    if not wanted: return expect(part).to_be_hidden()
    expect(part).to_be_visible()
    size = part.bounding_box()
    assert size["width"] > 10 and size["height"] > 10


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_has_its_page(book, kind, tmp_path):
    records, spectrum = not kind.endswith("without-records"), kind.startswith("pissa")
    cell = run_cell(book, 1 + list(KINDS).index(kind))
    seen = Seen(cell)
    expect(seen.text).to_contain_text("steered, c = +1.00")
    expect(seen.status).to_have_count(0)
    if records: expect(seen.reading).to_contain_text("measured")
    else: expect(seen.html.filter(has_text="Pass records=")).to_be_visible()
    for part, wanted in ((seen.handle, True), (seen.prompt, True), (seen.images.nth(0), records), (seen.picker, spectrum),
                         (seen.images.nth(1), spectrum), (seen.box("s_only"), spectrum)): shown(part, wanted)
    assert seen.button("Calibrate").is_enabled() == records
    cell.locator(".widget-vbox").first.screenshot(path=tmp_path / f"{kind}.png")

    text, doses = seen.text.inner_text(), seen.doses()
    for _ in range(6): seen.handle.press("ArrowRight")
    expect(seen.text).to_contain_text("steered, c = +1.30")
    if records: until(lambda: seen.doses() != doses, "the curve is drawn anew")
    until(lambda: len(seen.text.inner_text()) > 40, "there is text")
    expect(seen.status).to_have_count(0)

    text = seen.text.inner_text()
    seen.prompt.fill("Once upon a time")
    seen.button("Generate").click()
    until(lambda: seen.text.inner_text() != text, "the prompt is answered")
    expect(seen.status).to_have_count(0)
    seen.button("Close").click()
    expect(seen.html.filter(has_text="the model is free")).to_be_visible()
    assert not book.errors
