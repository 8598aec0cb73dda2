# Each target sets itself up: a fresh clone needs nothing before `make demo` or `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-isa check stress gpu tiny clean

# The stamp is newer than the files that list the dependencies, so nothing is installed again.
$(VENV)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python scripts/demo.py

# One process a core, at most four (each takes about 1.5 GB), with one thread each unless OMP_NUM_THREADS says otherwise.
# `worksteal` keeps neighbouring tests, which share fixtures, in one process. Plain `pytest` runs everything in one.
PARALLEL := --numprocesses=auto --maxprocesses=4 --dist=worksteal
test: check
	$(BIN)/python -m pytest $(PARALLEL)

# The tests of numbers, with the instruction sets of other processors: one run for each line of the list, some minutes each.
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

# The full counts of docs/reliability.md: three quarters of an hour or more on two cores. `make test` runs a few of each.
STRESS := resume bad_numbers checkpoints processes files data loras offline long handover
stress: $(VENV)/.installed
	for name in $(STRESS); do echo "== $$name"; $(BIN)/python tests/stress/$$name.py || exit 1; done

# Checks that need a GPU, for nine minutes; the same command again continues.
gpu: $(VENV)/.installed
	$(BIN)/python scripts/gpu_check.py --minutes 9

tiny: $(VENV)/.installed
	$(BIN)/python scripts/build_tiny.py

clean:
	rm -rf build runs .pytest_cache .ruff_cache
