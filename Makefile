# `make test` and `make demo` do their whole set-up: on a fresh Debian or Ubuntu, as root, they
# install the packages that they need; as another user they say which ones are missing.

PYTHON ?= python3
VENV ?= .venv
# Two at a time, each with a virtual machine of its own; the tests of a file share its states.
# The files in the order of tests/conftest.py.
PYTEST_ARGUMENTS ?= --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 50 --durations-min 5
BIN := $(VENV)/bin
READY := $(VENV)/ready
# Else each command that a test starts compiles the whole program anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help test lint unit vm demo bench crash-full mutants clean clean-vm

help:
	@echo 'make test      every check and every test, the virtual machine too (root, Go)'
	@echo 'make lint      ruff, mypy, import-linter'
	@echo 'make unit      the tests that take seconds'
	@echo 'make vm        start the virtual machine for work by hand'
	@echo 'make demo      a backup, a kill, a recovery and a restore, with ZFS or btrfs, and restic'
	@echo 'make demo ZFS=vm   the same with real ZFS in the virtual machine'
	@echo 'make bench     measure a run beside the bare commands (SIZES="1 20" ROUNDS=1: less of it)'
	@echo 'make crash-full  every crash point, pair and system call, power cuts: hours; it resumes'
	@echo 'make mutants   put defects into the engine and see that the tests find them (hours, root)'
	@echo 'make clean     remove what these made in this folder; clean-vm: and the machine'

test: lint
	$(BIN)/python tests/vm/machine.py build
	$(BIN)/pytest $(PYTEST_ARGUMENTS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --quiet --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

unit: $(READY)
	$(BIN)/pytest -m 'not vm' --ignore tests/platform --ignore tests/btrfs --ignore tests/xfs

vm: $(READY)
	$(BIN)/python tests/vm/machine.py start

demo: $(READY)
	@PYTHON='$(CURDIR)/$(BIN)/python' ZFS='$(ZFS)' demo/run.sh

bench: $(READY)
	$(BIN)/python tests/bench/bench.py

# Every file of which `make test` takes a sample, or leaves something out.
WIDER = $(shell grep -rlE 'tests\.extent|mark\.full' tests --include='test_*.py')

crash-full: export ATOMTX_VM_CPUS ?= 2
crash-full: $(READY)
	$(BIN)/python -m tests.crash.full
	ATOMTX_CRASH=full $(BIN)/pytest -o faulthandler_timeout=0 $(WIDER)

mutants: $(READY)
	nice $(BIN)/python -m tests.mutants.run $(MUTANTS)

$(READY): pyproject.toml
	@PYTHON=$(PYTHON) tests/vm/needs.sh $(PYTHON) venv strace mkfs.btrfs mkfs.ext4 mkfs.xfs xfsdump setfacl mtree zstd
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, this is " + sys.version)'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .mutants dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

clean-vm: clean
	$(PYTHON) tests/vm/machine.py clean
