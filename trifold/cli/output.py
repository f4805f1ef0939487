"""Options and output that the commands share."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console, RenderableType
from rich.table import Table

from trifold.core.errors import InputError

PLAIN_WIDTH = 200  # of tables that go to a file or a pipe


def _writable(_context: click.Context, _option: click.Parameter, value: str | None) -> str | None:
    """Refuse before any work what could not be written after it."""
    if value and value != "-":
        path = Path(value)
        parent = path.absolute().parent
        if path.is_dir() or not parent.is_dir() or not os.access(path if path.exists() else parent, os.W_OK):
            raise InputError(f"--json {value}: cannot be written; give a file in an existing folder, or '-'")
    return value


json_option = click.option(
    "--json",
    "json_to",
    metavar="FILE|-",
    callback=_writable,
    help="Write the result as JSON to a file, or to stdout with '-'.",
)
verbosity_options = [
    click.option("-v", "--verbose", is_flag=True, help="One line per layer."),
    click.option("-q", "--quiet", is_flag=True, help="Errors only."),
]


def with_verbosity(command: Any) -> Any:
    """Decorator: -v and -q."""
    for option in reversed(verbosity_options):
        command = option(command)
    return command


def level(verbose: bool, quiet: bool) -> int:
    """The reporter's level."""
    return -1 if quiet else int(verbose)


def calm(quiet: bool) -> None:
    """No progress bars of transformers where nobody looks at them."""
    if quiet or not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()


def emit(data: dict[str, Any], json_to: str | None, table: RenderableType | None) -> None:
    """Print the table, and write the JSON where it is wanted; '-' replaces the table."""
    if json_to:
        text = json.dumps(data, indent=2, sort_keys=True) + "\n"
        if json_to == "-":
            click.echo(text, nl=False)
            return
        Path(json_to).write_text(text)
    if table is not None:
        width = None if sys.stdout.isatty() else PLAIN_WIDTH
        Console(highlight=False, markup=False, width=width).print(table)


def size(count: float) -> str:
    """Bytes for people, in powers of ten as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def facts(title: str, rows: dict[str, Any]) -> Table:
    """A two-column table."""
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table
