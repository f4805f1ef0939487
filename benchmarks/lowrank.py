"""What lower rank does to a model: methods against each other, and low rank against few bits at like sizes.

    python benchmarks/lowrank.py [--model DIR --calib FILE --eval FILE] [--go-on]

The first table keeps 80 % and 60 % of the linears' bytes in factors of 16 bits. The second stores rounded weights,
factors and residuals at several sizes; the picture beside it has loss against bits. Every cell is a checkpoint written
by `trifold.compress`, loaded again and scored on the same windows, which calibration never saw. `±` is the standard
error of the paired difference over windows.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from common import RESULTS, add_text_arguments, machine, markdown, save
from quality import score_of
from sparsity import cell, rise, rounded

from trifold.lowrank.modegpt import PUBLISHED

EXACT = {"multiple_of": 1}  # ranks that use the whole share
METHODS: dict[str, dict[str, Any]] = {
    "SVD": {"method": "svd", "options": EXACT},
    "ASVD": {"method": "asvd", "options": EXACT},
    "SVD-LLM": {"method": "svd_llm", "options": EXACT},
    "MoDeGPT, as published": {"method": "modegpt", "options": PUBLISHED, "dtype": "bfloat16"},
    "MoDeGPT, ours": {"method": "modegpt", "dtype": "bfloat16"},
    "regression": {"method": "reduced_rank", "options": {"pivot": False, **EXACT}},
    "regression, pivot rows": {"method": "reduced_rank", "options": EXACT},
    "ours, all layers equally sensitive": {"method": "reduced_rank", "options": {"sensitive": False}, "shared": True},
    "ours: regression, pivot rows, shared budget": {"method": "reduced_rank", "shared": True},
}
"""Row -> step, to which the share that is kept is added: of each layer, or of all together if they share it.
dtype: of what are ordinary weights."""

KEEP = (0.8, 0.6)


def factors(method: str, bits: int | None = None, **options: Any) -> dict[str, Any]:
    """A step of low rank, rounded or not."""
    scheme = {"scheme": {"bits": bits, "group_size": 128}} if bits else {}
    return {"method": method, "options": options, **scheme}


SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "INT4 g64": ("bits", rounded("gptaq", 4, 64)),
    "INT4 g128": ("bits", rounded("gptaq", 4, 128)),
    "INT3 g64": ("bits", rounded("gptaq", 3, 64)),
    "INT3 g128": ("bits", rounded("gptaq", 3, 128)),
    "INT2 g32": ("bits", rounded("gptaq", 2, 32)),
    "INT2 g64": ("bits", rounded("gptaq", 2, 64)),
    "INT2 g128": ("bits", rounded("gptaq", 2, 128)),
    "GQSA W4S50 g16": ("sparse", rounded("gqsa", 4, 16, sparsity=0.5)),
    "rank80 + INT4": ("rank", factors("reduced_rank", 4, global_keep=0.8)),
    "rank60 + INT4": ("rank", factors("reduced_rank", 4, global_keep=0.6)),
    "W4 g128 + 0.15 bits": ("residual", factors("residual", 4, global_lr_bits=0.15)),
    "W3 g128 + 0.2 bits": ("residual", factors("residual", 3, global_lr_bits=0.2)),
    "W3 g128 + 0.15 bits": ("residual", factors("residual", 3, global_lr_bits=0.15)),
    "W2 g128 + 0.4 bits": ("residual", factors("residual", 2, global_lr_bits=0.4, factor_bits=3)),
    "W3 g128 + 0.2 bits, of each layer": ("residual", factors("residual", 3, lr_bits=0.2)),
    "W2 g128 + 0.4 bits, of each layer": ("residual", factors("residual", 2, lr_bits=0.4, factor_bits=3)),
}
"""Row -> fold, step. `of each layer`: the same bits for all instead of a shared budget."""

MATCHED = (
    ("W4 g128 + 0.15 bits", "INT4 g64"),
    ("W3 g128 + 0.15 bits", "INT3 g64"),
    ("rank80 + INT4", "INT3 g64"),
    ("rank80 + INT4", "W3 g128 + 0.2 bits"),
    ("rank80 + INT4", "INT3 g128"),
    ("GQSA W4S50 g16", "INT3 g128"),
    ("W2 g128 + 0.4 bits", "INT2 g32"),
    ("W2 g128 + 0.4 bits", "INT2 g64"),
    ("rank60 + INT4", "INT2 g32"),
    ("rank60 + INT4", "W2 g128 + 0.4 bits"),
)
"""Rows of about as many bits that are compared."""


def step_of(name: str, keep: float) -> dict[str, Any]:
    """The recipe's step of a row of METHODS."""
    entry = METHODS[name]
    share = {"global_keep" if entry.get("shared") else "keep": keep}
    return {"method": entry["method"], "options": {**entry.get("options", {}), **share}}


def methods_table(dense: dict[str, Any], cells: dict[str, dict[str, dict[str, Any]]]) -> str:
    """One row a share and method."""
    rows = []
    for share, found in cells.items():
        for name, entry in found.items():
            against = "" if name == "SVD-LLM" or "SVD-LLM" not in found else rise(entry, found["SVD-LLM"])
            bits, error = f"{entry['bits_per_weight']:.2f}", f"{entry['mean_error']:.4f}"
            rows.append([share, name, bits, error, f"{entry['perplexity']:.3f}", rise(entry, dense), against])
    head = ["kept", "method", "bits per weight", "mean error of layers", "perplexity", "rise in loss, nats"]
    return markdown([*head, "vs SVD-LLM"], rows)


def sizes_table(dense: dict[str, Any], cells: dict[str, dict[str, Any]]) -> str:
    """One row a recipe, the largest first."""
    ordered = sorted(cells.items(), key=lambda item: -item[1]["bits_per_weight"])
    rows = [[n, f"{e['bits_per_weight']:.3f}", f"{e['perplexity']:.3f}", rise(e, dense)] for n, e in ordered]
    return markdown(["", "bits per weight", "perplexity", "rise in loss, nats"], rows)


def matched_table(cells: dict[str, dict[str, Any]]) -> str:
    """Pairs of rows of like size, the first against the second, and which is better by two standard errors."""
    from trifold.eval import paired_difference

    rows = []
    for ours, theirs in MATCHED:
        if ours in cells and theirs in cells:
            a, b = cells[ours], cells[theirs]
            bits = f"{a['bits_per_weight']:.3f} : {b['bits_per_weight']:.3f}"
            difference, error = paired_difference(a["window_losses"], b["window_losses"])
            better = "neither" if abs(difference) < 2 * error else ours if difference < 0 else theirs
            rows.append([ours, theirs, bits, rise(a, b), better])
    return markdown(["", "against", "bits per weight", "difference in loss, nats", "better"], rows)


def draw(dense: dict[str, Any], cells: dict[str, dict[str, Any]], path: Path) -> None:
    """Rise in loss against bits, one colour a fold."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from trifold.demo.plot import FAINT, INK, PALETTE
    from trifold.eval import paired_difference

    figure = Figure(figsize=(7.5, 4.8), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, fold in enumerate(dict.fromkeys(fold for fold, _ in SIZES.values())):
        chosen = (name for name in cells if SIZES[name][0] == fold and "," not in name)
        names = sorted(chosen, key=lambda name: cells[name]["bits_per_weight"])
        x = [cells[name]["bits_per_weight"] for name in names]
        found = [paired_difference(cells[name]["window_losses"], dense["window_losses"]) for name in names]
        y, errors = [a for a, _ in found], [b for _, b in found]
        axes.errorbar(x, y, errors, marker="o", linewidth=1.5, capsize=2, color=PALETTE[number], label=fold)
        for name, at in zip(names, zip(x, y, strict=True), strict=True):
            axes.annotate(name, at, (5, 5), textcoords="offset points", color=PALETTE[number], fontsize=7.5)
    axes.set_yscale("log")
    axes.set_xlabel("bits per weight, all that is stored", color=INK)
    axes.set_ylabel("rise in loss, nats per token (log)", color=INK)
    axes.grid(color=FAINT, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, labelcolor=INK)
    figure.savefig(path, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_arguments(parser)
    parser.add_argument("--max-windows", type=int, default=200)
    parser.add_argument("--go-on", action="store_true", help="Keep the cells that the results already have.")
    parser.add_argument("--name", default="lowrank", help="Name of the files in benchmarks/results.")
    args = parser.parse_args()
    before = json.loads((RESULTS / f"{args.name}.json").read_text()) if args.go_on else {}
    dense = before.get("dense") or score_of(args.model, args)
    print(f"dense: loss {dense['loss']:.4f}", flush=True)
    kept: dict[str, dict[str, dict[str, Any]]] = before.get("kept", {})
    sizes: dict[str, dict[str, Any]] = before.get("sizes", {})

    def write() -> None:
        shown = {f"{share:.0%}": {n: kept[f"{share:.0%}"][n] for n in METHODS if n in kept[f"{share:.0%}"]}
                 for share in KEEP if f"{share:.0%}" in kept}  # fmt: skip
        protocol = f"{args.nsamples} x {args.seqlen} tokens of calibration, {args.max_windows} windows scored"
        where = ", ".join(f"{k} {v}" for k, v in machine().items())
        where += "; with cells of an earlier run" * bool(before)
        text = f"{Path(args.model).name}: {protocol}; dense perplexity {dense['perplexity']:.3f}.\n\n"
        text += f"Factors in 16 bits:\n\n{methods_table(dense, shown)}\n"
        text += f"Folds at several sizes:\n\n{sizes_table(dense, sizes)}\n"
        text += f"Of about the same size:\n\n{matched_table(sizes)}\n![loss against bits]({args.name}.png)\n\n{where}\n"
        data = {"machine": machine(), "model": Path(args.model).name, "dense": dense, "kept": kept, "sizes": sizes}
        save(args.name, data, text)

    for share in KEEP:
        row = kept.setdefault(f"{share:.0%}", {})
        for name in METHODS:
            if name not in row:
                row[name] = cell(
                    args, f"{name} {share:.0%}", [step_of(name, share)], METHODS[name].get("dtype", "float32")
                )
                write()
    for name, (_, step) in SIZES.items():
        if name not in sizes:
            sizes[name] = cell(args, name, [step])
            write()
    write()
    draw(dense, sizes, RESULTS / f"{args.name}.png")


if __name__ == "__main__":
    main()
