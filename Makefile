.DEFAULT_GOAL := help
SHELL := /bin/bash
BIN := .venv/bin
# A Python that we support and that can make a virtual environment: Debian has the modules for that in a package apart.
SUPPORTED := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 15))
PYTHON ?= $(shell for name in python3.14 python3.13 python3.12 python3.11 python3; do \
	$$name -c '$(SUPPORTED)' 2>/dev/null && echo $$name && break; done)
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest
COMPILE := $(BIN)/uv pip compile pyproject.toml --quiet --group build --universal --python-version 3.11 \
	--fork-strategy fewest --generate-hashes --custom-compile-command 'make lock'
BENCHMARKS := $(filter-out __init__ %_runs %_setups,$(basename $(notdir $(wildcard benchmarks/*.py))))

.PHONY: help setup setup-browser demo up test test-fast test-slow test-storage test-faults test-gpu bench lint types \
	catalog migration lock format clean

help: ## print every command
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: .venv/.installed ## make .venv with the pinned packages: PYTHON=/path/to/python3 chooses the Python

# pip, since every Python brings it; with hashes, so that two machines install the same files. The lock holds the build
# backend too: nothing more is fetched to install the project itself.
.venv/.installed: pyproject.toml requirements/dev.txt
	@$(PIP) --version >/dev/null 2>&1 || $(or $(PYTHON),false) -c '$(SUPPORTED)' 2>/dev/null || { \
		echo 'No Python 3.11, 3.12, 3.13 or 3.14 that can make a virtual environment was found.'; \
		echo 'Install one (Debian, Ubuntu: apt-get install python3 python3-venv)'; \
		echo 'or name one: make setup PYTHON=/path/to/python3'; \
		exit 1; } >&2
	$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(PIP) install --quiet --require-hashes --requirement requirements/dev.txt
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	touch $@

setup-browser: ## install Debian's Chromium for the dashboard's tests, where it is missing and can be had
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
		&& apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null; } \
		|| echo 'no Chromium, and none could be installed: the browser tests will be skipped'

demo: setup ## the whole service in two minutes: teacher, student, detections (data in .demo)
	$(BIN)/python -m examples.demo

up: setup ## serve on http://127.0.0.1:8765 until Ctrl-C (data in DEFEAT_HOME, else .defeat)
	$(BIN)/defeat up

# Two processes: half of the tests wait for databases, browsers and child processes. A file's tests stay together.
test: $(if $(T),setup,setup setup-browser lint types) ## what needs no GPU and no minutes; T=PATH: those tests alone
	$(PYTEST) $(or $(T),--numprocesses 2 --dist loadfile)

test-fast: setup ## unit tests only: no stack, no browser
	$(PYTEST) tests/app tests/defeat/client tests/defeat/cli tests/defeat/engine/data tests/defeat/engine/methods tests/defeat/engine/detectors --ignore tests/app/stack --ignore tests/app/dashboard

test-slow: setup ## what takes minutes: the demo, and blood cells where ../shared/data/bccd or DEFEAT_TEST_DATA is there
	$(PYTEST) -m slow --timeout=3600 -rs

test-storage: setup ## the API's and the supervisor's tests with their objects on an S3 server
	$(PYTEST) --storage s3 tests/app tests/worker --ignore tests/app/stack --ignore tests/app/dashboard

test-faults: setup ## what must not happen to a job whatever breaks, in full: half an hour, one JSON object on the last line
	@$(PYTEST) tests/faults -m '' --faults-long --timeout=3600 -rs

test-gpu: setup ## what needs a GPU
	$(PYTEST) -m gpu --timeout=1800 -rs

bench: setup ## every benchmark in its short form; each prints one JSON object on its last line
	@for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python -m benchmarks.$$name --quick || true; done

lint: setup ## ruff, import rules, Markdown and its links, spelling, and whether app/specs/catalog.json is up to date
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/rumdl check --quiet --no-cache .
	$(BIN)/codespell
	$(BIN)/python -m defeat.engine.catalog --check app/specs/catalog.json

types: setup ## mypy
	$(BIN)/mypy

catalog: setup ## write app/specs/catalog.json from the engine's configs
	$(BIN)/python -m defeat.engine.catalog app/specs/catalog.json

migration: setup ## write a migration from the difference between app/models.py and the migrations: M='add a column'
	@test -n "$$M" || { echo "Name what it does: make migration M='add a column'" >&2; exit 1; }
	@home=$$(mktemp --directory) && trap 'rm -r "$$home"' EXIT && export DATABASE_URL="sqlite:///$$home/db.sqlite3" \
		&& last=$$(basename "$$(ls migrations/versions/[0-9]*.py | tail -n 1)") \
		&& slug=$$(tr -cs '[:alnum:]' _ <<< "$${M,,}") \
		&& $(BIN)/alembic upgrade head \
		&& $(BIN)/alembic revision --autogenerate --message "$$M" \
			--rev-id "$$(printf '%04d' $$((10#$${last%%_*} + 1)))_$$(sed 's/^_*//; s/_*$$//' <<< "$$slug")"
	$(BIN)/ruff format --quiet migrations/versions
	$(BIN)/ruff check --quiet --fix migrations/versions

# One file for each thing that is installed, since pip installs every line of a file with hashes. All are resolved within
# dev.txt, so that a package has one version in all, for every Python and platform. What is pinned stays.
lock: setup ## write requirements/ from pyproject.toml; FLAGS=--upgrade or FLAGS='--upgrade-package timm' moves pins
	$(COMPILE) --extra dev --output-file requirements/dev.txt $(FLAGS)
	$(COMPILE) --extra app --extra traces --constraint requirements/dev.txt --output-file requirements/app.txt
	$(COMPILE) --extra worker --extra traces --constraint requirements/dev.txt --output-file requirements/worker.txt

format: setup ## format the code and the documents
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/rumdl fmt --silent --no-cache .

clean: ## remove what the commands above made, the installation apart
	rm -rf .demo .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
