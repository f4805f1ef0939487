"""Compiles the kernel of low rank as `compiled.py` does the others.

Weights are those of a tile of the loop whose tiles are larger, or of the left factor's loop if they are the same.
"""

import sys
from math import gcd

import compiled
from compiled import Case, numbers

from trifold.kernels.low_rank import kernel, ops
from trifold.kernels.weight_only.planes.layout import SLOT, layout_of

compiled.TYPES.update({"z": "*fp32", "places": "*i64", "left_scale": "*bf16", "left_zero": "*u8"})
PLAIN = {"z": "*bf16", "l0": "*bf16", "l1": "*bf16", "l2": "*bf16"}
PACKED = {"z": "*fp32", "l0": "*i16", "l1": "*i16", "l2": "*i16"}

FORMS = {
    "sum": (True, True, False),
    "sum plain": (True, False, False),
    "chain": (False, True, False),
    "pivots": (False, True, True),
    "pivots plain": (False, False, True),
}
"""Whether there is a packed base, a packed left factor, places."""
SUMS = ((1, 4), (2, 3), (3, 2), (3, 3), (3, 4), (4, 4), (5, 4), (6, 6), (7, 4), (7, 5), (8, 4))
"""Bits of the base and of the left factor."""
SELECTED = {
    80: ("sum int4+4 m8",),
    89: ("sum int2+3 m8",),
    90: ("sum int4+4 m8", "sum plain int4 m8", "pivots int4 m8"),
}


def packed(bits):
    tile = layout_of(bits).tile
    return numbers(bits, "int") | {"FLUSH": gcd(128, tile) // SLOT}


def cases():
    wanted = [("sum", *bits) for bits in SUMS] + [("chain", bits, bits) for bits in range(1, 9)]
    wanted += [(form, 4, 4) for form in FORMS if form not in ("sum", "chain")]
    for tokens in (8, 16):
        for form, base_bits, left_bits in wanted:
            base, left, placed = FORMS[form]
            config = ops.tiles_for(base_bits if base else None, left_bits if left else None, tokens)
            if config.bm < tokens:  # as for fewer
                continue
            compiled.TYPES.update(PACKED if left else PLAIN)
            constants = packed(base_bits) | {f"LEFT_{name}": value for name, value in packed(left_bits).items()}
            constants |= {"BASE": base, "PACKED": left, "PLACED": placed, "BIAS": True, "SHARED": base}
            constants |= {"BN": config.bn, "BM": config.bm}
            options = {"num_warps": config.warps, "num_stages": config.stages, "maxnreg": config.registers}
            bits = f"{base_bits}+{left_bits}" if form == "sum" else str(base_bits)
            name = f"{form} int{bits} m{tokens}"
            slots = [layout_of(there).slots for there, has in ((base_bits, base), (left_bits, left)) if has]
            selected = {architecture: name in names for architecture, names in SELECTED.items()}
            weights = config.bn * SLOT * max(slots, default=1)
            yield Case(f"low rank {name}", kernel.finish, constants, options, weights, selected)


if __name__ == "__main__":
    sys.exit(compiled.main(cases()))
