# Everything here works in a fresh clone with Python 3.11-3.13 (with venv), make and git, as a user without rights.

# The first suitable Python; name another with `make PYTHON=/path/to/python3.12 demo`.
SUITS := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	if $$python -c "$(SUITS)" 2>/dev/null; then echo $$python; break; fi; done)

# The tested torch. pip takes the build its indexes offer: on Linux one with CUDA, which runs on a CPU too.
TORCH ?= torch==2.13.0

.DEFAULT_GOAL := help
.PHONY: help demo test check format clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# The stamp is written last, so that an install that was cut short is done again, and one that is up to date costs nothing.
.venv/.installed: pyproject.toml Makefile
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 with its venv module is needed (Debian: apt install python3 python3-venv); name it with: make PYTHON=/path/to/python3.12"; exit 2; }
	@$(PYTHON) -c "$(SUITS)" || { echo "$(PYTHON) is not Python 3.11, 3.12 or 3.13 with its venv module"; exit 2; }
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv; torch is the large part of it"
	.venv/bin/python -m pip install $(if $(CI),--quiet) --disable-pip-version-check "$(TORCH)" -e ".[dev]"
	@touch $@

demo: .venv/.installed  ## install, train a LoRA of a person on the mini model (CPU, minutes) and show the pictures in demo/
	.venv/bin/lorabooth demo --out demo

test: .venv/.installed  ## install and run the tests
	.venv/bin/python -m pytest -q -n 2 --dist worksteal --durations 15

check: .venv/.installed  ## format, lint, types, direction of imports
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports

format: .venv/.installed  ## format the code and mend what the linter can
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

clean:  ## remove the environment, the caches and the demo's output
	rm -rf .venv demo .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
