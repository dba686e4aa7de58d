# `make` lists what there is. Everything happens in .venv; PYTHON=python3.12 picks another Python.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Files that say what is installed. They are made last, so that a failed or interrupted installation goes on next time.
CAN_TRAIN := $(VENV)/can-train
CAN_TEST := $(VENV)/can-test
PIP_INSTALL = $(BIN)/pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable
IS_NEW_ENOUGH = $(shell $(PYTHON) -c 'import sys; print("yes" if sys.version_info >= (3, 11) else "")' 2>/dev/null)
SHELL_SCRIPTS := $(wildcard slurm/*.sh slurm/*.sbatch launch/*.sh) .ci/run

.PHONY: help install train test test-quick torture mutants check docs bench clean

help: ## this list (the default)
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12
	@echo "ARGS='...' hands options on: make train ARGS=train.max_steps=100, make test ARGS='-k resume'"

install: $(CAN_TEST) ## make .venv with all that training and the tests need

# Tested versions are in constraints.txt; pyproject.toml says which others should do.
$(CAN_TRAIN): pyproject.toml constraints.txt
	$(if $(IS_NEW_ENOUGH),,$(error `$(PYTHON)` is not Python 3.11 or newer; name one that is: make PYTHON=python3.12))
	$(PYTHON) -m venv $(VENV)
	@echo 'installing what training needs into $(VENV) (PyTorch is large: some minutes)'
	$(PIP_INSTALL) '.[quickstart]'
	touch $@

$(CAN_TEST): $(CAN_TRAIN)
	$(PIP_INSTALL) '.[quickstart,slurm,test]'
	touch $@

# The last lines of a run that is stopped name the command that goes on.
train: export DDPM_COMMAND := make train$(if $(ARGS), ARGS='$(ARGS)')
train: $(CAN_TRAIN) ## train on this machine: configs/quickstart.yaml
	PYTHON=$(BIN)/python launch/torchrun.sh --config configs/quickstart.yaml $(ARGS)

# Two processes, since one waits for most of its time; ARGS='-n 0' makes it one, as for a debugger.
PYTEST := $(BIN)/python -m pytest -n 2

test: check ## all checks and all tests, as CI runs them (half an hour on two cores)
	$(PYTEST) $(ARGS)

# Without the tests marked slow: real SLURM, torchrun, kills, full disks, servers. Under three minutes on two cores.
test-quick: check ## all checks and the quick tests of every part (three minutes)
	$(PYTEST) -m 'not slow' $(ARGS)

torture: install ## random accidents for hours
	PYTHONPATH=tests:tests/slurm OMP_NUM_THREADS=1 $(BIN)/python tests/faults/torture.py $(ARGS)

mutants: install ## silent bugs put in on purpose: does a test see each? (an hour on two cores)
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py $(ARGS)

check: install ## ruff, mypy and shellcheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy tests/slurm/conftest.py
	$(BIN)/shellcheck --external-sources $(SHELL_SCRIPTS)

docs: install ## write the tables of docs/configuration.md anew, after a change of the config's keys
	PYTHONPATH=. $(BIN)/python docs/configuration.py

bench: install ## the side-by-side measurements of benchmarks/
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.checkpoint
	$(BIN)/python -m benchmarks.tracking
	$(BIN)/python -m benchmarks.elastic

clean: ## remove .venv and what the tools keep
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
