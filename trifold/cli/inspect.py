"""`trifold inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.table import Column, Table

from trifold.cli.output import emit, json_option, size


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@json_option
def inspect(checkpoint: Path, json_to: str | None) -> None:
    """Show each layer of a compressed checkpoint: format, shape, bits, bytes, error; and totals."""
    from trifold.compress.summary import summarise

    summary = summarise(checkpoint)
    emit(summary, json_to, None if json_to == "-" else _table(checkpoint, summary))


def _table(checkpoint: Path, summary: dict[str, Any]) -> Table:
    title = (
        f"{checkpoint}: {summary['bits_per_weight']:.3f} bits per compressed weight, "
        f"{summary['model_bits_per_weight']:.3f} over the whole model; "
        f"{size(summary['total_bytes'])} (dense: {size(summary['dense_bytes'])})"
    )
    columns = (Column("layer", overflow="fold"), "format", "shape", "bits/weight", "bytes", "error")
    table = Table(*columns, title=title, title_justify="left")
    for name, layer in summary["layers"].items():
        table.add_row(
            name,
            layer["describe"],
            "x".join(map(str, layer["shape"])),
            f"{layer['bits_per_weight']:.3f}",
            size(layer["bytes"]),
            "-" if layer["error"] is None else f"{layer['error']:.2e}",
        )
    return table
