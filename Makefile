# make demo: set everything up and run the main job on generated hospitals. make test: every check that CI makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO := demo/run

.PHONY: demo test lint clean-demo

demo: $(INSTALLED)
	$(BIN)/semisam phantom --out demo/data
	rm -rf $(DEMO)
	$(BIN)/semisam simulate --plan site_configs/phantom/plan.yaml --sites site_configs/phantom/sites --out $(DEMO)

test: lint
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean-demo:
	rm -rf demo

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; make PYTHON=python3.11 $(MAKECMDGOALS) names one." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
