# Two commands are all the set-up a user does: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNTIME := $(VENV)/.installed
STAMP := $(VENV)/.installed-dev
# Tests run in several processes; many more would only wait for the disk.
WORKERS := --numprocesses auto --maxprocesses 4 --dist worksteal
LINT := $(wildcard journal replay cdp bench tests)

.DEFAULT_GOAL := help
.PHONY: help setup packages demo test lint format bench soak test-crash test-vm fuzz clean

help:
	@echo "make demo        a disk protected, damaged and rolled back, in a minute; no root needed"
	@echo "make test        the test suite, installing what it needs"
	@echo "make lint        ruff, mypy and the layering contracts"
	@echo "make bench       measurements; see bench/README.md"
	@echo "make test-crash  power cuts, kills and damage at every place; hours"
	@echo "make soak        everything at once beside a model, ten minutes or ARGS=--minutes=600"
	@echo "make test-vm     kernel client and file systems in a guest under qemu"
	@echo "make fuzz        open-ended search, up to an hour"
	@echo "make clean       removes environments and caches"

# A venv that exists but is not stamped is completed, not recreated.
$(RUNTIME): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "setup: needs Python 3.11 or later, and $(PYTHON) is" \
	        "$$($(PYTHON) -V 2>/dev/null || echo missing); name another: make PYTHON=python3.12" >&2; \
	    exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "setup: $(PYTHON) cannot create virtual environments;" \
	        "install them with: sudo apt-get install python3-venv" >&2; \
	    exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setup: installing Python packages into $(VENV)"
	@$(BIN)/python -m pip --disable-pip-version-check install -qq -e .
	@touch $@

$(STAMP): pyproject.toml $(RUNTIME)
	@echo "setup: installing tools for tests into $(VENV)"
	@$(BIN)/python -m pip --disable-pip-version-check install -qq -e '.[dev]'
	@touch $@

packages:
	@deploy/install-packages deploy/debian-packages.txt

# Debian's packages come first: on a fresh Debian one of them is what makes a venv possible.
setup: packages
	@$(MAKE) -s --no-print-directory $(STAMP)

demo: $(RUNTIME)
	@$(BIN)/python -m cdp.demo

test: setup
	$(BIN)/python -m pytest -q -m 'not vm and not fuzz' $(WORKERS) $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check $(LINT)
	$(BIN)/ruff format --check $(LINT)
	$(BIN)/mypy $(LINT)
	$(BIN)/lint-imports --no-logo

format: $(STAMP)
	$(BIN)/ruff check --fix $(LINT)
	$(BIN)/ruff format $(LINT)

bench: setup
	$(BIN)/python bench/run.py $(ARGS)

test-crash: setup
	@deploy/install-packages deploy/debian-packages-crash.txt
	CDP_CRASH_FULL=1 $(BIN)/python -m pytest -q -m crash --timeout 7200 $(ARGS) tests/crash

soak: setup
	$(BIN)/python -m tests.crash.soak $(ARGS)

test-vm: setup
	@deploy/install-packages deploy/debian-packages-vm.txt
	$(BIN)/python -m pytest -q -m vm $(ARGS) tests/vm

fuzz: setup
	HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest -q -m fuzz --timeout 3600 $(ARGS)

clean:
	rm -rf $(VENV) .cache .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	rm -rf build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
