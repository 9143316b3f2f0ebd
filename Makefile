# Everything runs in .venv, made from the versions in constraints.txt.
PYTHON ?= python3.11
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
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
