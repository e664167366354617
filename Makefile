# Everything a fresh machine needs is python3 with venv; the rest is installed into .venv from constraints.txt.
#   make demo    train on scikit-learn's digits: SGD, SWA and EMA side by side
#   make test    the test suite, kernels in the interpreter and compiled for four GPU targets
#   make check   ruff, mypy, the wheel's contents, the tests against the installed wheel
#   make bench   the CPU benchmarks, into benchmarks/results/
#   make gpu     the GPU tests and benchmarks with the python in use, which must have torch and triton
# TORCH='torch==2.14.0' (any pip arguments: another release, a CUDA wheel, an index) brings another torch.

PYTHON ?= python3
TORCH ?=
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install
# A torch of the user's own must not be held to the pinned torch and triton.
PINS := $(VENV)/constraints.txt
STAMP := $(VENV)/torch-$(shell printf '%s' '$(TORCH)' | cksum | cut -d' ' -f1)

.PHONY: demo test check bench gpu clean

$(STAMP): constraints.txt
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
ifeq ($(strip $(TORCH)),)
	cp constraints.txt $(PINS)
	$(PIP) --constraint $(PINS) torch
else
	grep -v -e '^torch==' -e '^triton==' constraints.txt > $(PINS)
	$(PIP) $(TORCH)
endif
	touch $@

# timm, torchvision and ultralytics alone: torchvision would put the one torch it was built with in TORCH's place.
$(VENV)/demo $(VENV)/test $(VENV)/bench $(VENV)/check: $(VENV)/%: $(STAMP) pyproject.toml
	$(PIP) --constraint $(PINS) hatchling editables
	$(PIP) --constraint $(PINS) --no-build-isolation --editable '.[$*]'
	$(if $(filter test,$*),$(PIP) --constraint $(PINS) --no-deps timm torchvision ultralytics)
	touch $@

demo: $(VENV)/demo
	$(BIN)/python -m benchmarks demo

# A core for each process; a worker takes on tests that are next to each other, which share what they set up.
test check: export PYTEST_ADDOPTS := --numprocesses=logical --maxprocesses=4 --dist=worksteal

test: $(VENV)/test
	$(BIN)/python -m pytest --durations=10

check: $(VENV)/test $(VENV)/check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	rm -rf dist
	$(BIN)/python -m build --wheel --no-isolation > /dev/null
	$(BIN)/python -m benchmarks wheel

# The tests' libraries are peers here.
bench: $(VENV)/test $(VENV)/bench
	$(BIN)/python -m benchmarks all --device cpu

gpu:
	PYTHONPATH=$(CURDIR):$(CURDIR)/kernels/torch-ext $(PYTHON) -m pytest -m gpu -q
	PYTHONPATH=$(CURDIR):$(CURDIR)/kernels/torch-ext $(PYTHON) -m benchmarks all --device cuda

clean:
	rm -rf $(VENV) dist
