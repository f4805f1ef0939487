"""The reference: one expert after the other, with dense weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import linear

from trifold.kernels.experts.routing import Routing


def expert_linear(
    x: torch.Tensor,
    routing: Routing,
    weight: torch.Tensor | None,
    experts: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """x (M, in), a row for each slot or for each of `slots / M` neighbours -> (slots, out), zero where no expert is.

    experts: (out, in) each; biases: (out,). weight: (slots,), of each slot, or none.
    """
    slots = len(routing.order)
    y = x.new_zeros(slots, experts[0].shape[0])
    bounds = routing.bounds.tolist()
    for e, expert in enumerate(experts):
        mine = routing.order[bounds[e] : bounds[e + 1]]
        found = linear(x[mine // max(1, slots // len(x))], expert, None if biases is None else biases[e])
        y[mine] = found if weight is None else found * weight[mine, None]
    return y
