"""Activations times a canonical weight, with plain matrix products: what packed modules are compared with.

The three ways of putting parts together are here once; packed modules hand them products of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch.nn.functional import linear

from trifold.core.canonical import Canonical, Chain, Identity, LowRank, RoundedInput, Split, Sum
from trifold.core.inputs import round_input

Product = Callable[[torch.Tensor], torch.Tensor]
"""x (..., in) -> x Wᵀ, (..., out), of one dtype."""


def split_order(axis: int, index: torch.Tensor) -> torch.Tensor:
    """Which row or column comes where. index: (n,), the part of each -> (n,) int64.

    Axis 1: the input columns in order of the parts, so that each part finds its own side by side. Axis 0: for
    each output its place among the outputs of the parts, one after the other.
    """
    order = torch.argsort(index, stable=True)
    return order if axis == 1 else torch.argsort(order)


def split_product(
    x: torch.Tensor, axis: int, order: torch.Tensor, widths: Sequence[int], parts: Sequence[Product]
) -> torch.Tensor:
    """x times a weight whose rows or columns are divided. order: of `split_order`. widths: rows or columns of each."""
    if axis == 0:
        return torch.cat([part(x) for part in parts], dim=-1).index_select(-1, order)
    pieces = x.index_select(-1, order).split(list(widths), dim=-1)
    return reduce(torch.add, [part(piece) for part, piece in zip(parts, pieces, strict=True)])


def sum_product(x: torch.Tensor, parts: Sequence[Product]) -> torch.Tensor:
    """x times a sum of weights."""
    return reduce(torch.add, [part(x) for part in parts])


def chain_product(x: torch.Tensor, parts: Sequence[Product]) -> torch.Tensor:
    """x times a product of weights, outermost first: the last one meets x."""
    return reduce(lambda y, part: part(y), reversed(parts), x)


def product(weight: Canonical, dtype: torch.dtype) -> Product:
    """The product with a weight, whose leaves are dequantised once, to `dtype`."""
    match weight:
        case RoundedInput(inner, scheme, scale):
            multiply = product(inner, dtype)
            return lambda x: multiply(round_input(x, scheme, scale))
        case Identity():
            return lambda x: x
        case LowRank(left, right):
            factors = [_dense(left, dtype), _dense(right, dtype)]
            return lambda x: chain_product(x, factors)
        case Split(axis, index, parts):
            inside, order = [product(part, dtype) for part in parts], split_order(axis, index)
            widths = [part.shape[axis] for part in parts]
            return lambda x: split_product(x, axis, order, widths, inside)
        case Sum(parts):
            summands = [product(part, dtype) for part in parts]
            return lambda x: sum_product(x, summands)
        case Chain(parts):
            chained = [product(part, dtype) for part in parts]
            return lambda x: chain_product(x, chained)
    return _dense(weight.dequantize(), dtype)


def _dense(weight: torch.Tensor, dtype: torch.dtype) -> Product:
    weight = weight.to(dtype)
    return lambda x: linear(x, weight)
