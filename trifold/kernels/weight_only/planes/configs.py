"""Which tiles the product runs with, by architecture, width and number of tokens: a table, not a search.

What chose the entries is counted in the compiled code (instructions per weight, registers, shared memory; see
`tests/kernels/triton_budget.json`). None has been timed on a GPU yet.
"""

from __future__ import annotations

from typing import NamedTuple

from trifold.kernels.weight_only.planes.layout import layout_of

DENSE_FROM = 512
"""Tokens from which dequantised tiles are multiplied by the vendor's library. An estimate: a dense pass writes and
reads 16 bits a weight; in that time an H200 multiplies by about 500 tokens, at half the rate of the library."""
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""Bytes that a block may have, by compute capability; an unknown one counts as the nearest below it."""


class Config(NamedTuple):
    """bn: outputs, bm: tokens of a block."""

    bn: int
    bm: int
    warps: int
    stages: int


SMALL: dict[int, Config] = {8: Config(64, 8, 2, 4), 16: Config(64, 16, 2, 4), 32: Config(64, 32, 2, 4)}
"""By the largest number of tokens. Two warps: more would make Hopper's compiler take the asynchronous instruction,
whose accumulators have to be waited for at every scale."""
SMALL_WIDE: dict[int, Config] = {8: Config(64, 8, 2, 3), 16: Config(64, 16, 4, 3), 32: Config(64, 32, 4, 3)}
"""The same for widths with tiles of 512 inputs, where two warps of 16 tokens have too few registers."""
MIDDLE = Config(64, 64, 4, 3)
LARGE = Config(128, 64, 4, 3)


def configs(bits: int) -> dict[int, Config]:
    """By the largest number of tokens that each is for; above the last, the last."""
    small = SMALL_WIDE if layout_of(bits).slots == 16 else SMALL
    return {**small, 64: MIDDLE, 128: LARGE}


def choose(bits: int, tokens: int) -> Config:
    found = configs(bits)
    return found[next((limit for limit in found if tokens <= limit), max(found))]


def split(config: Config, tokens: int, out_features: int, tiles: int, processors: int) -> int:
    """Programs that share a piece of y: enough to give each of a GPU's processors six blocks of two warps.

    No share is below four tiles of inputs, in which a pipeline fills.
    """
    blocks = -(-out_features // config.bn) * -(-tokens // config.bm)
    wanted = processors * 12 // config.warps // max(blocks, 1)
    return max(1, min(wanted, tiles // 4, 32))
