"""Prefill and decoding by batch size: speed, time to the first token, memory."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trifold.compress.text import clamp_seqlen
from trifold.core.errors import InputError
from trifold.eval.forward import device_of, evaluating
from trifold.eval.speed import timed_decode

_WARMUP = 2  # decoded tokens before the clock starts: runtime layouts, allocator, caches
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Speed:
    """Of one batch size. Tokens per second count those of all sequences; bytes are None where the system does not
    tell. peak_bytes: of the process on the CPU, of torch's allocations on CUDA, while this batch ran."""

    batch_size: int
    prefill_tokens_per_s: float
    time_to_first_token_s: float
    decode_tokens_per_s: float
    peak_bytes: int | None


def bench(
    model: nn.Module,
    batch_sizes: Sequence[int] = (1, 4, 16),
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    repeats: int = 2,
    seed: int = 0,
) -> list[Speed]:
    """Greedy decoding of random prompts, with the KV cache; of `repeats` runs the fastest of each phase counts.

    Raises InputError for sizes below 1, for a prompt and answer that exceed the model's context, and for a model
    without a KV cache.
    """
    if min(*batch_sizes, prompt_tokens, new_tokens, repeats) < 1:
        raise InputError("batch sizes, prompt tokens, new tokens and repeats have to be 1 or more")
    config: Any = model.config
    context, _ = clamp_seqlen(prompt_tokens + new_tokens, config)
    if context < prompt_tokens + new_tokens:
        raise InputError(f"{prompt_tokens} prompt and {new_tokens} new tokens exceed the context of {context} tokens")
    generator, device = torch.Generator().manual_seed(seed), device_of(model)
    vocab_size = config.get_text_config().vocab_size
    found = []
    with evaluating(model), torch.no_grad():
        for size in batch_sizes:
            prompt = torch.randint(vocab_size, (size, prompt_tokens), generator=generator).to(device)
            timed_decode(model, prompt, min(_WARMUP, new_tokens))
            gc.collect()
            _forget_peak(device)
            runs = [timed_decode(model, prompt, new_tokens) for _ in range(repeats)]
            first, rest = (min(seconds) for seconds in zip(*runs, strict=True))
            found.append(Speed(size, size * prompt_tokens / first, first, size * new_tokens / rest, _peak(device)))
    return found


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)


def plot_speeds(speeds: Mapping[str, Sequence[Speed]], file: Path) -> None:
    """Bars of prefill and decoding by batch size, one colour for each model, as an image of the file's type.

    Raises InputError if matplotlib is missing or cannot write such a file.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("a plot needs matplotlib; pip install matplotlib") from error
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    panels = figure.subplots(1, 2)
    facts = (("prefill", "prefill_tokens_per_s"), ("decoding", "decode_tokens_per_s"))
    width = 0.8 / len(speeds)
    for panel, (title, field) in zip(panels, facts, strict=True):
        for i, (name, rows) in enumerate(speeds.items()):
            places = [place + (i - (len(speeds) - 1) / 2) * width for place in range(len(rows))]
            bars = panel.bar(places, [getattr(row, field) for row in rows], width, label=name)
            panel.bar_label(bars, fmt="{:.0f}", fontsize=8)
        sizes = [row.batch_size for row in next(iter(speeds.values()))]
        panel.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        panel.set(title=title, xlabel="batch size", ylabel="tokens/s")
    panels[0].legend()
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: the plot cannot be written ({error})") from error
