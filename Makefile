.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3.11
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest
BENCHMARKS := $(filter-out __init__ %_runs %_setups,$(basename $(notdir $(wildcard benchmarks/*.py))))

.PHONY: help setup setup-browser demo up test test-fast test-slow test-storage test-faults test-gpu bench lint types catalog format clean

help: ## print every command
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: .venv/.installed ## make .venv with the pinned dependencies

# `constraints.txt` pins every package, so two machines install the same.
.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

setup-browser: ## install Debian's Chromium for the dashboard's tests, where it is missing and can be had
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
		&& apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null; } \
		|| echo 'no Chromium, and none could be installed: the browser tests will be skipped'

demo: setup ## the whole service in two minutes: teacher, student, detections (data in .demo)
	$(BIN)/python -m examples.demo

up: setup ## serve on http://127.0.0.1:8765 until Ctrl-C (data in DEFEAT_HOME, else .defeat)
	$(BIN)/defeat up

test: setup setup-browser lint types ## everything that needs no GPU and no minutes
	$(PYTEST)

test-fast: setup ## unit tests only: no stack, no browser
	$(PYTEST) tests/app tests/defeat/client tests/defeat/cli tests/defeat/engine/data tests/defeat/engine/methods tests/defeat/engine/detectors --ignore tests/app/stack --ignore tests/app/dashboard

test-slow: setup ## what takes minutes: the demo, and blood cells where ../shared/data/bccd or DEFEAT_TEST_DATA is there
	$(PYTEST) -m slow --timeout=3600 -rs

test-storage: setup ## the API's and the supervisor's tests with their objects on an S3 server
	$(PYTEST) --storage s3 tests/app tests/worker/test_supervisor.py --ignore tests/app/stack --ignore tests/app/dashboard

test-faults: setup ## what must not happen to a job whatever breaks, in full: half an hour, one JSON object on the last line
	@$(PYTEST) tests/faults -m '' --faults-long --timeout=3600 -rs

test-gpu: setup ## what needs a GPU
	$(PYTEST) -m gpu --timeout=1800 -rs

bench: setup ## every benchmark in its short form; each prints one JSON object on its last line
	@for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python -m benchmarks.$$name --quick || true; done

lint: setup ## ruff, import rules, and whether app/specs/catalog.json is up to date
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/python -m defeat.engine.catalog --check app/specs/catalog.json

types: setup ## mypy
	$(BIN)/mypy

catalog: setup ## write app/specs/catalog.json from the engine's configs
	$(BIN)/python -m defeat.engine.catalog app/specs/catalog.json

format: setup ## format the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## remove what the commands above made, the installation apart
	rm -rf .demo .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
