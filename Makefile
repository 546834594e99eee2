# Every target does its own set-up, once: `make demo` on a fresh machine needs Python 3.11 or newer and nothing else.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV ?= .venv
JOBS ?= 2
OUT ?= out

BIN := $(VENV)/bin
# Two engines' worth of threads on two cores is one each; a test run never fights itself for them.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
# A process in which `import torch` fails, and diffusers' and transformers' imports too: what draws needs none of them.
NO_MODEL_CODE := import sys; sys.modules.update(torch=None, diffusers=None, transformers=None); \
	from mc_runtime.cli.main import main; main()

.PHONY: help demo demo-edit demo-video test test-all lint bench train setup clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

# Draws $(PROMPT) with the shipped checkpoint that has the target's name, into a file with suffix $(1), with the options $(2).
define draw
	@mkdir -p $(OUT)
	@echo "== building the bundle of $@ (kept in the cache: the next time this takes a second)"
	@$(BIN)/mc-runtime inspect $@
	@echo "== drawing \"$(PROMPT)\" in a process that cannot import torch, diffusers or transformers"
	@$(BIN)/python -c '$(NO_MODEL_CODE)' generate $@ "$(PROMPT)" -o $(OUT)/$@.$(1) --canvas-map $(OUT)/$@-canvas.png $(2)
	@echo "the result:     $(abspath $(OUT)/$@.$(1))"
	@echo "its canvas map: $(abspath $(OUT)/$@-canvas.png)"
endef

demo: PROMPT ?= a red circle left of a blue square
demo: $(BIN)/.ready-build  ## a picture from the shipped checkpoint: set up, build its bundle, draw without torch
	$(call draw,png)

demo-edit: PROMPT ?= make the red circle blue
demo-edit: IMAGE ?= examples/shapes/edit/input.png
demo-edit: $(BIN)/.ready-build  ## the same for the checkpoint that edits a picture (IMAGE=...)
	$(call draw,png,--image $(IMAGE))

demo-video: PROMPT ?= a red circle moves to the right
demo-video: $(BIN)/.ready-build  ## the same for the checkpoint that makes videos
	$(call draw,gif)

# A file stays in one process, so that what its tests share is built once.
test: $(BIN)/.ready-dev  ## the tests
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not matrix" $(ARGS)

test-all: $(BIN)/.ready-dev  ## all tests, with those of every backbone's whole bundle (more than an hour on two cores)
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
