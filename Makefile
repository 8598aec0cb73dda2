# Each target does all of its own set-up: a fresh clone needs nothing before `make demo` or `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test check stress gpu tiny clean

# The stamp is newer than the files that say what is installed, so an up-to-date environment costs nothing.
$(VENV)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python scripts/demo.py

test: check
	$(BIN)/python -m pytest

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

# What docs/reliability.md promises, counted in full: about three quarters of an hour on two cores. `make test` has a few of each.
STRESS := resume numbers checkpoints processes files data loras offline long
stress: $(VENV)/.installed
	for name in $(STRESS); do echo "== $$name"; $(BIN)/python scripts/stress_$$name.py || exit 1; done

# What only a GPU can show, in nine minutes; the same command again goes on where it ended.
gpu: $(VENV)/.installed
	$(BIN)/python scripts/gpu_check.py --minutes 9

tiny: $(VENV)/.installed
	$(BIN)/python scripts/build_tiny.py

clean:
	rm -rf build runs .pytest_cache .ruff_cache
