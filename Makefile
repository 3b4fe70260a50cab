# Two commands for users, each of which installs what it needs: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
# Nothing here needs a network after installation; two threads on two busy cores spin.
export HF_HUB_OFFLINE := 1
export OMP_WAIT_POLICY := passive
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test lint format

demo: .venv/installed
	$(BIN)/python recipes/pipeline.py
	@echo "$(BIN)/python recipes/chat.py talks to these policies; README.md says how to go on with your own data"

test: .venv/installed
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

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
