# Every target first sees to what it needs (scripts/setup). Settings: PROPOLIS_BUILD=debug|asan|... (setup.py),
# PYTHON=/path/to/python3, KEEP_GOING=1, PYTEST='-k name', ARGUMENTS='--enable' (of install-service).
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help demo test lint bench soak build install-service clean
export KEEP_GOING

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' Makefile

demo: build ## boot Linux, log in, run a command, power off
	@scripts/guest-image
	@scripts/demo

test: build ## every check and test: lint, units, tiny guests on /dev/kvm, Linux (in the lab if need be)
	@scripts/guest-image
	@.venv/bin/python scripts/run-tests $(PYTEST)

lint: build ## ruff, cython-lint, mypy, stubtest, a build without warnings
	@scripts/lint

bench: build ## print measurements with host and commit
	@scripts/guest-image
	@.venv/bin/python -m pytest -q -s -p no:cacheprovider -o addopts= --import-mode=importlib -m bench tests/bench

soak: build ## the tests with ROUNDS (20) instead of two rounds of each, and the units in the lab
	@scripts/guest-image
	@ROUNDS=$${ROUNDS:-20} LAB_TIMEOUT=$${LAB_TIMEOUT:-10800} .venv/bin/python scripts/run-tests --services $(PYTEST)

build: ## Debian packages, .venv, compiled modules; only what is missing
	@scripts/setup

install-service: build ## run this tree as a service: units, or the SMF manifest, in place (docs/services.md)
	@.venv/bin/propolis-server install-service $(ARGUMENTS)

clean: ## remove what was built, but not .venv
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .demo
	find propolis -name '*.so' -delete
