# `make` alone lists what there is.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint constraints.txt

.DEFAULT_GOAL := help

help: ## this list
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/demo.done ## install, then adversarial fine-tuning on digits through Ray, about two minutes; leaves runs/demo/report.html
	@rm -rf runs/demo
	@$(BIN)/distrobust data digits runs/digits-data > /dev/null
	@$(BIN)/distrobust train launch/digits.yaml --set run.dir=runs/demo

test: $(VENV)/test.done ## install what the tests need, check style and types, run the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not (procs or ray or prometheus or lab)" --numprocesses auto
	$(BIN)/python -m pytest -m "(procs or ray or prometheus) and not lab" --numprocesses 2 --dist loadfile

slow: $(VENV)/test.done ## the tests that need data or minutes; DISTROBUST_CIFAR10=DIR for those on CIFAR-10
	$(BIN)/python -m pytest -m "slow or gpu"

lab: $(VENV)/test.done ## launchers and faults on simulated hosts: three Ray nodes on this machine; root or user namespaces
	$(BIN)/python -m pytest -m lab

clean: ## remove the virtual environment and caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@echo "making a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/demo.done: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing (torch, ray and friends: a few minutes the first time)"
	@$(PIP) --editable '.[demo]'
	@touch $@

$(VENV)/test.done: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing what the tests need"
	@$(PIP) --editable '.[dev]'
	@touch $@

.PHONY: help demo test slow lab clean
