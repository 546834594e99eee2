# Every target does its own set-up, once: `make demo` on a fresh machine needs Python 3.11 or newer and nothing else.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV ?= .venv
JOBS ?= 2
PROMPT ?= a red circle left of a blue square
OUT ?= out

BIN := $(VENV)/bin
# Two engines' worth of threads on two cores is one each; a test run never fights itself for them.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
# A process in which `import torch` fails, and diffusers' and transformers' imports too: what draws needs none of them.
NO_MODEL_CODE := import sys; sys.modules.update(torch=None, diffusers=None, transformers=None); \
	from mc_runtime.cli.main import main; main()

.PHONY: help demo test test-all lint bench train setup clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

demo: $(BIN)/.ready-build  ## a picture from the shipped checkpoint: set up, build its bundle, draw without torch
	@mkdir -p $(OUT)
	@echo "== building the demo's bundle (kept in the cache: the next time this takes a second)"
	@$(BIN)/mc-runtime inspect demo
	@echo "== drawing \"$(PROMPT)\" in a process that cannot import torch, diffusers or transformers"
	@$(BIN)/python -c '$(NO_MODEL_CODE)' generate demo "$(PROMPT)" -o $(OUT)/demo.png --canvas-map $(OUT)/demo-canvas.png
	@echo "the picture:    $(abspath $(OUT)/demo.png)"
	@echo "its canvas map: $(abspath $(OUT)/demo-canvas.png)"

# A file stays in one process, so that what its tests share is built once.
test: $(BIN)/.ready-dev  ## the tests
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not matrix" $(ARGS)

test-all: $(BIN)/.ready-dev  ## all tests, with those of every backbone's whole bundle (half an hour on two cores)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

lint: $(BIN)/.ready-dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(BIN)/.ready-dev  ## all benchmarks, against the torch reference (ARGS=--quick for a minute's proof that they run)
	$(BIN)/python -m benchmarks.run $(ARGS)

train: $(BIN)/.ready-dev  ## train the demo checkpoint again, from scratch, into out/shapes/checkpoint
	$(BIN)/python -m examples.shapes.train $(ARGS)

setup: $(BIN)/.ready-dev  ## only the environment

clean:  ## remove the environment and what `make demo` wrote; the cache stays
	rm -rf $(VENV) $(OUT)

# torch goes first and by its exact number, or the resolver may take gigabytes of CUDA packages for it.
$(BIN)/.ready-build: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python found: install Python 3.11 or newer, or say PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is too old: install Python 3.11 or newer, or say PYTHON=..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0 -c constraints.txt
	$(BIN)/python -m pip install --quiet -e ".[build,cpu,openvino]" -c constraints.txt
	@touch $@

$(BIN)/.ready-dev: $(BIN)/.ready-build
	$(BIN)/python -m pip install --quiet -e ".[build,cpu,openvino,dev]" -c constraints.txt
	@touch $@
