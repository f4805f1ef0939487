"""What each recipe does to a model: loss on held-out text against bits per weight, with paired errors.

    python benchmarks/quality.py [--model DIR --calib FILE --eval FILE] [--bits 4,3,2] [--groups 64,128]

Every cell is a checkpoint written by `trifold.compress`, loaded again and scored on the same windows, which
calibration never saw. `±` is the standard error of the paired difference to the dense model over windows;
`vs RTN` is the paired difference to rounding to nearest, the simplest baseline, at the same bits per weight.
With `--peer` the losses of a JSON folder written by benchmarks/peers/llmcompressor.py stand beside ours.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from common import add_text_arguments, machine, markdown, save

METHODS = ["rtn", "awq", "gptq", "awq-gptq", "gptaq", "awq-gptaq"]


def cell(args: argparse.Namespace, method: str, bits: int, group: int) -> dict[str, Any]:
    """Compress, load, score."""
    import trifold

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        report = trifold.compress(
            args.model,
            f"w{bits}a16-{method}",
            args.calib,
            out,
            nsamples=args.nsamples,
            seqlen=args.seqlen,
            dtype="float32",
            settings=[f"group_size={group}"],
            verbosity=-1,
        )
        score = score_of(out, args)
    kept = ("bits_per_weight", "model_bits_per_weight", "mean_error", "seconds")
    return {"method": method, "bits": bits, "group": group, **score, **{k: report[k] for k in kept}}


def score_of(model: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Loss, perplexity and the losses of the windows, in float32."""
    import trifold

    report = trifold.evaluate(
        str(model),
        args.eval,
        seqlen=args.seqlen,
        max_windows=args.max_windows,
        dtype="float32",
        batch_size=20,
        speed=False,
    )
    return {"loss": report.loss, "perplexity": report.perplexity, "window_losses": list(report.window_losses)}


def table(dense: dict[str, Any], cells: list[dict[str, Any]], peers: dict[tuple[str, int, int], list[float]]) -> str:
    """Markdown, one row a cell."""
    from trifold.eval import paired_difference

    rows = [["dense", "", "16 or 32", f"{dense['perplexity']:.3f}", "", "", "", ""]]
    baseline = {(c["bits"], c["group"]): c["window_losses"] for c in cells if c["method"] == "rtn"}
    for c in cells:
        losses = c["window_losses"]
        rise, error = paired_difference(losses, dense["window_losses"])
        gain, gain_error = paired_difference(losses, baseline[c["bits"], c["group"]])
        peer = peers.get((c["method"], c["bits"], c["group"]))
        beside, against = "", ""
        if peer:
            beside = f"{paired_difference(peer, dense['window_losses'])[0]:.4f}"
            difference, spread = paired_difference(losses, peer)
            against = f"{difference:+.4f} ± {spread:.4f}"
        rows.append(
            [
                f"W{c['bits']} g{c['group']}",
                c["method"],
                f"{c['bits_per_weight']:.3f}",
                f"{c['perplexity']:.3f}",
                f"{rise:.4f} ± {error:.4f}",
                "" if c["method"] == "rtn" else f"{gain:+.4f} ± {gain_error:.4f}",
                beside,
                against,
            ]
        )
    head = ["", "method", "bits per weight", "perplexity", "rise in loss, nats", "vs RTN"]
    head += ["llm-compressor's rise", "ours minus theirs"]
    width = len(head) if peers else len(head) - 2
    return markdown(head[:width], [row[:width] for row in rows])


def peer_losses(folder: str | None) -> dict[tuple[str, int, int], list[float]]:
    """Window losses of the peer, by method, bits and group."""
    found = {}
    for file in sorted(Path(folder).glob("*.json")) if folder else ():
        entry = json.loads(file.read_text())
        found.setdefault((entry["method"], entry["bits"], entry["group_size"]), entry["window_losses"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_arguments(parser)
    parser.add_argument("--max-windows", type=int, default=200)
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--groups", default="64,128")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--peer", help="Folder of the peer's results.")
    parser.add_argument("--name", default="quality", help="Name of the files in benchmarks/results.")
    args = parser.parse_args()
    dense, cells = score_of(args.model, args), []
    print(f"dense: loss {dense['loss']:.4f}", flush=True)
    for bits in map(int, args.bits.split(",")):
        for group in map(int, args.groups.split(",")):
            for method in args.methods.split(","):
                cells.append(cell(args, method, bits, group))
                rise = cells[-1]["loss"] - dense["loss"]
                print(f"W{bits} g{group} {method}: rise {rise:.4f}, {cells[-1]['seconds']:.1f} s", flush=True)
    text = table(dense, cells, peer_losses(args.peer))
    print(text)
    protocol = (
        f"{args.nsamples} x {args.seqlen} tokens of calibration, {args.max_windows} windows of {args.seqlen} scored"
    )
    where = ", ".join(f"{k} {v}" for k, v in machine().items())
    data = {"machine": machine(), "model": Path(args.model).name, "dense": dense, "cells": cells}
    save(args.name, data, f"{Path(args.model).name}: {protocol}.\n\n{text}\n{where}\n")


if __name__ == "__main__":
    main()
