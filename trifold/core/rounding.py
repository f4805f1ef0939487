"""From codes, as solvers have them, to the canonical tensor that is stored."""

from __future__ import annotations

import torch

from trifold.core.canonical import Quantized
from trifold.core.ranges import to_stored
from trifold.core.scheme import SCALE_DTYPES, Scheme


def quantized(codes: torch.Tensor, bounds: tuple[torch.Tensor, torch.Tensor | None], scheme: Scheme) -> Quantized:
    """codes (out, in), as `to_codes` gives them or as `to_stored` does, with their ranges -> Quantized."""
    scale, zero = bounds
    dtype = SCALE_DTYPES[scheme.scale_dtype]
    stored_zero = None if zero is None else zero.to(dtype if scheme.zero_point == "real" else torch.uint8)
    codes = codes if codes.dtype == torch.uint8 else to_stored(codes, scheme)
    return Quantized(codes, scale.to(dtype), stored_zero, scheme)
