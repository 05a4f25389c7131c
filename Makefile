# make demo   set up and run the whole job on the shipped model (a few minutes)
# make test   set up, build llama.cpp as the judge of GGUF files (once, about 7 minutes), run all tests
# make setup | lint | bench | clean

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# On Linux MLX's CPU backend has a slow reference BLAS; OpenBLAS in front of it is 30 times faster. Optional.
BLAS   := $(shell sh scripts/openblas.sh find)
RUN     = $(if $(BLAS),env LD_PRELOAD=$(BLAS))

.PHONY: setup demo test lint bench clean

setup: $(VENV)/.package

$(VENV)/.python:
	@$(PYTHON) scripts/check_python.py
	@sh scripts/make_venv.sh $(PYTHON) $(VENV)
	@touch $@

$(VENV)/.package: $(VENV)/.python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@sh scripts/openblas.sh install
	@touch $@

$(VENV)/.test: $(VENV)/.package
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@echo "building llama.cpp (llama-cpp-python), about 7 minutes the first time"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[llama]'
	@env GOCACHE=$(CURDIR)/$(VENV)/go-cache GOTOOLCHAIN=local $(BIN)/go build text/template encoding/json
	@touch $@

# the recipes below call make again, so that an OpenBLAS installed a moment ago is found
demo: setup
	@$(MAKE) --no-print-directory run-demo

test: $(VENV)/.test
	@$(MAKE) --no-print-directory run-test

bench: setup
	@$(MAKE) --no-print-directory run-bench

.PHONY: run-demo run-test run-bench
run-demo:
	$(RUN) $(BIN)/mlx-pare demo --out runs/demo

# as many files at a time as there are cores, four at most; then BLAS has one thread in each
run-test:
	env OPENBLAS_NUM_THREADS=1 $(RUN) $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

run-bench:
	$(RUN) $(BIN)/python benchmarks/start_up.py
	$(RUN) $(BIN)/python benchmarks/criteria.py
	$(RUN) $(BIN)/python benchmarks/run.py

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
