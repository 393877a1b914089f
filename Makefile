# `make run` and `make test` are all a fresh machine needs besides Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The tests wait more than they work: three at a time fit on two cores. A file's tests stay together.
PARALLEL := -n 3 --dist loadfile

.PHONY: run test quick lint soak clean

run: $(VENV)/runtime
	$(BIN)/python neuron_client.py --local

# What fails beside two other tests and noisy neighbours is shown, and run once more by itself; failing twice fails.
test: $(VENV)/tools lint
	$(BIN)/python -m pytest -q $(PARALLEL) || $(BIN)/python -m pytest -q --last-failed --last-failed-no-failures none

# The inner loop: under half a minute.
quick: $(VENV)/tools
	$(BIN)/python -m pytest -q -x $(PARALLEL) -m "not slow"

lint: $(VENV)/tools
	$(BIN)/ruff check .
	$(BIN)/mypy .

# Hundreds of kills and network faults, then ten minutes at a fast clock; prints what it counted.
soak: $(VENV)/tools
	$(BIN)/python -m tests.soak

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/runtime: requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/tools: requirements.txt requirements-dev.txt requirements-dask.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@ $(VENV)/runtime

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .hypothesis neuron-state
