"""`trifold build-kernels`."""

from __future__ import annotations

from typing import Any

import click
from rich.table import Table

from trifold.cli.output import emit, json_option


@click.command("build-kernels")
@click.option(
    "--bits", type=click.IntRange(1, 8), multiple=True, help="Width of codes.  [default: 1 to 8, and bfloat16]"
)
@click.option("--all", "every", is_flag=True, help="For every instruction set of this processor, not the best alone.")
@json_option
def build_kernels(bits: tuple[int, ...], every: bool, json_to: str | None) -> None:
    """Compile the CPU kernels now instead of when a model first needs them."""
    from trifold.core.errors import ResourceError
    from trifold.core.native import cache_folder
    from trifold.kernels.native import VARIANTS, WIDTHS, Library, load, stages

    data: dict[str, Any] = {"cache": str(cache_folder()), "variants": {}}
    table = Table("instruction set", "built", title=f"kernels in {cache_folder()}", title_justify="left")
    built = False
    for name in VARIANTS:
        if built and not every:
            break
        results = {width: load(name, width) for width in bits or WIDTHS}
        failed = [result for result in results.values() if not isinstance(result, Library)]
        widths = [width for width, result in results.items() if isinstance(result, Library)]
        built = built or not failed
        if not bits and stages.lacking(name) is None:
            widths.append(16)
        data["variants"][name] = {"bits": widths, "reason": failed[0] if failed else None}
        table.add_row(name, str(failed[0]) if failed else ", ".join(f"{width} bits" for width in widths))
    emit(data, json_to, None if json_to == "-" else table)
    if not built:
        raise ResourceError("no kernel could be compiled; models run all the same, slower; install a C compiler")
