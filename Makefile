# One virtual environment, .venv, serves every target. A stamp file in it says which extra is
# installed; it is older than pyproject.toml or constraints.txt when that has to happen again.

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin

# The suite runs torch in every worker: more workers than this only fight over memory.
TEST_WORKERS ?= 8

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test lint bench sanitize clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' Makefile
	@echo '  Options:     ARGS="..." is handed on to demo, test and bench; PYTHON=python3.12 picks the interpreter'

demo: $(VENV)/.stamp-demo ## Watch a network grow dendrites
	$(BIN)/pbfx demo $(ARGS)

test: $(VENV)/.stamp-dev ## Run the tests; those marked gpu run where a GPU is
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses $(TEST_WORKERS) $(ARGS)

lint: $(VENV)/.stamp-dev ## Check style, format, types and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/codespell

bench: $(VENV)/.stamp-bench ## Run the benchmarks
	$(BIN)/python -m benchmarks $(ARGS)

# Torch's own allocator would hand out memory that goes on past the end of a tensor. Errors of CUDA's
# API are torch's business, which makes some on purpose.
sanitize: $(VENV)/.stamp-dev ## Look for bad accesses in small cases of the kernels, on a GPU
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 9 \
	  $(BIN)/python -m pytest -m gpu -p no:cacheprovider -q @tests/gpu/sanitized.txt

clean: ## Remove caches, build output and the .venv that make made
	rm -rf build dist *.egg-info kernels/*.egg-info .hypothesis .pytest_cache .ruff_cache .coverage
	find . -path ./$(VENV) -prune -o -path ./.git -prune -o -type d -name __pycache__ -exec rm -rf {} +
	@if [ -e $(VENV)/.stamp-venv ]; then echo 'rm -rf $(VENV)'; rm -rf $(VENV); fi

$(VENV)/.stamp-%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing pbfx[$*] into $(VENV); the first time this can take a few minutes (torch is large)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip --default-pip >/dev/null
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[$*]'
	@# The dev extra holds the others.
	@if [ $* = dev ]; then touch $(VENV)/.stamp-demo $(VENV)/.stamp-bench; fi
	@touch $@

$(BIN)/python:
	@command -v "$(PYTHON)" >/dev/null 2>&1 || { \
	  echo "pbfx: no interpreter '$(PYTHON)' found; install Python 3.11 to 3.13, or name one: make PYTHON=/path/to/python3.12"; exit 1; } >&2
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "pbfx: needs Python 3.11 to 3.13, but '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1); name another: make PYTHON=python3.12"; exit 1; } >&2
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "pbfx: '$(PYTHON)' lacks the venv module; install it (Debian and Ubuntu: apt install python3-venv) or name another: make PYTHON=..."; exit 1; } >&2
	@echo "Making a virtual environment in $(VENV) with $$("$(PYTHON)" --version)"
	@"$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
	@touch $(VENV)/.stamp-venv
