"""AutoAWQ's `gemm` layout: 4 bits, packed along the outputs in the order its kernel unpacks them.

    qweight  int32 (in, out / 8)
    qzeros   int32 (groups, out / 8)
    scales   float16 (groups, out)

Nibble k of a word holds output 8 j + (0, 2, 4, 6, 1, 3, 5, 7)[k], of codes and zero-points alike.
Lin et al. 2023, arXiv 2306.00978.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from trifold.core.canonical import Canonical
from trifold.core.errors import InputError
from trifold.ecosystem.act_order import grouped
from trifold.ecosystem.base import (
    CODECS,
    Codec,
    Ecosystem,
    Settings,
    Tensors,
    by_row,
    group_size,
    inexact,
    not_integers,
    quantized,
    ragged,
    weights_only,
)
from trifold.formats.bitstream import pack_bits, unpack_bits

_BITS, _PACK = 4, 8
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # output in nibble k
_PLACE = (0, 4, 1, 5, 2, 6, 3, 7)  # nibble of output n


class AwqCodec(Codec):
    name, ecosystem, codes = "awq", "awq", "qweight"
    _leaves = frozenset({"qweight", "qzeros", "scales"})

    def refusal(self, weight: Canonical, dtype: torch.dtype) -> str | None:
        why = weights_only(weight) or not_integers(weight) or ragged(weight)
        if why:
            return why
        found = quantized(weight)
        if found.scheme.bits != _BITS:
            return f"it has {found.scheme.bits} bits, not 4"
        if found.shape[0] % _PACK:
            return f"its {found.shape[0]} outputs do not fill words of 8"
        return inexact(found.scale, torch.float16)

    def settings(self, weight: Canonical) -> Settings:
        return {"bits": _BITS, "group_size": group_size(quantized(weight))}

    def encode(self, weight: Canonical, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        found = quantized(weight)
        scale, zero = by_row(found)
        if zero is None:  # loaders want zero-points always
            zero = torch.full(scale.shape, 2 ** (_BITS - 1), dtype=torch.uint8)
        return {
            "qweight": _interleave(found.codes.T),
            "qzeros": _interleave(zero.T),
            "scales": scale.T.to(torch.float16).contiguous(),
        }

    def decode(self, tensors: Tensors, settings: Settings) -> Canonical:
        codes, zero = (_deinterleave(tensors[leaf]).T.contiguous() for leaf in ("qweight", "qzeros"))
        group = settings["group_size"]
        width = None if group == -1 or group >= codes.shape[1] else group
        return grouped(codes, tensors["scales"].T.contiguous(), zero, _BITS, width)


def _interleave(codes: torch.Tensor) -> torch.Tensor:
    """(n, out) uint8 -> (n, out / 8) int32."""
    words = codes.reshape(codes.shape[0], -1, _PACK)[..., list(_ORDER)]
    return pack_bits(words.reshape(codes.shape), _BITS)


def _deinterleave(words: torch.Tensor) -> torch.Tensor:
    """The inverse."""
    count = words.shape[1] * _PACK
    codes = unpack_bits(words, _BITS, count).reshape(words.shape[0], -1, _PACK)[..., list(_PLACE)]
    return codes.reshape(words.shape[0], count)


class Awq(Ecosystem):
    method = "awq"

    def write(
        self, layers: Mapping[str, tuple[Codec, Settings]], dense: Collection[str], routers: Collection[str] = ()
    ) -> dict[str, Any]:
        (first, (_, settings)), *rest = layers.items()
        for name, (_, other) in rest:
            if other != settings:
                raise InputError(
                    f"{name}: awq has one group size for all layers, and {other['group_size']} differs from "
                    f"{settings['group_size']} of {first}; --to compressed-tensors can hold both"
                )
        return {
            "quant_method": self.method,
            **settings,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": sorted([*dense, *routers]) or None,
        }

    def read(self, config: Mapping[str, Any], tensors: Mapping[str, torch.dtype]) -> dict[str, tuple[Codec, Settings]]:
        version, bits = str(config.get("version", "gemm")).lower(), config.get("bits", config.get("w_bit", _BITS))
        if version != "gemm" or bits != _BITS:
            raise InputError(f"AWQ of version {version!r} with {bits} bits is not read; known: gemm with 4")
        settings = {"bits": _BITS, "group_size": config.get("group_size", config.get("q_group_size", 128))}
        layers = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
        if any(f"{layer}.qzeros" not in tensors for layer in layers):
            raise InputError("AWQ without zero-points is not read; quantise with zero_point: true")
        return {layer: (CODECS.get("awq"), settings) for layer in layers}


CODECS.register(AwqCodec.name)(AwqCodec())
