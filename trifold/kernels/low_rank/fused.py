"""Which weights made of parts are run as one product of low rank, and that product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from trifold.kernels.compose import COMPOSITIONS
from trifold.kernels.gpu import no_gpu
from trifold.kernels.low_rank.ops import PLAIN, Kind, low_rank_linear
from trifold.kernels.weight_only.dense import Dense
from trifold.kernels.weight_only.dense import LowRank as PlainFactors
from trifold.kernels.weight_only.planes.op import PlaneGemm, arguments
from trifold.kernels.weight_only.planes.ops import COMPUTED

if TYPE_CHECKING:
    from trifold.kernels.packed_linear import PackedLinear

MOST_TOKENS = 16
"""Beyond, what is saved is little beside the products."""
Matrix = tuple[list[torch.Tensor], str]
_NONE: Matrix = ([], "")


def on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def fused(module: PackedLinear, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
    """x (M, in) times a weight that is a chain of two factors, or a sum of a packed weight and factors, + bias.

    None if it is something else, or not for this product.
    """
    halves = x.dtype in (torch.float16, torch.bfloat16)
    if not halves or x.shape[0] > MOST_TOKENS or (torch.is_grad_enabled() and x.requires_grad):
        return None
    if not on_gpu(x.device) or no_gpu(x.device) is not None:
        return None
    base, factors = _NONE, module
    parts = _parts(module)
    if module.spec["format"] == "sum" and len(parts) == 2:
        found = _matrix(parts[0], x, plain=False)
        if found is None:
            return None
        base, factors = found, parts[1]
    two = _factors(factors, x, placed=base is _NONE)
    if two is None:
        return None
    right, left, places = two
    kinds = "\n".join((base[1], right[1], left[1]))
    bias = None if bias is None else bias.to(x.dtype)
    y: torch.Tensor = low_rank_linear(x.contiguous(), base[0], right[0], left[0], kinds, places, bias)
    return y


def _factors(module: PackedLinear, x: torch.Tensor, placed: bool) -> tuple[Matrix, Matrix, torch.Tensor | None] | None:
    """(right, left, places of a left factor that is an identity and other rows; placed: whether that is allowed)."""
    spec = module.spec
    if spec["format"] == "low_rank":
        op = module.op(x)
        if not isinstance(op, PlainFactors) or spec["dtype"] != str(x.dtype).removeprefix("torch."):
            return None
        tensors, rank = module.hold(op), spec["rank"]
        plain = tensors["weight"].reshape(-1, rank), tensors["weight_right"].reshape(rank, -1)
        return ([plain[1]], PLAIN), ([plain[0]], PLAIN), None
    parts = _parts(module)
    if spec["format"] != "chain" or len(parts) != 2:
        return None
    outer, places = parts[0], None
    if outer.spec["format"] == "split":
        kinds = [part["format"] for part in outer.spec["parts"]]
        if not placed or outer.spec["axis"] != 0 or len(kinds) != 2 or kinds[0] != "identity":
            return None
        places = outer.hold(COMPOSITIONS["split"])["places"]
        outer = _parts(outer)[1]
    left, right = _matrix(outer, x), _matrix(parts[1], x)
    return None if left is None or right is None or _looked_up(left[1]) else (right, left, places)


def _parts(module: PackedLinear) -> Sequence[PackedLinear]:
    return getattr(module, "parts", ())


def _looked_up(kind: str) -> bool:
    """Whether numbers come from a table, which is for whoever has registers."""
    return kind != PLAIN and not any(f'"{name}"' in kind for name in COMPUTED)


def _matrix(module: PackedLinear, x: torch.Tensor, plain: bool = True) -> Matrix | None:
    """A leaf as the operator takes it."""
    if "parts" in module.spec or module.spec.get("input"):
        return None
    op = module.op(x)
    if isinstance(op, PlaneGemm):
        given = arguments(module.hold(op), module.spec)
        zero = given["zero"]
        kind = Kind(given["bits"], given["group"], given["grid"], given["midpoint"], zero is not None)
        return [*given["planes"], given["scale"], *([] if zero is None else [zero])], kind.text
    if plain and isinstance(op, Dense) and module.spec.get("dtype") == str(x.dtype).removeprefix("torch."):
        return [module.hold(op)["weight"].reshape(module.spec["shape"])], PLAIN
    return None
