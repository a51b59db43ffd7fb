# make demo: set everything up and run the main job on generated hospitals. make test: every check that CI runs.
# make docs: the documentation as a site in site/.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO := demo/run

.PHONY: demo test lint docs mutants clean-demo

demo: $(INSTALLED)
	$(BIN)/semisam phantom --out demo/data
	rm -rf $(DEMO)
	$(BIN)/semisam simulate --plan site_configs/phantom/plan.yaml --sites site_configs/phantom/sites --out $(DEMO)

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED)
	$(BIN)/python -m mkdocs build --strict

# Puts known faults into a copy of the code, one at a time, and prints those that no test catches. Not part of CI.
mutants: $(INSTALLED)
	$(BIN)/python -m tests.mutants.run

clean-demo:
	rm -rf demo

# sam2 is built against the installed torch; an isolated build would download torch a second time.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; make PYTHON=python3.11 $(MAKECMDGOALS) names one." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	SAM2_BUILD_CUDA=0 $(BIN)/python -m pip install --disable-pip-version-check --no-build-isolation \
		-c constraints.txt -e '.[sam2]'
	@touch $@
