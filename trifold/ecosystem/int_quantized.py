"""`int-quantized` of compressed-tensors: integers in a byte each, with rounded activations.

    weight             int8 (out, in)
    weight_scale       the model's dtype (out, groups), or (1,) for the whole matrix
    weight_zero_point  int8, as the scales; asymmetric only
    input_scale        float (1,); static activations only

Codes and zero-points are signed: ours minus 2**(bits - 1).
"""

from __future__ import annotations

import torch

from trifold.core.canonical import Canonical, Quantized
from trifold.core.scheme import Scheme
from trifold.ecosystem.base import (
    CODECS,
    Codec,
    Settings,
    Tensors,
    inexact,
    not_integers,
    quantized,
    ragged,
    scale_name,
)
from trifold.ecosystem.ct_args import INPUT_SCALE, group_size, input_refusal, input_tensors, settings_of, with_input


class IntQuantized(Codec):
    name, ecosystem, codes = "int-quantized", "compressed-tensors", "weight"
    _leaves = frozenset({"weight", "weight_scale", "weight_zero_point", INPUT_SCALE})

    def refusal(self, weight: Canonical, dtype: torch.dtype) -> str | None:
        return (
            not_integers(weight)
            or ragged(weight)
            or inexact(quantized(weight).scale, dtype)
            or input_refusal(weight, ("int",))
        )

    def settings(self, weight: Canonical) -> Settings:
        return settings_of(weight, self.name, tensor=True)

    def encode(self, weight: Canonical, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        found = quantized(weight)
        offset, whole = 2 ** (found.scheme.bits - 1), found.scheme.group_size == "tensor"
        scale, zero = found.scale.to(dtype), found.zero_point
        tensors = {
            "weight": _signed(found.codes, offset),
            "weight_scale": scale.reshape(1) if whole else scale.contiguous(),
        }
        if zero is not None:
            tensors["weight_zero_point"] = _signed(zero.reshape(1) if whole else zero, offset)
        return tensors | input_tensors(weight)

    def decode(self, tensors: Tensors, settings: Settings) -> Canonical:
        args, scale = settings["weights"], tensors["weight_scale"]
        bits, zero, width = args.get("num_bits", 8), tensors.get("weight_zero_point"), group_size(args)
        offset, whole = 2 ** (bits - 1), scale.numel() == 1 and args.get("strategy", "tensor") == "tensor"
        scale = scale.reshape(1, 1) if whole else scale
        if args.get("symmetric", True):
            zero = torch.ones(scale.shape, dtype=torch.uint8) if bits == 1 else None
        else:
            zero = _unsigned(tensors["weight_zero_point"].reshape(scale.shape), offset)
        scheme = Scheme(bits, "tensor" if whole else width or "channel", zero is None, scale_name(scale.dtype))
        return with_input(
            Quantized(_unsigned(tensors["weight"], offset), scale.contiguous(), zero, scheme), tensors, settings
        )


def _signed(codes: torch.Tensor, offset: int) -> torch.Tensor:
    return (codes.short() - offset).to(torch.int8).contiguous()


def _unsigned(codes: torch.Tensor, offset: int) -> torch.Tensor:
    return (codes.short() + offset).to(torch.uint8).contiguous()


CODECS.register(IntQuantized.name)(IntQuantized())
