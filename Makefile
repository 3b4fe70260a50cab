# `make demo` and `make test` are for users; each installs what it needs into .venv.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
# Nothing needs a network after installation. Two threads on two busy cores spin.
export HF_HUB_OFFLINE := 1
export OMP_WAIT_POLICY := passive
export TOKENIZERS_PARALLELISM := false

MODEL ?= HuggingFaceTB/SmolLM2-135M-Instruct
SEEDS ?= 0

.PHONY: demo real test test-all smoke lint format

demo: .venv/installed
	$(BIN)/python recipes/pipeline.py
	@echo "Next: $(BIN)/python recipes/chat.py talks to these policies. README.md shows how to use your own data."

# A real chat model, and what it knows of cities: hours on a CPU (docs/experiment.md). MODEL may be a folder.
real: export HF_HUB_OFFLINE := 0
real: .venv/installed
	$(BIN)/python recipes/pipeline.py --config configs/smollm2-135m/knowledge.yaml \
	  --set arguments.model_name_or_path=$(MODEL) --set "seeds=[$(SEEDS)]"

# What a user needs to know that an installation or a change works.
test: .venv/installed
	$(PYTEST) -m "not (browser or fuzz or kill or real or smollm2)"

# All tests: those of the page in a browser, of random input, of killed processes, on real models too.
test-all: .venv/installed
	$(PYTEST)

# Every recipe, a few steps on the tiny model.
smoke: .venv/installed
	$(BIN)/python -m pytest -m smoke tests/project/test_smoke.py

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("rlhf-recipes needs Python 3.11 or later: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
