# make quickstart: text to trained model to translated files.  make test: everything that CI runs.
# make bench: raylm beside others, in about an hour; it needs the real text of $RAYLM_DATA.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: venv quickstart test bench lint format clean

venv: $(VENV)/.installed

# torch first and by itself: its pinned version may come from a place of its own, such as a CPU index.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("raylm needs Python 3.11 or newer") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

quickstart: venv
	$(BIN)/raylm quickstart $(ARGS)

test: venv lint
	$(BIN)/python -m pytest $(ARGS)

bench: venv
	$(BIN)/python -m tests.benchmarks --json bench.json $(ARGS)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
