"""QuantizationArgs of compressed-tensors: what its config says of weights and of activations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from trifold.core.canonical import Canonical, Quantized, RoundedInput
from trifold.core.errors import InputError
from trifold.core.inputs import InputScheme
from trifold.ecosystem.base import Settings, group_of, quantized

INPUT_SCALE = "input_scale"


def settings_of(weight: Canonical, codec: str, tensor: bool = False) -> Settings:
    """The scheme of a group of layers. tensor: one scale for the whole matrix may be said so."""
    found = quantized(weight)
    group = group_of(found)
    strategy = "channel" if group is None else "group"
    args: Settings = {
        "num_bits": found.scheme.bits,
        "type": "int" if found.scheme.grid == "int" else "float",
        "symmetric": found.scheme.symmetric,
        "strategy": "tensor" if tensor and found.scheme.group_size == "tensor" else strategy,
        "dynamic": False,
    }
    if group is not None:
        args["group_size"] = group
    return {
        "format": codec,
        "weights": args,
        "input_activations": _input_args(weight.scheme) if isinstance(weight, RoundedInput) else None,
        "output_activations": None,
    }


def _input_args(scheme: InputScheme) -> Settings:
    return {
        "num_bits": scheme.bits,
        "type": "int" if scheme.grid == "int" else "float",
        "symmetric": True,
        "strategy": "tensor" if scheme.static else "token",
        "dynamic": not scheme.static,
    }


def group_size(args: Mapping[str, Any]) -> int | None:
    """Inputs that share a scale of a weight; None if all of a row, or of the matrix, do. Raises InputError."""
    size = args.get("group_size")
    strategy = args.get("strategy") or ("tensor" if size is None else "group" if size > 0 else "channel")
    if strategy in ("tensor", "channel"):
        return None
    if strategy == "group" and isinstance(size, int):
        return size
    raise InputError(f"weights quantised by {strategy!r} are not read; known: tensor, channel, group")


def input_refusal(weight: Canonical, kinds: tuple[str, ...]) -> str | None:
    """Why its activations cannot be rounded. kinds: "int" or "float", as the layout knows."""
    if not isinstance(weight, RoundedInput):
        return None
    kind = "int" if weight.scheme.grid == "int" else "float"
    return None if kind in kinds else f"it rounds activations to {weight.scheme.label}"


def input_tensors(weight: Canonical) -> dict[str, torch.Tensor]:
    """What is stored of its activations."""
    scale = weight.scale if isinstance(weight, RoundedInput) else None
    return {} if scale is None else {INPUT_SCALE: scale}


def with_input(weight: Canonical, tensors: Mapping[str, torch.Tensor], settings: Settings) -> Canonical:
    """The weight, with its activations rounded as the settings say. Raises InputError for what is not run."""
    args = settings.get("input_activations")
    if not args:
        return weight
    strategy, dynamic, kind = args.get("strategy"), args.get("dynamic", False), args.get("type", "int")
    known = (strategy, dynamic) in (("token", True), ("tensor", False))
    if not (known and args.get("symmetric", True) and (kind == "int" or args.get("num_bits", 8) == 8)):
        said = f"type={kind!r} strategy={strategy!r} dynamic={dynamic!r} symmetric={args.get('symmetric', True)!r}"
        raise InputError(f"activations of {said} are not run; known: dynamic by token, static by tensor, symmetric")
    if not isinstance(weight, Quantized):
        raise InputError("act-order and rounded activations together are not run")
    integers = kind == "int"
    scheme = InputScheme(args.get("num_bits", 8), "int" if integers else "fp8_e4m3", not dynamic, full_range=integers)
    return RoundedInput(weight, scheme, tensors[INPUT_SCALE].reshape(1).float() if scheme.static else None)
