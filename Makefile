# Everything runs in .venv, made from the versions in constraints.txt; PINS= takes the newest.
PYTHON ?= python3.11
PINS ?= --constraint constraints.txt
BIN := .venv/bin

.PHONY: quickstart test lint wheel clean

quickstart: .venv/made
	$(BIN)/python examples/quickstart.py

test: .venv/made
	$(BIN)/pytest

lint: .venv/made
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: .venv/made
	$(BIN)/python -m build --wheel --outdir dist .

clean:
	rm -rf .venv dist build *.egg-info

.venv/made: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(PINS) --editable '.[dev]'
	touch $@
