"""What every registered method and format has to keep, found through the registries."""

import dataclasses
import inspect
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import trifold
import trifold.lowrank
import trifold.quantizers
import trifold.sparsity
from trifold.core.errors import RecipeError
from trifold.core.method import METHODS, BlockMethod, LayerMethod, LayerProblem, Tuner
from trifold.core.scheme import Scheme
from trifold.formats import FORMATS, bits_per_weight, digest, format_for, stored_bytes

ROOT = Path(__file__).parent.parent
LAYER = [name for name in METHODS if issubclass(METHODS.get(name), LayerMethod)]
QUANTIZERS = [name for name in LAYER if METHODS.get(name).__module__.startswith("trifold.quantizers.")]


def problem(rows=9, columns=43, bits=3, group=16, zero_column=False, symmetric=False, **scheme):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, columns, generator=generator) @ torch.randn(columns, columns, generator=generator) / 8
    weight = torch.randn(rows, columns, generator=generator)
    if zero_column:
        x[:, 3], weight[:, 5] = 0, 0
    drift = 0.01 * (torch.randn(x.shape, generator=generator).T @ x).double()
    schemes = {"a": Scheme(bits, group, symmetric, **scheme)}
    return LayerProblem({"a": weight}, schemes, (x.T @ x).double(), drift, sample=x, absmean=x.abs().mean(0))


@pytest.mark.parametrize("name", list(METHODS))
def test_a_method_is_a_frozen_dataclass_of_one_kind_with_a_docstring(name):
    method = METHODS.get(name)
    kinds = [kind for kind in (LayerMethod, BlockMethod, Tuner) if issubclass(method, kind)]
    assert len(kinds) == 1
    assert dataclasses.is_dataclass(method) and method.__dataclass_params__.frozen
    assert method() == method() and hash(method()) == hash(method())
    assert inspect.getdoc(method) and inspect.getmodule(method).__doc__


@pytest.mark.parametrize("name", LAYER)
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"rows": 1},
        {"columns": 2, "group": 1},
        {"zero_column": True},
        {"group": "channel"},
        {"group": "tensor"},
        {"group": 1000},
        {"bits": 1},
        {"bits": 8, "symmetric": True},
        {"zero_point": "real"},
        {"zero_point": "real", "group": "tensor", "bits": 1},
        {"grid": "nf4", "bits": 4},
        {"grid": "nf4", "bits": 4, "group": "channel", "rows": 1},
        {"grid": "fp4_e2m1", "bits": 4, "zero_column": True},
        {"grid": "fp8_e4m3", "bits": 8, "group": "channel"},
        {"grid": "fp8_e4m3", "bits": 8, "group": "tensor"},
    ],
    ids=str,
)
def test_a_layer_method_is_pure_finite_and_its_result_survives_storage(name, case):
    p, method = problem(**case), METHODS.get(name)()
    weight = p.weights["a"].clone()
    try:
        method.check(tuple(weight.shape), p.schemes["a"])
    except RecipeError:
        return  # refused in the plan
    first, second = (method.solve(p).canonical["a"] for _ in range(2))
    assert torch.equal(p.weights["a"], weight)
    dense = first.dequantize()
    assert first.shape == tuple(weight.shape) and torch.isfinite(dense).all()
    assert torch.equal(dense, second.dequantize())
    fmt = FORMATS.get(format_for(first))
    spec, tensors = fmt.describe(first), fmt.pack(first)
    assert {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()} == fmt.layout(spec)
    again = fmt.unpack(tensors, spec)
    assert torch.equal(again.dequantize(), dense) and digest(fmt.pack(again)) == digest(tensors)
    assert stored_bytes(spec) == sum(t.nbytes for t in tensors.values())
    assert bits_per_weight(spec) == 8 * stored_bytes(spec) / weight.numel()


@pytest.mark.parametrize("name", QUANTIZERS)
def test_more_bits_are_never_worse(name):
    from trifold.core.obs import relative_error

    errors = []
    for bits in (2, 3, 4, 6, 8):
        p = problem(rows=32, bits=bits)
        solved = METHODS.get(name)().solve(p).canonical["a"].dequantize()
        errors.append(relative_error(p.weights["a"], solved, p.gram))
    assert all(b < 0.6 * a for a, b in itertools.pairwise(errors))


def test_the_public_api():
    assert set(trifold.__all__) == {"Recipe", "__version__", "compress", "evaluate", "evaluate_tasks", "export", "load"}
    assert all(hasattr(trifold, name) for name in trifold.__all__)
    with pytest.raises(AttributeError, match="no attribute 'quantize'"):
        _ = trifold.quantize


def test_what_runs_a_checkpoint_needs_neither_pydantic_nor_datasets():
    """A machine that only runs models, or the check for GPUs, may lack them."""
    without = "import sys; sys.modules.update(dict.fromkeys(('pydantic', 'datasets', 'lm_eval', 'matplotlib')))"
    code = f"{without}; import trifold, gpu_check, common; assert common.machine()['trifold']"
    path = os.pathsep.join((str(ROOT), str(ROOT / "benchmarks")))
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True)
    assert not done.returncode, done.stderr.decode()
