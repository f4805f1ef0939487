"""Weights whose columns belong to groups in any order, as GPTQ's act-order leaves them without static groups."""

from __future__ import annotations

import torch

from trifold.core.canonical import Canonical, Quantized, Split
from trifold.core.errors import InputError
from trifold.core.scheme import Scheme
from trifold.ecosystem.base import scale_name

_MOST_GROUPS = 256  # parts of a split


def grouped(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bits: int,
    group_size: int | None,
    g_idx: torch.Tensor | None = None,
) -> Canonical:
    """A weight from its groups: one tensor if they lie side by side, else a split of the columns, a part for each.

    codes: (out, in) uint8. scale, zero: (out, groups). group_size: None for one scale a row. g_idx: (in,), the
    group of each column. Raises InputError if there are too many groups for a split, ValueError if g_idx names a
    group that has no scale.
    """
    columns, dtype = codes.shape[1], scale_name(scale.dtype)
    width = columns if group_size is None else group_size
    natural = torch.arange(columns) // width
    if g_idx is None or torch.equal(g_idx.long().cpu(), natural):
        scheme = Scheme(bits, "channel" if group_size is None else group_size, zero is None, dtype)
        return Quantized(codes, scale.contiguous(), zero, scheme)
    if g_idx.shape != (columns,) or int(g_idx.min()) < 0 or int(g_idx.max()) >= scale.shape[1]:
        raise ValueError(f"g_idx does not say for {columns} columns which of {scale.shape[1]} groups they are in")
    used, index = torch.unique(g_idx.long(), return_inverse=True)
    if len(used) > _MOST_GROUPS:
        raise InputError(
            f"act-order with {len(used)} groups is not read, at most {_MOST_GROUPS}; quantise with static groups"
        )
    scheme = Scheme(bits, "channel", zero is None, dtype)
    parts = []
    for number, group in enumerate(used.tolist()):
        places = (index == number).nonzero().squeeze(1)
        own = None if zero is None else zero[:, group : group + 1].contiguous()
        chosen = codes.index_select(1, places.to(codes.device))
        parts.append(Quantized(chosen, scale[:, group : group + 1].contiguous(), own, scheme))
    return Split(1, index, tuple(parts))
