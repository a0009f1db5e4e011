"""Under test, every function of modlab checks its shapes and types; and fixtures for the tiny model."""
import os
import sys

import pytest
import torch
from jaxtyping import install_import_hook

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that would download is a mistake
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("MODLAB_SVD_CACHE", "0")  # tests leave nothing behind
os.environ["MODLAB_SVD_CACHE"] = "0"  # what an earlier run computed must not stand in for what this one should

assert "modlab" not in sys.modules, "modlab was imported before the hook that checks its types"
install_import_hook("modlab", "checked.beartype")


@pytest.fixture
def tiny():
    "(model, tokenizer): the tiny Llama, a fresh one for every test, since adapters write into models."
    from modlab.model.loading import tiny_model
    return tiny_model()


@pytest.fixture
def tiny_llama(tiny):
    "The tiny Llama alone."
    return tiny[0]


@pytest.fixture
def tiny_tok(tiny):
    "The tokenizer of the tiny Llama alone."
    return tiny[1]


@pytest.fixture
def one_thread():
    "For models so small that handing work to a second thread costs more than doing it."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def same_random_numbers():
    "What a test draws does not depend on which tests ran before it."
    torch.manual_seed(0)
