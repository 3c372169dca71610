# hostd. `make setup` builds .venv and build/; every other target needs it first and runs it.
SHELL := /bin/bash
PY := .venv/bin/python
KINDS := unit contract kernel broker vm lab crash

.PHONY: help setup demo test check bench lab fmt

help: ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

setup: ## Install what is needed (apt, PyPI) and build the test guests, as root
	@deploy/setup.sh

demo: setup ## The whole job end to end, with real Firecracker and a Linux guest
	@.venv/bin/hostd demo

test: setup ## All tests, the slowest last
	@$(PY) -m pytest tests/unit tests/contract tests/kernel tests/broker tests/vm tests/crash tests/lab

check: setup ## Lint, types, layers
	@.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/codespell && .venv/bin/mypy && .venv/bin/pyright && .venv/bin/lint-imports

bench: setup ## Measure, side by side with the raw alternative; writes bench/results.json
	@$(PY) -m bench

lab: setup ## Open a shell in the lab VM (true KVM, cgroup v2)
	@$(PY) -m tests.lab.open

fmt: ## Format
	@.venv/bin/ruff format . && .venv/bin/ruff check --fix .
