"""`trifold plan`."""

from __future__ import annotations

from typing import Any

import click

from trifold.cli.output import emit, json_option, size


@click.command()
@click.argument("model")
@click.option("-r", "--recipe", required=True, help="Preset name (see `trifold recipes`) or YAML file.")
@click.option(
    "--dtype", default="auto", show_default=True, type=click.Choice(["auto", "float32", "bfloat16", "float16"])
)
@click.option("--set", "settings", multiple=True, metavar="[STEP.]K=V", help="Change a recipe's setting.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@json_option
def plan(
    model: str, recipe: str, dtype: str, settings: tuple[str, ...], trust_remote_code: bool, json_to: str | None
) -> None:
    """What a recipe would make of MODEL: sizes by component, from its config alone.

    MODEL is a folder, a hub id or a config.json. No weights are read.
    """
    from trifold.compress.estimate import estimate_model
    from trifold.compress.recipe import Recipe

    found = estimate_model(model, Recipe.load(recipe).updated(list(settings)), dtype, trust_remote_code).to_dict()
    emit(found, json_to, _table(model, recipe, found))
    for notice in found["notices"]:
        click.echo(notice, err=True)


def _table(model: str, recipe: str, found: dict[str, Any]) -> Any:
    from rich.table import Column, Table

    figures = ("parameters", "dense", "packed", "bits each")
    table = Table("part", *(Column(name, justify="right") for name in figures), show_footer=True)
    table.title, table.title_justify = f"{model}, {recipe}: {found['blocks']} blocks, {found['layers']} layers", "left"
    for name, part in found["components"].items():
        table.add_row(name, *_cells(part["parameters"], part["dense_bytes"], part["bytes"]))
    totals = ("all", *_cells(found["parameters"], found["dense_bytes"], found["total_bytes"]))
    for column, text in zip(table.columns, totals, strict=True):
        column.footer = text
    table.caption = f"compressed layers: {found['bits_per_weight']:.3f} bits per weight"
    table.caption_justify = "left"
    return table


def _cells(parameters: int, dense: int, packed: int) -> tuple[str, ...]:
    return f"{parameters:,}", size(dense), size(packed), f"{8 * packed / max(parameters, 1):.2f}"
