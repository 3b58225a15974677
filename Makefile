PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
QUICKSTART := $(VENV)/.quickstart
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --disable-pip-version-check -qq --constraint constraints.txt
LOWEST := $(shell sed -n 's/.*"lightning>=\([0-9.]*\),.*/\1/p' pyproject.toml)

.PHONY: quickstart test test-slow test-lowest lint options docs format clean
.DELETE_ON_ERROR:
.NOTPARALLEL:

quickstart: $(QUICKSTART)
	@$(BIN)/minirec fetch ml-100k --to data
	@$(BIN)/minirec quickstart

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow
	MINIREC_PROPERTY_EXAMPLES=200 $(BIN)/python -m pytest -n 2 --dist worksteal -m property

test-lowest: $(INSTALLED)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --upgrade --target build/lowest \
		"lightning==$(LOWEST)" "pytorch-lightning==$(LOWEST)"
	PYTHONPATH=build/lowest $(BIN)/python -c 'import lightning; print("lightning", lightning.__version__)'
	PYTHONPATH=build/lowest $(BIN)/python -m pytest -n 2 -m "not slow" tests/callbacks/test_any_loader.py \
		tests/callbacks/test_interrupted_batch.py tests/callbacks/test_neighbours.py \
		tests/callbacks/test_plan_lengths.py tests/callbacks/test_resume_ranks.py \
		tests/callbacks/test_stepping_batches.py tests/callbacks/test_tuner.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/helpers/layers.py
	rm -rf build/types && mkdir -p build/types
	cp -r minirec_pl build/types/minirec_pl && cp -r callbacks build/types/minirec_pl/callbacks
	cd build/types && $(abspath $(BIN))/mypy --cache-dir ../../.mypy_cache --config-file ../../pyproject.toml --strict -p minirec_pl

options: $(INSTALLED)
	PYTHONPATH=tests $(BIN)/python tests/helpers/option_list.py

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "site: build/site/index.html"

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("minirec-pl needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -m venv $(VENV)

$(QUICKSTART): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing minirec-pl into $(VENV), which takes a minute or two"
	@$(PIP) --editable ".[report]"
	@touch $@

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing minirec-pl and what its tests need into $(VENV), which takes a few minutes"
	@$(PIP) --editable ".[dev,report,bench]"
	@touch $(QUICKSTART) $@
