import pytest
import torch

from trifold.core.method import LayerProblem
from trifold.core.obs import relative_error
from trifold.core.ranges import fit_ranges
from trifold.core.scheme import Scheme
from trifold.quantizers import GPTQ, RTN

PAPER = GPTQ(act_order=False, ranges="minmax", refine=0)


def correlated(tokens, features, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator) / features**0.5
    x = torch.randn(tokens, features, generator=generator) @ mix
    return x * torch.exp(spread * torch.randn(features, generator=generator))


def problem(rows=16, columns=32, bits=3, group=16, seed=0, **more):
    x = correlated(256, columns, seed)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 100))
    return LayerProblem({"a": weight}, {"a": Scheme(bits, group, **more)}, (x.T @ x).double())


def error(problem, method, name="a"):
    return relative_error(problem.weights[name], method.solve(problem).canonical[name].dequantize(), problem.gram)


def test_a_diagonal_gram_makes_the_sweep_plain_rounding():
    p = problem()
    p = LayerProblem(p.weights, p.schemes, torch.diag(torch.rand(32, dtype=torch.float64) + 0.1))
    for order in (True, False):
        swept = GPTQ(act_order=order, ranges="minmax", refine=0).solve(p).canonical["a"]
        rounded = RTN("minmax").solve(p).canonical["a"]
        assert torch.equal(swept.codes, rounded.codes) and torch.equal(swept.scale, rounded.scale)


def test_scaling_the_gram_changes_no_code():
    p = problem()
    scaled = LayerProblem(p.weights, p.schemes, p.gram * 64.0)
    for method in (PAPER, GPTQ()):
        assert torch.equal(method.solve(p).canonical["a"].codes, method.solve(scaled).canonical["a"].codes)


def test_total_error_is_below_rounding_to_nearest_on_every_seed():
    ratios = []
    for seed in range(40):
        p = problem(seed=seed)
        ratios.append(error(p, PAPER) / error(p, RTN("minmax")))
    assert max(ratios) < 1 and sum(ratios) / len(ratios) < 0.7


def test_refinement_lowers_the_damped_loss_and_default_beats_the_paper():
    ratios = []
    for seed in range(20):
        p = problem(seed=seed)
        ratios.append(error(p, GPTQ()) / error(p, PAPER))
    assert sum(ratios) / len(ratios) < 0.85


@pytest.mark.parametrize("block", [1, 7, 16, 31, 32, 128])
def test_lazy_blocks_change_speed_only(block):
    p = problem(rows=5, columns=43, group=8)
    one = GPTQ(refine=0, block_size=block).solve(p).canonical["a"]
    reference = GPTQ(refine=0, block_size=43).solve(p).canonical["a"]
    assert (one.codes == reference.codes).float().mean() > 0.99  # float32 sums differ in their last bits


def test_linears_that_share_an_input_are_solved_as_if_alone():
    p = problem(rows=12)
    other = torch.randn(7, 32, generator=torch.Generator().manual_seed(5))
    scheme = p.schemes["a"]
    both = GPTQ().solve(LayerProblem({"a": p.weights["a"], "b": other}, {"a": scheme, "b": scheme}, p.gram))
    alone = GPTQ().solve(LayerProblem({"b": other}, {"b": scheme}, p.gram))
    assert torch.equal(both.canonical["b"].codes, alone.canonical["b"].codes)


def test_linears_of_different_schemes_keep_their_own():
    p = problem()
    schemes = {"a": Scheme(2, 16), "b": Scheme(5, "channel", symmetric=True)}
    solved = GPTQ().solve(LayerProblem({"a": p.weights["a"], "b": p.weights["a"]}, schemes, p.gram)).canonical
    assert solved["a"].scheme.bits == 2 and solved["b"].scheme.bits == 5
    assert solved["b"].scale.shape == (16, 1) and solved["b"].zero_point is None


@pytest.mark.parametrize("group", [16, 5, "channel", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_every_scheme_is_solved(group, symmetric, bits):
    p = problem(rows=6, columns=23, bits=bits, group=group, symmetric=symmetric)
    solved = GPTQ().solve(p).canonical["a"]
    assert solved.shape == (6, 23) and torch.isfinite(solved.dequantize()).all()
    if bits == 8:
        assert error(p, GPTQ()) < 1e-3


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_singular_gram_is_damped_and_noted(rank):
    p = problem()
    factor = torch.randn(rank, 32, dtype=torch.float64)
    for damping in (0.01, 0.0):
        solution = GPTQ(damping=damping).solve(LayerProblem(p.weights, p.schemes, factor.T @ factor))
        assert torch.isfinite(solution.canonical["a"].dequantize()).all()
    if rank == 0:
        assert solution.events["a"]["damping"]["dead"] == 32


def test_dead_inputs_are_counted_and_harmless():
    p = problem()
    gram = p.gram.clone()
    gram[5], gram[:, 5] = 0, 0
    solution = GPTQ().solve(LayerProblem(p.weights, p.schemes, gram))
    assert solution.events["a"]["damping"]["dead"] == 1
    assert torch.isfinite(solution.canonical["a"].dequantize()).all()


def test_a_gram_that_is_not_finite_is_refused():
    p = problem()
    with pytest.raises(ValueError, match="NaN or infinity"):
        GPTQ().solve(LayerProblem(p.weights, p.schemes, p.gram * float("nan")))


def test_one_row_and_one_column_group():
    x = correlated(64, 7)
    p = LayerProblem({"a": torch.randn(1, 7)}, {"a": Scheme(4, 1)}, (x.T @ x).double())
    assert error(p, GPTQ()) < 1e-2


def test_given_bounds_are_used():
    p = problem()
    bounds = fit_ranges(p.weights["a"] * 0.5, p.schemes["a"])
    solved = GPTQ(refine=0).solve(LayerProblem(p.weights, p.schemes, p.gram, None, {"a": bounds}))
    assert torch.equal(solved.canonical["a"].scale.float(), bounds[0])


def test_solving_modifies_nothing():
    p = problem()
    weight, gram = p.weights["a"].clone(), p.gram.clone()
    GPTQ().solve(p)
    assert torch.equal(weight, p.weights["a"]) and torch.equal(gram, p.gram)


GRIDS = [{"grid": "nf4", "bits": 4}, {"grid": "fp4_e2m1", "bits": 4}, {"grid": "fp8_e4m3", "bits": 8}]
GRIDS += [{"zero_point": "real", "bits": bits} for bits in (2, 4)]


@pytest.mark.parametrize("scheme", GRIDS, ids=str)
def test_tables_and_real_zero_points_beat_rounding(scheme):
    ratios = []
    for seed in range(10):
        for group in (16, "channel"):
            p = problem(seed=seed, group=group, **scheme)
            paper, rounded = error(p, PAPER), error(p, RTN("minmax"))
            assert paper < rounded
            ratios.append(error(p, GPTQ()) / paper)
    assert sum(ratios) / len(ratios) < 0.9


@pytest.mark.parametrize("scheme", GRIDS, ids=str)
def test_a_diagonal_gram_is_plain_rounding_on_any_grid(scheme):
    p = problem(**scheme)
    p = LayerProblem(p.weights, p.schemes, torch.diag(torch.rand(32, dtype=torch.float64) + 0.1))
    swept, rounded = (m.solve(p).canonical["a"] for m in (GPTQ(ranges="minmax", refine=0), RTN("minmax")))
    assert torch.equal(swept.codes, rounded.codes) and torch.equal(swept.scale, rounded.scale)


@pytest.mark.parametrize("scheme", GRIDS, ids=str)
def test_gptaq_without_drift_is_gptq_on_any_grid(scheme):
    from dataclasses import replace

    from trifold.quantizers import GPTAQ

    p = problem(**scheme)
    still = replace(p, drift=torch.zeros(32, 32, dtype=torch.float64))
    assert torch.equal(GPTAQ().solve(still).canonical["a"].codes, GPTQ().solve(p).canonical["a"].codes)
