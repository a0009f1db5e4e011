"""Prompts as token ids: special tokens that are appended, assistant turns that go on, whatever a tokenizer or template throws."""
import pytest
import torch
from models import adapter_of, build
from tokenizers import processors

from modlab import batches, capture_activations, contrast, encode, heal, kl_curve
from modlab.learn.contrast import ContrastConfig
from modlab.learn.heal import HealConfig
from modlab.model.text import Batch, encode_records, prompt_ids

pytestmark = pytest.mark.usefixtures("one_thread")
USER, DRAFT = {"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "With"}
PAIR = dict(prompt="Tea? ", cho="Milk.", rej="Lemon.")


def marking(tok, template):
    "The tokenizer, with special tokens around every text."
    ids = [(mark, tok.convert_tokens_to_ids(mark)) for mark in ("<bos>", "<eos>", "<pad>")]
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return tok


@pytest.mark.parametrize("template, before", [("<bos> $A <eos>", "<bos>"), ("$A <eos>", ""), ("<bos> $A", "<bos>"), ("$A", ""),
                                              ("<bos> <pad> $A <eos> <eos>", "<bos><pad>")])
@pytest.mark.parametrize("text", ["Hello", "a", "<eos>", "a<eos>", "<bos><eos><bos>", " \n"])
def test_appended_special_tokens_are_no_part_of_the_prompt(tiny_tok, template, before, text):
    tok = marking(tiny_tok, template)
    ids, n_prompt = encode(tok, text, " you")
    assert tok.decode(ids[:n_prompt]) == before + text and tok.decode(ids[n_prompt:]) == " you"


@pytest.mark.parametrize("template, ids", [("<bos> $A <eos>", [0]), ("$A <eos>", []), ("<bos> $A", [0]), ("$A", [])])
def test_an_empty_prompt_keeps_what_comes_before_it(tiny_tok, template, ids):
    assert prompt_ids(marking(tiny_tok, template), "") == ids


def test_a_chat_gets_no_special_tokens(tiny_tok):
    assert tiny_tok.decode(prompt_ids(marking(tiny_tok, "<bos> $A <eos>"), [USER])) == "<|user|>Tea?\n<|assistant|>"


@pytest.mark.parametrize("content", ["With", "With ", "", "Tea?", "With\n\nmilk"])
def test_an_assistants_turn_is_continued(tiny_tok, content):
    messages = [USER, dict(DRAFT, content=content)]
    assert tiny_tok.decode(prompt_ids(tiny_tok, messages)) == f"<|user|>Tea?\n<|assistant|>{content}"
    assert messages == [USER, dict(DRAFT, content=content)], "the record is left as it is"
    ids, n_prompt = encode(tiny_tok, messages, " milk.")
    assert tiny_tok.decode(ids[n_prompt:]) == " milk."


def test_any_other_last_turn_opens_the_assistants(tiny_tok):
    for messages in ([USER], [USER, DRAFT, USER], [{"role": "system", "content": "Be brief."}]):
        assert tiny_tok.decode(prompt_ids(tiny_tok, messages)).endswith("<|assistant|>")


BROKEN = {"a lone surrogate in the prompt": dict(prompt="\ud83d"), "in an answer": dict(rej="x\udc00"),
          "in a message": dict(prompt=[{"role": "user", "content": "\ud83d"}]),
          "a template's TypeError": dict(prompt=[{"role": "user", "content": 3}]),
          "a template's own refusal": dict(prompt=[{"role": "nobody", "content": "x"}]),
          "an assistant's turn that is no text": dict(prompt=[USER, dict(DRAFT, content=None)])}


@pytest.fixture
def strict(tiny_tok):
    "A tokenizer with a template that concatenates, so that a number is a TypeError, and that refuses a role."
    tiny_tok.chat_template = ("{% for m in messages %}"
                              "{% if m['role'] == 'nobody' %}{{ raise_exception('what role?') }}{% endif %}"
                              "{{ m['role'] + ': ' + m['content'] }}\n{% endfor %}")
    return tiny_tok


@pytest.mark.parametrize("kind", BROKEN)
def test_whatever_is_thrown_comes_out_with_the_records_number(strict, kind):
    records = [PAIR, PAIR, PAIR | BROKEN[kind]]
    with pytest.raises(ValueError, match="^record 2: .*refuses"): encode_records(strict, records, "cho")
    model = build()
    a = adapter_of("lora", model)
    for f in (lambda: list(batches(strict, records, "rej")), lambda: capture_activations(model, strict, records),
              lambda: kl_curve(model, strict, a, records, [0.0])):
        with pytest.raises(ValueError, match="record 2: .*refuses"): f()
    with pytest.raises(ValueError, match=" 2.* refuses"): contrast(model, strict, a, records, cfg=ContrastConfig(val_frac=0))
    samples = [dict(prompt=r["prompt"], completion=r["rej"]) for r in records]
    with pytest.raises(ValueError, match=" 2.* refuses"): heal(model, strict, samples, cfg=HealConfig(min_train=1))


def test_a_tokenizer_that_moves_the_text_is_refused(tiny_tok):
    class Odd(type(tiny_tok)):
        def __call__(self, text, add_special_tokens=True):
            found = super().__call__(text, add_special_tokens=False)
            if add_special_tokens: found["input_ids"] = found["input_ids"][::-1]
            return found
    tiny_tok.__class__ = Odd
    with pytest.raises(ValueError, match="not around it; give chat messages"): prompt_ids(tiny_tok, "ab")


def test_a_batch_prints_no_tensor(tiny_tok):
    batch, = batches(tiny_tok, [PAIR, PAIR], "cho")
    assert repr(batch) == "Batch(2 sequences of up to 10 tokens, 10 completion tokens)"
    assert batch == batch and batch != Batch(batch.input_ids, batch.attention_mask, torch.zeros_like(batch.is_target))
