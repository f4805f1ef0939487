"""The identities behind low rank, in float64."""

import pytest
import torch

import trifold.compress.recipe  # noqa: F401  knows all methods
from tests.sparsity.problems import correlated
from trifold.core.canonical import Chain, LowRank
from trifold.core.obs import NotFiniteError
from trifold.core.scheme import Scheme
from trifold.lowrank.factors import Layout, factorise, pivots, rotation
from trifold.lowrank.metric import Metric

SHAPES = [(96, 128), (128, 96), (61, 61), (7, 43), (43, 7), (1, 7), (7, 1)]


def whitened(weight, gram, rank):
    """The paper's form: SVD of W L with the Cholesky factor L."""
    lower = torch.linalg.cholesky(gram)
    u, s, v = torch.linalg.svd(weight.double() @ lower, full_matrices=False)
    return torch.linalg.solve_triangular(
        lower, (u[:, :rank] * s[:rank]) @ v[:rank], upper=False, left=False
    ), s.square()


@pytest.mark.parametrize("rows, columns", SHAPES)
def test_the_gram_form_is_the_whitened_form_and_its_error_is_the_tail(rows, columns):
    weight, gram = correlated(1, rows, columns)
    metric = Metric.of(gram)
    energies = metric.energies(weight)
    for rank in {1, min(rows, columns) // 2, min(rows, columns)} - {0}:
        expected, squares = whitened(weight, gram, rank)
        basis = metric.basis(weight, rank)
        found = basis @ (basis.T @ weight.double())
        total = float(squares.sum())
        assert torch.allclose(basis.T @ basis, torch.eye(rank, dtype=torch.float64), atol=1e-10)
        assert torch.allclose(energies, squares, rtol=0, atol=1e-10 * total)
        assert metric.loss(found - expected) <= 1e-18 * total
        assert abs(metric.loss(weight - found) - float(squares[rank:].sum())) <= 1e-10 * total


def test_any_root_gives_the_same_energies_and_no_other_weight_of_the_rank_is_better():
    weight, gram = correlated(2, 24, 32)
    metric, rank = Metric.of(gram), 9
    energies = metric.energies(weight)
    values, vectors = torch.linalg.eigh(gram)
    symmetric = (vectors * values.sqrt()) @ vectors.T
    assert torch.allclose(torch.linalg.svdvals(weight.double() @ symmetric).square(), energies, rtol=1e-8)
    least = float(energies[rank:].sum())
    basis = metric.basis(weight, rank)
    generator = torch.Generator().manual_seed(0)
    for size in (1e-3, 1e-1, 10.0):
        left = basis + size * torch.randn(basis.shape, generator=generator, dtype=torch.float64)
        right = basis.T @ weight.double()
        assert metric.loss(weight - left @ right) > least * (1 + 1e-9)


@pytest.mark.parametrize("rows, columns", [(20, 32), (32, 20)])
def test_centring_leaves_the_tail_of_the_covariance_and_is_never_worse(rows, columns):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(columns, 200, generator=generator, dtype=torch.float64)
    x = x + 3 * torch.randn(columns, 1, generator=generator, dtype=torch.float64)
    weight, mean = torch.randn(rows, columns, generator=generator, dtype=torch.float64), x.mean(1)
    metric, plain = Metric.centred(x @ x.T, mean, 200), Metric.of(x @ x.T)
    outputs = weight @ x
    values = torch.linalg.svdvals(outputs - outputs.mean(1, keepdim=True)).square()
    for rank in (0, 1, 6, 15):
        basis = metric.basis(weight, rank)
        found = basis @ (basis.T @ weight)
        shift = (weight - found) @ mean
        error = float((outputs - found @ x - shift[:, None]).square().sum())
        assert abs(error - float(values[rank:].sum())) <= 1e-9 * float(outputs.square().sum())
        assert error < float(plain.energies(weight)[rank:].sum())
    constant = mean[:, None].expand(columns, 5)  # nothing but a mean: rank 0 with a bias is exact
    assert float(Metric.centred(constant @ constant.T, mean, 5).energies(weight).max()) < 1e-9


@pytest.mark.parametrize("rows, columns", [(12, 20), (20, 12)])
def test_a_singular_gram_matrix_needs_no_care(rows, columns):
    weight, gram = correlated(3, rows, columns)
    gram[3], gram[:, 3] = 0, 0  # a dead feature
    gram[5], gram[:, 5] = gram[4], gram[:, 4]  # and one that copies another
    gram[5, 5] = gram[4, 5] = gram[5, 4] = gram[4, 4]
    metric = Metric.of(gram)
    energies = metric.energies(weight)
    for rank in (1, 5, min(rows, columns)):
        basis = metric.basis(weight, rank)
        error = metric.loss(weight - basis @ (basis.T @ weight.double()))
        assert abs(error - float(energies[rank:].sum())) <= 1e-9 * float(energies.sum())
    zero = Metric.of(torch.zeros_like(gram))
    assert torch.isfinite(zero.basis(weight, 3)).all() and not zero.energies(weight).any()


def test_statistics_that_are_not_finite_are_refused():
    for value in (torch.nan, torch.inf):
        gram = torch.eye(4, dtype=torch.float64)
        gram[1, 2] = value
        with pytest.raises(NotFiniteError):
            Metric.of(gram)


@pytest.mark.parametrize("rows, columns", SHAPES)
@pytest.mark.parametrize("pivot", [True, False])
def test_factors_give_the_best_weight_of_their_rank(rows, columns, pivot):
    weight, gram = correlated(4, rows, columns)
    metric, rank = Metric.of(gram), max(1, min(rows, columns) // 3)
    found = factorise(weight, metric, rank, Layout(dtype="float32", pivot=pivot))
    tail, total = float(metric.energies(weight)[rank:].sum()), metric.loss(weight)
    assert found.shape == (rows, columns)
    assert abs(metric.loss(weight - found.dequantize()) - tail) <= 1e-6 * total
    if not pivot:
        assert isinstance(found, LowRank) and found.rank == rank
    elif rank < rows:
        split, right = found.parts
        assert split.parts[0].size == rank and right.shape == (rank, columns)
        numbers = sum(part.values.numel() for part in (split.parts[1], right))
        assert numbers == rank * (rows + columns - rank)
        own = split.index == 0  # the pivot rows are the right factor itself
        assert torch.equal(found.dequantize()[own], right.dequantize())


def test_the_left_factor_makes_good_what_the_right_one_lost():
    weight, gram = correlated(5, 48, 64)
    metric = Metric.of(gram)
    for pivot in (True, False):
        for scheme in (Scheme(3, 32), Scheme(4, "channel", True)):
            layout = Layout(scheme, pivot=pivot)
            once = factorise(weight, metric, 24, layout, refit=False)
            again = factorise(weight, metric, 24, layout)
            losses = [metric.loss(weight - found.dequantize()) for found in (once, again)]
            assert isinstance(again, Chain) and losses[1] < 0.9 * losses[0]


def test_left_for_is_least_squares():
    weight, gram = correlated(6, 10, 16)
    right = torch.randn(4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    root = torch.linalg.cholesky(gram)
    expected = torch.linalg.lstsq((right @ root).T, (weight.double() @ root).T).solution.T
    assert torch.allclose(Metric.of(gram).left_for(weight, right), expected, rtol=1e-8)
    assert Metric.of(gram).left_for(weight, right[[0, 0]]) is None


def test_pivot_rows_span_the_others_with_small_coefficients():
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(40, 6, dtype=torch.float64, generator=generator))[0]
    basis[[3, 9, 17, 20, 31, 39]] *= 1e-9  # rows that must not be taken
    rows, coefficients = pivots(basis)
    others = [i for i in range(40) if i not in rows.tolist()]
    assert rows.tolist() == sorted(rows.tolist()) and not set(rows.tolist()) & {3, 9, 17, 20, 31, 39}
    assert torch.allclose(coefficients @ basis[rows], basis[others], atol=1e-12)
    assert float(coefficients.abs().max()) <= 1.05


def test_swaps_bound_what_elimination_leaves():
    generator = torch.Generator().manual_seed(2)
    basis = torch.linalg.qr(torch.randn(90, 20, dtype=torch.float64, generator=generator))[0]
    tight, loose = pivots(basis, 1.0 + 1e-9), pivots(basis, torch.inf)
    for rows, coefficients in (tight, loose):
        others = [i for i in range(90) if i not in rows.tolist()]
        assert torch.allclose(coefficients @ basis[rows], basis[others], atol=1e-9)
    assert float(tight[1].abs().max()) <= 1 + 1e-6 < 1.2 < float(loose[1].abs().max())


def test_a_rotation_is_orthogonal_and_always_the_same():
    like = torch.empty(0, dtype=torch.float64)
    for size in (1, 2, 31):
        turn = rotation(size, like)
        assert torch.allclose(turn @ turn.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
        assert torch.equal(turn, rotation(size, like))
