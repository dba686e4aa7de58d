# make install | train | test | torture | check | bench. Everything happens in .venv; PYTHON=python3.12 picks another Python.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.PHONY: install train test torture check bench clean

install: $(STAMP)

# Tested versions are in constraints.txt; pyproject.toml says which others should do.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[quickstart,slurm,test]'
	touch $@

train: install
	PYTHON=$(BIN)/python launch/torchrun.sh --config configs/quickstart.yaml $(ARGS)

test: check
	$(BIN)/python -m pytest $(ARGS)

torture: install
	PYTHONPATH=tests:tests/slurm OMP_NUM_THREADS=1 $(BIN)/python tests/faults/torture.py $(ARGS)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.checkpoint
	$(BIN)/python -m benchmarks.tracking
	$(BIN)/python -m benchmarks.elastic

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
