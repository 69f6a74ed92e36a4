# Needs Python >= 3.11 and make. Every target installs what it needs into .venv first.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install demo study-small test test-fast test-gpu lint docs bench clean

VENV := .venv
BIN := $(VENV)/bin
EXTRAS := openvino,onnx,eval,report,dev,docs
# Give PYTHON=... for another interpreter, TORCH_ARGS=... for pip options of the torch install
# alone (an index of CPU builds, say), ARGS=... for options of demo, study-small, test and bench.
PYTHON ?=
TORCH_ARGS ?=
ARGS ?=

# After the install nothing here reads the network.
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

install: $(VENV)/.installed ## the package and everything it needs, pinned, into .venv

demo: $(VENV)/.installed ## quantize, run and score the bundled CIFAR-10 model
	@$(BIN)/quantempo demo $(ARGS)

study-small: $(VENV)/.installed ## every table and figure of the paper, small, on the bundled model
	@$(BIN)/python -m studies.ptq4dm --small --compare none --out runs/study-small $(ARGS)

test: $(VENV)/.installed ## all tests
	@$(BIN)/python -m pytest -q -n auto $(ARGS)

test-fast: $(VENV)/.installed ## tests for a commit: no compiled GPU kernels, studies, long runs
	@$(BIN)/python -m pytest -q -n auto -m "not (compiled or study or slow)" $(ARGS)

test-gpu: $(VENV)/.installed ## tests that need a CUDA device, each by its name
	@$(BIN)/python -c "import sys, torch; torch.cuda.is_available() or sys.exit('make: no CUDA device')"
	@$(BIN)/python -m pytest -v -m cuda $(ARGS)

lint: $(VENV)/.installed ## ruff check, ruff format --check, mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

docs: $(VENV)/.installed ## the pages as a site in build/site, any warning an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build 2>&1 | { grep -v ^INFO || true; }

bench: $(VENV)/.installed ## time the int8 engines against float32 and bfloat16
	@[ -d runs/demo/packed ] || $(BIN)/quantempo demo
	@$(BIN)/quantempo bench --run runs/demo $(ARGS)

clean: ## remove .venv, caches and built packages (keeps runs/)
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src studies tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml constraints.txt
	@set -- $(PYTHON); \
	[ $$# -gt 0 ] || set -- python3.11 python3 python3.12 python3.13; \
	for python in "$$@"; do \
	  "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	  echo "installing into $(VENV) with $$("$$python" --version), a few minutes the first time"; \
	  "$$python" -m venv $(VENV) || { echo "make: '$$python -m venv' failed; install the venv" \
	    "module of that Python (python3-venv on Debian)" >&2; exit 1; }; \
	  exit 0; \
	done; \
	echo "make: no Python >= 3.11 among: $$*; install one or run make PYTHON=/path/to/python" >&2; \
	exit 1
	@$(BIN)/python -m pip install -qq -c constraints.txt $(TORCH_ARGS) torch
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[$(EXTRAS)]'
	@# CPU builds of torch bring no Triton, which the tests of the GPU kernels interpret and compile;
	@# 3.6.0 is what docs/gpu.md was measured with, and its interpreter needs NumPy before 2.4.
	@$(BIN)/python -c 'import triton' 2>/dev/null || \
	  $(BIN)/python -m pip install -qq --no-deps triton==3.6.0
	@touch $@
