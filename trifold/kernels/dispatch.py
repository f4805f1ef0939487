"""Which op runs a weight: a table of rows in order of preference.

The first row that fits, and whose op supports the weight, wins. An op that is not chosen says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from trifold.formats.base import Spec
from trifold.kernels.int8_dynamic import blockwise as dynamic_blockwise
from trifold.kernels.int8_dynamic import naive as dynamic_naive
from trifold.kernels.int8_dynamic import torch_int8
from trifold.kernels.op import Op
from trifold.kernels.weight_only import blockwise, naive, torch_int4
from trifold.kernels.weight_only import torch_int8 as weight_int8


class Row(NamedTuple):
    """None stands for any. quantized_input: whether the spec has an `input` scheme."""

    formats: tuple[str, ...] | None
    quantized_input: bool
    device: str | None
    dtype: torch.dtype | None
    op: Op


TABLE: tuple[Row, ...] = (
    Row(("int", "affine"), False, "cpu", torch.bfloat16, torch_int4.TorchInt4()),
    Row(("int",), False, "cpu", torch.bfloat16, weight_int8.TorchInt8()),
    Row(None, False, None, None, blockwise.Blockwise()),
    Row(None, False, None, None, naive.Naive()),
    Row(("int",), True, "cpu", None, torch_int8.TorchInt8()),
    Row(None, True, None, None, dynamic_blockwise.Blockwise()),
    Row(None, True, None, None, dynamic_naive.Naive()),
)


@dataclass(frozen=True)
class Choice:
    """op: name of the op that runs. rejected: the ones preferred to it, with the reason why they cannot."""

    op: str
    rejected: dict[str, str]


def _reason(row: Row, spec: Spec, dtype: torch.dtype, device: torch.device) -> str | None:
    if row.formats is not None and spec["format"] not in row.formats:
        return f"takes format {' or '.join(row.formats)}, not {spec['format']}"
    if row.device not in (None, device.type):
        return f"runs on {row.device}, not {device.type}"
    if row.dtype not in (None, dtype):
        return f"takes {row.dtype} activations, not {dtype}"
    return row.op.supports(spec, dtype, device)


def _choose(spec: Spec, dtype: torch.dtype, device: torch.device) -> tuple[Op, dict[str, str]]:
    if not dtype.is_floating_point:
        raise TypeError(f"activations must be floating point, not {dtype}")
    rejected: dict[str, str] = {}
    for row in TABLE:
        if row.quantized_input != bool(spec.get("input")):
            continue
        reason = _reason(row, spec, dtype, device)
        if reason is None:
            return row.op, rejected
        rejected[row.op.name] = reason
    raise AssertionError("the naive ops support everything")


def resolve(spec: Spec, dtype: torch.dtype, device: torch.device) -> Op:
    """The op for activations of `dtype` on `device`. Raises TypeError if they are not floating point."""
    return _choose(spec, dtype, device)[0]


def explain(spec: Spec, dtype: torch.dtype, device: torch.device | str) -> Choice:
    """What `resolve` chooses, and why it chose nothing that it prefers."""
    op, rejected = _choose(spec, dtype, torch.device(device))
    return Choice(op.name, rejected)
