"""`pack-quantized` of compressed-tensors: integers of 1 to 8 bits, packed into int32 words.

    weight_packed      int32 (out, ceil(in * bits / 32))      bitstream along each row
    weight_scale       the model's dtype (out, groups)
    weight_zero_point  int32 (ceil(out * bits / 32), groups)  bitstream down each column; asymmetric only
    weight_shape       int64 (2,)                             out, in
    weight_g_idx       int32 (in,)                            group of each column; old act-order files only

Their codes are signed and stored with an offset of 2**(bits - 1), so that the words are those of our unsigned codes.
Versions before 0.18 did not let codes straddle words; such files are read too.
"""

from __future__ import annotations

import torch

from trifold.core.canonical import Canonical
from trifold.core.errors import InputError
from trifold.ecosystem.act_order import grouped
from trifold.ecosystem.base import CODECS, Codec, Settings, Tensors, by_row, inexact, not_integers, quantized, ragged
from trifold.ecosystem.ct_args import INPUT_SCALE, group_size, input_refusal, input_tensors, settings_of, with_input
from trifold.formats.bitstream import pack_bits, unpack_bits, words_for


class PackQuantized(Codec):
    name, ecosystem, codes = "pack-quantized", "compressed-tensors", "weight_packed"
    _leaves = frozenset(
        {"weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", INPUT_SCALE}
    )

    def refusal(self, weight: Canonical, dtype: torch.dtype) -> str | None:
        return (
            not_integers(weight)
            or ragged(weight)
            or inexact(quantized(weight).scale, dtype)
            or input_refusal(weight, ("int", "float"))
        )

    def settings(self, weight: Canonical) -> Settings:
        return settings_of(weight, self.name)

    def encode(self, weight: Canonical, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        found = quantized(weight)
        bits, (scale, zero) = found.scheme.bits, by_row(found)
        tensors = {
            "weight_packed": pack_bits(found.codes, bits),
            "weight_scale": scale.to(dtype).contiguous(),
            "weight_shape": torch.tensor(found.shape, dtype=torch.int64),
        }
        if zero is not None:
            tensors["weight_zero_point"] = pack_bits(zero.T, bits).T.contiguous()
        return tensors | input_tensors(weight)

    def decode(self, tensors: Tensors, settings: Settings) -> Canonical:
        args = settings["weights"]
        bits, (rows, columns) = args.get("num_bits", 8), tensors["weight_shape"].tolist()
        if args.get("type", "int") != "int" or not 1 <= bits <= 8:
            raise InputError(f"packed weights of type {args.get('type')!r} with {bits} bits are not read")
        old = _old_layout(tensors["weight_packed"].shape[1], bits, columns, settings.get("version"))
        codes = _unpack(tensors["weight_packed"], bits, columns, old)
        scale, zero = tensors["weight_scale"], None
        scale = scale.reshape(1, 1).expand(rows, 1) if scale.numel() == 1 else scale  # one for the whole matrix
        if not args.get("symmetric", True):
            words = tensors["weight_zero_point"].T.contiguous()
            zero = _unpack(words, bits, rows, old).T.contiguous()
        elif bits == 1:  # their zero is the upper code, ours lies between the two
            zero = torch.ones(scale.shape, dtype=torch.uint8)
        weight = grouped(codes, scale, zero, bits, group_size(args), tensors.get("weight_g_idx"))
        return with_input(weight, tensors, settings)


def _old_layout(words: int, bits: int, count: int, version: str | None) -> bool:
    """Whether no code straddles two words. The size of a row tells, and where it does not, the version."""
    dense, old = words_for(count, bits), -(-count // (32 // bits))
    if words not in (dense, old):
        raise ValueError(f"{words} words cannot hold {count} codes of {bits} bits")
    if dense != old:
        return words == old
    numbers = [int(part) for part in (version or "").split(".")[:2] if part.isdecimal()]
    return len(numbers) == 2 and numbers < [0, 18]


def _unpack(words: torch.Tensor, bits: int, count: int, old: bool) -> torch.Tensor:
    if not old:
        return unpack_bits(words, bits, count)
    shifts = torch.arange(0, 32 - bits + 1, bits, device=words.device)
    codes = (words.long().unsqueeze(-1) >> shifts) & 2**bits - 1
    return codes.to(torch.uint8).reshape(len(words), -1)[:, :count].contiguous()


CODECS.register(PackQuantized.name)(PackQuantized())
