"""Scales in two levels: codes of 8 bits, times one bfloat16 number of their row.

In this form every row's largest scale has the code 255, so a scale tells its code: the product of a code and a bfloat16
number is exact in float32.
"""

from __future__ import annotations

import torch

LARGEST = 255


def to_row_scales(scale: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Nearest scales that have the form, for positive ones (out, groups) float32. kept: (out, groups) bool, those that
    count; the others stay as they are."""
    whole = scale.masked_fill(~kept, 0.0)
    top = whole.amax(1, keepdim=True)
    row = _row(top)
    codes = (whole / row).round().clamp(1, LARGEST).masked_fill(whole == top, LARGEST)
    return torch.where(kept, codes * row, scale)


def from_row_scales(scale: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Codes (out, groups) uint8, of those that are kept, and row scales (out,) bfloat16; None without the form."""
    whole = scale.masked_fill(~kept, 0.0)
    row = _row(whole.amax(1, keepdim=True))
    codes = (whole / row).round()
    if not bool(((codes * row == whole) & (codes <= LARGEST) & ((codes >= 1) | ~kept)).all()):
        return None
    return codes.to(torch.uint8), row[:, 0].to(torch.bfloat16)


def _row(top: torch.Tensor) -> torch.Tensor:
    """(out, 1) float32, of the largest scales; 1 where there is none."""
    row = (top / LARGEST).to(torch.bfloat16).float()
    return torch.where(top > 0, row.clamp(min=torch.finfo(torch.bfloat16).tiny), torch.ones_like(row))
