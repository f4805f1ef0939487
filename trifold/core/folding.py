"""The arithmetic of a `Fold`: whether a block has it, which scales it can take, and what they change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from trifold.core.topology import Fold

if TYPE_CHECKING:
    from trifold.core.method import BlockContext


def rows_in_block(fold: Fold, context: BlockContext) -> torch.Tensor | None:
    """What `folded_rows` gives for this block, or None if the block does not have the fold.

    It has it if the producer is there and the consumers, and they alone, are compressed on one common input.
    """
    consumers = set(fold.consumers)
    if not consumers <= context.weights.keys() & context.schemes.keys():
        return None
    leaders = {context.inputs[name] for name in consumers}
    beside = {name for name, leader in context.inputs.items() if leader in leaders}
    producer = context.weights.get(fold.producer, context.parameters.get(f"{fold.producer}.weight"))
    if len(leaders) != 1 or beside != consumers or producer is None:
        return None
    consumed = context.weights[fold.consumers[0]].shape[1]
    return folded_rows(fold, len(producer), consumed, context.topology.head_dim)


def folded_rows(fold: Fold, produced: int, consumed: int, head_dim: int) -> torch.Tensor | None:
    """(value heads, features) int64: the rows of a producer with `produced` rows that the consumers' `consumed`
    inputs come from; each value head serves consumed / rows.numel() consecutive query heads.

    One head of all features where heads need not be told apart. None if the shapes do not fit the fold.
    """
    if fold.rows == "second half":
        return _heads(produced - consumed, consumed, consumed) if produced == 2 * consumed else None
    if fold.rows in ("all", "last"):
        width, odd = (produced, 0) if fold.rows == "all" else divmod(produced - consumed, 2)
        if width == consumed and not odd:
            return _heads(produced - width, width, width)
        grouped = fold.kind == "value" and head_dim and width > 0 and not odd
        fits = grouped and not width % head_dim and not consumed % width
        return _heads(produced - width, width, head_dim) if fits else None
    if not head_dim or consumed % head_dim:
        return None
    heads = consumed // head_dim if fold.rows == "latent" else (produced - consumed) // (2 * head_dim)
    if heads < 1 or produced % heads or (consumed // head_dim) % heads or produced // heads < head_dim:
        return None
    ends = torch.arange(1, heads + 1) * (produced // heads)
    return ends[:, None] + torch.arange(-head_dim, 0)


def _heads(start: int, width: int, head_dim: int) -> torch.Tensor:
    return (start + torch.arange(width)).reshape(-1, head_dim)


def per_value(scale: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(consumed,) -> (rows.numel(),): the geometric mean over the query heads that share a value head."""
    heads, features = rows.shape
    if len(scale) == rows.numel():
        return scale
    return scale.reshape(heads, -1, features).log().mean(1).exp().reshape(-1)


def per_query(scale: torch.Tensor, rows: torch.Tensor, consumed: int) -> torch.Tensor:
    """(rows.numel(),) -> (consumed,): each value head's scale, repeated for its query heads."""
    heads, features = rows.shape
    return scale.reshape(heads, 1, features).expand(heads, consumed // rows.numel(), features).reshape(-1)


def foldable(fold: Fold, rows: torch.Tensor, scale: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
    """The nearest scale (consumed,) that the producer can really take over.

    A value projection shares it among the query heads of a group. The weight of a norm, given as `norm`, is
    rounded to its dtype, and the scale that undoes the rounded one exactly is used.
    """
    if fold.kind != "norm":
        return per_query(per_value(scale, rows), rows, len(scale))
    assert norm is not None
    factor = norm.to(scale.dtype) + fold.offset
    new = (factor / scale - fold.offset).to(norm.dtype).to(scale.dtype) + fold.offset
    exact = factor / new
    return torch.where(torch.isfinite(exact) & (exact > 0), exact, torch.ones_like(exact))


def divide_producer(
    fold: Fold,
    rows: torch.Tensor,
    scale: torch.Tensor,
    weights: Mapping[str, torch.Tensor],
    parameters: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """New weights and new parameters with the producer's output divided by `scale` (consumed,).

    weights: (out, in) by layer name. parameters: by name, of the producer if it is no such layer, and its bias;
    they keep their dtype.
    """
    name = fold.producer
    layer = weights.get(name)
    divisor = scale.new_ones(len(parameters[f"{name}.weight"] if layer is None else layer))
    divisor[rows.reshape(-1).to(scale.device)] = per_value(scale, rows)
    changed = {}
    for leaf, offset in (("weight", fold.offset), ("bias", 0.0)):
        value = parameters.get(f"{name}.{leaf}")
        if value is not None and (layer is None or leaf == "bias"):
            shaped = divisor.reshape(-1, *(1 for _ in value.shape[1:]))
            changed[f"{name}.{leaf}"] = ((value.to(scale.dtype) + offset) / shaped - offset).to(value.dtype)
    return {} if layer is None else {name: layer / divisor[:, None]}, changed
