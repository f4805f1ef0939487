import pytest
import torch

from trifold.core.statistics import AbsMax, AbsMean, Gram, Mean, Observation, Sample

KINDS = [Gram, AbsMean, Mean, AbsMax]


def whole_numbers(tokens, features, seed=0):
    """Products and sums of these are exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, (tokens, features), generator=generator).float()


def value_of(statistic):
    return statistic.matrix if isinstance(statistic, Gram) else statistic.value


def seen(kind, *batches):
    statistic = kind(batches[0].shape[1])
    for batch in batches:
        statistic.update(Observation(batch))
    return statistic


@pytest.mark.parametrize("features", [1, 3, 43, 128, 129, 300, 1100])
@pytest.mark.parametrize("tokens", [1, 3, 257])
def test_gram_is_xtx(features, tokens):
    x = whole_numbers(tokens, features)
    matrix = seen(Gram, x).matrix
    assert matrix.dtype == torch.float64
    assert torch.equal(matrix, x.double().T @ x.double())
    assert torch.equal(matrix, matrix.T)


def test_gram_of_real_numbers_is_symmetric_and_close():
    x = torch.randn(513, 200, generator=torch.Generator().manual_seed(0))
    matrix, exact = seen(Gram, x).matrix, x.double().T @ x.double()
    assert torch.equal(matrix, matrix.T)
    assert ((matrix - exact).abs() <= 513 * 2**-24 * (x.double().abs().T @ x.double().abs())).all()


def test_values_by_hand():
    x = torch.tensor([[1.0, -2.0, 0.0], [3.0, 4.0, 0.0]])
    assert seen(Gram, x).matrix.tolist() == [[10, 10, 0], [10, 20, 0], [0, 0, 0]]
    assert seen(AbsMean, x).value.tolist() == [2, 3, 0]
    assert seen(Mean, x).value.tolist() == [2, 1, 0]
    assert seen(AbsMax, x).value.tolist() == [3, 4, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_merging_equals_one_pass(kind):
    x = whole_numbers(101, 43)
    whole = seen(kind, x)
    for cuts in ((50, 51), (1, 100), (33, 0, 68)):
        parts = [seen(kind, part) for part in x.split(cuts)]
        for part in parts[1:]:
            parts[0].merge(part)
        assert parts[0].tokens == whole.tokens == 101
        assert torch.equal(value_of(parts[0]), value_of(whole))
        assert torch.equal(value_of(seen(kind, *x.split(cuts))), value_of(whole))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_of_the_input_does_not_matter(kind, dtype):
    x = whole_numbers(31, 43)
    assert torch.equal(value_of(seen(kind, x.to(dtype))), value_of(seen(kind, x)))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_seen_is_zero(kind):
    empty = seen(kind, torch.zeros(0, 5))
    assert empty.tokens == 0 and not value_of(empty).any()
    x = whole_numbers(7, 5)
    empty.merge(seen(kind, x))
    assert torch.equal(value_of(empty), value_of(seen(kind, x)))


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_same_kind_and_size_merge(kind):
    with pytest.raises(TypeError, match="cannot merge"):
        kind(3).merge(kind(4))
    other = Mean if kind is not Mean else AbsMax
    with pytest.raises(TypeError, match="cannot merge"):
        kind(3).merge(other(3))


def test_sums_do_not_lose_small_batches_to_float32():
    statistic = Mean(1)
    statistic.update(Observation(torch.full((1, 1), 2.0**26)))
    for _ in range(4):
        statistic.update(Observation(torch.ones(1, 1)))
    assert statistic.total.item() == 2**26 + 4


@pytest.mark.parametrize("sizes", [[1], [512], [100, 412, 1], [700, 0, 13, 1300], [1] * 600, [2048, 2048]])
def test_a_sample_is_every_so_many_tokens(sizes):
    x = torch.arange(2.0 * sum(sizes)).reshape(-1, 2)
    sample = Sample(2)
    for part in x.split(sizes):
        sample.update(Observation(part))
    stride = 1
    while -(-len(x) // stride) > Sample.LIMIT:
        stride *= 2
    assert torch.equal(sample.rows, x[::stride]) and sample.tokens == len(x)
    other = Sample(2)
    other.merge(sample)
    assert torch.equal(other.rows, sample.rows)
    sample.merge(other)
    assert len(sample.rows) <= Sample.LIMIT and sample.tokens == 2 * len(x)
