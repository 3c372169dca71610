# hostd. `make setup` builds .venv and build/; every target needs it, or its venv part, and runs it.
SHELL := /bin/bash
PY := .venv/bin/python
KINDS := unit contract kernel broker page lab vm crash
# Two processes, each with whole files in the order of the kinds (ADR 1099). `make test SPLIT=` is one process.
SPLIT := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help setup venv demo test unit crash soak check bench bench-page deb lab fmt protocol

help: ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

setup: ## Install what is needed (apt, PyPI) and build the test guests, as root
	@deploy/setup.sh

venv: ## Build .venv alone, from PyPI, as any user
	@deploy/setup.sh venv

demo: setup ## The whole job end to end, with real Firecracker and a Linux guest
	@.venv/bin/hostd demo
	@echo "To watch it in a browser: .venv/bin/hostd demo --page"

test: setup ## All tests, the slow kinds last
	@$(PY) -m pytest $(SPLIT) $(KINDS:%=tests/%) && $(PY) -m tests.guests.versions tests/contract tests/vm tests/crash

unit: venv ## The unit tests, as any user
	@$(PY) -m pytest $(SPLIT) tests/unit

crash: setup ## kill -9 at every point of every command, with real Firecracker; some ten minutes
	@HOSTD_CRASH_SEED=all $(PY) -m pytest tests/crash

MINUTES ?= 30
soak: setup ## Mixed commands under kills of worker, VMMs and NATS servers; MINUTES=n
	@$(PY) -m tests.soak --minutes $(MINUTES)

check: venv ## Lint, spelling, types, layers, as any user
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target check-pyright check-others

.PHONY: check-pyright check-others
check-pyright: # takes as long as all others three times
	@.venv/bin/pyright

check-others:
	@.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/codespell && .venv/bin/lint-imports && .venv/bin/mypy

bench: setup ## Measure, side by side with the raw alternative; writes bench/results.json
	@$(PY) -m bench

protocol: venv ## Write docs/protocol from the types and the examples
	@$(PY) -m tests.protocol

deb: venv ## Build the Debian package in build/deb
	@$(PY) deploy/debian/build.py

bench-page: setup ## Frames of the fleet page under load, measured in Chromium
	@$(PY) -m bench.page

lab: setup ## Open a shell in the lab VM (true KVM, cgroup v2)
	@$(PY) -m tests.lab.open

fmt: venv ## Format
	@.venv/bin/ruff format . && .venv/bin/ruff check --fix .
