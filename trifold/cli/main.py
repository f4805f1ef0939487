"""The command group, and how errors become exit codes."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Callable
from typing import Any

import click

from trifold.cli.bench import bench
from trifold.cli.build_kernels import build_kernels
from trifold.cli.compress import compress
from trifold.cli.demo import demo
from trifold.cli.eval import evaluate
from trifold.cli.export import export
from trifold.cli.generate import generate
from trifold.cli.inspect import inspect
from trifold.cli.plan import plan
from trifold.cli.recipes import recipes
from trifold.core.errors import InputError, ResourceError, TrifoldError
from trifold.core.version import VERSION

INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(VERSION, prog_name="trifold")
def cli() -> None:
    """Fold a language model three ways: fewer bits, fewer weights, lower rank."""


for command in (compress, demo, evaluate, inspect, export, generate, plan, recipes, bench, build_kernels):
    cli.add_command(command)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 wrong input, 3 failed proof, 4 environment, 130 Ctrl-C."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.captureWarnings(True)
    sys.exit(_run(cli.main, sys.argv[1:] if arguments is None else arguments))


def _run(entry: Callable[..., Any], arguments: list[str]) -> int:
    try:
        entry(args=arguments, prog_name="trifold", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return InputError.exit_code
    except click.ClickException as error:
        return _fail(InputError(f"{error.format_message()} (see trifold --help)"))
    except (click.Abort, KeyboardInterrupt):
        if not _speaks():
            return INTERRUPTED
        click.echo(f"\ninterrupted; to go on, repeat: {shlex.join(['trifold', *arguments])}", err=True)
        return INTERRUPTED
    except TrifoldError as error:
        return _fail(error)
    except OSError as error:
        return _fail(ResourceError(f"{error.filename or 'system'}: {error.strerror or error}"))
    return 0


def _fail(error: TrifoldError) -> int:
    if not _speaks():
        return error.exit_code
    click.echo(f"error: {' '.join(str(error).split())}", err=True)
    return error.exit_code


def _speaks() -> bool:
    """Of several processes the first that fails speaks for all."""
    if "WORLD_SIZE" not in os.environ:
        return True
    from trifold.compress.processes import speaks

    return speaks()
