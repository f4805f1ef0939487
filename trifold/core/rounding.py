"""From codes, as solvers have them, to the canonical tensor that is stored."""

from __future__ import annotations

import torch

from trifold.core.canonical import Quantized
from trifold.core.ranges import to_stored
from trifold.core.scheme import SCALE_DTYPES, Scheme


def quantized(codes: torch.Tensor, bounds: tuple[torch.Tensor, torch.Tensor | None], scheme: Scheme) -> Quantized:
    """codes (out, in), as `to_codes` gives them, with their ranges -> Quantized as it is stored."""
    scale, zero = bounds
    dtype = SCALE_DTYPES[scheme.scale_dtype]
    stored_zero = None if zero is None else zero.to(dtype if scheme.zero_point == "real" else torch.uint8)
    return Quantized(to_stored(codes, scheme), scale.to(dtype), stored_zero, scheme)
