"""Under test, every function of modlab checks its shapes and types; and fixtures for the tiny model."""
import os
import sys

import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that would download is a mistake
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")

assert "modlab" not in sys.modules, "modlab was imported before the hook that checks its types"
install_import_hook("modlab", "beartype.beartype")


@pytest.fixture
def tiny():
    "(model, tokenizer): the tiny Llama, a fresh one for every test, since adapters write into models."
    from modlab.models import tiny_model
    return tiny_model()


@pytest.fixture
def tiny_llama(tiny):
    "The tiny Llama alone."
    return tiny[0]


@pytest.fixture
def tiny_tok(tiny):
    "The tokenizer of the tiny Llama alone."
    return tiny[1]
