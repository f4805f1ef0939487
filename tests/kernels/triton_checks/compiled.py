"""Compiles the kernels for GPUs that are not there, and holds what comes out to `triton_budget_*.json`.

Each release of Triton makes other code of them, so a release has a budget of its own; what that does not name is held
to the newest's.

    python compiled.py            a selection: each kernel, each architecture, each kind of unpacking
    python compiled.py --all      every kernel, width, grid, configuration and architecture
    python compiled.py --record   writes the budget, of the selection or with --all

`compiled_sparse.py` and `compiled_lowrank.py` do the same with other kernels, and the same budget.

Of each: no register is spilled, shared memory fits, and the main loop has no more instructions per weight than the
budget says, but for a few per cent.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from math import gcd
from pathlib import Path
from typing import NamedTuple

os.environ["TRITON_INTERPRET"] = "0"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from trifold.kernels.rounded_input import triton_product, triton_product_kernel, triton_round_kernel
from trifold.kernels.weight_only.planes import activations, dequantize, gemm, ops
from trifold.kernels.weight_only.planes.configs import CONFIGS, MIDDLE
from trifold.kernels.weight_only.planes.layout import SLOT, layout_of

HERE = Path(__file__).parent
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
GRIDS = {4: ("int", "nf4", "fp4_e2m1"), 8: ("int", "fp8_e4m3")}
TYPES = {"x": "*bf16", "y": "*bf16", "w": "*bf16", "bias": "*bf16", "a": "*fp16", "scale": "*bf16", "zero": "*u8"} | {
    **dict.fromkeys(("p0", "p1", "p2"), "*i16"),
    **dict.fromkeys(("sum", "inverse", "partial"), "*fp32"),
    **dict.fromkeys(("token", "row", "given", "weight"), "*fp32"),
    "code": "*i8",
    **dict.fromkeys(("count", "offset", "bounds"), "*i32"),
    "order": "*i64",
}


class Case(NamedTuple):
    """weights: that one pass of the main loop unpacks, 0 if instructions are not counted; selected: always checked."""

    name: str
    kernel: object
    constants: dict
    options: dict
    weights: int
    selected: dict[int, bool]
    oldest: int = 80


def numbers(bits, grid, group=128):
    midpoint = 2.0 ** (bits - 1) if grid == "int" else 0.0
    constants = {"LAYOUT": layout_of(bits), "GRID": ops.grid_of(grid), "GROUP": group, "MIDPOINT": midpoint}
    return constants | {"ASYMMETRIC": grid == "int"}


def cases():
    for bits, configs in CONFIGS.items():
        for grid in GRIDS.get(bits, ("int",)):
            for limit, config in configs.items():
                tile = layout_of(bits).tile
                constants = {"FLUSH": gcd(128, tile) // SLOT, "BIAS": True, "SHARED": True, "BN": config.bn}
                options = {"num_warps": config.warps, "num_stages": config.stages, "maxnreg": config.registers}
                usual = bits == 4 and grid == "int"
                selected = {
                    80: usual and limit == 16,
                    89: usual and limit == 8,
                    90: usual or (limit == 8 and bits in (2, 3, 4, 8)),
                }
                yield Case(
                    f"multiply {grid}{bits if grid == 'int' else ''} m{limit}", gemm.multiply,
                    numbers(bits, grid) | constants | {"BM": config.bm}, options, config.bn * tile, selected,
                )  # fmt: skip
                more = {"WEIGHTED": True, "WIDTH": 128, "BM": config.bm}
                yield Case(
                    f"experts {grid}{bits if grid == 'int' else ''} m{limit}", gemm.multiply_experts,
                    numbers(bits, grid) | constants | more, options, config.bn * tile,
                    {80: False, 89: False, 90: usual and limit == 8},
                )  # fmt: skip
            if bits in MIDDLE and grid in ops.COMPUTED:
                config = MIDDLE[bits]
                constants |= {"BM": config.bm, "BN": config.bn, "SHARED": False}
                options = {"num_warps": config.warps, "num_stages": config.stages, "maxnreg": config.registers}
                yield Case(
                    f"multiply {grid}{bits if grid == 'int' else ''} m{config.bm}", gemm.multiply,
                    numbers(bits, grid) | constants, options, config.bn * tile,
                    {90: bits == 4 and grid == "int"}, 90,
                )  # fmt: skip
            usual = bits in (3, 4)
            yield Case(
                f"expand {grid}{bits if grid == 'int' else ''}", dequantize.expand,
                numbers(bits, grid) | {"BN": 64}, {}, 0, {80: False, 89: False, 90: usual},
            )  # fmt: skip
    for block in (1024, 4096, 16384):
        constants = {"STEP": 4, "SLOT": SLOT, "SPAN": 0, "CHUNK": 128, "BLOCK": block}
        options = {"num_warps": block // 1024}
        yield Case(
            f"prepare {block}", activations.prepare, constants, options, 0, dict.fromkeys((80, 89, 90), block > 1024)
        )

    for limit, config in triton_product.CONFIGS.items():
        tiles = {"BM": config.bm, "BN": config.bn, "BK": config.bk, "BIAS": True, "WHOLE": limit > 16, "SHARED": True}
        options = {"num_warps": config.warps, "num_stages": config.stages}
        weights = config.bn * config.bk
        for name, floats, group in (("int8", False, 0), ("fp8", True, 0), ("fp8 grouped", True, 128)):
            constants = tiles | {"FLOAT": floats, "GROUP": group, "OFFSET": not floats}
            usual = {80: False, 89: limit == 128 and not group, 90: group == 0 or limit == 16}
            kernel, kind = triton_product_kernel.multiply, f"{name} m{limit}"
            yield Case(kind, kernel, constants, options, weights, usual, 89 if floats else 80)
    for name, constants in (("int8", {"LARGEST": 127.0, "FLOAT": False}), ("fp8", {"LARGEST": 448.0, "FLOAT": True})):
        for block in (1024, 16384):
            more, options = {"STATIC": False, "BLOCK": block}, {"num_warps": block // 1024}
            usual = {80: block == 1024, 89: False, 90: block > 1024}
            yield Case(f"round {name} {block}", triton_round_kernel.round_tokens, constants | more, options, 0, usual)


def _type(case, name):
    floats = case.constants.get("FLOAT")
    if name in ("x_ptr", "codes_ptr") and case.kernel is triton_product_kernel.multiply:
        return "*fp8e4nv" if floats else "*i8"
    if name == "scale_ptr" and case.kernel is triton_round_kernel.round_tokens:
        return "*fp32"
    if "FLOAT" in case.constants and name in ("sum_ptr", "partial_ptr"):
        return "*fp32" if floats and name == "partial_ptr" else "*i32"
    return TYPES.get(name.removesuffix("_ptr"), "i32")


def compiled(case, architecture):
    """(code, registers, bytes of shared memory, bytes spilled) of a case."""
    names = case.kernel.arg_names
    signature = {n: "constexpr" if n in case.constants else _type(case, n) for n in names}
    aligned = [n for n in names if n.endswith("_ptr") or n in ("N", "K", "PADDED")]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=case.constants, attrs=attributes)
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=case.options)
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "k.cubin"), Path(folder, "k.ptx")
        cubin.write_bytes(made.asm["cubin"])
        ptx.write_text(made.asm["ptx"])
        target = re.search(r"\.target (sm_\w+)", made.asm["ptx"]).group(1)
        code = _output(BINARIES / "cuobjdump", "-sass", cubin)
        said = _output(get_ptxas(architecture).path, "-v", f"--gpu-name={target}", ptx, "-o", os.devnull)
    registers = int(re.search(r"Used (\d+) registers", said).group(1))
    spilled = int(re.search(r"(\d+) bytes spill stores", said).group(1))
    return code, registers, made.metadata.shared, spilled


def _output(*command):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def main_loop(code):
    """Instructions of the loop that multiplies: from the target of a branch backwards to the branch."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", code, re.M)
    places = [(int(place, 16), text) for place, text in lines]
    loops = []
    for end, text in places:
        found = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if found and int(found.group(1), 16) <= end:
            body = [text for place, text in places if int(found.group(1), 16) <= place <= end]
            loops.append((sum("MMA" in text for text in body), len(body)))
    assert loops and max(loops)[0], "no loop multiplies"
    return max(loops)[1]


def measure(case, architecture):
    code, registers, shared, spilled = compiled(case, architecture)
    found = {"registers": registers, "shared": shared, "spilled": spilled}
    if case.weights:
        found["per_weight"] = round(main_loop(code) * 32 * case.options["num_warps"] / case.weights, 2)
    return found


def complaints(name, found, limit, architecture, tolerance):
    if found["spilled"]:
        yield f"{name}: {found['spilled']} bytes spilled"
    if found["shared"] > SHARED_MEMORY[architecture]:
        yield f"{name}: {found['shared']} bytes of shared memory, there are {SHARED_MEMORY[architecture]}"
    if limit is None:
        yield f"{name}: not in the budget; record it"
    elif found.get("per_weight", 0) > limit.get("per_weight", 0) * tolerance:
        yield f"{name}: {found['per_weight']} instructions per weight, the budget is {limit['per_weight']}"


def budgets():
    """(file of this release of Triton, its budget, the same with what the newest says of kernels it has not)."""
    found = {tuple(map(int, re.findall(r"\d+", path.stem))): path for path in HERE.glob("triton_budget_*.json")}
    release = tuple(map(int, triton.__version__.split(".")[:2]))
    file = HERE / f"triton_budget_{release[0]}.{release[1]}.json"
    own = json.loads(file.read_text()) if file.exists() else {}
    return file, own, (json.loads(found[max(found)].read_text()) if found else {}) | own


def main(cases):
    parser = argparse.ArgumentParser()
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--tolerance", type=float, default=1.04, help="of another compiler's release")
    options = parser.parse_args()
    file, own, budget = budgets()
    wrong, table = [], {}
    for case in cases:
        for architecture in SHARED_MEMORY:
            name = f"{case.name} sm_{architecture}"
            wanted = options.all or case.selected.get(architecture)
            if architecture < case.oldest or not wanted or options.only not in name:
                continue
            table[name] = measure(case, architecture)
            print(name, table[name], flush=True)
            limit = table[name] if options.record else budget.get(name)
            wrong += complaints(name, table[name], limit, architecture, options.tolerance)
    if options.record:
        rows = [f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in ({**own, **table}).items()]
        file.write_text("{\n" + ",\n".join(rows) + "\n}\n")
    print("\n".join(wrong) or f"{len(table)} kernels are within the budget")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(cases()))
