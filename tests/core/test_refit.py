import pytest
import torch

from trifold.core import refit as module
from trifold.core.obs import damped
from trifold.core.refit import refit, toward_dense


def problem(rows=7, columns=43, share=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = mix @ torch.randn(columns, 3 * columns, generator=generator, dtype=torch.float64)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, columns, generator=generator) >= share
    return weight, damped(x @ x.T, 0.01), mask, x


def losses(difference, hessian):
    return ((difference @ hessian) * difference).sum(1)


@pytest.mark.parametrize("rows, columns", [(1, 2), (7, 43), (40, 97)])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_the_slope_is_zero_where_weights_stay(rows, columns, share):
    weight, hessian, mask, _ = problem(rows, columns, share)
    found = refit(weight, hessian, mask, weight * mask)
    assert (found[~mask] == 0).all()
    slope = (found - weight) @ hessian
    assert slope[mask].abs().max() <= 1e-9 * (weight @ hessian).abs().max() if mask.any() else True
    if share == 0:
        torch.testing.assert_close(found, weight)


def test_it_is_the_least_squares_solution_of_each_row():
    weight, hessian, mask, _ = problem()
    found = refit(weight, hessian, mask, weight * mask)
    root = torch.linalg.cholesky(hessian)
    for row, kept, ours in zip(weight, mask, found, strict=True):
        expected = torch.linalg.lstsq(root.T[:, kept], (row @ root)[:, None]).solution.squeeze(1)
        torch.testing.assert_close(ours[kept], expected)


def test_rows_in_parts_and_in_float32_are_the_same(monkeypatch):
    weight, hessian, mask, _ = problem(40, 97)
    whole = refit(weight, hessian, mask, weight * mask)
    monkeypatch.setattr(module, "_SYSTEM_ELEMENTS", 3 * 97**2)
    torch.testing.assert_close(refit(weight, hessian, mask, weight * mask), whole)
    monkeypatch.setattr(module, "_DOUBLE_UP_TO", 0)
    found = refit(weight, hessian, mask, weight * mask)
    best = losses(weight - whole, hessian)
    assert ((losses(weight - found, hessian) - best) <= 1e-5 * best).all()


def test_rows_that_keep_nothing_or_all():
    weight, hessian, mask, _ = problem()
    mask[0], mask[1] = False, True
    found = refit(weight, hessian, mask, weight * mask)
    assert (found[0] == 0).all()
    torch.testing.assert_close(found[1], weight[1])
    assert (refit(weight, hessian, torch.zeros_like(mask), weight * 0) == 0).all()


def test_a_start_that_is_better_stays():
    """Of a matrix that is none: the system cannot be solved, so nothing is believed."""
    weight, hessian, mask, _ = problem()
    broken = hessian - 2 * torch.diag(hessian.diagonal()) + hessian.diagonal().mean() * torch.eye(43)
    broken.diagonal().abs_()
    start = weight * mask
    found = refit(weight, broken, mask, start)
    assert (losses(weight - found, broken) <= losses(weight - start, broken)).all()


def test_dense_targets_are_the_cross_gram():
    weight, _, mask, x = problem()
    x_dense = x + 5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    gram = x @ x.T
    moved = toward_dense(weight, gram, (x_dense - x) @ x.T, 1.0)
    found = refit(moved, gram, mask, weight * mask)
    target = weight @ x_dense
    for row, kept, ours in zip(target, mask, found, strict=True):
        expected = torch.linalg.lstsq(x[kept].T, row[:, None]).solution.squeeze(1)
        torch.testing.assert_close(ours[kept], expected, rtol=1e-6, atol=1e-8)
    plain = refit(weight, gram, mask, weight * mask)
    assert (target - found @ x).square().sum() < 0.99 * (target - plain @ x).square().sum()
    assert torch.equal(toward_dense(weight, gram, torch.full_like(gram, torch.nan), 1.0), weight)
