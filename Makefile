# `make demo`, `make test`, `make check`: each first makes .venv, with the versions in constraints.txt, if it is missing.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2
INSTALLED := .venv/.installed

.PHONY: demo test test-slow test-slurm check clean

demo: $(INSTALLED)
	$(BIN)/ctseg demo --output demo

# Two processes share the tests; every worker imports torch, so more of them need memory.
test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

# Starts a Slurm of two nodes on this machine; needs root, slurm-wlm and munge, and skips without them.
test-slurm: $(INSTALLED)
	$(BIN)/python -m pytest -m slurm tests/slurm -rs

check: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Keeps .venv, which takes minutes to make, and every run and data set.
clean:
	rm -rf build dist demo .pytest_cache .mypy_cache .ruff_cache
	find . -path ./.venv -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make needs Python 3.11 or newer for the versions in constraints.txt, but $(PYTHON) is" \
	    "$$($(PYTHON) --version 2>&1). Name another one: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
# A client for tests of `ctseg serve`, beside the packages: it would bring another MONAI and pydicom along. Tests that
# need it skip without it.
	-$(BIN)/python -m pip install --no-deps --ignore-installed --prefix .venv/monailabel monailabel==0.8.5
	touch $@
