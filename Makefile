# Two commands for a fresh machine: `make quickstart` runs the main job, `make test` the tests.
# Each sets up everything it needs in ./.venv first. Only Python 3.11 or 3.12, pip and make are assumed.

PYTHON ?= $(shell command -v python3.12 >/dev/null 2>&1 && python3.12 -c 1 2>/dev/null && echo python3.12 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
# The core needs no torchvision and no CUDA; name another index or wheel for torch by TORCH=...
TORCH ?= torch>=2.11,<2.14

.PHONY: quickstart test lint bench clean

quickstart: $(VENV)/.installed
	$(BIN)/vistune quickstart

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 14) else "vistune needs Python 3.11 or newer, found " + sys.version.split()[0] + "; name one with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=24'
	$(BIN)/python -m pip install '$(TORCH)' -e '.[quickstart]'
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/.installed
	$(BIN)/python -m pip install --quiet '$(TORCH)' -e '.[quickstart,dev]'
	touch $@
