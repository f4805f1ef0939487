import itertools

import pytest
import torch

from tests.sparsity.problems import correlated, error, solve
from trifold.core.errors import RecipeError
from trifold.core.obs import quadratic_loss
from trifold.core.pattern import Pattern
from trifold.core.refit import refit
from trifold.core.scheme import Scheme
from trifold.formats import describe, pack, unpack
from trifold.sparsity import GQSA
from trifold.sparsity.gqsa import group_saliency
from trifold.sparsity.survivors import Metric

ORDERS = ("together", "once", "sequential")


def spearman(a, b):
    ranks = [t.argsort().argsort().double() for t in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def true_costs(weight, metric, size):
    """By how much the loss of each row rises when one group goes and all others adapt: by solving for them."""
    costs = []
    for start in range(0, weight.shape[1], size):
        mask = torch.ones_like(weight, dtype=torch.bool)
        mask[:, start : start + size] = False
        best = refit(weight, metric.hessian, mask, weight.masked_fill(~mask, 0.0))
        costs.append(torch.stack([quadratic_loss(d[None], metric.hessian) for d in weight - best]))
    return torch.stack(costs, 1)


@pytest.mark.parametrize("columns, size", [(64, 8), (43, 8), (32, 1), (20, 20)])
def test_block_saliency_is_brute_force(columns, size):
    weight, gram = correlated(rows=5, columns=max(columns, 4))
    metric = Metric.of(gram, 0.01)
    found = group_saliency(weight.double(), metric, Pattern.parse(f"1x{size}"))
    torch.testing.assert_close(found, true_costs(weight.double(), metric, size), rtol=1e-5, atol=0)


def test_it_ranks_better_than_the_shortcuts():
    weight, gram = correlated(rows=8, columns=128)
    metric, pattern = Metric.of(gram, 0.01), Pattern.parse("1x16")
    true = true_costs(weight.double(), metric, 16)
    mean = {}
    for kind in ("block", "element", "wanda"):
        found = group_saliency(weight.double(), metric, pattern, kind)
        mean[kind] = sum(spearman(a, b) for a, b in zip(found, true, strict=True)) / len(weight)
    assert mean["block"] > 0.9999 and max(mean["element"], mean["wanda"]) < 0.995


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scope", ["row", "matrix"])
@pytest.mark.parametrize("sparsity, columns", [(0.3, 640), (0.5, 128), (0.5, 136)])
def test_groups_go_whole_and_as_many_as_asked(order, scope, sparsity, columns):
    weight, gram = correlated(rows=6, columns=columns, tokens=300)
    solved = solve(GQSA(sparsity, order=order, scope=scope), weight, gram, Scheme(4, 16))
    groups = -(-columns // 16)
    padded = torch.nn.functional.pad(solved.mask, (0, -columns % 16), value=False).unflatten(1, (-1, 16))
    kept = padded.any(-1)
    assert solved.pattern == "1x16"
    assert torch.equal(solved.mask, kept.repeat_interleave(16, 1)[:, :columns])
    if scope == "row":
        assert ((~kept).sum(1) == int(sparsity * groups + 1e-9)).all()
    else:
        assert (~kept).sum() == int(sparsity * groups * 6 + 1e-9)


def test_the_groups_that_go_are_the_cheapest():
    weight, gram = correlated(rows=6, columns=128)
    metric = Metric.of(gram, 0.01)
    costs = group_saliency(weight, metric, Pattern.parse("1x16"))
    kept = solve(GQSA(order="once"), weight, gram, Scheme(4, 16)).mask[:, ::16]
    for row_costs, row_kept in zip(costs, kept, strict=True):
        assert row_costs[~row_kept].max() <= row_costs[row_kept].min()


def test_dropped_groups_have_no_scale_of_their_own():
    weight, gram = correlated(rows=6, columns=72)
    values = solve(GQSA(), weight, gram, Scheme(4, 16)).values
    gone = ~solve(GQSA(), weight, gram, Scheme(4, 16)).mask
    assert (values.codes[gone] == 0).all() and (values.scale[gone[:, ::16]] == 1).all()
    assert (values.zero_point[gone[:, ::16]] == 0).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_refit_and_refinement_pay(seed):
    weight, gram = correlated(seed)
    scheme = Scheme(4, 16)
    full = error(GQSA(order="once"), weight, gram, scheme)
    assert full < 0.85 * error(GQSA(order="once", refit=False, refine=0), weight, gram, scheme)
    assert full < 0.75 * error(GQSA(order="sequential", refit=False, refine=0), weight, gram, scheme)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_groups_chosen_together_beat_groups_chosen_one_by_one(seed, scope):
    weight, gram = correlated(seed)
    scheme = Scheme(4, 16)
    found = {order: error(GQSA(order=order, scope=scope), weight, gram, scheme) for order in ORDERS}
    assert found["together"] < (0.98 if scope == "row" else 0.85) * min(found["once"], found["sequential"])


def test_of_two_groups_that_stand_for_each_other_one_stays():
    """Each alone costs nothing; both together cost all that they carry."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4096, generator=generator, dtype=torch.float64)
    x[16:32] = x[:16] + 0.01 * torch.randn(16, 4096, generator=generator, dtype=torch.float64)
    x[32:] *= 0.3
    weight, gram = torch.randn(8, 64, generator=generator), x @ x.T
    masks = {order: solve(GQSA(order=order), weight, gram, Scheme(8, 16)).mask[:, ::16] for order in ORDERS}
    assert not masks["once"][:, :2].any()
    assert (masks["together"][:, :2].sum(1) == 1).all()


def test_nothing_dropped_is_plain_group_rounding():
    weight, gram = correlated(rows=6, columns=72)
    errors = [error(GQSA(0.0), weight, gram, Scheme(bits, 16)) for bits in (2, 3, 4, 8)]
    assert all(b < 0.4 * a for a, b in itertools.pairwise(errors)) and errors[-1] < 1e-4


@pytest.mark.parametrize("symmetric", [False, True])
def test_scales_of_8_bits_cost_little(symmetric):
    weight, gram = correlated(rows=24)
    scheme = Scheme(4, 16, symmetric)
    solved = solve(GQSA(scale_bits=8), weight, gram, scheme)
    spec = describe(solved)
    assert spec["scale_bits"] == 8 and spec == describe(GQSA(scale_bits=8).sketch((24, 128), scheme))
    assert torch.equal(unpack(pack(solved), spec).dequantize(), solved.dequantize())
    wide = error(GQSA(), weight, gram, scheme)
    assert error(GQSA(scale_bits=8), weight, gram, scheme) < 1.02 * wide
    with pytest.raises(RecipeError, match="scale_dtype='float16' is of scale_bits=16"):
        GQSA(scale_bits=8).check((8, 64), Scheme(4, 16, scale_dtype="float16"))


def test_rows_of_too_many_groups_are_refused_before_anything_is_done():
    with pytest.raises(
        RecipeError, match=r"rows of 32768 groups at most, not in_features=131072 in 65536 of group_size=2"
    ):
        GQSA().check((8, 2**17), Scheme(4, 2))
