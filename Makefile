# `make demo`, `make test` and `make check` each start from a bare checkout: Python 3.11+, make and pip's index.

PYTHON ?= python3
# pip's newest torch may bring gigabytes of CUDA packages; this one is what the project is tested with.
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=
DEMO_PROMPT ?= Explain in two sentences why the sky is blue.

VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
INSTALLING := $(VENV)/.installing
MODEL := models/smollm2-135m-instruct

# The prompt reaches the shell through the environment, and through `value` so that make leaves its dollar signs.
override DEMO_PROMPT := $(value DEMO_PROMPT)
export DEMO_PROMPT

MAKEFLAGS += --no-print-directory # the test runner's closing line stays the last one
.DEFAULT_GOAL := help
.PHONY: help demo test check format clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile

demo: $(INSTALLED) $(MODEL)/config.json ## answer DEMO_PROMPT="..." through the split
	@$(RUN) -m asynctsqp.tee --model $(MODEL) --chat --prompt="$$DEMO_PROMPT" --max-new-tokens 128

test: $(INSTALLED) $(MODEL)/config.json ## run the test suite (PYTEST_ARGS="-k shm -x" narrows it)
	@$(RUN) -m pytest $(PYTEST_ARGS)

check: $(INSTALLED) ## formatting, lint and types, nothing changed
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

format: $(INSTALLED) ## format, and fix what the linter can
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

clean: ## remove everything that make has made: the environment, the model, caches
	rm -rf $(VENV) models build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The marker says that an install has begun and not ended: pip cannot tell a half-copied package from a whole
# one, so what an interrupted run left is thrown away. It becomes the stamp by one rename.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'error: Python 3.11 or newer is needed: make PYTHON=python3.12' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null \
		|| { echo 'error: $(PYTHON) cannot make a virtual environment: apt install python3-venv' >&2; exit 1; }
	@if [ -e $(INSTALLING) ]; then rm -rf $(VENV); fi
	@echo 'installing into $(VENV): some minutes, once' >&2
	@$(PYTHON) -m venv $(VENV)
	@touch $(INSTALLING)
	@$(RUN) -m pip install --quiet --disable-pip-version-check '$(TORCH)'
	@$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[dev]' '$(TORCH)'
	@mv $(INSTALLING) $@

$(MODEL)/config.json: | $(INSTALLED)
	@$(RUN) -m benchmarks.demo_model $(MODEL)
