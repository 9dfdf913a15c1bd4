# What a person types. Each target sets up its own virtual environment where none stands.
#   make demo    fine-tune a real model on a real task and show what it learned
#   make test    the tests (`make test-slow`: those that take minutes)
#   make lint    style and types
#   make bench   the figures of the README, beside the peers

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test test-slow lint bench clean

demo: $(VENV)/.run
	precision=$$($(BIN)/python -c "from deltaw.kernels import loader; print('fp32' if loader.why_not() else 'int8')") \
	&& $(BIN)/deltaw train examples/demo.yaml --precision $$precision \
	&& $(BIN)/deltaw eval runs/demo --precision $$precision --base --answers 6 --general 6
	@cat examples/next-steps.txt

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/sft.py

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

$(VENV)/.bench: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
