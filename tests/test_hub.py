"""Adapters by the name of a folder, or of a repository: on a Hub that is a local folder behind a server on the loopback."""
import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from models import adapter_of, build

from modlab import ModulatedLoRA, load_adapter, read_metadata, to_peft

pytestmark = pytest.mark.usefixtures("one_thread")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    "The two requests that a download makes: which version is there, and the bytes of it."
    folder: Path

    def answer(self, body: bool) -> None:
        repository, _, name = self.path.lstrip("/").partition("/resolve/main/")
        file = self.folder / repository / name
        if not file.is_file(): return self.missing("EntryNotFound" if (self.folder / repository).is_dir() else "RepoNotFound")
        data = file.read_bytes()
        self.send_response(200)
        self.say({"X-Repo-Commit": COMMIT, "ETag": hashlib.sha256(data).hexdigest(), "Content-Length": len(data)})
        if body: self.wfile.write(data)

    def missing(self, code: str) -> None:
        self.send_response(404)
        self.say({"X-Error-Code": code, "Content-Length": 0})

    def say(self, headers: dict) -> None:
        for key, value in headers.items(): self.send_header(key, str(value))
        self.end_headers()

    def do_HEAD(self): self.answer(body=False)
    def do_GET(self): self.answer(body=True)
    def log_message(self, *args): pass


def address(monkeypatch, port: int) -> None:
    "Where the client looks for the Hub."
    here = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(constants, "ENDPOINT", here)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", here + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A folder whose subfolders are repositories; the client is told that this is the Hub, and keeps its copies elsewhere."
    folder = tmp_path / "hub"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Local", (Hub,), {"folder": folder}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address(monkeypatch, server.server_port)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield folder
    server.shutdown()
    server.server_close()
    thread.join()


def publish(folder: Path, name: str, seed: int = 0) -> ModulatedLoRA:
    "A trained-looking adapter, saved under a name."
    adapter = adapter_of("lora", build(), r=4)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters(): p.copy_(torch.randn(p.shape, generator=g))
    folder.mkdir(parents=True, exist_ok=True)
    adapter.save(folder / name)
    return adapter


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("load", [load_adapter, ModulatedLoRA.from_checkpoint])
def test_by_the_name_of_a_repository(hub, load):
    a = publish(hub / "user" / "name", "adapter.safetensors")
    b = load(build(), "user/name")
    assert same(a.A, b.A) and same(a.B, b.B)
    assert read_metadata("user/name")["kind"] == "lora"


def test_one_of_several_files_of_a_repository(hub):
    publish(hub / "user" / "name", "adapter.safetensors", seed=0)
    a = publish(hub / "user" / "name" / "rounds", "two.safetensors", seed=1)
    assert same(a.A, load_adapter(build(), "user/name/rounds/two.safetensors").A)


def test_what_was_fetched_once_is_there_without_a_network(hub, monkeypatch):
    a = publish(hub / "user" / "name", "adapter.safetensors")
    load_adapter(build(), "user/name")
    address(monkeypatch, port=9)  # nobody is there
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same(a.A, load_adapter(build(), "user/name").A)


@pytest.mark.parametrize("name, why", [
    ("user/name", "no adapter.safetensors in a repository of that name on the Hub .*EntryNotFound"),
    ("user/other", "no adapter.safetensors .*RepositoryNotFound"), ("user/name/three.safetensors", "no three.safetensors")])
def test_what_the_hub_has_not_is_named(hub, name, why):
    (hub / "user" / "name").mkdir(parents=True)
    model = build()
    with pytest.raises(FileNotFoundError, match=f"user/.*nothing of that name here, and {why}"): load_adapter(model, name)


def test_a_folder_that_exists_is_not_looked_for_on_the_hub(hub, tmp_path, monkeypatch):
    publish(hub / "user" / "name", "adapter.safetensors", seed=0)
    a = publish(tmp_path / "user" / "name", "adapter.safetensors", seed=1)
    monkeypatch.chdir(tmp_path)
    assert same(a.A, load_adapter(build(), "user/name").A)


def test_a_path_is_never_looked_for_on_the_hub(hub, tmp_path, monkeypatch):
    publish(hub / "user" / "name", "adapter.safetensors")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"): load_adapter(build(), Path("user/name"))
    with pytest.raises(FileNotFoundError, match="no such file"): load_adapter(build(), "runs/a.safetensors")


# ---- folders ----

def test_saved_into_a_folder_and_loaded_from_it(tmp_path):
    a = publish(tmp_path, ".")
    assert [p.name for p in tmp_path.iterdir()] == ["adapter.safetensors"]
    assert same(a.A, load_adapter(build(), tmp_path).A) and read_metadata(tmp_path)["r"] == 4
    a.load(tmp_path)


def test_the_only_file_of_a_folder_and_the_usual_one_among_others(tmp_path):
    one = publish(tmp_path, "one.safetensors", seed=1)
    assert same(one.A, load_adapter(build(), tmp_path).A)
    usual = publish(tmp_path, "adapter.safetensors", seed=2)
    assert same(usual.A, load_adapter(build(), tmp_path).A)


def test_a_folder_that_is_not_clear_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"its other safetensors files are \[\]"): load_adapter(build(), tmp_path)
    for name in ("b.safetensors", "a.safetensors"): publish(tmp_path, name)
    with pytest.raises(FileNotFoundError, match=r"\['a.safetensors', 'b.safetensors'\]: name one"):
        load_adapter(build(), tmp_path)


def test_a_folder_of_peft_is_told_apart(tmp_path):
    to_peft(adapter_of("lora", build(), r=4), tmp_path / "peft")
    with pytest.raises(OSError, match=r"holds a PEFT adapter, which from_peft\(model, path\) reads"):
        load_adapter(build(), tmp_path / "peft")
