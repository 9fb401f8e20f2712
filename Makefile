# Two commands: `make serve` and `make test`. Each does all its own set-up in .venv; the second run starts at once.
#   PYTHON=python3.12   the interpreter that .venv is made from (>= 3.11, with headers)
#   VENV=0              use PYTHON and the packages it has; installs nothing, builds the extensions in the checkout
#   ARGS="--port 9000"  flags for the server (docs/flags.md) or for pytest

NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
  $$python -c '$(NEW_ENOUGH)' 2>/dev/null && echo $$python && exit; done; echo python3)
VENV ?= 1
ARGS ?=
SHELL := /bin/bash

ifeq ($(VENV),0)
  PY := PYTHONPATH=$(CURDIR)/build/path:$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON)
  STATE := build/path
else
  PY := .venv/bin/python
  STATE := .venv
endif

NATIVE := $(wildcard $(addprefix vattention_ext/csrc/*,.cpp .hpp .ipp) $(addprefix kernels/cpu/*,.cpp .hpp .ipp))
INSTALL := scripts/install.py requirements/versions.toml setup.py pyproject.toml
CPU_TESTS := $(shell grep -v '^\#' tests/manifests/cpu.txt)
SHARD ?= 1/1

.PHONY: help serve test test-full test-gpu check sanitize environment docs wheel clean

help: ## what there is to make
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 14

serve: $(STATE)/.ready-serve ## install, build, obtain SmolLM2-135M-Instruct and serve it on 127.0.0.1:8000
	$(PY) -m engine.api_server --host 127.0.0.1 --port 8000 $(ARGS)

test: check ## make check and the whole CPU suite, which sees no GPU
	CUDA_VISIBLE_DEVICES= $(PY) -m pytest -m "not slow" $(CPU_TESTS) $(ARGS)

test-full: check ## make test with the slow tests
	CUDA_VISIBLE_DEVICES= $(PY) -m pytest --timeout 1800 $(CPU_TESTS) $(ARGS)

test-gpu: $(STATE)/.ready-test-gpu ## the tests that need a GPU, skipped without one; SHARD=1/4 runs a quarter
	$(PY) -m scripts.gpu_tests --shard $(SHARD) -- $(ARGS)

check: $(STATE)/.ready-test ## ruff, mypy, manifests, import floors, lints, links
	$(PY) -m scripts.check

sanitize: ## the C++ allocator under AddressSanitizer and ThreadSanitizer
	scripts/sanitize.sh $(ARGS)

environment: $(STATE)/.ready-test ## write environment.yml and environment-cuda.yml from requirements/versions.toml
	$(PY) -m scripts.environment

docs: $(STATE)/.ready-test ## write docs/flags.md and the picture in docs/memory.md
	$(PY) -m scripts.flags
	$(PY) -m scripts.draw_memory

wheel: $(STATE)/.ready-serve ## a wheel in dist/
	rm -rf build/lib* build/bdist*
	$(PY) -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .

$(STATE)/.ready-serve: $(INSTALL) $(NATIVE)
	$(PYTHON) scripts/install.py --state $(STATE) --for serve

$(STATE)/.ready-test: $(INSTALL) $(NATIVE)
	$(PYTHON) scripts/install.py --state $(STATE) --for test

$(STATE)/.ready-test-gpu: $(INSTALL) $(NATIVE)
	$(PYTHON) scripts/install.py --state $(STATE) --for test-gpu

clean: ## remove what was built and installed here (not the models)
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find engine kernels vattention_ext scripts tests -name __pycache__ -prune -exec rm -rf {} +
	rm -f vattention_ext/_native*.so kernels/_cpu*.so
