# Everything from nothing but Python 3.11 or newer, gcc and make. `make help` lists the targets.
#
# PYTHON   the interpreter that the environment is made with   (make test PYTHON=python3.13)
# VENV     where the environment lives                         (make test VENV=.venv-3.13)
# ARGS     passed on to what runs                              (make test ARGS="-k shm -x")
# WORKERS  processes that share the tests; 0 for none but pytest (make test WORKERS=0 ARGS="--pdb")
# LIBUCX   the version that `make test-ucx` tests with
# KVIKIO   the version that is tested

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
WORKERS ?= 3
LIBUCX ?= 1.22.0
KVIKIO ?= 26.10.*

BIN := $(VENV)/bin
PY := $(BIN)/python
STAMPS := $(VENV)/.stamps
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(PY) -m pip install --quiet
NATIVE := $(wildcard asyncxfer/_fast/*.pyx asyncxfer/_fast/*.pxd asyncxfer/_fast/*.h)
PROJECT := pyproject.toml setup.py

.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo test test-ucx test-kvikio lint format bench docs build sdist-proof clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMPS)/native  ## move a paged KV cache from a prefill process to a decode process, verified
	$(PY) examples/kv_handoff.py $(ARGS)

test: $(STAMPS)/test $(STAMPS)/kvikio $(STAMPS)/native  ## the whole suite, with coverage of the Python
	$(PY) -m pytest -n $(WORKERS) --dist loadfile --cov --cov-report=term $(ARGS)

test-ucx: $(STAMPS)/test $(STAMPS)/native  ## every combination over UCX, with another version of it: make test-ucx LIBUCX=1.22.0
	$(PIP) --upgrade --no-deps --target $(VENV)/libucx-$(LIBUCX) libucx-cu12==$(LIBUCX)
	UCX_MATRIX=1 UCX_OTHER_BUILD=$(abspath $(VENV))/libucx-$(LIBUCX)/libucx ASYNCXFER_UCX_LIBRARY=$(abspath $(VENV))/libucx-$(LIBUCX)/libucx \
	    $(PY) -m pytest tests/test_contract.py tests/test_ucx*.py tests/test_ucp.py tests/security/test_ucx.py \
	    -k "ucx or Ucx or ucp" $(ARGS)

test-kvikio: $(STAMPS)/test $(STAMPS)/kvikio $(STAMPS)/native  ## every combination by KvikIO; for real where there is a GPU
	KVIKIO_MATRIX=1 $(PY) -m pytest tests/test_kvikio.py tests/gpu/test_gpu_kvikio.py $(ARGS)

lint: $(STAMPS)/lint $(STAMPS)/native  ## ruff, mypy --strict, stubtest, layers, change log
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PY) -m mypy
	$(PY) -m mypy.stubtest $(if $(wildcard stubtest-allow.txt),--allowlist stubtest-allow.txt) asyncxfer._fast
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/towncrier build --draft --version next > /dev/null

format: $(STAMPS)/lint  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMPS)/nixl $(STAMPS)/native  ## our figures next to those of NIXL on this machine, interleaved
	$(PY) -m asyncxfer bench --peer nixl $(ARGS)

docs: $(STAMPS)/docs $(STAMPS)/native  ## the documentation, offline, warnings are errors: docs/_build/html
	$(PY) -m sphinx -W --keep-going -q -b html docs docs/_build/html $(ARGS)
	@echo "docs/_build/html/index.html"

build: $(STAMPS)/build  ## sdist and wheel in dist/, each proven in an empty environment
	rm -rf dist build/lib* build/bdist*
	$(PY) -m build --outdir dist .
	PYTHON=$(PYTHON) bash .ci/prove-build dist

clean:  ## remove environments, builds, caches
	rm -rf .venv* build dist *.egg-info docs/_build .coverage* htmlcov .hypothesis \
	    .mypy_cache .ruff_cache .pytest_cache .import_linter_cache asyncxfer/_fast/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- the environment, in steps that are done once -------------------------------------------------------------

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "asyncxfer needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS)
	$(PIP) "pip>=24"
	@touch $@

# The build requirements come from pyproject.toml, the only place that pins them. Without build isolation
# a changed .pyx costs one compilation, not one environment.
$(STAMPS)/core: $(STAMPS)/venv $(PROJECT)
	$(PY) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' \
	    > $(STAMPS)/build-requires.txt
	$(PIP) -r $(STAMPS)/build-requires.txt
	$(PIP) --no-build-isolation --editable ".[uvloop]"
	@touch $@

$(STAMPS)/native: $(STAMPS)/core $(NATIVE)
	$(PY) setup.py --quiet build_ext --inplace
	@touch $@

# asyncxfer itself is there already, so this adds what the extra asks for and compiles nothing.
$(STAMPS)/test $(STAMPS)/lint $(STAMPS)/docs: $(STAMPS)/%: $(STAMPS)/core
	$(PIP) "asyncxfer[$*]"
	@touch $@

# KvikIO asks for CuPy and CUDA, 2.8 GB; without a GPU these 16 MB are enough.
$(STAMPS)/kvikio: $(STAMPS)/test
	$(PIP) --no-deps "kvikio-cu12==$(KVIKIO)" "libkvikio-cu12==$(KVIKIO)" nvidia-cufile-cu12 rapids-logger cuda-pathfinder
	@touch $@

$(STAMPS)/build: $(STAMPS)/venv
	$(PIP) build
	@touch $@

# The wheels of NIXL ask for torch, which the bench does not need.
$(STAMPS)/nixl: $(STAMPS)/core
	$(PIP) "asyncxfer[uvloop,bench]"
	$(PY) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["nixl"], sep="\n")' \
	    > $(STAMPS)/nixl-requires.txt
	$(PIP) --no-deps -r $(STAMPS)/nixl-requires.txt
	@touch $@
