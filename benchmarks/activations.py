"""What rounding activations does to a model, as it is and with outlier channels put in.

    python benchmarks/activations.py [--model DIR --calib FILE --eval FILE] [--factors 1,30,100] [--channels 4]

A factor f multiplies the weights of every norm that feeds linears by f on a few channels, and divides the columns
that read them: the same function, with activations as large models have them. Every cell is a checkpoint written by
`trifold.compress`, loaded again and scored on the same windows, which calibration never saw.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import add_text_arguments, machine, markdown, save
from quality import score_of

RECIPES = [
    "w8a8",
    "w8a8-static",
    "w8a8-smoothquant",
    "w8a8-smoothquant-static",
    "w8a8-llmint8",
    "w8a8-fp8",
    "w8a8-fp8-static",
]


def with_outliers(model: str, factor: float, count: int, folder: Path) -> None:
    """Write the model with `count` channels of each norm larger by `factor`, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trifold.core.families import topology_of
    from trifold.core.topology import find_blocks

    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    width = dense.config.hidden_size
    channels = torch.arange(count) * (width // count) + width // (2 * count)
    folds = [fold for fold in topology_of(dense.config).folds if fold.kind == "norm"]
    for block in dense.get_submodule(find_blocks(dense)):
        for fold in folds:
            block.get_submodule(fold.producer).weight.data[channels] *= factor
            for name in fold.consumers:
                block.get_submodule(name).weight.data[:, channels] /= factor
    dense.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)


def cell(args: argparse.Namespace, model: Path, recipe: str) -> dict[str, Any]:
    """Compress, load, score."""
    import trifold

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        sizes = {"nsamples": args.nsamples, "seqlen": args.seqlen}
        report = trifold.compress(str(model), recipe, args.calib, out, dtype="float32", verbosity=-1, **sizes)
        return {"bits_per_weight": report["bits_per_weight"], **score_of(out, args)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_arguments(parser)
    parser.add_argument("--max-windows", type=int, default=200)
    parser.add_argument("--factors", default="1,30,100")
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--recipes", default=",".join(RECIPES))
    args = parser.parse_args()
    factors, cells = [float(f) for f in args.factors.split(",")], {}
    dense = score_of(args.model, args)
    for factor in factors:
        with tempfile.TemporaryDirectory() as folder:
            with_outliers(args.model, factor, args.channels, Path(folder))
            for recipe in args.recipes.split(","):
                found = cells[recipe, factor] = cell(args, Path(folder), recipe)
                rise = 100 * (found["perplexity"] / dense["perplexity"] - 1)
                print(f"x {factor:g}: {recipe} {found['perplexity']:.3f} ({rise:+.2f} %)", flush=True)
    rows = []
    for recipe in args.recipes.split(","):
        scores = [cells[recipe, factor]["perplexity"] for factor in factors]
        rises = [f"{score:.3f} ({100 * (score / dense['perplexity'] - 1):+.2f} %)" for score in scores]
        rows.append([recipe, f"{cells[recipe, factors[0]]['bits_per_weight']:.2f}", *rises])
    text = markdown(["", "bits per weight", *(f"outliers x {factor:g}" for factor in factors)], rows)
    protocol = (
        f"{args.nsamples} x {args.seqlen} tokens of calibration, {args.max_windows} windows of {args.seqlen} scored; "
        f"{args.channels} channels of each norm; dense perplexity {dense['perplexity']:.3f}"
    )
    where = ", ".join(f"{k} {v}" for k, v in machine().items())
    flat = [{"recipe": recipe, "factor": factor, **found} for (recipe, factor), found in cells.items()]
    data = {"machine": machine(), "model": Path(args.model).name, "dense": dense, "cells": flat}
    save("activations", data, f"{Path(args.model).name}: {protocol}.\n\n{text}\n{where}\n")


if __name__ == "__main__":
    main()
