# `make demo` and `make test` set up everything they need in .venv on their first call.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

.PHONY: demo test lint lowest bench lock clean

demo: $(STAMP)
	$(BIN)/dfpir demo demo-run

# Each worker is a process of its own, and would compile our modules again.
unexport PYTHONDONTWRITEBYTECODE

# Three processes keep two cores busy though tests wait for workers (decision 47); torch has one thread in each: threads
# that share a core wait for one another. Tests with a Ray cluster come by themselves, since every process would start one
# of its own.
IN_PROCESSES := -m "not ray" --numprocesses=3 --dist=worksteal

test: $(STAMP) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(IN_PROCESSES)
	$(BIN)/python -m pytest -m ray

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The tests with the oldest versions that pyproject.toml admits.
lowest: $(STAMP)
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(VENV)/lowest
	$(BIN)/uv pip install --quiet --resolution lowest-direct --python $(VENV)/lowest/bin/python --editable ".[dev]"
	OMP_NUM_THREADS=1 $(VENV)/lowest/bin/python -m pytest $(IN_PROCESSES)
	$(VENV)/lowest/bin/python -m pytest -m ray

$(STAMP): requirements.lock pyproject.toml $(wildcard models/*.c)
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip sync --quiet --compile-bytecode --python $(BIN)/python requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $(STAMP)

# Ratios against the plain network, and what each step of a block gains.
bench: $(STAMP)
	$(BIN)/python -m benchmarks.engine --memory 1024x1024
	$(BIN)/python -m benchmarks.engine --model dfpir-compact --shapes 256x256 481x321 1024x1024 --memory 1024x1024 \
		--csv benchmarks/results/engine-compact.csv
	$(BIN)/python -m benchmarks.steps

# Pins every dependency; index addresses stay out of the file.
lock: $(STAMP)
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --extra dev --no-emit-index-url --no-annotate \
		--no-header --output-file requirements.lock pyproject.toml

clean:
	rm -rf $(VENV) demo-run
