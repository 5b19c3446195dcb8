# Every target sets up what it needs in .venv; a bare machine needs python3 (with venv), make and a network.

PYTHON ?= python3
# Passed to pip, for example: make venv PIP_FLAGS="--index-url https://my.mirror/simple"
PIP_FLAGS ?=

BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint check format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP) ## create .venv and install the project with its tools

demo: $(STAMP) ## generate one picture with the embedded model
	$(BIN)/python -m l2p_lowvram generate --model demo -p "a large red circle on a blue background, left" \
		-o demo.png --seed 1 --overwrite

test: $(STAMP) ## run the tests
	$(BIN)/python -m pytest -q

lint: $(STAMP) ## check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test ## lint, then test: what .ci/run does

format: $(STAMP) ## format the code and apply safe fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove .venv, caches and build leftovers
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last: an interrupted install is taken up again by the next make.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) > /dev/null || { \
		echo "make: $(PYTHON) not found; install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3" >&2; \
		exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "make: $(PYTHON) is older than 3.10; name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; \
		echo "make: '$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -c constraints.txt -e '.[dev,interop]'
	@touch $@
