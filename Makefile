# Two commands do everything: `make demo` (all four stages, a table, a page that tells them) and `make test`.
# Both create .venv on first use; PYTHON may name another interpreter (>= 3.10). `make test-floors` tests the oldest
# versions of the libraries that setup.py allows.

PYTHON ?= python3
TEST_PROCESSES ?= 2
BIN = .venv/bin
INSTALLED = .venv/installed

.PHONY: demo test lint test-floors results install clean

demo: $(INSTALLED)
	$(BIN)/python tools/demo.py

test: $(INSTALLED)
	$(BIN)/python -m pytest -q -m "not slow" --numprocesses $(TEST_PROCESSES) --dist worksteal tests

# The style that pyproject.toml states; `ruff check --fix . && ruff format .` mends most of what it finds.
lint: $(INSTALLED)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

# The oldest versions that setup.py allows, on Python 3.10 where there is one (or FLOORS_PYTHON=...): several GB, then as
# long as `make test`. `uv` comes from PyPI into the same folder.
FLOORS = .venv-floors
FLOORS_PYTHON ?= $(shell python3.10 -c 'import sys; print(sys.executable)' 2>/dev/null || echo $(PYTHON))

test-floors: $(FLOORS)/installed
	OMP_NUM_THREADS=1 $(FLOORS)/bin/python -m pytest -q -m "not slow" --numprocesses $(TEST_PROCESSES) --dist worksteal tests

$(FLOORS)/installed: setup.py
	$(FLOORS_PYTHON) -m venv $(FLOORS)
	$(FLOORS)/bin/python -m pip install --quiet --upgrade pip uv
	$(FLOORS)/bin/uv pip install --quiet --python $(FLOORS)/bin/python --resolution lowest-direct --editable '.[train,eval,dev]'
	touch $@

# docs/results.md and the drawings, from the records of what was measured
results: $(INSTALLED)
	$(BIN)/python tools/results.py
	$(BIN)/python tools/figures.py

install: $(INSTALLED)

$(INSTALLED): setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python >= 3.10 is needed, this is %s; name another with make PYTHON=..." % sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[train,eval,dev]'
	touch $@

clean:
	rm -rf .venv $(FLOORS) build *.egg-info
