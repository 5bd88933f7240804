# make demo: set up and tune a consistency model on the digits.   make test: set up and run the tests.
PYTHON ?= python3
BIN := .venv/bin
INPUTS := pyproject.toml setup.py

.PHONY: demo quick ledger-smoke fuzz core test drills drills-short mutants test-gpu gpu gpu-paths sanitize check format readme kernel-report bench long-haul clean

demo: .venv/.installed
	$(BIN)/python -m ect.train

quick: .venv/.test-installed  # the tests that take at most two seconds each; what takes longer and hides it fails
	$(BIN)/python -m ect_kernels.testing.emulator
	$(BIN)/python -m pytest -q --quick -n auto --maxprocesses 8 --dist worksteal

core:  # the quick tests of maths, files and commands, in any environment that has pytest: make core BIN=path/to/venv/bin
	$(BIN)/python -m pytest -q --quick @tests/core.txt

test: .venv/.test-installed
	$(BIN)/python -m ect_kernels.testing.emulator
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal --cov --cov-report=term:skip-covered --cov-fail-under=90
	$(BIN)/python tests/gpu_paths/report.py

drills-short: .venv/.test-installed  # runs that are killed, damaged, short of room, stopped: each a few times, in three minutes
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal tests/drills

drills: .venv/.test-installed  # the same in full, 100 kills and every write of a run; the table goes to benchmarks/results/drills.md
	$(BIN)/python -m tests.drills --count long --write

# The tests that need a CUDA device, by what is installed, with no network: $(PYTHON) where there is no .venv.
test-gpu:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m pytest -m gpu $(shell grep -rl --include='test_*.py' 'mark\.gpu' tests)

gpu:  # the first hour on a GPU machine without a network, twice ten minutes (PART=1, PART=2: one of them)
	$(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/first_hour.py $(if $(PART),--part $(PART))

gpu-paths: .venv/.test-installed  # the code of a GPU without one: every combination, where `make test` takes every pair
	$(BIN)/python -m pytest tests/gpu_paths --full

sanitize: .venv/.test-installed  # every CUDA kernel on the CPU, and every CPU kernel, under the address, undefined-behaviour and thread sanitizers
	$(BIN)/python -m pytest tests/kernels/test_sanitize.py

fuzz: .venv/.test-installed  # hypothesis on every reader of files, ten minutes each (SECONDS=60: less), by a seed that it prints
	$(BIN)/python -m tests.fuzz $(if $(SECONDS),--seconds $(SECONDS))

mutants: .venv/.test-installed  # forty seeded mistakes in the code that decides what is learnt: the tests find all but two
	$(BIN)/python tests/mutants.py

check: .venv/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.test-installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

kernel-report: .venv/.test-installed  # registers, spills, access widths of every kernel for six architectures, against the bars
	$(BIN)/python benchmarks/kernel_report.py --check

readme: .venv/.installed  # train the digits anew, and put their picture, tables and checkpoint where they are shown
	rm -rf runs/readme
	$(BIN)/python -m ect.train --run-dir runs/readme
	$(BIN)/python benchmarks/readme.py runs/readme

ledger-smoke: .venv/.test-installed  # train two short lines of benchmarks/results/ledger.jsonl again: they come out as recorded
	$(BIN)/python benchmarks/ledger.py --check
	$(BIN)/python benchmarks/ledger.py --smoke

bench: .venv/.test-installed  # all that can be timed or predicted here; step times and floors go to benchmarks/results/README.md
	$(BIN)/python benchmarks/ops.py --quick
	$(BIN)/python benchmarks/precision.py
	$(BIN)/python benchmarks/roofline.py
	$(BIN)/python benchmarks/step_time.py
	$(BIN)/python benchmarks/plots.py

long-haul: .venv/.installed  # 20,000 steps of the digits network: does memory, the number of open files or a step's time grow?
	$(BIN)/python benchmarks/long_haul.py

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.installed: $(INPUTS) | .venv/bin/python
	$(BIN)/python -m pip install -e .
	touch $@

.venv/.test-installed: .venv/.installed
	$(BIN)/python -m pip install -e '.[test]'
	touch $@
