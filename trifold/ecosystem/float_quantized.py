"""`float-quantized` of compressed-tensors: 8-bit floats.

    weight        float8_e4m3fn (out, in)
    weight_scale  the model's dtype (out, 1), or (1,) for the whole matrix; read also (ceil(out / R), ceil(in / C))
    input_scale   float (1,); static activations only

Blocks of R x C are read as groups of C inputs, each row with the scale of its block.
"""

from __future__ import annotations

import torch

from trifold.core.canonical import Canonical, Quantized
from trifold.core.errors import InputError
from trifold.core.scheme import Scheme
from trifold.ecosystem.base import CODECS, Codec, Settings, Tensors, group_of, inexact, inner, scale_name
from trifold.ecosystem.ct_args import INPUT_SCALE, group_size, input_refusal, input_tensors, settings_of, with_input
from trifold.formats.base import describe, label

_GRID = "fp8_e4m3"


class FloatQuantized(Codec):
    name, ecosystem, codes = "float-quantized", "compressed-tensors", "weight"
    _leaves = frozenset({"weight", "weight_scale", INPUT_SCALE})

    def refusal(self, weight: Canonical, dtype: torch.dtype) -> str | None:
        found = inner(weight)
        if not isinstance(found, Quantized) or found.scheme.grid != _GRID:
            return f"it is {label(describe(found))}, not 8-bit floats"
        if group_of(found) is not None:
            return f"it has a scale for every {group_of(found)} inputs, not one for a row or the matrix"
        return inexact(found.scale, dtype) or input_refusal(weight, ("float",))

    def settings(self, weight: Canonical) -> Settings:
        return settings_of(weight, self.name, tensor=True)

    def encode(self, weight: Canonical, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        found = inner(weight)
        assert isinstance(found, Quantized)
        scale = found.scale.to(dtype).contiguous()
        tensors = {
            "weight": found.codes.contiguous().view(torch.float8_e4m3fn),
            "weight_scale": scale.reshape(1) if found.scheme.group_size == "tensor" else scale,
        }
        return tensors | input_tensors(weight)

    def decode(self, tensors: Tensors, settings: Settings) -> Canonical:
        args, scale, codes = settings["weights"], tensors["weight_scale"], tensors["weight"].view(torch.uint8)
        if args.get("num_bits", 8) != 8 or args.get("type") != "float":
            raise InputError(f"{args.get('num_bits')}-bit floats in bytes are not read")
        group: int | str = "channel"
        if args.get("strategy") == "block":
            height, width = (int(size) for size in args["block_structure"])
            group, scale = width, scale.repeat_interleave(height, dim=0)[: codes.shape[0]]
        elif scale.numel() == 1 and args.get("strategy", "tensor") == "tensor":
            group, scale = "tensor", scale.reshape(1, 1)
        else:
            group = group_size(args) or "channel"
        scheme = Scheme(8, group, True, scale_name(scale.dtype), _GRID)  # type: ignore[arg-type]
        return with_input(Quantized(codes, scale.contiguous(), None, scheme), tensors, settings)


CODECS.register(FloatQuantized.name)(FloatQuantized())
