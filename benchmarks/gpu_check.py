"""Checks and times the kernels for GPUs on the GPU of this machine; `make gpu-check`. Takes less than 8 minutes.

    python benchmarks/gpu_check.py [--seconds 420] [--only values|decode|speed|sparse|lowrank]
    TRITON_INTERPRET=1 python benchmarks/gpu_check.py --dry-run     on any CPU: tiny shapes, nothing is written

1. Values (`gpu_values.py`): every width, grid and kind of group, odd shapes, both dtypes in turn, experts, rounded
   activations, against float64, in memory full of NaN; the same bits again, and in a CUDA graph.
2. One token through a random model of the shape of Llama 3 8B, packed and in bfloat16.
3. Speed (`gpu_speed.py`), in CUDA graphs, over more copies of a weight than the second-level cache holds: as a
   fraction of the copy bandwidth and of the matrix rate of bfloat16, both measured here, beside other products of the
   same shape.
4. Sparse weights (`gpu_sparse.py`): values, and times beside cuBLAS and dense int4.
5. Low rank (`gpu_lowrank.py`): values, and times in one piece, part by part, and of cuBLAS.

Results go to `benchmarks/results/gpu.json` and `.md`. Nothing is written where there is no GPU. What fails says so in
its place of the table; wrong values are the script's exit code.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import gpu_lowrank
import gpu_sparse
import gpu_speed
import gpu_values
import torch
from common import machine, markdown, save
from gpu_layers import Gpu, Rehearsal

COLUMNS = ["product", "shape", "tokens", "microseconds", "of_copy_bandwidth", "of_bf16_rate", "failed"]

SPARSE = ["sparse weights", "op", "tokens", "error", "microseconds", "over cublas", "over dense W4", "published"]
LOW_RANK = ["weights", "tokens", "error", "microseconds", "part by part", "over cublas"]


def _cells(rows: list[dict[str, Any]], columns: list[str]) -> list[list[Any]]:
    return [[row.get(column, "") for column in columns] for row in rows]


def attempt(part: Callable[..., Any], *arguments: Any) -> Any:
    """What a part finds, or why it found nothing: the others still have their turn."""
    try:
        return part(*arguments)
    except Exception as error:
        return {"failed": f"{part.__name__}: {type(error).__name__}: {str(error)[:300]}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=420, help="after which no new row is begun")
    parser.add_argument("--only", choices=["values", "decode", "speed", "sparse", "lowrank"])
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    if options.dry_run and os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("gpu-check: --dry-run runs in Triton's interpreter; set TRITON_INTERPRET=1")
    if not (options.dry_run or torch.cuda.is_available()):
        sys.exit("gpu-check: torch finds no GPU here, so nothing was checked or measured")
    gpu, begun = Rehearsal() if options.dry_run else Gpu(), time.time()
    name = "CPU" if gpu.dry else torch.cuda.get_device_properties(gpu.device).name
    data: dict[str, Any] = {"gpu": name, "machine": machine()}
    text, wrong, failed = f"# Kernels on a {name}\n\n", False, []
    with gpu.place():
        if options.only in (None, "values"):
            data["values"] = gpu_values.check(gpu, begun + options.seconds * 0.45)
            wrong = gpu_values.wrong(data["values"])
            text += markdown(["weights", "op", "error over what is allowed", "problems"], data["values"]) + "\n"
        if options.only in (None, "decode"):
            data["decode_ms"] = attempt(gpu_speed.decode, gpu)
            failed += ["decode"] if "failed" in data["decode_ms"] else []
            text += f"One token through a random 8B model, ms: {data['decode_ms']}\n\n"
            gpu.free()
        if options.only in (None, "speed"):
            limits = data["ceilings"] = gpu_speed.ceilings(gpu)
            deadline = begun + options.seconds
            data["speed"] = gpu_speed.experts(gpu, deadline, limits) + gpu_speed.speed(gpu, deadline, limits)
            text += f"Copy: {limits['bytes'] / 1e12:.2f} TB/s; bfloat16: {limits['operations'] / 1e12:.0f} TFLOP/s.\n\n"
            text += markdown(COLUMNS, _cells(data["speed"], COLUMNS))
        for part, module, columns in (("sparse", gpu_sparse, SPARSE), ("lowrank", gpu_lowrank, LOW_RANK)):
            if options.only not in (None, part):
                continue
            found = data[part] = attempt(module.rows, gpu)
            if isinstance(found, dict):
                failed.append(part)
                text += f"\n{found}\n"
            else:
                text += "\n" + markdown(columns, _cells(found, columns))
                wrong = wrong or any(not row["error"] <= 1 for row in found)
            gpu.free()
    print(text)
    if not gpu.dry:
        save("gpu", data, text)
    if wrong or failed:
        sys.exit("gpu-check: values are wrong, or a part did not run; see the tables")


if __name__ == "__main__":
    main()
