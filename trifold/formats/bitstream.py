"""Dense bitstreams: b-bit codes, one after the other, in little-endian int32 words.

Code k of a row occupies bits k*b .. k*b+b-1 of the row's words, least significant bit first; a code may
straddle two words, and the tail of the last word is zero. It is the layout of compressed-tensors' packed
weights and, transposed, of GPTQ's.
"""

from __future__ import annotations

import torch

_PERIOD = 32  # codes after which every bit width is back at a word boundary


def words_for(count: int, bits: int) -> int:
    """Words that `count` codes take."""
    return -(-count * bits // 32)


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """codes (rows, n) uint8, each below 2**bits -> (rows, words_for(n, bits)) int32."""
    rows, count = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -count % _PERIOD)).reshape(rows, -1, _PERIOD)
    words = torch.zeros(rows, padded.shape[1], bits, dtype=torch.int64, device=codes.device)
    for k in range(_PERIOD):
        value = padded[..., k].long()
        word, shift = divmod(k * bits, 32)
        words[..., word] |= value << shift & 0xFFFFFFFF
        if shift + bits > 32:
            words[..., word + 1] |= value >> (32 - shift)
    words = torch.where(words >= 2**31, words - 2**32, words)
    return words.to(torch.int32).reshape(rows, -1)[:, : words_for(count, bits)].contiguous()


def unpack_bits(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The inverse: (rows, words) int32 -> (rows, count) uint8."""
    rows = words.shape[0]
    if not rows:
        return words.new_empty(0, count, dtype=torch.uint8)
    mask = 2**bits - 1
    if 8 % bits == 0:  # codes do not straddle bytes
        octets = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)  # also of one word
        if bits < 8:
            octets = torch.stack([octets >> s & mask for s in range(0, 8, bits)], dim=-1)
        return octets.reshape(rows, -1)[:, :count].contiguous()
    padded = torch.nn.functional.pad(words, (0, -words.shape[1] % bits)).reshape(rows, -1, bits)
    wide = padded.long() & 0xFFFFFFFF
    codes = torch.empty(rows, wide.shape[1], _PERIOD, dtype=torch.uint8, device=words.device)
    for k in range(_PERIOD):
        word, shift = divmod(k * bits, 32)
        value = wide[..., word] >> shift
        if shift + bits > 32:
            value |= wide[..., word + 1] << (32 - shift)
        codes[..., k] = (value & mask).to(torch.uint8)
    return codes.reshape(rows, -1)[:, :count].contiguous()


def unpack_range(words: torch.Tensor, bits: int, first: int, count: int) -> torch.Tensor:
    """Codes first .. first + count - 1 of one stream: words (n,) int32 -> (count,) uint8."""
    if not count:
        return words.new_empty(0, dtype=torch.uint8)
    lead = first % _PERIOD
    start, stop = (first - lead) * bits // 32, words_for(first + count, bits)
    return unpack_bits(words[start:stop][None], bits, lead + count)[0, lead:]


def codes_at(words: torch.Tensor, bits: int, places: torch.Tensor) -> torch.Tensor:
    """Codes of one stream at any places: words (n,) int32, places int64 -> uint8 of the shape of places."""
    if not places.numel():
        return places.to(torch.uint8)
    word, shift = places * bits // 32, places * bits % 32
    low = words[word].long() & 0xFFFFFFFF
    high = words[(word + 1).clamp(max=len(words) - 1)].long() & 0xFFFFFFFF
    return ((low >> shift | high << (32 - shift)) & 2**bits - 1).to(torch.uint8)
