"""Which tiles the product runs with, by width and number of tokens: a table, not a search.

What chose the entries is counted in the compiled code: instructions per weight, registers, shared memory, in
`tests/kernels/triton_checks/triton_budget_*.json`. None has been timed on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """bn: outputs, bm: tokens of a block. registers: of a thread, at most."""

    bn: int
    bm: int
    warps: int
    stages: int
    registers: int = 168


_NARROW = {8: Config(64, 8, 2, 4), 16: Config(64, 16, 2, 4)}
_WIDE = {8: Config(32, 8, 2, 3), 16: Config(32, 16, 2, 2, 255)}
_MORE = {32: Config(64, 32, 2, 3, 255), 64: Config(64, 64, 4, 3, 255)}
CONFIGS: dict[int, dict[int, Config]] = {
    1: _WIDE,
    2: _NARROW | {32: _MORE[32]},
    3: _WIDE | {8: Config(64, 8, 2, 3, 255)},
    4: _NARROW | _MORE,
    5: _WIDE,
    6: {8: Config(64, 8, 2, 4, 200), 16: Config(64, 16, 2, 4, 255)},
    7: _WIDE,
    8: _NARROW | _MORE,
}
"""By bits and by the largest number of tokens; the last also for more. The more slots a tile has, the more registers a
block needs. With two warps Hopper's compiler does not take its asynchronous instruction, whose sums would have to be
waited for at every scale."""
MIDDLE: dict[int, Config] = {4: Config(64, 128, 4, 3, 255), 8: Config(64, 128, 4, 3, 255)}
"""By bits, for more tokens than the others take at once, where that makes blocks enough for all processors: half the
instructions for a token on Hopper, whose instruction takes weights from registers; no gain
on others. Sums are not shared, and numbers not looked up; both would need more registers."""
_MOST_BLOCKS = 8  # of tokens, that unpack the same weights


def choose(bits: int, tokens: int) -> Config:
    found = CONFIGS[bits]
    return found[next((limit for limit in found if tokens <= limit), max(found))]


def choose_for(bits: int, tokens: int, out_features: int, processors: int, middle: bool) -> Config:
    """The same for one product; middle: whether MIDDLE is for this GPU and grid."""
    found, wide = choose(bits, tokens), MIDDLE.get(bits)
    if wide is None or not middle or tokens <= found.bm:
        return found
    blocks = -(-tokens // wide.bm) * -(-out_features // wide.bn)
    return wide if blocks >= processors else found


def dense_from(bits: int) -> int:
    """Tokens from which dequantised tiles are multiplied by the vendor's library.

    An estimate: a dense pass writes and reads 16 bits a weight; in that time an H200 multiplies by about 500 tokens,
    at half the rate of the library. Widths without a configuration for many tokens give up earlier.
    """
    return _MOST_BLOCKS * max(CONFIGS[bits])
