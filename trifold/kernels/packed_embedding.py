"""An embedding table that stays packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch

from trifold.formats.base import Spec
from trifold.kernels.op import Op
from trifold.kernels.rows import DECODERS, dequantize
from trifold.kernels.storage import PackedModule


class PackedEmbedding(PackedModule):
    """Rows of a packed table, dequantised when they are looked up.

    spec: the JSON of a format, with `shape` (num_embeddings, embedding_dim). dtype: of the output; casting
    the module changes it, and nothing else. A head that runs on the table may have put it into its op's layout.
    """

    def __init__(self, spec: Spec, dtype: torch.dtype) -> None:
        super().__init__(spec)
        self.num_embeddings, self.embedding_dim = (int(size) for size in spec["shape"])
        self.dtype = dtype

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids (...) int -> (..., embedding_dim). Raises IndexError for an id outside the table."""
        rows, decode, op = ids.reshape(-1).long(), DECODERS.get(self.spec["format"]), self._holder
        if isinstance(op, Op) and len(rows):
            found = op.gather(self._tensors_for(op), self.spec, rows, self.dtype)
        elif not len(rows):
            found = torch.empty(0, dtype=self.dtype, device=ids.device)
        elif decode is not None:
            found = dequantize(decode(self.portable(), self.spec, rows), self.dtype)
        else:
            found = self.dequantize().index_select(0, rows).to(self.dtype)
        return found.reshape(*ids.shape, self.embedding_dim)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        probe = fn(torch.empty(1, dtype=self.dtype, device=self.get_buffer(next(iter(self._layout))).device))
        self.dtype = probe.dtype if probe.dtype.is_floating_point else self.dtype
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dtype={self.dtype}"
