"""Which tokens go to which expert, without asking the GPU how many they are."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Routing(NamedTuple):
    """Slot s is choice s % k of token s // k.

    order: (tokens * k,) int64, the slots sorted by expert, those of one expert in their own order. bounds:
    (experts + 1,) int32; expert e has the slots `order[bounds[e] : bounds[e + 1]]`. Slots before the first bound and
    behind the last have no expert here.
    """

    order: torch.Tensor
    bounds: torch.Tensor


def route(index: torch.Tensor, experts: int) -> Routing:
    """index (tokens, k), the chosen experts; what is outside 0..experts-1 is another process's."""
    chosen, order = index.reshape(-1).sort(stable=True)
    numbers = torch.arange(experts + 1, device=index.device, dtype=index.dtype)
    return Routing(order, torch.searchsorted(chosen, numbers, out_int32=True))
