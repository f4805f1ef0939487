"""Compiles the sparse kernels as `compiled.py` does the others. Weights are those of a tile, dropped ones too."""

import sys

import compiled
from compiled import Case

from trifold.kernels.sparse.gpu import bitmap, bitmap_kernels, group_kernels, groups
from trifold.kernels.weight_only.planes.layout import layout_of

compiled.TYPES.update(
    {"words": "*i16", "meta": "*i32", "map": "*i64", "mask": "*i32", "offset": "*i32", "values": "*bf16"}
)


def cases():
    for bits in groups.WIDTHS:
        for group in (16, 32, 64, 128) if bits == 4 else (32,):
            for tokens in (1, 2, 4, 8) if bits == 4 and group <= 32 else (1, 8):
                config = groups.choose(bits, group, tokens)
                constants = {
                    "LAYOUT": layout_of(bits), "GROUP": group, "T": config.tile, "PHASES": config.phases, "WIDE": False,
                    "BIAS": True, "SHARED": True, "BN": config.bn, "BM": config.bm,
                }  # fmt: skip
                options = {"num_warps": config.warps, "num_stages": config.stages, "maxnreg": config.registers}
                usual = bits == 4 and group <= 32
                selected = {
                    80: usual and group == 32 and tokens == 8,
                    89: usual and group == 16 and tokens == 1,
                    90: usual and tokens in (1, 8),
                }
                weights = config.bn * config.tile * group
                name = f"groups int{bits} g{group} m{tokens}"
                yield Case(name, group_kernels.multiply, constants, options, weights, selected)
    for tokens in (16, 32, 64):
        constants = {
            "BIAS": True, "WHOLE": True, "SHARED": True, "CHUNK": bitmap.CHUNK, "BN": bitmap.ROWS, "BM": tokens,
        }  # fmt: skip
        selected = {80: False, 89: tokens == 16, 90: tokens != 32}
        options = {"num_warps": bitmap.WARPS}
        yield Case(f"bitmap m{tokens}", bitmap_kernels.multiply, constants, options, bitmap.ROWS * 32, selected)
    constants = {"BIAS": True, "BLOCK": 1024}
    yield Case("bitmap total", bitmap_kernels.total, constants, {"num_warps": 4}, 0, {80: False, 89: False, 90: True})


if __name__ == "__main__":
    sys.exit(compiled.main(cases()))
