PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The one PyTorch that development knows, of which a machine can keep a build without CUDA at hand.
TORCH := $(shell grep '^torch==' constraints.txt)
REAL_MODEL ?= /tmp/smollm2

.PHONY: install lock demo test test-slow test-wheel test-newest real-model lint format clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# constraints.txt anew, with the newest of everything but PyTorch; run it with Python 3.11.
lock:
	$(PYTHON) -m venv --clear .venv-lock
	.venv-lock/bin/python -m pip install --quiet '$(TORCH)' --editable '.[dev]'
	.venv-lock/bin/python -m pip list --format=freeze --exclude-editable --exclude pip > .venv-lock/found
	(grep '^#' constraints.txt; sed 's/+cpu$$//' .venv-lock/found | LC_ALL=C sort -f) > .venv-lock/constraints.txt
	mv .venv-lock/constraints.txt constraints.txt
	rm -r .venv-lock

# The main job on the model that ships with slimlm: no network, no token, no GPU.
demo: export OMP_WAIT_POLICY = passive
demo: install
	$(BIN)/slimlm compress --model llama --sparsity 0.25 --output-dir demo-out --overwrite
	$(BIN)/slimlm eval demo-out --against llama

# The real model that comparisons are made with; make real-model REAL_MODEL=directory.
real-model: install
	$(BIN)/python eval/real_model.py $(REAL_MODEL)

# Tiny models gain nothing from a second thread, and two processes do. Those a test starts must not spin when idle.
test test-slow test-wheel test-newest: export OMP_NUM_THREADS = 1
test test-slow test-wheel test-newest: export OMP_WAIT_POLICY = passive
WORKERS ?= 2

test: install
	$(BIN)/python -m pytest -m "not slow" --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 15

test-slow: install
	$(BIN)/python -m pytest -m slow --numprocesses $(WORKERS) --dist loadfile --durations 10

test-wheel: install
	$(BIN)/python -m pytest tests/test_wheel.py

# What users get today, whatever constraints.txt says; fails only where slimlm uses what a library will remove.
test-newest:
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade '$(TORCH)' --editable '.[dev]'
	.venv-newest/bin/python -m tests.newest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .venv-lock .venv-newest demo-out build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
