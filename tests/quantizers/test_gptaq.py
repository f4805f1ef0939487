import torch

from trifold.core.method import LayerProblem
from trifold.core.scheme import Scheme
from trifold.quantizers import GPTAQ, GPTQ


def streams(seed, tokens=400, columns=32, noise=0.3):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator)
    dense = torch.randn(tokens, columns, generator=generator) @ mix
    x = dense + noise * torch.randn(tokens, columns, generator=generator) @ mix
    weight = torch.randn(16, columns, generator=generator)
    return weight, x.double(), dense.double()


def problem(seed):
    weight, x, dense = streams(seed)
    return LayerProblem({"a": weight}, {"a": Scheme(3, 16)}, x.T @ x, (dense - x).T @ x), x, dense


def test_without_drift_it_is_gptq():
    p, _, _ = problem(0)
    p = LayerProblem(p.weights, p.schemes, p.gram, torch.zeros_like(p.gram))
    a, b = (m.solve(p).canonical["a"] for m in (GPTAQ(strength=1.0), GPTQ()))
    assert torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale)


def test_no_strength_is_gptq():
    p, _, _ = problem(0)
    assert torch.equal(GPTAQ(strength=0).solve(p).canonical["a"].codes, GPTQ().solve(p).canonical["a"].codes)


def test_the_moved_target_is_the_least_squares_solution():
    """At 8 bits rounding hardly matters: what is left is the regression of the dense output on x."""
    weight, x, dense = streams(1)
    p = LayerProblem({"a": weight}, {"a": Scheme(8, 4)}, x.T @ x, (dense - x).T @ x)
    solved = GPTAQ(strength=1.0, damping=1e-6).solve(p).canonical["a"].dequantize().double()
    expected = torch.linalg.lstsq(x, dense @ weight.double().T).solution.T
    assert (x @ (solved - expected).T).norm() / (x @ expected.T).norm() < 5e-3
    assert (x @ (solved - weight.double()).T).norm() / (x @ expected.T).norm() > 5e-2


def test_it_comes_closer_to_the_dense_output_than_gptq():
    ratios = []
    for seed in range(10):
        p, x, dense = problem(seed)
        target = dense @ p.weights["a"].double().T
        errors = [
            (x @ m.solve(p).canonical["a"].dequantize().double().T - target).square().sum()
            for m in (GPTAQ(strength=1.0), GPTAQ(), GPTQ())
        ]
        assert errors[0] < errors[2]
        ratios.append(float(errors[1] / errors[2]))
    assert sum(ratios) / len(ratios) < 0.95
