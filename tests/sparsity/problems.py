"""Layers with correlated inputs, as transformers have them."""

import torch

from trifold.core.method import LayerProblem
from trifold.core.obs import relative_error


def correlated(seed=0, rows=96, columns=128, tokens=1024):
    """weight (rows, columns) float32 and the Gram matrix of inputs of low rank with noise, of uneven size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) / columns**0.5
    mix = torch.randn(columns, columns // 4, generator=generator, dtype=torch.float64)
    x = mix @ torch.randn(columns // 4, tokens, generator=generator, dtype=torch.float64) / (columns / 4) ** 0.5
    x += 0.3 * torch.randn(columns, tokens, generator=generator, dtype=torch.float64)
    x *= torch.exp(0.8 * torch.randn(columns, 1, generator=generator, dtype=torch.float64))
    return weight, x @ x.T


def solve(method, weight, gram=None, scheme=None, drift=None):
    """What a method makes of one layer."""
    problem = LayerProblem({"a": weight}, {} if scheme is None else {"a": scheme}, gram, drift)
    return method.solve(problem).canonical["a"]


def error(method, weight, gram, scheme=None):
    """Squared output error over the squared output."""
    return relative_error(weight, solve(method, weight, gram, scheme).dequantize(), gram)
