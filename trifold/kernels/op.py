"""What an op is: one way to multiply activations by a packed weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch

from trifold.formats.base import Spec
from trifold.kernels.rows import dequantize_rows

Tensors = dict[str, torch.Tensor]
"""Tensors of one weight by name: portable as its format lays them out, or an op's own runtime layout."""

Call = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
"""x and bias -> y, of one weight."""


class Runtime:
    """Stateless. Several modules share one instance.

    name: what `explain` calls it. replaces: whether it keeps a runtime layout in place of the portable
    tensors; then `prepare` and `restore` are each other's inverse, bit for bit, and modify nothing they are
    given.
    """

    name: ClassVar[str]
    replaces: ClassVar[bool] = False

    def prepare(self, tensors: Tensors, spec: Spec) -> Tensors:
        """The runtime layout of portable tensors."""
        return tensors

    def restore(self, tensors: Tensors, spec: Spec) -> Tensors:
        """The portable tensors of a runtime layout."""
        return tensors


class Op(Runtime, ABC):
    """Multiplies by a weight that is stored as a whole.

    gathers: whether single rows of its runtime layout can be looked up.
    """

    gathers: ClassVar[bool] = False

    def supports(self, spec: Spec, dtype: torch.dtype, device: torch.device) -> str | None:
        """None if the op can run this weight with such activations, else the reason why not."""
        return None

    @abstractmethod
    def run(self, x: torch.Tensor, tensors: Tensors, spec: Spec, bias: torch.Tensor | None) -> torch.Tensor:
        """x (M, in) with M >= 1 -> (M, out), both of one float dtype. tensors: as `prepare` returned them.
        bias: (out,) of x's dtype."""

    def bind(self, tensors: Tensors, spec: Spec) -> Call:
        """`run` of one weight; what does not change from call to call may be worked out here. tensors: stay as they
        are while the result is in use."""
        return lambda x, bias: self.run(x, tensors, spec, bias)

    def rows(self, tensors: Tensors, spec: Spec, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Rows start..stop-1 of the dequantised weight, (stop - start, in), rounded once to `dtype`."""
        return dequantize_rows(tensors, spec, start, stop, dtype)

    def gather(self, tensors: Tensors, spec: Spec, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """rows (n,) int64 -> those rows of the dequantised weight, (n, in), rounded once to `dtype`. Only if it
        `gathers`; raises IndexError for a row that there is not."""
        raise NotImplementedError(self.name)
