"""Which op runs a weight: a table of rows in order of preference.

The first row that fits, and whose op supports the weight, wins. An op that is not chosen says why. TRIFOLD_KERNEL
names the op that every weight has to be run by, or several, with commas between them, of which one has to.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from trifold.core.errors import InputError, unknown_name
from trifold.formats.base import Spec, label
from trifold.kernels.experts.op import ExpertsOp
from trifold.kernels.experts.planes import PlaneExperts
from trifold.kernels.native import VARIANTS
from trifold.kernels.op import Op
from trifold.kernels.rounded_input import blockwise as rounded_blockwise
from trifold.kernels.rounded_input import cpu_int8, torch_fp8, torch_int8, triton_fp8, triton_int8
from trifold.kernels.rounded_input import naive as rounded_naive
from trifold.kernels.sparse import bitmap, groups, torch24
from trifold.kernels.sparse import naive as sparse_naive
from trifold.kernels.sparse.gpu import bitmap as gpu_bitmap
from trifold.kernels.sparse.gpu import groups as gpu_groups
from trifold.kernels.sparse.library import VARIANTS as SPARSE_VARIANTS
from trifold.kernels.weight_only import blockwise, cpu, dense, halves, naive, torch_int4
from trifold.kernels.weight_only import torch_int8 as weight_int8
from trifold.kernels.weight_only.planes import op as planes

InputKind = Literal["as it is", "rounded", "int", "fp8_e4m3"]


class Row(NamedTuple):
    """None stands for any. input: what is done to activations; "rounded" is any grid, the last two are that one."""

    formats: tuple[str, ...] | None
    input: InputKind
    device: str | None
    dtype: torch.dtype | None
    op: Op


_CODES = ("int", "affine", "table")
_BITMAPS = ("bitmask", "sparse24")

TABLE: tuple[Row, ...] = (
    Row(_CODES, "as it is", "cpu", None, cpu.Compiled("amx")),
    Row(_CODES, "as it is", "cpu", None, cpu.Compiled("avx512_bf16")),
    Row(_CODES, "as it is", "cpu", None, cpu.Compiled("avx512")),
    Row(_CODES, "as it is", "cpu", None, cpu.Compiled("avx2")),
    Row(("int", "affine"), "as it is", "cpu", torch.bfloat16, torch_int4.TorchInt4()),
    Row(("int",), "as it is", "cpu", torch.bfloat16, weight_int8.TorchInt8()),
    Row(_CODES, "as it is", "cpu", None, cpu.Compiled("portable")),
    *(Row(("group_sparse_int",), "as it is", "cpu", None, groups.CompiledGroups(name)) for name in SPARSE_VARIANTS),
    *(Row(_BITMAPS, "as it is", "cpu", None, bitmap.CompiledBitmap(name)) for name in SPARSE_VARIANTS),
    Row((*_CODES, "fp8"), "as it is", "cuda", None, planes.PlaneGemm()),
    Row(("group_sparse_int",), "as it is", "cuda", None, gpu_groups.TritonGroups()),
    Row(("sparse24",), "as it is", "cuda", None, torch24.TorchSparse24()),
    Row(_BITMAPS, "as it is", "cuda", None, gpu_bitmap.TritonBitmap()),
    *(Row(("dense", "low_rank"), "as it is", "cpu", None, halves.Halves(name)) for name in VARIANTS),
    Row(("dense",), "as it is", None, None, dense.Dense()),
    Row(("low_rank",), "as it is", None, None, dense.LowRank()),
    Row(("identity",), "as it is", None, None, dense.Identity()),
    Row(None, "as it is", None, None, blockwise.Blockwise()),
    Row(None, "as it is", None, None, naive.Naive()),
    Row(("group_sparse_int", *_BITMAPS), "as it is", None, None, sparse_naive.Naive()),
    Row(("int",), "int", "cpu", None, torch_int8.TorchInt8()),
    Row(("int", "affine"), "int", "cpu", None, cpu_int8.CompiledInt8("amx")),
    Row(("int", "affine"), "int", "cpu", None, cpu_int8.CompiledInt8("avx512_bf16")),
    Row(("int",), "int", "cuda", None, triton_int8.TritonInt8()),
    Row(("fp8",), "fp8_e4m3", "cuda", None, triton_fp8.TritonFP8()),
    Row(("fp8",), "fp8_e4m3", None, None, torch_fp8.TorchFP8()),
    Row(None, "rounded", None, None, rounded_blockwise.Blockwise()),
    Row(None, "rounded", None, None, rounded_naive.Naive()),
)

EXPERTS: dict[str, ExpertsOp] = {planes.PlaneGemm.name: PlaneExperts()}
"""By the op of one expert: what runs all of them at once. The others run one by one."""


@dataclass(frozen=True)
class Choice:
    """op: name of the op that runs. rejected: the ones preferred to it, with the reason why they cannot.

    parts: of a weight made of parts, whose op is called as its format: the choice for each of them.
    """

    op: str
    rejected: dict[str, str]
    parts: tuple[Choice, ...] = ()


def _reason(row: Row, spec: Spec, dtype: torch.dtype, device: torch.device) -> str | None:
    if row.formats is not None and spec["format"] not in row.formats:
        return f"takes format {' or '.join(row.formats)}, not {spec['format']}"
    if row.device not in (None, device.type):
        return f"runs on {row.device}, not {device.type}"
    if row.dtype not in (None, dtype):
        return f"takes {row.dtype} activations, not {dtype}"
    return row.op.supports(spec, dtype, device)


def _choose(spec: Spec, dtype: torch.dtype, device: torch.device, in_place: bool = False) -> tuple[Op, dict[str, str]]:
    if not dtype.is_floating_point:
        raise TypeError(f"activations must be floating point, not {dtype}")
    if "parts" in spec:
        raise TypeError(f"a {spec['format']} has no op; each of its parts has one")
    rejected: dict[str, str] = {}
    kinds = ("rounded", spec["input"].get("grid", "int")) if spec.get("input") else ("as it is",)
    forced = _forced()
    for row in TABLE:
        if forced and row.op.name not in forced:
            continue
        if row.input not in kinds:
            if forced:
                rejected[row.op.name] = "takes rounded activations" if kinds[0] == "as it is" else "does not round them"
            continue
        reason = _reason(row, spec, dtype, device)
        if reason is None and in_place and row.op.replaces and not row.op.gathers:
            reason = "keeps a layout of its own, but the tensors are shared"
        if reason is None:
            return row.op, rejected
        rejected[row.op.name] = reason
    if forced:
        why = "; ".join(f"{name}: {reason}" for name, reason in rejected.items())
        raise InputError(f"TRIFOLD_KERNEL={','.join(forced)} cannot run {label(spec)} of shape {spec['shape']}: {why}")
    raise AssertionError("the naive ops support everything")


def _forced() -> tuple[str, ...]:
    """The names in TRIFOLD_KERNEL. Raises InputError for an unknown one."""
    names = tuple(name.strip() for name in os.environ.get("TRIFOLD_KERNEL", "").split(",") if name.strip())
    known = [row.op.name for row in TABLE]
    for name in names:
        if name not in known:
            raise InputError(f"TRIFOLD_KERNEL: {unknown_name('kernel', name, known)}")
    return names


def resolve(spec: Spec, dtype: torch.dtype, device: torch.device, in_place: bool = False) -> Op:
    """The op for activations of `dtype` on `device`; `in_place`: one under which single rows can still be looked up.

    Raises TypeError if the activations are not floating point, InputError if TRIFOLD_KERNEL names an op that is
    unknown or cannot run the weight.
    """
    return _choose(spec, dtype, device, in_place)[0]


def explain(spec: Spec, dtype: torch.dtype, device: torch.device | str, in_place: bool = False) -> Choice:
    """What `resolve` chooses, for each part if there are any, and why it chose nothing that it prefers."""
    if "parts" in spec:
        return Choice(spec["format"], {}, tuple(explain(part, dtype, device) for part in spec["parts"]))
    op, rejected = _choose(spec, dtype, torch.device(device), in_place)
    return Choice(op.name, rejected)


def resolve_experts(op: str, spec: Spec, experts: int, slots: int) -> tuple[ExpertsOp | None, str]:
    """What runs experts of one spec, each of which `op` runs, with `slots` tokens for all of them together.

    None, and the reason, if they run one by one.
    """
    found = EXPERTS.get(op)
    reason = f"{op} runs one expert at a time" if found is None else found.supports(spec, experts, slots)
    return (found, "") if reason is None else (None, reason)
