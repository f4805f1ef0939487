"""Compiles the sparse kernels for GPUs that are not there, and holds what comes out to `sparse_budget.json`.

    python compiled_sparse.py [--all] [--record] [--only NAME]

As `compiled.py`: no register is spilled, shared memory fits, and the main loop has no more instructions per weight
(that survives, or of bitmaps each) than the budget says, but for a few per cent.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import compiled as shared
from compiled import SHARED_MEMORY, Case, complaints

from trifold.kernels.sparse.gpu import bitmap, bitmap_kernels, group_kernels, groups

BUDGET = Path(__file__).with_name("sparse_budget.json")
shared.TYPES.update(
    dict.fromkeys(("words", "start", "first", "mask", "offset"), "*i32")
    | {"number": "*u8", "head": "*fp32", "tail": "*fp32", "values": "*bf16", "partial": "*fp32"}
)


def cases():
    for bits in groups.WIDTHS:
        for group in (16, 32, 64, 128):
            for tokens in (1, 4):
                constants = {
                    "BITS": bits, "GROUP": group, "MIDPOINT": float(2 ** (bits - 1)), "ASYMMETRIC": True, "BIAS": True,
                    "WHOLE": True, "B": groups.block_of(group), "TOKENS": tokens,
                }  # fmt: skip
                usual = bits == 4 and group <= 32
                selected = {80: False, 89: usual and group == 16 and tokens == 1, 90: usual}
                weights = groups.block_of(group) * group
                name = f"groups int{bits} g{group} t{tokens}"
                yield Case(
                    name, group_kernels.multiply, constants, {"num_warps": groups.warps_of(bits)}, weights, selected
                )
    yield Case(
        "groups join", group_kernels.join, {"BIAS": True}, {"num_warps": 1}, 0, dict.fromkeys((80, 89, 90), True)
    )
    for tokens in (16, 32, 64):
        constants = {
            "BIAS": True,
            "WHOLE": True,
            "SHARED": True,
            "CHUNK": bitmap.CHUNK,
            "BN": bitmap.ROWS,
            "BM": tokens,
        }
        selected = {80: False, 89: tokens == 16, 90: True}
        weights = bitmap.ROWS * 32
        yield Case(
            f"bitmap m{tokens}", bitmap_kernels.multiply, constants, {"num_warps": bitmap.WARPS}, weights, selected
        )
    constants = {"BIAS": True, "BLOCK": 1024}
    yield Case("bitmap total", bitmap_kernels.total, constants, {"num_warps": 4}, 0, {80: False, 89: False, 90: True})


def main_loop(code):
    """Instructions of the innermost loop that multiplies most."""
    lines = [(int(place, 16), text) for place, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", code, re.M)]
    spans = []
    for end, text in lines:
        found = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if found and int(found.group(1), 16) < end:
            spans.append((int(found.group(1), 16), end))
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    bodies = [[text for place, text in lines if begin <= place <= end] for begin, end in inner]
    return max((sum("FMA" in text or "MMA" in text for text in body), len(body)) for body in bodies)[1]


def measure(case, architecture):
    code, registers, memory, spilled = shared.compiled(case, architecture)
    found = {"registers": registers, "shared": memory, "spilled": spilled}
    if case.weights:
        found["per_weight"] = round(main_loop(code) * 32 * case.options["num_warps"] / case.weights, 2)
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--tolerance", type=float, default=1.04, help="of another compiler's release")
    options = parser.parse_args()
    budget = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    wrong, table = [], {}
    for case in cases():
        for architecture in SHARED_MEMORY:
            name = f"{case.name} sm_{architecture}"
            if not (options.all or options.record or case.selected[architecture]) or options.only not in name:
                continue
            table[name] = measure(case, architecture)
            print(name, table[name], flush=True)
            limit = table[name] if options.record else budget.get(name)
            wrong += complaints(name, table[name], limit, architecture, options.tolerance)
    if options.record:
        rows = [f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in ({**budget, **table}).items()]
        BUDGET.write_text("{\n" + ",\n".join(rows) + "\n}\n")
    print("\n".join(wrong) or f"{len(table)} kernels are within the budget of sparse_budget.json")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
