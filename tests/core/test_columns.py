import subprocess

import pytest
import torch

from trifold.core import native
from trifold.core.columns import NearestCode, descend_block
from trifold.core.obs import inverse_cholesky, sweep
from trifold.core.refine import _descend_block
from trifold.core.scheme import Scheme

compiled = pytest.mark.skipif(native.library("columns") is None, reason="no C compiler")


@pytest.fixture
def no_compiler(monkeypatch):
    """As on a machine without one."""
    monkeypatch.setenv("TRIFOLD_NATIVE", "0")
    native.library.cache_clear()
    yield
    native.library.cache_clear()


def problem(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    x = torch.randn(3 * columns, columns, generator=generator)
    scale = torch.rand(3, rows, generator=generator) * 0.2 + 0.1
    zero = torch.randint(0, 16, (3, rows), generator=generator).float()
    return weight, x.T @ x / len(x), scale, zero


def swept(weight, hessian, scale, zero, block):
    grid = NearestCode(scale, zero, [j % 3 for j in range(weight.shape[1])], Scheme(4))
    decided, loss = sweep(weight, inverse_cholesky(hessian)[0].float(), grid, block)
    return grid.codes, decided, loss


@compiled
@pytest.mark.parametrize("rows, columns, block", [(1, 7, 4), (5, 1, 8), (257, 43, 16), (600, 97, 128)])
def test_compiled_sweep_is_the_torch_one(rows, columns, block, monkeypatch):
    given = problem(rows, columns)
    codes, decided, loss = swept(*given, block)
    monkeypatch.setattr(NearestCode, "fix", lambda *_: False)
    expected_codes, expected, expected_loss = swept(*given, block)
    differ = (codes != expected_codes).any(0)  # a tie that the rounding of sums decided, and what follows from it
    assert differ.float().mean() <= 0.01
    torch.testing.assert_close(decided[~differ], expected[~differ])
    torch.testing.assert_close(loss[~differ], expected_loss[~differ], rtol=1e-4, atol=1e-5)


@compiled
@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 32), (256, 7), (517, 31)])
def test_compiled_descent_is_the_torch_one(rows, columns):
    generator = torch.Generator().manual_seed(1)
    _, hessian, scale, _ = problem(rows, columns)
    codes = torch.randint(0, 16, (columns, rows), generator=generator).float()
    slopes = torch.randn(columns, rows, generator=generator)
    sizes = scale[[j % 3 for j in range(columns)]]
    step = (sizes * hessian.diagonal()[:, None]).reciprocal()
    got, expected = codes.clone(), codes.clone()
    moved, expected_moved = torch.zeros(2, columns, rows)
    assert descend_block(got, slopes, step, sizes, moved, hessian, 15)
    _descend_block(expected, slopes, step, sizes, expected_moved, hessian, Scheme(4))
    differ = (got != expected).any(0)
    assert differ.float().mean() <= 0.01 and not torch.equal(got, codes)
    torch.testing.assert_close(moved[:, ~differ], expected_moved[:, ~differ])


@compiled
def test_a_view_into_a_larger_matrix_is_read_with_its_stride():
    weight, hessian, scale, zero = problem(4, 40)
    whole = swept(weight, hessian, scale, zero, 40)[0]
    assert torch.equal(swept(weight, hessian, scale, zero, 8)[0], whole)


def test_without_a_compiler_torch_does_it(no_compiler):
    assert native.library("columns") is None
    codes, decided, _ = swept(*problem(3, 8), 4)
    assert codes.isfinite().all() and decided.isfinite().all()


def test_a_compiler_that_fails_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "false")
    monkeypatch.setenv("TRIFOLD_CACHE", str(tmp_path))
    native.library.cache_clear()
    assert native.library("columns") is None
    assert not list(tmp_path.iterdir())
    native.library.cache_clear()


@compiled
def test_double_precision_and_other_layouts_are_left_to_torch():
    grid = NearestCode(torch.ones(1, 4), torch.zeros(1, 4), [0, 0], Scheme(4))
    matrix = torch.zeros(2, 4)
    assert grid.fix(0, matrix, matrix.clone(), torch.eye(2))
    assert not grid.fix(0, matrix.double(), matrix.double(), torch.eye(2).double())
    assert not grid.fix(0, torch.zeros(4, 2).T, matrix, torch.eye(2))


@compiled
def test_the_library_is_built_once(monkeypatch, tmp_path):
    monkeypatch.setenv("TRIFOLD_CACHE", str(tmp_path))
    native.library.cache_clear()
    assert native.library("columns") is not None
    assert [path.suffix for path in tmp_path.iterdir()] == [".so"]
    native.library.cache_clear()
    monkeypatch.setattr(subprocess, "run", None)  # a second build would fail
    assert native.library("columns") is not None
    native.library.cache_clear()
