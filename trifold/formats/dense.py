"""`dense`, `low_rank` and `identity`: numbers as they are, beside compressed parts of a weight.

    dense     weight        (out * in,)     dtype, row by row
    low_rank  weight        (out * rank,)   dtype, the left factor row by row
              weight_right  (rank * in,)    dtype, the right factor row by row
    identity  weight        (0,)            int32, nothing

One dimension, so that a loader without Trifold finds a shape that no dense weight has, and stops.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from trifold.core.canonical import Canonical, Dense, Identity, LowRank
from trifold.core.errors import CheckpointError
from trifold.formats.base import FORMATS, Format, Layout, Spec

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class DenseFormat(Format):
    def holds(self, canonical: Canonical) -> bool:
        return isinstance(canonical, Dense) and canonical.values.dtype in _NAMES

    def describe(self, canonical: Canonical) -> Spec:
        assert isinstance(canonical, Dense)
        return {"format": "dense", "shape": list(canonical.shape), "dtype": _NAMES[canonical.values.dtype]}

    def label(self, spec: Spec) -> str:
        return str(spec["dtype"])

    def layout(self, spec: Spec) -> Layout:
        rows, columns = spec["shape"]
        return {"weight": ((rows * columns,), _DTYPES[spec["dtype"]])}

    def pack(self, canonical: Canonical) -> dict[str, torch.Tensor]:
        assert isinstance(canonical, Dense)
        return {"weight": _flat(canonical.values)}

    def unpack(self, tensors: Mapping[str, torch.Tensor], spec: Spec) -> Dense:
        return Dense(tensors["weight"].reshape(spec["shape"]))


class LowRankFormat(Format):
    def holds(self, canonical: Canonical) -> bool:
        if not isinstance(canonical, LowRank):
            return False
        return canonical.left.dtype == canonical.right.dtype and canonical.left.dtype in _NAMES

    def describe(self, canonical: Canonical) -> Spec:
        assert isinstance(canonical, LowRank)
        return {
            "format": "low_rank",
            "shape": list(canonical.shape),
            "rank": canonical.rank,
            "dtype": _NAMES[canonical.left.dtype],
        }

    def label(self, spec: Spec) -> str:
        return f"rank {spec['rank']} {spec['dtype']}"

    def layout(self, spec: Spec) -> Layout:
        (rows, columns), rank, dtype = spec["shape"], spec["rank"], _DTYPES[spec["dtype"]]
        return {"weight": ((rows * rank,), dtype), "weight_right": ((rank * columns,), dtype)}

    def pack(self, canonical: Canonical) -> dict[str, torch.Tensor]:
        assert isinstance(canonical, LowRank)
        return {"weight": _flat(canonical.left), "weight_right": _flat(canonical.right)}

    def unpack(self, tensors: Mapping[str, torch.Tensor], spec: Spec) -> LowRank:
        (rows, columns), rank = spec["shape"], spec["rank"]
        return LowRank(tensors["weight"].reshape(rows, rank), tensors["weight_right"].reshape(rank, columns))


class IdentityFormat(Format):
    def holds(self, canonical: Canonical) -> bool:
        return isinstance(canonical, Identity)

    def describe(self, canonical: Canonical) -> Spec:
        return {"format": "identity", "shape": list(canonical.shape)}

    def layout(self, spec: Spec) -> Layout:
        if spec["shape"][0] != spec["shape"][1]:
            raise CheckpointError(f"an identity of shape {spec['shape']} is not square")
        return {"weight": ((0,), torch.int32)}

    def pack(self, canonical: Canonical) -> dict[str, torch.Tensor]:
        return {"weight": torch.empty(0, dtype=torch.int32)}

    def unpack(self, tensors: Mapping[str, torch.Tensor], spec: Spec) -> Identity:
        return Identity(spec["shape"][0])


def _flat(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().reshape(-1)


FORMATS.register("dense")(DenseFormat())
FORMATS.register("low_rank")(LowRankFormat())
FORMATS.register("identity")(IdentityFormat())
