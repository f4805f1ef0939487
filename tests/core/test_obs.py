import pytest
import torch

from trifold.core.obs import (
    all_finite,
    damped,
    inverse_cholesky,
    invert_lower_,
    output_losses,
    quadratic_loss,
    relative_error,
    sweep,
)


def gram(features, tokens, seed=0):
    """Of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, features, generator=generator, dtype=torch.float64) @ mix
    return x.T @ x


def random_weight(rows, columns, seed=1):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def nearest(_, column):
    return column.mul(2).round().div(2)


HAND = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)


def test_factor_by_hand():
    upper, damping = inverse_cholesky(HAND, 0.0)
    expected = torch.tensor([[0.816497, -0.408248], [0.0, 0.707107]], dtype=torch.float64)
    assert torch.allclose(upper, expected, atol=1e-6)
    assert torch.allclose(upper.T @ upper, torch.tensor([[2.0, -1.0], [-1.0, 2.0]]).double() / 3)
    assert (damping.ratio, damping.tries, damping.dead, damping.remarkable) == (0.0, 1, 0, False)


def test_sweep_by_hand():
    upper, _ = inverse_cholesky(HAND, 0.0)
    weight = torch.tensor([[0.4, 0.4]], dtype=torch.float64)
    met = []
    decided, loss = sweep(weight, upper, lambda j, column: met.append(column.item()) or column.round())
    assert met == pytest.approx([0.4, 0.6])
    assert decided.tolist() == [[0.0, 1.0]]
    assert loss.item() / 2 == pytest.approx(0.28)
    assert quadratic_loss(weight - weight.round(), HAND).item() / 2 == pytest.approx(0.48)


def test_the_first_step_is_the_surgeons():
    upper, _ = inverse_cholesky(HAND, 0.0)
    met = []
    sweep(torch.tensor([[0.7, 0.45]]).double(), upper, lambda j, c: met.append(c.item()) or c.round())
    inverse = HAND.inverse()
    assert met[1] == pytest.approx(0.45 - (0.7 - 1.0) * (inverse[0, 1] / inverse[0, 0]).item())


@pytest.mark.parametrize("columns", [1, 2, 43, 129, 172])
@pytest.mark.parametrize("ratio", [0.0, 0.01])
def test_the_ledger_is_exact(columns, ratio):
    h, weight = gram(columns, 3 * columns), random_weight(7, columns)
    upper, damping = inverse_cholesky(h, ratio)
    decided, loss = sweep(weight, upper, nearest)
    difference, loaded = weight - decided, damped(h, damping.ratio)
    per_row = ((difference @ loaded) * difference).sum(1)
    assert torch.allclose(loss, per_row, rtol=1e-6)
    assert loss.sum().item() == pytest.approx(quadratic_loss(difference, loaded).item(), rel=1e-6)
    assert torch.equal(decided, nearest(0, decided))


@pytest.mark.parametrize("size", [1, 2, 256, 257, 601, 1031])
@pytest.mark.parametrize("by_column", [False, True])
def test_triangles_are_inverted_in_place(size, by_column):
    lower = torch.linalg.cholesky(gram(size, 2 * size))
    inverse = lower.T.contiguous().clone().T if by_column else lower.contiguous().clone()
    assert invert_lower_(inverse) is inverse
    assert torch.equal(inverse, inverse.tril())
    unit = torch.eye(size, dtype=torch.float64)
    assert torch.allclose(inverse @ lower, unit, atol=1e-9) and torch.allclose(lower @ inverse, unit, atol=1e-9)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_what_is_not_finite_is_found(bad, dtype):
    matrix = torch.ones(7, 5, dtype=dtype)
    for tensor in (matrix, matrix.T, matrix[:, 1], matrix[:, :3], torch.empty(0, 5)):
        assert all_finite(tensor)
    matrix[3, 1] = bad
    for tensor in (matrix, matrix.T, matrix[:, 1], matrix[:, :3], matrix[3, 1]):
        assert not all_finite(tensor)
    assert all_finite(matrix[:, 2:])


def test_what_overflows_another_dtype_is_found():
    values = torch.tensor([1.0, -65520.0])  # rounds to float16's infinity
    assert all_finite(values) and all_finite(values, torch.bfloat16) and not all_finite(values, torch.float16)
    assert all_finite(torch.tensor([65519.0]), torch.float16)


@pytest.mark.parametrize("columns", [3, 512, 513, 1100])
def test_losses_are_sums_over_rows(columns):
    h, weight = gram(columns, 2 * columns), random_weight(5, columns)
    rounded = nearest(0, weight)
    difference = weight - rounded
    expected = [float(((d @ h) * d).sum()) for d in (difference, weight)]
    assert output_losses(weight, rounded, h) == pytest.approx(expected, rel=1e-9)
    parts = [output_losses(w, r, h) for w, r in zip(weight.split(2), rounded.split(2), strict=True)]
    assert [sum(p) for p in zip(*parts, strict=True)] == pytest.approx(expected, rel=1e-9)
    assert relative_error(weight, rounded, h) == pytest.approx(expected[0] / expected[1], rel=1e-9)


@pytest.mark.parametrize("block", [1, 3, 16, 100, 172, 1000])
def test_block_size_changes_nothing(block):
    weight = random_weight(7, 172)
    upper, _ = inverse_cholesky(gram(172, 500))
    # A decision that depends smoothly on the column, so that every last bit of it can be compared.
    reference, loss = sweep(weight, upper, lambda j, column: 0.9 * column, block=128)
    decided, other = sweep(weight, upper, lambda j, column: 0.9 * column, block=block)
    assert torch.allclose(decided, reference, rtol=0, atol=1e-12)
    assert torch.allclose(other, loss, rtol=1e-11, atol=1e-12)
    assert torch.equal(sweep(weight, upper, nearest, block)[0], sweep(weight, upper, nearest)[0])


def test_before_block_sees_the_compensated_columns():
    weight, seen, met = random_weight(3, 10), {}, {}
    upper, _ = inverse_cholesky(gram(10, 50))

    def before(start, stop, columns):
        seen[start] = (stop, columns.clone())

    def decide(j, column):
        met[j] = column.clone()
        return column.round()

    sweep(weight, upper, decide, block=4, before_block=before)
    assert {start: stop for start, (stop, _) in seen.items()} == {0: 4, 4: 8, 8: 10}
    for start, (stop, columns) in seen.items():
        assert columns.shape == (stop - start, 3)
        assert torch.equal(columns[0], met[start])  # later ones still wait for the errors of the block


def test_inputs_are_left_alone():
    h, weight = gram(9, 30), random_weight(3, 9)
    before = h.clone(), weight.clone()
    upper, _ = inverse_cholesky(h)
    kept = upper.clone()
    sweep(weight, upper, nearest, block=4)
    assert torch.equal(h, before[0]) and torch.equal(weight, before[1]) and torch.equal(upper, kept)


def test_diagonal_inputs_mean_plain_rounding():
    weight = random_weight(7, 43)
    h = torch.diag(torch.linspace(0.1, 10, 43).double())
    upper, _ = inverse_cholesky(h)
    decided, loss = sweep(weight, upper, nearest)
    assert torch.equal(decided, nearest(0, weight))
    assert torch.allclose(loss, ((weight - decided) ** 2 @ damped(h, 0.01).diagonal()))


@pytest.mark.parametrize("factor", [1e-6, 3.0, 1e8])
def test_the_size_of_the_inputs_does_not_matter(factor):
    h, weight = gram(43, 100), random_weight(7, 43)
    expected = sweep(weight, inverse_cholesky(h)[0], nearest)
    scaled = sweep(weight, inverse_cholesky(h * factor)[0], nearest)
    assert torch.equal(scaled[0], expected[0])
    assert torch.allclose(scaled[1], expected[1] * factor)


def test_it_beats_rounding():
    h, weight = gram(64, 200), random_weight(16, 64)
    upper, _ = inverse_cholesky(h)
    decided, _ = sweep(weight, upper, nearest)
    assert relative_error(weight, decided, h) < 0.8 * relative_error(weight, nearest(0, weight), h)


def test_rank_deficient_inputs():
    h, weight = gram(43, 5), random_weight(7, 43)
    for ratio in (0.01, 0.0):
        upper, damping = inverse_cholesky(h, ratio)
        assert torch.isfinite(upper).all() and not damping.diagonal
        decided, loss = sweep(weight, upper, nearest)
        assert torch.isfinite(decided).all() and torch.isfinite(loss).all()
    assert damping.ratio > 0 and damping.tries > 1 and damping.remarkable


def test_inputs_that_were_never_seen():
    weight = random_weight(7, 43)
    upper, damping = inverse_cholesky(torch.zeros(43, 43, dtype=torch.float64))
    assert damping.dead == 43 and damping.remarkable and not damping.diagonal
    assert torch.equal(sweep(weight, upper, nearest)[0], nearest(0, weight))
    h = gram(43, 100)
    h[5], h[:, 5] = 0, 0
    upper, damping = inverse_cholesky(h)
    assert damping.dead == 1 and damping.tries == 1
    decided, _ = sweep(weight, upper, nearest)
    assert torch.equal(decided[:, 5], nearest(0, weight[:, 5]))


def test_a_gram_that_is_none_falls_back_to_its_diagonal():
    h = torch.full((3, 3), 1e9, dtype=torch.float64)
    h.fill_diagonal_(1.0)
    upper, damping = inverse_cholesky(h)
    assert damping.diagonal and damping.remarkable
    weight = random_weight(2, 3)
    assert torch.equal(sweep(weight, upper, nearest)[0], nearest(0, weight))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused(value):
    h = torch.eye(3, dtype=torch.float64)
    h[1, 2] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        inverse_cholesky(h)


def test_losses():
    difference = torch.tensor([[1.0, -1.0], [2.0, 0.0]])
    assert quadratic_loss(difference, HAND).item() == 2 + 8
    assert relative_error(difference, torch.zeros(2, 2), HAND) == 1.0
    assert relative_error(difference, difference, HAND) == 0.0
    assert relative_error(torch.zeros(2, 2), torch.zeros(2, 2), HAND) == 0.0
    assert relative_error(torch.zeros(2, 2), difference, HAND) == 1.0
