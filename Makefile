# `make demo` and `make test` need only Python 3.11 with venv, make and gcc; everything else goes into .venv.
PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PYTEST_ARGS ?=

.PHONY: demo test chaos chaos-run soak nightly bench lint setup clean

demo: setup
	$(BIN)/python -m pipelines.hcp demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations=15 $(PYTEST_ARGS)

# Kills, cut networks, a real SLURM where it is installed (apt-get install slurm-wlm munge), thousands of sequences: an hour or so.
chaos: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and cluster" --kills 200 -s tests/cluster tests/server $(PYTEST_ARGS)

# The cortical study at shares of its size: simulate, plan, fit, check, write maps, read them in again as surface data.
NIGHTLY       ?= runs/nightly
NIGHTLY_SIZES ?= 1% 10%

nightly: setup
	rm -rf $(NIGHTLY)
	set -e; for size in $(NIGHTLY_SIZES); do \
	  at=$(NIGHTLY)/$${size%?}; study="pipelines/hcp.yaml --set cohort=$$at/cohort.zarr --set run=$$at/run"; \
	  $(BIN)/python -m pipelines.hcp simulate --size $$size --cohort $$at/cohort.zarr; \
	  for step in plan fit check; do $(BIN)/pavi-scale $$step $$study; done; \
	  $(BIN)/python -m pipelines.hcp maps $$at/run --out $$at/maps; \
	  $(BIN)/python -m pipelines.hcp ingest $$at/maps/sub-*/*_probseg.dscalar.nii --out $$at/ingested.zarr; \
	done

# Crashes, damage, full disks and races of the run directory: half an hour or more; prints its figures. Mounts a tmpfs (as root) or skips that part.
chaos-run: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow --timeout=3600 tests/faults $(PYTEST_ARGS)

# Two hours of the cortical study at 1 %, killed once a minute; for a try: make soak SOAK_ARGS="--hours 0.1 --subjects 2 --vertices 500 --between 4 25"
soak: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pipelines.bench.soak $(SOAK_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

# The rivals are installed beside the locked versions, which they may not change.
bench: setup $(VENV)/.bench
	$(BIN)/python -m pipelines.bench

setup: $(STAMP)

# torch first and by itself: what comes after then finds it installed and asks for no other build.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
	  || { echo "requirements.lock is for Python 3.11; found: $$($(PYTHON) --version 2>&1). Name one with 'make PYTHON=/path/to/python3.11'." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' requirements.lock)"
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.bench: $(STAMP)
	$(BIN)/python -m pip install --quiet -c requirements.lock --no-build-isolation -e ".[bench]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
