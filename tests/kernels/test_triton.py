"""Triton's kernels without a GPU: values in the interpreter, compiled code ahead of time, each in its own process."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
CHECKS = HERE / "triton_checks"
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
WITHOUT = """
import sys; sys.modules["triton"] = None
import torch
from packed_samples import activations, layer, quantized
from trifold.kernels import explain
module = layer(quantized(64, 192, 4, 64, False))
assert module(activations(3, 192)).isfinite().all()
print(explain(module.spec, torch.float16, "cuda").rejected["weight_only.planes"])
"""


def process(*command, **variables):
    path = os.pathsep.join([str(HERE.parents[1]), str(HERE)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, cwd=HERE.parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    return done.stdout


@needs_triton
def test_values_in_the_interpreter():
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", *sorted(CHECKS.glob("interpreted_*.py")))
    assert " passed" in process(*command, TRITON_INTERPRET="1")


@needs_triton
def test_compiled_code_keeps_the_budget(tmp_path):
    variables = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    assert " within the budget" in process(CHECKS / "compiled.py", **variables)


def test_without_triton_everything_else_works():
    assert process("-c", WITHOUT) == "triton is not installed\n"


@needs_triton
def test_the_check_for_gpus_runs_as_far_as_there_is_none():
    script = HERE.parents[1] / "benchmarks" / "gpu_check.py"
    said = process(script, "--dry-run", TRITON_INTERPRET="1")  # its exit code says that all values are right
    rows = [line for line in said.splitlines() if line.startswith("| ")]
    assert sum(line.endswith(" none |") for line in rows) == 10
    assert sum("Error" in line for line in rows) == 2  # the products of others that want a GPU, or are not here
    assert "'times faster': " in said and all(
        name in said for name in ("experts.planes", "groups_triton", "bitmap_triton", "int4 + rank 128 bf16")
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_check_for_gpus_measures_nothing_without_one():
    script = HERE.parents[1] / "benchmarks" / "gpu_check.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode and "no GPU here, so nothing was checked or measured" in done.stderr
