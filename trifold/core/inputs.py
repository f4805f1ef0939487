"""Input schemes: how a layer's activations are rounded when it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from trifold.core.errors import RecipeError

InputGrid = Literal["int", "fp8_e4m3"]
_FP8_LARGEST = 448.0


@dataclass(frozen=True)
class InputScheme:
    """`value = code * scale`, zero at zero.

    grid: "int" has symmetric integer codes, `|code| <= 2**(bits-1) - 1`; "fp8_e4m3" 8-bit floats (OCP E4M3,
    no infinities), `|code| <= 448`. static: False finds one scale per token at run time, its largest magnitude
    over the largest code; True has one scale for all tokens, found in calibration and stored. full_range: integer codes
    go down to -2**(bits-1), and a token's scale is its largest magnitude over 2**(bits-1) - 1/2, as compressed-tensors
    rounds activations.

    Raises RecipeError for an impossible value.
    """

    bits: int = 8
    grid: InputGrid = "int"
    static: bool = False
    full_range: bool = False

    def __post_init__(self) -> None:
        if self.grid not in ("int", "fp8_e4m3"):
            raise RecipeError(f"input grid={self.grid!r} is neither 'int' nor 'fp8_e4m3'")
        if not 2 <= self.bits <= 8:
            raise RecipeError(f"input bits={self.bits} is outside 2..8; 8 is usual, 16 means: leave it out")
        if self.grid == "fp8_e4m3" and self.bits != 8:
            raise RecipeError(f"input bits={self.bits}: fp8_e4m3 has 8; write grid: int for fewer")
        if self.full_range and self.grid != "int":
            raise RecipeError(f"input full_range is about integers, and {self.grid} has a largest value; leave it out")

    @property
    def largest(self) -> float:
        """The largest code."""
        return _FP8_LARGEST if self.grid == "fp8_e4m3" else float(2 ** (self.bits - 1) - 1)

    @property
    def least(self) -> float:
        """The least code."""
        return -self.largest - self.full_range

    @property
    def dtype(self) -> torch.dtype:
        """Of the codes."""
        return torch.float8_e4m3fn if self.grid == "fp8_e4m3" else torch.int8

    @property
    def label(self) -> str:
        """In a few characters, such as `a8` or `a8 fp8 static`."""
        words = [f"a{self.bits}", "fp8" if self.grid == "fp8_e4m3" else "", "static" if self.static else ""]
        words += ["full range"] if self.full_range else []
        return " ".join(filter(None, words))

    def to_dict(self) -> dict[str, Any]:
        """The `input` of a spec: `bits`, and what is not the default."""
        given: dict[str, Any] = {"bits": self.bits}
        if self.grid != "int":
            given["grid"] = self.grid
        return given | {key: True for key in ("static", "full_range") if getattr(self, key)}

    def static_scale(self, absmax: torch.Tensor) -> torch.Tensor:
        """absmax: largest |x| of each input feature in calibration -> the scale of all, (1,) float32."""
        return _scale(absmax.float().amax().reshape(1), self)


def _scale(largest: torch.Tensor, scheme: InputScheme) -> torch.Tensor:
    """Largest magnitudes -> scales; where that is zero any would do, and it is 1."""
    half = (scheme.largest - scheme.least) / 2
    scale = largest / torch.full_like(largest, half)  # by a number, GPUs multiply by its inverse instead
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def quantize_input(
    x: torch.Tensor, scheme: InputScheme, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (..., in), any float dtype -> codes (..., in) of `scheme.dtype`, scale float32 (..., 1).

    scale: (1,), of a static scheme; what exceeds it saturates. A token with a NaN gets the scale NaN, since
    integer codes cannot say it; a token of zeros the scale 1.
    """
    x = x.float()
    if scheme.static:
        if scale is None:
            raise ValueError("a static input scheme needs its scale")
        scale = torch.where(x.isnan().any(-1, keepdim=True), torch.nan, scale.to(x.device))
    else:
        scale = _scale(x.abs().amax(-1, keepdim=True), scheme)
    codes = (x / scale).clamp_(scheme.least, scheme.largest)
    return (codes.round_() if scheme.grid == "int" else codes).to(scheme.dtype), scale


def round_input(x: torch.Tensor, scheme: InputScheme, scale: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., in) rounded to the values that `quantize_input` chooses; same dtype."""
    codes, scale = quantize_input(x, scheme, scale)
    return (codes.float() * scale).to(x.dtype)
