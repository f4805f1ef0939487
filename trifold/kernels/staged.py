"""Packed linears on CPUs as products in two stages: both factors in one call, a residual beside its base.

`native/stages.c` does not care how a weight is stored, so a layer may be codes of any width, bfloat16 factors, rounded
factors with pivot rows, or a weight with a low-rank residual.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from trifold.formats.base import Spec
from trifold.formats.quantized import scheme_of
from trifold.kernels.compose import COMPOSITIONS, heights
from trifold.kernels.native.stages import BLOCK, Layer, Part, lacking
from trifold.kernels.op import Op, Tensors
from trifold.kernels.weight_only import halves
from trifold.kernels.weight_only.cpu import Compiled, stored
from trifold.kernels.weight_only.halves import Halves

if TYPE_CHECKING:
    from trifold.kernels.packed_linear import PackedLinear

_MOST_TOKENS = {"amx": 4, "portable": 15}
"""Up to which codes are multiplied in stages, 31 elsewhere. For a few more than these their own op has a faster kernel,
but not so much faster that two of its calls were."""


class Staged(NamedTuple):
    """A layer as stages. most: tokens for which that is the fastest. held: of each module the runtime tensors."""

    layer: Layer
    variant: str
    most: int
    held: tuple[tuple[weakref.ref[PackedLinear], Tensors], ...]

    def holds(self) -> bool:
        """Whether the modules still have these tensors."""
        return all((module := ref()) is not None and module.holding(tensors) for ref, tensors in self.held)


def staged(module: PackedLinear, dtype: torch.dtype) -> Staged | None:
    """The layer as stages for activations of `dtype` on a CPU; None if one of its parts has no such kernel."""
    roles = _roles(module)
    if roles is None or dtype not in (torch.float32, torch.bfloat16):
        return None
    divided = roles.pop("split", None)
    for name, leaf in roles.items():
        if "parts" in leaf.spec or (leaf.spec["format"] == "low_rank" and name != "factors"):
            return None
    if any(tensor.device.type != "cpu" for tensor in (*module.parameters(), *module.buffers())):
        return None
    ops = {name: leaf.op_for(dtype, torch.device("cpu")) for name, leaf in roles.items()}
    limits = [_most_tokens(op, roles[name].spec, dtype) for name, op in ops.items()]
    variants = {getattr(op, "variant", "") for op in ops.values()}
    if len(variants) != 1 or not all(limits) or lacking(next(iter(variants))) is not None:
        return None
    held = {leaf: leaf.hold(ops[name]) for name, leaf in roles.items()}
    given: dict[str, Any] = {}
    for name, leaf in roles.items():
        given |= _parts(name, leaf.spec, held[leaf])
    if divided is not None:
        held[divided] = divided.hold(COMPOSITIONS["split"])
        places = held[divided]["places"].split(heights(divided.spec))
        given["pivots"], given["places"] = places
    return Staged(Layer.of(**given), variants.pop(), min(limits), tuple((weakref.ref(m), t) for m, t in held.items()))


def _roles(module: PackedLinear) -> dict[str, PackedLinear] | None:
    """What the leaves of a layer are in it: base, right and left, or both factors; `split` has the pivots' places."""
    parts: list[Any] = list(getattr(module, "parts", ()))
    if module.spec["format"] == "low_rank":
        return {"factors": module}
    if not parts:
        return {"base": module}
    if len(parts) != 2 or module.spec["format"] == "split":
        return None
    first, second = parts
    if module.spec["format"] == "sum":
        factors = _roles(second)
        return None if factors is None or {"base", "split"} & factors.keys() else {"base": first, **factors}
    if first.spec["format"] != "split":
        return {"right": second, "left": first}
    kinds = [part["format"] for part in first.spec["parts"]]
    if first.spec["axis"] or len(kinds) != 2 or kinds[0] != "identity":
        return None
    return {"right": second, "left": first.parts[1], "split": first}


def _most_tokens(op: Op, spec: Spec, dtype: torch.dtype) -> int:
    """0 if the op's layout is not one that stages take."""
    if isinstance(op, Halves):
        return op.most_tokens(dtype)
    if not isinstance(op, Compiled) or spec.get("input"):
        return 0
    scheme, columns = scheme_of(spec), spec["shape"][1]
    group = scheme.group_width(columns)
    if scheme.table is not None or scheme.zero_point == "real" or (group % BLOCK and group < columns):
        return 0
    return _MOST_TOKENS.get(op.variant, 31)


def _parts(name: str, spec: Spec, tensors: Tensors) -> dict[str, Part]:
    if spec["format"] in ("dense", "low_rank"):
        found = halves.parts(tensors, spec)
        return (
            {"right": found["weight_right"], "left": found["weight"]} if name == "factors" else {name: found["weight"]}
        )
    codes, scale, zero, _, shape, bits = stored(tensors, spec)
    return {name: Part(bits, shape, codes, scale, zero)}
