# Every target builds .venv by itself. Choose the interpreter with PYTHON=..., pass pip options with PIP_ARGS=...
# (for example an index that holds the CPU build of PyTorch).
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
ONE_THREAD := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt $(PIP_ARGS)
# pip compiles with one process, and tests of others too: a minute and a half for what development needs
COMPILE := $(BIN)/python -m compileall -qq -j 0 -x /tests/ $(VENV)/lib || true

.PHONY: demo test test-zoo lint bench-quick bench-peers tables clean

demo: $(VENV)/.base
	$(BIN)/espalier demo --out runs/demo

test: $(VENV)/.dev
	$(ONE_THREAD) $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

test-zoo: $(VENV)/.dev
	$(ONE_THREAD) $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal -m zoo

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench-quick: $(VENV)/.dev
	$(ONE_THREAD) $(BIN)/python -m benchmarks.quick

# Other toolkits beside ours on real digits, three seeds, all anew; a run that was stopped goes on.
bench-peers: $(VENV)/.dev
	ESPALIER_RUNS=runs/bench-peers $(ONE_THREAD) $(BIN)/python -m benchmarks.run only peers-digits
	ESPALIER_RUNS=runs/bench-peers $(BIN)/python -m benchmarks.tables --print peers-digits

tables: $(VENV)/.dev
	$(BIN)/python -m benchmarks.tables

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "espalier needs Python 3.11 or newer; say: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# What the demo needs: the package and ONNX export.
$(VENV)/.base: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable '.[onnx]'
	$(COMPILE)
	@touch $@

# What development needs: every extra, in one go.
$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable '.[models,data,onnx,detection,dev,bench]'
	$(COMPILE)
	@touch $(VENV)/.base $@
