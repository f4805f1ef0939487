"""`trifold demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from trifold.cli.output import calm, emit, json_option, level, size, with_verbosity


@click.command()
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("trifold-demo"),
    show_default=True,
    help="Folder for the models, demo.json and demo.png; an earlier demo in it is replaced.",
)
@click.option("--recipes", metavar="A,B,...", help="Presets to compare.  [default: 8 to 2 bits; RTN, GPTQ, AWQ + GPTQ]")
@json_option
@with_verbosity
def demo(output: Path, recipes: str | None, json_to: str | None, verbose: bool, quiet: bool) -> None:
    """Compress the model that comes with Trifold in several ways; compare size, quality and speed.

    Needs no network and about a minute on two cores.
    """
    from trifold.compress.progress import Reporter
    from trifold.demo.run import PICTURE, RECIPES
    from trifold.demo.run import demo as compare

    calm(quiet)
    names = RECIPES if recipes is None else [name.strip() for name in recipes.split(",") if name.strip()]
    result = compare(output, names, Reporter(level(verbose, quiet)))
    emit(result, json_to, None if quiet else _table(result))
    if not quiet and json_to != "-":
        click.echo(f"picture: {output / PICTURE}")


def _table(result: dict[str, Any]) -> Any:
    from rich.table import Column, Table

    figures = ("bits/weight", "on disk", "perplexity", "KL", "tasks", "tokens/s", "compressed in")
    columns: list[Column | str] = ["recipe", *(Column(name, justify="right") for name in figures)]
    title = (
        f"No model can have a perplexity below {result['floor']:.3f} on this text; "
        f"guessing answers {100 * result['chance']:.1f} % of the tasks"
    )
    table = Table(*columns, title=title, title_justify="left")
    for row in result["rows"]:
        dense = row["recipe"] == "dense"
        table.add_row(
            row["recipe"],
            f"{row['bits_per_weight']:.2f}",
            size(row["bytes"]),
            _finite(row["perplexity"], 3),
            "-" if dense else _finite(row["kl"], 4),
            f"{100 * row['accuracy']:.1f} %",
            f"{row['tokens_per_s']:.0f}",
            "-" if dense else f"{row['seconds']:.1f} s",
        )
    return table


def _finite(value: float | None, digits: int) -> str:
    return "not finite" if value is None else f"{value:.{digits}f}"
