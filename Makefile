# The verbs of this repository; `make` alone explains them. Everything happens in .venv, made when it is missing.
# To use your own environment: make test VENV=path/to/venv

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Pinned, because another version may be a build of several gigabytes. Only tests, training and GPUs need torch.
TORCH  ?= torch==2.13.0
PIP    := $(BIN)/pip --quiet --disable-pip-version-check --no-input install --no-compile
READY  := $(VENV)/.turborank-ready
BUILT_FROM := pyproject.toml $(wildcard CMakeLists.txt native/*)

.DEFAULT_GOAL := help
.PHONY: audit conformance conformance-core coverage help install check test test-engine bench docs sanitize emulate faults fuzz clean

help:
	@echo "make install    an editable turborank in $(VENV), with what tests and training need"
	@echo "make check      ruff (lint, format) and mypy --strict"
	@echo "make test       the tests; choose some with  make test ARGS='tests/test_tokens.py -k windows'"
	@echo "make test-engine  the tests of what runs the native engine (TURBORANK_ISA=avx2 or portable forces an instruction set)"
	@echo "make coverage   the tests, and which lines and branches of src/turborank they ran"
	@echo "make conformance  real clients and tools against our server (conformance-core: fewer), and mteb, LlamaIndex,"
	@echo "                ir_datasets and sentence-transformers beside our evaluation; CLIENTS=folder for their environments"
	@echo "make bench      speed beside error, ours and peers (ARGS are passed on)"
	@echo "make docs       write the generated pages of docs/ anew from the code"
	@echo "make sanitize   the native engine under address, undefined-behaviour and thread sanitizers"
	@echo "make emulate    the native engine on 64-bit Arm, by qemu"
	@echo "make audit      known vulnerabilities of what an installation brings, and its bill of materials in dist/sbom.json"
	@echo "make faults     every allocation fails, disks are full or read-only, processes are killed, clients misbehave"
	@echo "make fuzz       damaged files and bodies, by coverage: FUZZ_SECONDS=3600 for each format, FUZZ_TARGETS='config beir'"
	@echo "make clean      remove builds and caches, not $(VENV)"

install: $(READY)

# Editable: Python sources are read in place; the native engine is rebuilt when one of its files has changed.
$(READY): $(BUILT_FROM)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (minutes the first time)"
	@$(PIP) --editable '.[test,serve,eval,train,otel,onnx]' $(TORCH)
	@touch $@

check: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

test: $(READY)
	$(BIN)/python -m pytest $(ARGS)

# What may depend on the instruction set.
ENGINE := native test_scheduler.py test_reranker.py test_readme.py serve

test-engine: $(READY)
	$(BIN)/python -m pytest $(addprefix tests/,$(ENGINE)) $(ARGS)

coverage: $(READY)
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest $(ARGS)
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

# Each client and each tool lives in an environment of its own, outside this repository.
CLIENTS ?= $(HOME)/.cache/turborank-conformance
CONFORMANCE := test_conformance.py test_tools.py test_peers.py

conformance: $(READY)
	TURBORANK_CONFORMANCE=$(CLIENTS) $(BIN)/python -m pytest $(addprefix tests/conformance/,$(CONFORMANCE)) $(ARGS)

conformance-core: $(READY)
	TURBORANK_CONFORMANCE=$(CLIENTS) $(BIN)/python -m pytest $(addprefix tests/conformance/,$(CONFORMANCE)) -m core $(ARGS)

bench: $(READY)
	$(BIN)/python bench/bench.py $(ARGS)

docs: $(READY)
	$(BIN)/python docs/generate.py

sanitize: $(READY)
	PATH="$(abspath $(BIN)):$$PATH" tests/native/sanitize.sh

emulate: $(READY)
	PATH="$(abspath $(BIN)):$$PATH" tests/native/emulate.sh

# In environments of their own. Says what could not be checked, and ends after AUDIT_SECONDS.
AUDIT_SECONDS ?= 900

audit:
	$(PYTHON) deploy/audit.py .venv-audit $(AUDIT_SECONDS)

# All of the faults of which an ordinary run takes a few; figures for docs/reliability.md. Several processes; ends after
# FAULTS_SECONDS with the counts so far.
FAULTS_PROCESSES ?= $(shell nproc 2>/dev/null || echo 2)
FAULTS_SECONDS   ?= 1200

faults: $(READY)
	$(BIN)/python tests/faults/everything.py $(FAULTS_PROCESSES) $(FAULTS_SECONDS)

# One format after the other, each at most FUZZ_MEMORY MiB; continues what an earlier run with the same FUZZ_FOLDER began.
# What is found stays there as found-TARGET-…; reduced, it becomes a row of tests/fuzz/cases.py.
FUZZ_SECONDS ?= 60
FUZZ_MEMORY  ?= 2048
FUZZ_FOLDER  ?= build/fuzz
FUZZ_TARGETS ?= config settings safetensors tokenizer run qrels beir llamaindex chunks csv tsv jsonl training calibration body

fuzz: $(READY)
	@$(BIN)/python -c 'import atheris' 2>/dev/null || $(PIP) atheris
	FUZZ_MEMORY=$(FUZZ_MEMORY) $(BIN)/python tests/fuzz/campaign.py $(FUZZ_FOLDER) $(FUZZ_SECONDS) $(FUZZ_TARGETS)

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage .coverage.*
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
