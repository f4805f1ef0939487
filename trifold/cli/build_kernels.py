"""`trifold build-kernels`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
    """Compile the CPU kernels now instead of when a model first needs them: dense, grouped and bitmap sparse."""
    from trifold.core.errors import ResourceError
    from trifold.core.native import cache_folder
    from trifold.kernels import native
    from trifold.kernels.native import stages
    from trifold.kernels.sparse import library as sparse
    from trifold.kernels.sparse.bitmap import CompiledBitmap
    from trifold.kernels.sparse.groups import CompiledGroups

    widths = bits or tuple(native.WIDTHS)
    dense = _build(native.VARIANTS, widths, every, native.load)
    for name, entry in dense.items():
        if stages.lacking(name) is None and not bits:
            entry["bits"].append(16)
    groups = _build(sparse.VARIANTS, widths, every, lambda name, width: sparse.load(CompiledGroups.source, name, width))
    numbers = (4, 16) if 4 in widths else (16,)  # integers; bfloat16
    bitmaps = _build(
        sparse.VARIANTS, numbers, every, lambda name, width: sparse.load(CompiledBitmap.source, name, width)
    )
    data = {"cache": str(cache_folder()), "variants": dense, "sparse": {"groups": groups, "bitmap": bitmaps}}
    table = Table("kernel", "instruction set", "built", title=f"kernels in {cache_folder()}", title_justify="left")
    for kind, results in (("dense", dense), ("sparse groups", groups), ("bitmap", bitmaps)):
        for name, found in results.items():
            built = ", ".join(f"{width} bits" for width in found["bits"])
            table.add_row(kind, name, found["reason"] or built)
    emit(data, json_to, None if json_to == "-" else table)
    if not any(found["reason"] is None for results in (dense, groups, bitmaps) for found in results.values()):
        raise ResourceError("no kernel could be compiled; models run all the same, slower; install a C compiler")


def _build(
    variants: Iterable[str], widths: Iterable[int], every: bool, load: Callable[[str, int], object]
) -> dict[str, dict[str, Any]]:
    """By instruction set, from the fastest on, until one is built whole: the widths that were, and why others were
    not."""
    found: dict[str, dict[str, Any]] = {}
    for name in variants:
        results = {width: load(name, width) for width in widths}
        reasons = [result for result in results.values() if isinstance(result, str)]
        done = [width for width, result in results.items() if not isinstance(result, str)]
        found[name] = {"bits": done, "reason": reasons[0] if reasons else None}
        if not reasons and not every:
            break
    return found
