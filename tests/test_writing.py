"""Texts at doses: each is the one that it would be alone, and its divergence is that of the model's own logits."""
import pandas as pd
import pytest
import torch
from models import ARCHS, DEVICE, KINDS, adapter_of, build, changes, half, hooks, logits, state
from tokenizers import Tokenizer
from tokenizers import models as kinds
from transformers import PreTrainedTokenizerFast

from modlab import generate_at, tiny_model
from modlab.maths.divergence import kl_rev
from modlab.model.rows import NoRows
from modlab.model.text import prompt_ids

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = ["Who?", "What would you rather have, tea or coffee?", "Hm."]
CHAT = [dict(role="user", content="Who?")]


def letters():
    "A tokenizer for the small vocabularies of `models`: a letter is a token, and there is no chat template."
    vocab = {token: n for n, token in enumerate(["<pad>", "<bos>", "<eos>", *map(chr, range(32, 125))])}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(kinds.BPE(vocab=vocab, merges=[])), bos_token="<bos>",
                                   eos_token="<eos>", pad_token="<pad>")


def at(model, tok, adapter, prompts=PROMPTS, cs=(-3.0, 0.0, 3.0), **kw):
    return generate_at(model, tok, adapter, prompts, list(cs), **dict(max_new_tokens=6, progress=False) | kw)


@pytest.mark.parametrize("arch", [*ARCHS, "qwen3", "gemma3"])
def test_a_text_is_that_of_a_batch_of_its_own(arch):
    model, tok = build(arch), tiny_model()[1] if arch == "llama" else letters()
    adapter = half("lora", model)
    table = at(model, tok, adapter, batch_size=4)
    assert table.columns.tolist() == ["prompt", "c", "sample", "text", "n_tokens", "kl"] and len(table) == 9
    for row in table.itertuples():
        ids = torch.tensor([prompt_ids(tok, row.prompt)], device=DEVICE)
        with adapter(model, row.c):
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0)
        new = out[0, ids.shape[1]:]
        stop = (new == 2).nonzero()[:1].flatten().tolist() if arch != "llama" else []
        new = new[:stop[0] + 1] if stop else new
        assert tok.batch_decode([new.tolist()], skip_special_tokens=True) == [row.text] and row.n_tokens == len(new)
        rows = slice(ids.shape[1] - 1, ids.shape[1] - 1 + len(new))
        with adapter(model, row.c): dosed = logits(model, out)[0, rows]
        assert abs(kl_rev(dosed, logits(model, out)[0, rows]).mean().item() - row.kl) < 1e-5 * max(1, row.kl)
    assert table.kl[table.c == 0].eq(0).all() and table.text.nunique() > 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_stays_behind(kind, dtype):
    model, tok = build(dtype=dtype), tiny_model()[1]
    adapter = half(kind, model, init=(0.3, 0.5)) if kind.startswith("pissa") else half(kind, model)
    before = state(model)
    model.train()
    table = at(model, tok, adapter)
    assert model.training and not changes(before, model) and not adapter.attached and adapter.c == 0
    assert table.kl[table.c == 0].abs().max() < (1e-6 if dtype == torch.float32 else 1e-2) and table.kl.max() > 1e-3


@pytest.fixture
def case():
    model = build()
    return model, tiny_model()[1], adapter_of("lora", model)


def test_an_end_counts_and_ends(case):
    model, tok, adapter = case
    free = at(model, tok, adapter, PROMPTS[:1], [0.0])
    ids = torch.tensor([prompt_ids(tok, PROMPTS[0])], device=DEVICE)
    third = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] + 2].item()
    cut = at(model, tok, adapter, PROMPTS, [0.0, 1.0], eos_token_id=[third, 1])
    assert cut.n_tokens[0] <= 3 and free.n_tokens[0] == 6 and cut.n_tokens.max() <= 6 and cut.kl.notna().all()


def test_samples_are_drawn_apart_and_alike_at_every_dose(case):
    model, tok, adapter = case
    table = at(model, tok, adapter, cs=[0.0, 0.0, 2.0], samples=3, temperature=1.0)
    texts = table.pivot_table(index=["prompt", "sample"], columns="c", values="text", aggfunc=list)
    assert all(len(set(zeros)) == 1 for zeros in texts[0.0]) and table.text.nunique() >= 9
    again = at(model, tok, adapter, PROMPTS[::-1], [2.0], samples=2, temperature=1.0, batch_size=1)
    known = table.set_index(["prompt", "c", "sample"]).text
    assert all(known[row.prompt, 2.0, row.sample] == row.text for row in again.itertuples())
    other = at(model, tok, adapter, cs=[2.0], samples=2, temperature=1.0, seed=1)
    assert not any(known[row.prompt, 2.0, row.sample] == row.text for row in other.itertuples())
    state_of_torch = torch.get_rng_state()
    at(model, tok, adapter, temperature=1.0)
    assert torch.equal(state_of_torch, torch.get_rng_state())


def test_a_low_temperature_is_nearly_greedy(case):
    model, tok, adapter = case
    assert at(model, tok, adapter, temperature=1e-4).text.equals(at(model, tok, adapter).text)


def test_what_the_model_would_do_by_default_is_not_done(case):
    model, tok, adapter = case
    plain = at(model, tok, adapter)
    model.generation_config.do_sample, model.generation_config.temperature, model.generation_config.num_beams = True, 2.0, 2
    model.generation_config.top_p, model.generation_config.top_k = 0.5, 5
    assert at(model, tok, adapter).equals(plain)


def test_chats_take_the_template_and_texts_do_not(case):
    model, tok, adapter = case
    as_text = tok.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    both = at(model, tok, adapter, [CHAT, as_text, "Who?"], [1.0])
    assert both.text[0] == both.text[1] != both.text[2] and both["prompt"][0] == CHAT
    tok.chat_template = None
    assert at(model, tok, adapter, ["Who?"], [1.0]).text[0] == both.text[2]
    with pytest.raises(ValueError, match="prompt 1: .*no chat template"): at(model, tok, adapter, ["Who?", CHAT])


def test_wrapped_models_write_the_same(case):
    model, tok, adapter = case
    assert at(torch.nn.DataParallel(model), tok, adapter).equals(at(model, tok, adapter))
    assert at(model, tok, adapter, pd.Series(PROMPTS, index=[5, 6, 7])).equals(at(model, tok, adapter))


@pytest.mark.parametrize("change, said", [
    (dict(prompts="Who?"), "give \\[prompt\\]"), (dict(prompts=CHAT), "give \\[prompt\\]"), (dict(prompts=[]), "must be a list"),
    (dict(prompts=["a", ""]), "prompt 1 has no token"), (dict(cs=[]), "at least one"),
    (dict(prompts=[[dict(role="user")]]), "prompt 0: message 0"), (dict(cs=[float("nan")]), "finite"),
    (dict(samples=2), "temperature=1.0"), (dict(samples=0), "samples"), (dict(temperature=-1.0), "temperature"),
    (dict(temperature=float("nan")), "temperature"), (dict(max_new_tokens=0), "max_new_tokens"),
    (dict(batch_size=0), "batch_size"),
    (dict(do_sample=True), "decides do_sample"), (dict(num_return_sequences=2), "num_return_sequences")])
def test_bad_arguments_are_told(case, change, said):
    model, tok, adapter = case
    with pytest.raises(ValueError, match=said): at(model, tok, adapter, **change)
    assert not adapter.attached and not hooks(model)


def test_a_stop_in_the_middle_leaves_the_model_alone(case, monkeypatch):
    model, tok, adapter = case
    monkeypatch.setattr(type(model), "generate", lambda *a, **kw: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): at(model, tok, adapter)
    assert not adapter.attached and not hooks(model)


def test_one_dose_per_batch_serves_layers_that_cannot_tell_rows_apart(tiny, monkeypatch):
    from modlab.adapters import hooks
    model, tok = tiny
    a = adapter_of("lora", model)
    def blind(name, x, n, rows): raise NoRows(f"{name} sees no rows")
    wanted = generate_at(model, tok, a, ["one", "two"], [1.0, -2.0], max_new_tokens=4)
    monkeypatch.setattr(hooks, "check_rows", blind)
    with pytest.raises(NoRows): generate_at(model, tok, a, ["one", "two"], [1.0, -2.0], max_new_tokens=4)
    found = generate_at(model, tok, a, ["one", "two"], [1.0, -2.0], max_new_tokens=4, batch_size=1)
    assert found.text.tolist() == wanted.text.tolist() and (found.kl - wanted.kl).abs().max() < 1e-6
