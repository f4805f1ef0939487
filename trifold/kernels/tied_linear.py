"""An output head on the table of a packed embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trifold.core.canonical import Canonical
from trifold.kernels.dispatch import Choice, explain, resolve
from trifold.kernels.op import Op, Runtime, Tensors
from trifold.kernels.packed_embedding import PackedEmbedding
from trifold.kernels.packed_linear import PackedLinear


class TiedLinear(PackedLinear):
    """x Wᵀ + b, where W is a `PackedEmbedding`'s table; it has no tensors of its own but the bias.

    The table is looked up by rows at the same time, so an op with a layout of its own is chosen only if that
    lets rows be looked up.
    """

    def __init__(self, table: PackedEmbedding, bias: bool, bias_dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.__dict__["_table"] = table  # not a submodule: the tensors are the embedding's
        self.spec, self._layout, self._runtime, self._holder = table.spec, {}, {}, None
        self._bound, self._shared = None, None
        self.out_features, self.in_features = table.num_embeddings, table.embedding_dim
        values = torch.empty(self.out_features, dtype=bias_dtype) if bias else None
        self.register_parameter("bias", None if values is None else nn.Parameter(values, requires_grad=False))
        self._ops: dict[tuple[torch.dtype, torch.device], Op] = {}

    def canonical(self) -> Canonical:
        return self.__dict__["_table"].canonical()

    def op_for(self, dtype: torch.dtype, device: torch.device) -> Op:
        key = (dtype, device)
        if key not in self._ops:
            self._ops[key] = resolve(self.spec, dtype, device, in_place=True)
        return self._ops[key]

    def _tensors_for(self, op: Runtime) -> Tensors:
        tensors: Tensors = self.__dict__["_table"]._tensors_for(op)
        return tensors

    def choice(self, dtype: torch.dtype, device: torch.device | str) -> Choice:
        return explain(self.spec, dtype, device, in_place=True)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "weight":  # transformers ties by assigning the other's weight; it is tied already
            super().__setattr__(name, value)
