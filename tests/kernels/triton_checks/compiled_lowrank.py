"""Compiles the kernel of low rank as `compiled.py` does the others.

Weights are those of a tile of the loop that is longest: the left factor's where it is packed, else the base's.
"""

import sys
from math import gcd

import compiled
from compiled import Case, numbers

from trifold.kernels.low_rank import kernel, ops
from trifold.kernels.weight_only.planes.configs import choose
from trifold.kernels.weight_only.planes.layout import SLOT, layout_of

compiled.TYPES.update({"z": "*fp32", "places": "*i64", "left_scale": "*bf16", "left_zero": "*u8"})
PLAIN = {"z": "*bf16", "l0": "*bf16", "l1": "*bf16", "l2": "*bf16"}
PACKED = {"z": "*fp32", "l0": "*i16", "l1": "*i16", "l2": "*i16"}


def packed(bits):
    tile = layout_of(bits).tile
    return numbers(bits, "int") | {"FLUSH": gcd(128, tile) // SLOT}


def cases():
    for bits in (2, 3, 4, 8):
        for tokens in (8, 16) if bits == 4 else (8,):
            config = choose(bits, tokens)
            options = {"num_warps": config.warps, "num_stages": config.stages, "maxnreg": ops.REGISTERS}
            for name, base, left, placed in (
                ("sum", True, True, False),
                ("sum plain", True, False, False),
                ("chain", False, True, False),
                ("pivots", False, True, True),
                ("pivots plain", False, False, True),
            ):
                if bits != 4 and name != "sum":
                    continue
                compiled.TYPES.update(PACKED if left else PLAIN)
                constants = packed(bits) | {f"LEFT_{name}": value for name, value in packed(bits).items()}
                constants |= {"BASE": base, "PACKED": left, "PLACED": placed, "BIAS": True, "SHARED": base}
                constants |= {"BN": config.bn, "BM": config.bm}
                usual = bits == 4 and tokens == 8
                selected = {
                    80: usual and name == "sum",
                    89: False,
                    90: usual and name in ("sum", "sum plain", "pivots"),
                }
                weights = config.bn * (layout_of(bits).tile if base or left else SLOT)
                yield Case(f"low rank {name} int{bits} m{tokens}", kernel.finish, constants, options, weights, selected)


if __name__ == "__main__":
    sys.exit(compiled.main(cases()))
