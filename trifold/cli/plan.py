"""`trifold plan`."""

from __future__ import annotations

from typing import Any

import click
from rich.console import Group
from rich.table import Column, Table

from trifold.cli.output import emit, facts, json_option, size


@click.command()
@click.argument("model")
@click.option("-r", "--recipe", required=True, help="Preset name (see `trifold recipes`) or YAML file.")
@click.option(
    "--dtype", default="auto", show_default=True, type=click.Choice(["auto", "float32", "bfloat16", "float16"])
)
@click.option("--set", "settings", multiple=True, metavar="[STEP.]K=V", help="Change a recipe's setting.")
@click.option("--nsamples", type=int, help="Calibration windows.  [default: the recipe's, 128]")
@click.option("--seqlen", type=int, help="Tokens of a window.  [default: the recipe's, 2048]")
@click.option("--batch-size", type=click.IntRange(min=1), help="Windows per forward pass.")
@click.option("--device", default="auto", show_default=True, help="Of the compression that is planned.")
@click.option("--stats-memory", metavar="SIZE", help="As for `compress`.")
@click.option("--offload-activations", is_flag=True, help="As for `compress`.")
@click.option("--measure", is_flag=True, help="Solve one layer of random weights, and tell the time of all from it.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@json_option
def plan(
    model: str,
    recipe: str,
    dtype: str,
    settings: tuple[str, ...],
    nsamples: int | None,
    seqlen: int | None,
    measure: bool,
    trust_remote_code: bool,
    json_to: str | None,
    **rest: Any,
) -> None:
    """What a recipe would make of MODEL, and the memory, disk and time it takes, from its config alone.

    MODEL is a folder, a hub id or a config.json. No weights are read. Memory is that of the process above what its
    imports take.
    """
    from trifold.compress.estimate import estimate_model
    from trifold.compress.job import Options
    from trifold.compress.recipe import Recipe

    wanted = {"nsamples": nsamples, "seqlen": seqlen}
    chosen = Recipe.load(recipe).updated([*settings, *(f"{k}={v}" for k, v in wanted.items() if v is not None)])
    found = estimate_model(model, chosen, dtype, trust_remote_code, Options(**rest), measure).to_dict()
    emit(found, json_to, Group(_table(model, recipe, found), _needs(found)))
    for notice in found["notices"]:
        click.echo(notice, err=True)


def _needs(found: dict[str, Any]) -> Table:
    """Memory by stage, disk, and time if it was measured."""
    rows = {}
    for title, stages in (("memory", found["memory"]), ("device memory", found["device_memory"])):
        if stages:
            peak = max(stages, key=lambda name: stages[name])
            rows[title] = f"{size(stages[peak])} at its peak: " + ", ".join(f"{k} {size(v)}" for k, v in stages.items())
    rows["disk"] = ", ".join(f"{name} {size(count)}" for name, count in found["disk"].items())
    if found["seconds"]:
        rows["seconds"] = ", ".join(f"{name} {value:.3g}" for name, value in found["seconds"].items())
    return facts("needs", rows)


def _table(model: str, recipe: str, found: dict[str, Any]) -> Any:
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
