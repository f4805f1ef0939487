"""`trifold bench`."""

from __future__ import annotations

import dataclasses
import gc
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from trifold.cli.output import calm, emit, json_option, size

if TYPE_CHECKING:
    import torch

    from trifold.eval import Speed


@click.command()
@click.argument("model")
@click.option("--baseline", help="Another model, such as the dense one, measured in the same run.")
@click.option(
    "--batch-size",
    "batch_sizes",
    type=click.IntRange(min=1),
    multiple=True,
    default=(1, 4, 16),
    show_default=True,
    help="Sequences at once; can be given several times.",
)
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--new-tokens", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=2, show_default=True, help="Runs; the fastest counts.")
@click.option(
    "--dtype", default="auto", show_default=True, type=click.Choice(["auto", "float32", "bfloat16", "float16"])
)
@click.option("--device", default=None, help="Where to run.  [default: as transformers chooses]")
@click.option(
    "--plot", type=click.Path(dir_okay=False, path_type=Path), help="Image file for a plot; needs matplotlib."
)
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@json_option
def bench(
    model: str,
    baseline: str | None,
    batch_sizes: tuple[int, ...],
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    dtype: str,
    device: str | None,
    plot: Path | None,
    trust_remote_code: bool,
    json_to: str | None,
) -> None:
    """Measure MODEL: prefill and decoding speed, time to the first token and memory, by batch size."""
    import torch

    from trifold.api import load
    from trifold.compress.files import usable_device
    from trifold.eval import bench as measure
    from trifold.eval import plot_speeds

    calm(quiet=False)
    device_map = None if device is None else {"": usable_device(device)}
    trust: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    speeds: dict[str, list[Speed]] = {}
    loading: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(filter(None, (model, baseline))):
        start = time.perf_counter()
        loaded = load(name, dtype=dtype, device_map=device_map, **trust)
        seconds = time.perf_counter() - start
        speeds[name] = measure(loaded, batch_sizes, prompt_tokens, new_tokens, repeats)
        held = {_place(tensor): tensor.nbytes for tensor in (*loaded.parameters(), *loaded.buffers())}
        loading[name] = {"load_s": seconds, "weight_bytes": sum(held.values())}
        del loaded
        gc.collect()
    data = {
        "models": {n: {**loading[n], "speeds": [dataclasses.asdict(s) for s in rows]} for n, rows in speeds.items()},
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "threads": torch.get_num_threads(),
    }
    if plot is not None:
        plot_speeds(speeds, plot)
    emit(data, json_to, None if json_to == "-" else _table(speeds, loading))


def _table(speeds: dict[str, list[Speed]], loading: dict[str, dict[str, float]]) -> Table:
    """One row for each model and batch size; beside the figures of the first, how they compare to the second's."""
    columns = ("model", "weights", "batch", "prefill tokens/s", "first token", "decoding tokens/s", "peak memory")
    table = Table(*columns, title_justify="left")
    names = list(speeds)
    for name in names:
        for i, row in enumerate(speeds[name]):
            other = speeds[names[1]][i] if name == names[0] and len(names) > 1 else None
            table.add_row(
                name,
                size(loading[name]["weight_bytes"]),
                str(row.batch_size),
                _compared(row.prefill_tokens_per_s, None if other is None else other.prefill_tokens_per_s),
                f"{row.time_to_first_token_s * 1e3:.0f} ms",
                _compared(row.decode_tokens_per_s, None if other is None else other.decode_tokens_per_s),
                "-" if row.peak_bytes is None else size(row.peak_bytes),
            )
    return table


def _compared(value: float, other: float | None) -> str:
    return f"{value:.1f}" if other is None else f"{value:.1f} ({value / other:.2f}x)"


def _place(tensor: torch.Tensor) -> int:
    """What two names of one tensor have in common; those in an order of their kernel's own are never shared."""
    return -id(tensor) if tensor.is_mkldnn else tensor.data_ptr()
