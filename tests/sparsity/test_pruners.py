"""What every pruner keeps: patterns, counts, the order of errors, hard input."""

import dataclasses
import itertools
import math

import pytest
import torch

from tests.sparsity.problems import correlated, error, solve
from trifold.core.canonical import Quantized
from trifold.core.errors import RecipeError
from trifold.core.method import LayerProblem
from trifold.core.obs import NotFiniteError
from trifold.core.pattern import Pattern
from trifold.core.scheme import Scheme
from trifold.formats import describe
from trifold.sparsity import ALPS, GQSA, Magnitude, SparseGPT, Wanda

PRUNERS = [Magnitude, Wanda, SparseGPT, ALPS]
SEEDS = [0, 1, 2]


def counts(mask, size):
    """Kept weights of each group of `size`."""
    return mask.unflatten(1, (-1, size)).sum(-1)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_each_idea_is_worth_its_price(seed, pattern):
    weight, gram = correlated(seed)
    errors = [
        error(ALPS(pattern=pattern), weight, gram),
        error(SparseGPT(pattern=pattern), weight, gram),
        error(SparseGPT(pattern=pattern, refit=False), weight, gram),
        error(Wanda(pattern=pattern, refit=False), weight, gram),
        error(Magnitude(pattern=pattern), weight, gram),
    ]
    most = (0.7 if pattern == "unstructured" else 0.9, 0.6, 0.7, 0.6)
    assert all(a < share * b for share, (a, b) in zip(most, itertools.pairwise(errors), strict=True))
    assert error(Wanda(pattern=pattern), weight, gram) < 0.5 * errors[3]


@pytest.mark.parametrize("kind", PRUNERS)
@pytest.mark.parametrize("scheme", [None, Scheme(4, 16), Scheme(3, 128, True), Scheme(4, 16, grid="nf4")])
@pytest.mark.parametrize("refit", [True, False])
def test_patterns_are_exact_also_after_rounding(kind, scheme, refit):
    weight, gram = correlated(rows=7, columns=64)
    for pattern in ("2:4", "1:3", "1x16", "5:8", "unstructured"):
        columns = 63 if pattern == "1:3" else 64
        solved = solve(kind(pattern=pattern, refit=refit), weight[:, :columns], gram[:columns, :columns], scheme)
        mask, dense = solved.mask, solved.dequantize()
        assert solved.pattern == pattern and (dense[~mask] == 0).all()
        if pattern == "2:4":
            assert (counts(mask, 4) == 2).all()
        elif pattern == "5:8":
            assert (counts(mask, 8) == 5).all()
        elif pattern == "1:3":
            assert (counts(mask, 3) == 1).all()
        elif pattern == "1x16":
            assert set(counts(mask, 16).unique().tolist()) <= {0, 16}
            assert mask.sum() == mask.numel() // 2
        else:
            assert mask.sum() == mask.numel() // 2
        if scheme is not None:
            assert isinstance(solved.values, Quantized) and solved.values.scheme == scheme


@pytest.mark.parametrize("kind", PRUNERS)
@pytest.mark.parametrize("scope", ["row", "matrix"])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.3, 0.5, 0.77, 0.999])
def test_as_many_go_as_were_asked_for(kind, scope, sparsity):
    weight, gram = correlated(rows=5, columns=43)
    mask = solve(kind(sparsity=sparsity, scope=scope), weight, gram).mask
    if scope == "row":
        assert ((~mask).sum(1) == math.floor(sparsity * 43)).all()
    else:
        assert abs(int((~mask).sum()) - sparsity * 5 * 43) <= 1


@pytest.mark.parametrize("kind", PRUNERS)
def test_nothing_dropped_is_nothing_changed(kind):
    weight, gram = correlated(rows=5, columns=43)
    for refit in (True, False):
        solved = solve(kind(sparsity=0.0, refit=refit, dtype="float32"), weight, gram)
        assert solved.mask.all()
        torch.testing.assert_close(solved.dequantize(), weight, rtol=1e-5, atol=1e-6)
    assert torch.equal(solve(kind(sparsity=0.0, refit=False, dtype="float32"), weight, gram).dequantize(), weight)


@pytest.mark.parametrize("kind", [*PRUNERS, GQSA])
def test_more_sparsity_costs_more(kind):
    weight, gram = correlated()
    scheme = Scheme(8, 16) if kind is GQSA else None
    errors = [error(kind(sparsity=s), weight, gram, scheme) for s in (0.0, 0.25, 0.5, 0.75, 0.9)]
    assert all(a < b for a, b in itertools.pairwise(errors))


def test_mask_only_methods_leave_the_rest_alone():
    weight, gram = correlated(rows=9, columns=43)
    for method in (Magnitude(dtype="float32"), Wanda(refit=False, dtype="float32")):
        solved = solve(method, weight, gram)
        assert torch.equal(solved.dequantize()[solved.mask], weight[solved.mask])


def test_magnitude_looks_at_no_data():
    weight, gram = correlated(rows=9, columns=43)
    blind = solve(Magnitude(), weight)
    assert torch.equal(blind.dequantize(), solve(Magnitude(), weight, gram).dequantize())
    kept, gone = weight.abs()[blind.mask], weight.abs()[~blind.mask]
    assert solve(Magnitude(scope="matrix"), weight).mask.sum() == blind.mask.numel() - blind.mask.numel() // 2
    assert Magnitude().gathers == () and Magnitude(refit=True).gathers
    free = solve(Magnitude(scope="matrix"), weight).mask
    assert weight.abs()[free].min() >= weight.abs()[~free].max() and kept.mean() > gone.mean()


def test_wanda_by_hand_and_its_independence_of_the_size_of_the_inputs():
    weight = torch.tensor([[4.0, -3.0, 2.0, -1.0], [1.0, 1.0, 1.0, 1.0]])
    gram = torch.diag(torch.tensor([1.0, 4.0, 9.0, 64.0], dtype=torch.float64))
    # scores: 4 6 6 8 and 1 2 3 8; damping moves them by less than the gaps, ties go to the earlier
    mask = solve(Wanda(refit=False, damping=0.0), weight, gram).mask
    assert mask.tolist() == [[False, False, True, True], [False, False, True, True]]
    weight, gram = correlated(rows=9, columns=43)
    assert torch.equal(solve(Wanda(), weight, gram).mask, solve(Wanda(), weight, 1e6 * gram).mask)


def test_with_independent_inputs_wanda_is_the_best_mask():
    weight, _ = correlated(rows=3, columns=6)
    gram = torch.diag(torch.linspace(0.2, 3, 6).double())
    best = error(Wanda(refit=False, damping=0.0, dtype="float32"), weight, gram)
    for places in itertools.combinations(range(6), 3):
        mask = torch.ones(6, dtype=torch.bool)
        mask[list(places)] = False
        difference = (weight * ~mask).double()
        per_row = (difference.square() @ gram.diagonal()) / (weight.double().square() @ gram.diagonal())
        ours = weight - solve(Wanda(refit=False, damping=0.0, dtype="float32"), weight, gram).dequantize()
        ours_row = (ours.double().square() @ gram.diagonal()) / (weight.double().square() @ gram.diagonal())
        assert (ours_row <= per_row + 1e-12).all()
    assert best > 0


@pytest.mark.parametrize(
    "method", [SparseGPT(), SparseGPT(pattern="2:4"), SparseGPT(refit=False), Wanda(), ALPS(), GQSA()], ids=str
)
def test_rows_do_not_depend_on_each_other(method):
    weight, gram = correlated(rows=12, columns=64)
    scheme = Scheme(4, 16) if isinstance(method, GQSA) else None
    method = dataclasses.replace(method, scope="row")
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    whole = solve(method, weight, gram, scheme).dequantize()
    torch.testing.assert_close(solve(method, weight[order], gram, scheme).dequantize(), whole[order])


@pytest.mark.parametrize("kind", [*PRUNERS, GQSA])
@pytest.mark.parametrize("rows, columns", [(1, 2), (1, 43), (13, 17), (3, 131)])
def test_odd_shapes_dead_inputs_and_rows_of_zeros(kind, rows, columns):
    weight, gram = correlated(rows=rows, columns=max(columns, 4))
    weight, gram = weight[:, :columns].clone(), gram[:columns, :columns].clone()
    gram[1], gram[:, 1] = 0, 0
    weight[0] = 0
    for scheme in [Scheme(4, 8)] + ([None] if kind is not GQSA else []):
        solved = solve(kind(), weight, gram, scheme)
        assert solved.shape == (rows, columns) and torch.isfinite(solved.dequantize()).all()
        assert (solved.dequantize()[0] == 0).all()
        if kind not in (GQSA, Magnitude):
            assert not solved.mask[1:, 1].any()  # it meets nothing, so it goes first


@pytest.mark.parametrize("kind", [Wanda, SparseGPT, ALPS, GQSA])
def test_statistics_that_are_none(kind):
    weight, gram = correlated(rows=4, columns=16)
    for value in (torch.nan, torch.inf):
        bad = gram.clone()
        bad[2, 2] = value
        with pytest.raises(NotFiniteError):
            solve(kind(), weight, bad, Scheme(4, 8))
    rank_one = torch.ones(16, 16, dtype=torch.float64)
    assert torch.isfinite(solve(kind(), weight, rank_one, Scheme(4, 8)).dequantize()).all()
    assert torch.isfinite(solve(kind(), weight, torch.zeros_like(gram), Scheme(4, 8)).dequantize()).all()


def test_what_a_report_says():
    weight, gram = correlated(rows=8, columns=32)
    gram[3], gram[:, 3] = 0, 0
    solution = SparseGPT(sparsity=0.25).solve(LayerProblem({"a": weight}, {}, gram))
    assert solution.events["a"]["sparsity"] == 0.25 and solution.events["a"]["damping"]["dead"] == 1


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"sparsity": 1.0}, "sparsity=1.0 is outside"),
        ({"sparsity": -0.1}, "sparsity=-0.1 is outside"),
        ({"sparsity": float("nan")}, "sparsity=nan is outside"),
        ({"pattern": "4:2"}, "pattern='4:2' is neither"),
        ({"pattern": "0:4"}, "pattern='0:4' is neither"),
        ({"pattern": "1x0"}, "pattern='1x0' is neither"),
        ({"pattern": "2-4"}, "neither 'unstructured', N:M with 0 < N < M such as '2:4', nor '1xG'"),
        ({"dense_targets": 2}, "dense_targets=2 is outside"),
        ({"damping": -1}, "damping=-1"),
    ],
)
@pytest.mark.parametrize("kind", PRUNERS)
def test_impossible_settings(kind, settings, words):
    with pytest.raises(RecipeError, match=words.replace("[", r"\[")):
        kind(**settings)


def test_impossible_layers():
    with pytest.raises(RecipeError, match="in_features=42 is not a multiple of 4, so pattern='2:4' does not divide it"):
        Wanda(pattern="2:4").check((3, 42), None)
    with pytest.raises(RecipeError, match=r"sparsity=0.7 cannot be had with pattern='2:4', which drops 0.5"):
        SparseGPT(pattern="2:4", sparsity=0.7).check((3, 44), None)
    SparseGPT(pattern="2:4", sparsity=0.5).check((3, 44), None)
    with pytest.raises(RecipeError, match="group_size='channel' has none inside a row"):
        GQSA().check((3, 44), Scheme(4, "channel"))
    with pytest.raises(
        RecipeError, match=r"group_sparse_int holds integers.*not grid='nf4'.*held by the format bitmask"
    ):
        GQSA().check((3, 44), Scheme(4, 16, grid="nf4"))
    with pytest.raises(RecipeError, match="not zero_point='real'"):
        GQSA().check((3, 44), Scheme(4, 16, zero_point="real"))


def test_patterns_choose_the_least_and_the_earlier_of_equals():
    scores = torch.tensor([[1.0, 1.0, 1.0, 1.0, 5.0, 0.0, 7.0]])
    assert Pattern.parse("unstructured").mask(scores, 0.5).int().tolist() == [[0, 0, 1, 1, 1, 0, 1]]
    assert Pattern.parse("1x3").mask(scores, 0.5).int().tolist() == [[0, 0, 0, 1, 1, 1, 1]]
    assert Pattern.parse("1x3").group_scores(scores).tolist() == [[3.0, 6.0, 7.0]]
    assert Pattern.parse("1:2").mask(scores[:, :6], 0.9).int().tolist() == [[0, 1, 0, 1, 1, 0]]


SKETCHED = [
    (Wanda, {"sparsity": 0.37}, None),
    (Wanda, {"sparsity": 0.37, "scope": "matrix"}, None),
    (Magnitude, {"dtype": "float32"}, None),
    (SparseGPT, {"sparsity": 0.3}, Scheme(3, 16)),
    (SparseGPT, {"pattern": "2:4"}, Scheme(4, 16, True)),
    (SparseGPT, {"pattern": "1x8", "block_size": 16}, Scheme(4, 8)),
    (ALPS, {"pattern": "3:4"}, None),
    (GQSA, {"sparsity": 0.3}, Scheme(4, 8)),
    (GQSA, {"sparsity": 0.7, "scope": "matrix"}, Scheme(2, 8, True)),
    (GQSA, {"sparsity": 0.7, "order": "sequential", "scope": "matrix", "block_size": 16}, Scheme(4, 8)),
]


@pytest.mark.parametrize("kind, settings, scheme", SKETCHED)
@pytest.mark.parametrize("rows, columns", [(7, 44), (1, 60), (13, 172)])
def test_sizes_are_known_before_there_is_a_weight(kind, settings, scheme, rows, columns):
    weight, gram = correlated(rows=rows, columns=columns, tokens=300)
    method = kind(**settings)
    assert describe(method.sketch((rows, columns), scheme)) == describe(solve(method, weight, gram, scheme))


@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_of_short_groups_that_are_counted_weight_by_weight_the_most_is_told(scope):
    weight, gram = correlated(rows=9, columns=43)
    method = Wanda(pattern="1x16", scope=scope)
    told = describe(method.sketch((9, 43), None))["survivors"]
    found = describe(solve(method, weight, gram))["survivors"]
    assert found <= told <= found + 9 * 5
