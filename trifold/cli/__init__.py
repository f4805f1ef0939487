"""The command line: thin commands over the public API. Tables for people, `--json` for programs."""

from trifold.cli.main import main

__all__ = ["main"]
