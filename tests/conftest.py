"""Under test, every function of modlab checks its shapes and types; and fixtures for the tiny model."""
import logging
import os
import sys
from importlib.util import find_spec

if "PYTEST_XDIST_WORKER" in os.environ: os.environ["OMP_NUM_THREADS"] = "1"  # threads of two workers wait for each other
if "MODLAB_TEST_DEVICE" not in os.environ: os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same tests on every machine

import pytest
import torch
from jaxtyping import install_import_hook

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that would download is a mistake
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("MODLAB_SVD_CACHE", "0")  # tests leave nothing behind
os.environ["MODLAB_SVD_CACHE"] = "0"  # what an earlier run computed must not stand in for what this one should

assert "modlab" not in sys.modules, "modlab was imported before the hook that checks its types"
CHECKED = find_spec("beartype") is not None
if CHECKED: install_import_hook("modlab", "checked.beartype")


def pytest_report_header() -> str:
    types = "types are checked" if CHECKED else "types are NOT checked, since beartype is missing"
    return f"modlab: on {os.environ.get('MODLAB_TEST_DEVICE', 'cpu')}, {types}"


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


@pytest.fixture(autouse=True)
def same_logging():
    "Nor does what it logs."
    before, level = logging.root.manager.disable, logging.getLogger("modlab").level
    yield
    logging.disable(before)
    logging.getLogger("modlab").setLevel(level)
