# Two commands: `make bench` and `make test`. Both set up what they need first.
#
# They work in .venv, or in the environment that is activated, or in VENV=…; a torch that is already there stays.

VENV ?= $(or $(VIRTUAL_ENV),.venv)
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.trilby-installed
TEST_PROCESSES ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: bench test lint types compile-matrix doctor clean

bench: $(READY)
	$(PYTHON) -m trilby.bench

# Two processes at a time; their threads then outnumber the cores of a small machine, and must not spin while they wait.
test: export OMP_WAIT_POLICY = passive
test: lint types
	$(PYTHON) -m pytest -n $(TEST_PROCESSES) --dist worksteal -m "not slow"
	$(PYTHON) -m pytest -n $(TEST_PROCESSES) --dist worksteal -m "slow and not alone"
	$(PYTHON) -m pytest -m alone

lint: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror csrc/*.cpp csrc/*.h tests/kernels/*.cpp

# The folders are imported as trilby.kernels, trilby.gpt, trilby.bench; mypy finds them so through a link.
types: $(READY)
	mkdir -p build/types && ln -sfn ../.. build/types/trilby
	$(PYTHON) -m mypy -p trilby.kernels -p trilby.gpt -p trilby.bench

# Every Triton kernel with every launch, for every GPU that the kernels know: an hour on two cores, then only what changed.
compile-matrix: $(READY)
	$(PYTHON) -W error -m trilby.kernels.gpu matrix

doctor: $(READY)
	$(PYTHON) -m trilby.kernels

# Installs trilby in place with everything for development, then says what runs here and what is missing. The pinned set
# holds for a new environment; one that has a torch keeps that torch.
$(READY): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	test -x $(PYTHON) || python3 -m venv $(VENV)
	mkdir -p build
	if $(PYTHON) -c "import torch" 2>/dev/null; \
	  then grep -v "^torch==" constraints.txt > build/constraints.txt; \
	  else cp constraints.txt build/constraints.txt; fi
	$(PYTHON) -m pip install --quiet -c build/constraints.txt setuptools ninja torch
	$(PYTHON) -m pip install --quiet -c build/constraints.txt --no-build-isolation --editable ".[dev]"
	$(PYTHON) -m trilby.kernels
	touch $@

clean:
	rm -rf build dist *.egg-info kernels/*.so
	find . -name __pycache__ -not -path "./.venv/*" -prune -exec rm -rf {} +
