# Each target does all of its own set-up: a fresh clone needs nothing before `make demo` or `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-isa check stress gpu tiny clean

# The stamp is newer than the files that say what is installed, so an up-to-date environment costs nothing.
$(VENV)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python scripts/demo.py

# A process a core, four at most (each holds about 1.5 GB), with one thread each unless OMP_NUM_THREADS says otherwise.
# `worksteal` leaves neighbouring tests in one process, as they share fixtures. Plain `pytest` runs everything in one.
PARALLEL := --numprocesses=auto --maxprocesses=4 --dist=worksteal
test: check
	$(BIN)/python -m pytest $(PARALLEL)

# The tests of numbers as other processors would have them: a run for each line of the list, some minutes each.
NUMERIC := tests/objectives tests/samplers tests/models tests/rewards tests/shapes tests/train tests/evaluation tests/data \
	$(filter-out tests/test_notebooks.py tests/test_offline.py tests/test_untrusted_files.py,$(wildcard tests/test_*.py))
test-isa: $(VENV)/.installed
	failed=0; while read -r settings; do \
		echo "== $$settings"; \
		env $$settings $(BIN)/python -m pytest -q $(PARALLEL) $(NUMERIC) < /dev/null || failed=1; \
	done < tests/instruction_sets.txt; exit $$failed

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

# What docs/reliability.md promises, counted in full: three quarters of an hour or more on two cores. `make test` has a few of each.
STRESS := resume bad_numbers checkpoints processes files data loras offline long handover
stress: $(VENV)/.installed
	for name in $(STRESS); do echo "== $$name"; $(BIN)/python tests/stress/$$name.py || exit 1; done

# What only a GPU can show, in nine minutes; the same command again goes on where it ended.
gpu: $(VENV)/.installed
	$(BIN)/python scripts/gpu_check.py --minutes 9

tiny: $(VENV)/.installed
	$(BIN)/python scripts/build_tiny.py

clean:
	rm -rf build runs .pytest_cache .ruff_cache
