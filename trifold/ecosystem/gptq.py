"""GPTQ's layout, as AutoGPTQ began it and GPTQModel and vLLM read it. Frantar et al. 2022, arXiv 2210.17323.

    qweight  int32 (ceil(in * bits / 32), out)     bitstream down each column: the inputs of one output
    qzeros   int32 (groups, ceil(out * bits / 32)) bitstream along each row
    scales   float16 (groups, out)
    g_idx    int32 (in,)                           group of each input

`gptq`, version 1, stores zero-points minus one; `gptq_v2` stores them as they are.
"""

from __future__ import annotations

import re
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

_BITS = (2, 3, 4, 8)


class GptqCodec(Codec):
    """version: 1 or 2."""

    ecosystem, codes = "gptq", "qweight"
    _leaves = frozenset({"qweight", "qzeros", "scales", "g_idx"})

    def __init__(self, version: int) -> None:
        self.version = version
        self.name = "gptq" if version == 1 else "gptq_v2"  # type: ignore[misc]

    def refusal(self, weight: Canonical, dtype: torch.dtype) -> str | None:
        return weights_only(weight) or not_integers(weight) or ragged(weight) or self._unfit(weight, dtype)

    def _unfit(self, weight: Canonical, dtype: torch.dtype) -> str | None:
        found = quantized(weight)
        bits, (rows, columns) = found.scheme.bits, found.shape
        if bits not in _BITS:
            return f"it has {bits} bits, not one of {', '.join(map(str, _BITS))}"
        if rows * bits % 32 or columns * bits % 32:
            return f"{rows} x {columns} codes of {bits} bits do not fill whole words"
        if self.version == 1 and found.zero_point is not None and bool((found.zero_point == 0).any()):
            return "it has a zero-point of 0, which version 1 would store as -1"
        return inexact(found.scale, torch.float16)

    def settings(self, weight: Canonical) -> Settings:
        found = quantized(weight)
        return {
            "bits": found.scheme.bits,
            "group_size": group_size(found),
            "sym": found.scheme.symmetric,
            "checkpoint_format": self.name,
        }

    def encode(self, weight: Canonical, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        found = quantized(weight)
        bits, columns, (scale, zero) = found.scheme.bits, found.shape[1], by_row(found)
        if zero is None:
            zero = torch.full(scale.shape, 2 ** (bits - 1), dtype=torch.uint8)
        stored = zero - 1 if self.version == 1 else zero
        return {
            "qweight": pack_bits(found.codes, bits).T.contiguous(),
            "qzeros": pack_bits(stored.T, bits),
            "scales": scale.T.to(torch.float16).contiguous(),
            "g_idx": (torch.arange(columns) // found.scheme.group_width(columns)).to(torch.int32),
        }

    def decode(self, tensors: Tensors, settings: Settings) -> Canonical:
        bits, scale, g_idx = settings["bits"], tensors["scales"].T.contiguous(), tensors.get("g_idx")
        words = tensors["qweight"]
        columns = words.shape[0] * 32 // bits if g_idx is None or not g_idx.numel() else len(g_idx)
        codes = unpack_bits(words.T.contiguous(), bits, columns)
        zero = None if settings["sym"] else self._zero_point(tensors["qzeros"], bits, codes.shape[0])
        group = settings["group_size"]
        trivial = None if g_idx is None or not g_idx.numel() else g_idx
        return grouped(codes, scale, zero, bits, None if group == -1 or group >= columns else group, trivial)

    def _zero_point(self, words: torch.Tensor, bits: int, rows: int) -> torch.Tensor:
        """(out, groups) uint8. What GPTQModel stored of a zero-point of 0 borrowed from the field above it, so that
        the inverse is an addition of whole words; its constant for 3 bits, where fields straddle words, adds to
        each field."""
        if self.version == 1 and bits != 3:
            one = sum(1 << shift for shift in range(0, 32, bits))
            wide = (words.long() + one) & 0xFFFFFFFF
            words = torch.where(wide >= 2**31, wide - 2**32, wide).to(torch.int32)
        zero = unpack_bits(words, bits, rows)
        if self.version == 1 and bits == 3:
            zero = zero + 1 & 7
        return zero.T.contiguous()


class Gptq(Ecosystem):
    method = "gptq"

    def write(
        self, layers: Mapping[str, tuple[Codec, Settings]], dense: Collection[str], routers: Collection[str] = ()
    ) -> dict[str, Any]:
        """One setting for all layers of the decoder blocks, since its loaders know no other."""
        (first, (_, settings)), *rest = layers.items()
        for name, (_, other) in rest:
            if other != settings:
                key = next(key for key in settings if other[key] != settings[key])
                raise InputError(
                    f"{name}: gptq has one setting for all layers, and {key}={other[key]} differs from "
                    f"{settings[key]} of {first}; --to compressed-tensors can hold both"
                )
        for name in layers:
            if not _blocks(name):
                raise InputError(
                    f"{name}: gptq stores the layers of decoder blocks; --to compressed-tensors has others"
                )
        for name in dense:
            if _blocks(name) == _blocks(first):
                raise InputError(
                    f"{name}: gptq has every layer of the decoder blocks quantised, and this one is dense; "
                    "--to compressed-tensors can leave it so"
                )
        return {"quant_method": self.method, **settings, "desc_act": False, "lm_head": False}

    def read(self, config: Mapping[str, Any], tensors: Mapping[str, torch.dtype]) -> dict[str, tuple[Codec, Settings]]:
        stored = config.get("checkpoint_format") or config.get("format") or "gptq"
        if stored not in ("gptq", "gptq_v2"):
            raise InputError(f"the GPTQ layout {stored!r} is not read; known: gptq, gptq_v2")
        found: dict[str, tuple[Codec, Settings]] = {}
        for name in tensors:
            layer, _, leaf = name.rpartition(".")
            if leaf == "qweight":
                found[layer] = CODECS.get(stored), _settings_of(layer, config)
        return found


def _blocks(name: str) -> str:
    """The list of blocks that a layer is in: its name up to the first number."""
    return re.split(r"\.\d+\.", name, maxsplit=1)[0] if re.search(r"\.\d+\.", name) else ""


def _settings_of(layer: str, config: Mapping[str, Any]) -> Settings:
    """With the overrides of `dynamic`, whose first pattern that matches counts. Raises InputError."""
    settings = {key: config.get(key, default) for key, default in (("bits", None), ("group_size", -1), ("sym", True))}
    for pattern, own in (config.get("dynamic") or {}).items():
        if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), layer):
            settings |= {key: own[key] for key in settings if key in own}
            break
    if settings["bits"] not in _BITS:
        raise InputError(f"{layer}: GPTQ with {settings['bits']} bits is not read; known: 2, 3, 4, 8")
    return settings


for _version in (1, 2):
    CODECS.register("gptq" if _version == 1 else "gptq_v2")(GptqCodec(_version))
