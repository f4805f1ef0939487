import math

import numpy
import pytest
import torch

from trifold.core.errors import InputError
from trifold.eval import jackknife_difference, paired_difference


def test_paired_difference():
    mean, error = paired_difference([3.0, 2.0, 5.0, 4.0], [2.0, 2.0, 3.0, 3.0])  # differences 1, 0, 2, 1
    assert mean == 1.0
    assert error == pytest.approx(math.sqrt(2 / 3) / 2)
    assert paired_difference([1.5, 2.5], [1.0, 2.0]) == (0.5, 0.0)
    mean, error = paired_difference([2.0], [1.0])
    assert mean == 1.0
    assert math.isnan(error)


@pytest.mark.parametrize(("a", "b"), [([1.0], [1.0, 2.0]), ([], [])])
def test_paired_difference_needs_the_same_windows(a, b):
    with pytest.raises(InputError, match=f"{len(a)} and {len(b)} window losses"):
        paired_difference(a, b)


@pytest.mark.parametrize("count", [2, 3, 37, 100])
def test_the_jackknife_of_a_mean_is_the_paired_difference(count):
    generator = torch.Generator().manual_seed(count)
    a, b = torch.randn(2, count, generator=generator).tolist()
    assert jackknife_difference(a, b, lambda x: sum(x) / len(x)) == pytest.approx(paired_difference(a, b))


def test_the_jackknife_by_hand():
    a, b = [1.0, 2.0, 4.0], [1.0, 1.0, 2.0]
    value, error = jackknife_difference(a, b, lambda x: math.prod(x))
    without = [8 - 2, 4 - 2, 2 - 1]  # the products of the other two
    assert value == 6
    assert error == pytest.approx(math.sqrt(2 / 3 * sum((x - 3) ** 2 for x in without)))


def test_the_jackknife_in_blocks_is_near_the_spread_of_repetitions():
    """Perplexity-like: the standard error over fresh samples of 1,009 documents (a prime: uneven blocks)."""
    rng = numpy.random.default_rng(0)

    def drawn():
        b = rng.normal(-2, 1, 1009)
        return (b + rng.normal(-0.05, 0.2, 1009)).tolist(), b.tolist()

    def perplexity(x):
        return math.exp(-sum(x) / len(x))

    values = [perplexity(a) - perplexity(b) for a, b in (drawn() for _ in range(400))]
    errors = [jackknife_difference(*drawn(), perplexity)[1] for _ in range(20)]
    assert numpy.mean(errors) == pytest.approx(numpy.std(values), rel=0.12)


@pytest.mark.parametrize(("a", "b"), [([1.0], [1.0]), ([1.0, 2.0], [1.0]), ([], [])])
def test_the_jackknife_needs_the_same_documents(a, b):
    with pytest.raises(InputError, match=f"{len(a)} and {len(b)} documents"):
        jackknife_difference(a, b, sum)
