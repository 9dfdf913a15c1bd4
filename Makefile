# What a person types. Each target sets up its own virtual environment where none stands.
#   make demo      fine-tune a real model on a real task and show what it learned
#   make test      the tests (`make test-slow`: those that take minutes)
#   make lint      style and types
#   make sanitize  the kernels' own tests in C++, under AddressSanitizer and UndefinedBehaviorSanitizer
#   make bench     the figures of the README, beside the peers

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

# What the compiled kernels are made of: a change of one makes the next target install, and so build, them again.
CSRC    := src/deltaw/kernels/csrc
KERNELS := setup.py $(wildcard $(CSRC)/*)

.PHONY: demo test test-slow lint bench sanitize clean

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

# ---- the kernels under sanitizers: they and their tests as one program
CTESTS    := tests/kernels/csrc
SANITIZED := build/sanitize
SANITIZE  := $(shell cat $(CSRC)/compile_flags.txt) -O1 -g -Wall -Wextra -fopenmp -I$(CSRC) \
             -fsanitize=address,undefined -fno-sanitize-recover=undefined
OBJECTS   := $(patsubst %.cpp,$(SANITIZED)/%.o,$(notdir $(wildcard $(CSRC)/*.cpp) $(wildcard $(CTESTS)/*.cpp)))
vpath %.cpp $(CSRC) $(CTESTS)

sanitize: $(SANITIZED)/test_kernels
	ASAN_OPTIONS=allocator_may_return_null=1 $<

$(SANITIZED)/test_kernels: $(OBJECTS)
	$(CXX) $(SANITIZE) $^ -o $@

$(SANITIZED)/%.o: %.cpp $(wildcard $(CSRC)/*.h) $(wildcard $(CTESTS)/*.h) $(CSRC)/compile_flags.txt
	@mkdir -p $(SANITIZED)
	$(CXX) $(SANITIZE) -c $< -o $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml $(KERNELS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.dev: pyproject.toml $(KERNELS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

$(VENV)/.bench: pyproject.toml $(KERNELS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
