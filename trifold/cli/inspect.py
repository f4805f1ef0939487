"""`trifold inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Column, Table

from trifold.cli.output import emit, json_option, size

if TYPE_CHECKING:
    from trifold.kernels import Choice


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--kernels", is_flag=True, help="Show which kernel runs each layer here, and why none that is faster.")
@click.option("--device", default="cpu", show_default=True, help="With --kernels: where the model is to run.")
@click.option("--trust-remote-code", is_flag=True, help="With --kernels: run code that comes with the model.")
@json_option
def inspect(checkpoint: Path, kernels: bool, device: str, trust_remote_code: bool, json_to: str | None) -> None:
    """Show each layer of a compressed checkpoint: format, shape, bits, bytes, error; and totals.

    CHECKPOINT is a folder or hub id, of Trifold, compressed-tensors, GPTQ or AWQ.
    """
    from trifold.compress.files import model_folder
    from trifold.compress.summary import summarise

    folder = model_folder(checkpoint)
    summary = summarise(folder)
    if not kernels:
        emit(summary, json_to, None if json_to == "-" else _table(checkpoint, summary))
        return
    from trifold.compress.files import usable_device
    from trifold.compress.integration.choices import kernel_choices

    choices = kernel_choices(folder, usable_device(device), trust_remote_code=trust_remote_code)
    data = {name: _as_json(choice) for name, choice in choices.items()}
    emit({"device": device, "kernels": data}, json_to, None if json_to == "-" else _kernel_table(summary, choices))


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
            "-" if layer["bits_per_weight"] is None else f"{layer['bits_per_weight']:.3f}",
            size(layer["bytes"]),
            "-" if layer["error"] is None else f"{layer['error']:.2e}",
        )
    return table


def _as_json(choice: Choice) -> dict[str, Any]:
    found: dict[str, Any] = {"kernel": choice.op, "rejected": choice.rejected}
    return found | ({"parts": [_as_json(part) for part in choice.parts]} if choice.parts else {})


def _kernel_table(summary: dict[str, Any], choices: dict[str, Choice]) -> Table:
    """One row for each layer; the reasons once, below, since most layers share them."""
    table = Table(Column("layer", overflow="fold"), "format", "kernel", title_justify="left", caption_justify="left")
    reasons: dict[str, dict[str, None]] = {}
    for name, choice in choices.items():
        described = summary["layers"].get(name, {}).get("describe", "tied")
        table.add_row(name, described, ", ".join(dict.fromkeys(_names(choice))))
        for leaf in _leaves(choice):
            for rejected, reason in leaf.rejected.items():
                reasons.setdefault(f"not {rejected}: {reason}", {}).setdefault(leaf.op)
    lines = [f"{reason} (hence {', '.join(chosen)})" for reason, chosen in reasons.items()]
    table.caption = "\n".join(lines) or None
    return table


def _leaves(choice: Choice) -> list[Choice]:
    return [leaf for part in choice.parts for leaf in _leaves(part)] if choice.parts else [choice]


def _names(choice: Choice) -> list[str]:
    return [leaf.op for leaf in _leaves(choice)]
