# `make demo` and `make test` are all a newcomer needs; both build .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
REPORTS := build/tests

.PHONY: venv demo test test-slow test-site lint clean

venv: $(VENV)/.complete

$(VENV)/.complete: requirements.txt requirements-data.txt requirements-examples.txt requirements-images.txt requirements-dev.txt constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info[:2] >= (3, 11), f"Python 3.11 is needed, this is {sys.version}"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --requirement requirements-dev.txt
	touch $@

demo: venv
	$(BIN)/python examples/demo.py

# Two workers: a test of several ranks waits about as long as it computes. Both commands always run; exit code 5 of pytest
# is a selection by PYTEST_ARGS without a test.
test: venv lint
	@mkdir -p $(REPORTS); failed=0; \
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder --junitxml=$(REPORTS)/fast.xml \
	    $(PYTEST_ARGS) || [ $$? -eq 5 ] || failed=1; \
	$(BIN)/python -m tests.support.budget $(REPORTS)/fast.xml; \
	exit $$failed

test-slow: venv
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

# The torch that a site documents (launch/frontier/software/torch.txt), here without ROCm: the program and the tests must
# run on it, too. A venv of its own, with the other versions of constraints.txt. pip prefers PyTorch's CPU wheel, 2.10.0+cpu;
# where only PyPI can be reached it takes the CUDA build, gigabytes of it, which runs on CPUs as well.
SITE_TORCH := 2.10.0
SITE := .venv-site

$(SITE)/.complete: requirements-dev.txt constraints.txt
	$(PYTHON) -m venv $(SITE)
	$(SITE)/bin/pip install --quiet --extra-index-url https://download.pytorch.org/whl/cpu torch==$(SITE_TORCH)
	grep -v '^torch==' constraints.txt > $(SITE)/constraints.txt
	echo "torch==$(SITE_TORCH)" >> $(SITE)/constraints.txt
	$(SITE)/bin/pip install --quiet --constraint $(SITE)/constraints.txt --requirement requirements-dev.txt
	touch $@

test-site: $(SITE)/.complete
	$(SITE)/bin/python -m pytest -m "unit and not slow" $(PYTEST_ARGS)
	$(SITE)/bin/python -m pytest -m "not slow" tests/parity tests/checkpoint $(PYTEST_ARGS)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) $(SITE) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache demo_out
