# Every target works from a fresh clone with Python 3.11+ and pip alone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export HF_HUB_OFFLINE ?= 1

.PHONY: install test check demo bench clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto

demo: install
	$(BIN)/trifold demo

bench: install
	$(BIN)/python benchmarks/compress.py

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache

.PHONY: check-kernels check-triton36 gpu-check

# Every Triton kernel, width, configuration and GPU architecture, compiled without a GPU; `test` does a selection.
check-kernels: install
	for part in compiled compiled_sparse compiled_lowrank; do \
		PYTHONPATH=. $(BIN)/python tests/kernels/triton_checks/$$part.py --all || exit 1; done

# The kernels' tests with the oldest Triton that is supported, in an environment of its own.
check-triton36: OLD := .venv-triton36
check-triton36:
	test -x $(OLD)/bin/python || $(PYTHON) -m venv $(OLD)
	grep -vE '^(triton|numpy)==' constraints.txt > $(OLD)/constraints.txt
	$(OLD)/bin/pip install --quiet --disable-pip-version-check -c $(OLD)/constraints.txt torch
	$(OLD)/bin/pip install --quiet --disable-pip-version-check -c $(OLD)/constraints.txt -e '.[dev]' 'triton==3.6.0' 'numpy<2.4'
	$(OLD)/bin/python -m pytest -q tests/kernels/test_planes.py tests/kernels/test_triton_rounded.py tests/kernels/test_sparse_triton.py tests/kernels/test_triton.py

# Values and speed on this machine's GPU, in less than 8 minutes; results go to benchmarks/results/. GPU_PYTHON is one
# whose torch has CUDA.
gpu-check: GPU_PYTHON ?= $(PYTHON)
gpu-check:
	PYTHONPATH=. $(GPU_PYTHON) benchmarks/gpu_check.py
