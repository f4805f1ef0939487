"""Progress of long work: one live line on a terminal, plain lines elsewhere. Always on stderr."""

from __future__ import annotations

import time
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from trifold.compress.memory import current_bytes, resident_bytes


class Reporter:
    """What the pipeline tells while it works. level: -1 quiet, 0 normal, 1 every layer."""

    def __init__(self, level: int = 0, console: Console | None = None) -> None:
        self.level = level
        self.console = console or Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        self._started = 0.0
        self._total = 0
        self._pace = ""

    def notice(self, message: str) -> None:
        """Something the user should know, once."""
        if self.level >= 0:
            self.console.print(message, markup=False, soft_wrap=True)

    def detail(self, message: str) -> None:
        """Something for those who ask for more."""
        if self.level >= 1:
            self.notice(message)

    def begin(self, blocks: int, done: int) -> None:
        """The walk over the blocks starts, with `done` of them finished earlier."""
        self._started, self._total = time.perf_counter(), blocks - done
        if self.level >= 0 and self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("block {task.completed}/{task.total}"),
                TextColumn("{task.fields[facts]}"),
            )
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task("compressing", total=blocks, completed=done, facts=_memory())

    def layer(self, name: str, entry: dict[str, Any]) -> None:
        """A layer is solved."""
        line = f"{name}  error {entry['error']:.3e}  {entry['bits_per_weight']:.3f} bits"
        if self._bar is not None:
            facts = f"loss {entry['error']:.2e}  {self._pace}{_memory()}"
            self._bar.update(self._task, description=name, facts=facts)
        if self.level >= 1:
            self.notice(line)
        if "damping" in entry:
            self.notice(f"{name}: {_damping(entry['damping'])}")

    def block(self, index: int, blocks: int, done: int, loss: float) -> None:
        """A block is finished; `done` of them in this run."""
        elapsed = time.perf_counter() - self._started
        left = elapsed / done * (self._total - done)
        self._pace = f"{elapsed / done:.2f} s/block  ETA {_clock(left)}  "
        if self._bar is not None:
            facts = f"loss {loss:.2e}  {self._pace}{_memory()}"
            self._bar.update(self._task, completed=index + 1, facts=facts)
        else:
            self.notice(f"block {index + 1}/{blocks}  mean error {loss:.3e}  {self._pace}{_memory()}")

    def end(self) -> None:
        """The walk is over, or was broken off."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _clock(seconds: float) -> str:
    """Such as 45 s, 12:30 or 3:05:00."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _memory() -> str:
    """What is resident now and was at most, here and on a GPU."""
    text = f"memory {current_bytes() / 2**30:.2f} GiB  peak memory {resident_bytes() / 2**30:.2f} GiB"
    if not torch.cuda.is_initialized():
        return text
    now, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    return f"{text}  GPU {now / 2**30:.2f} GiB  peak {peak / 2**30:.2f} GiB"


def _damping(event: dict[str, Any]) -> str:
    if event["diagonal"]:
        return "the Gram matrix cannot be factorised; rounded to nearest"
    parts = []
    if event["dead"]:
        parts.append(f"{event['dead']} inputs never differ from zero in the calibration text")
    if event["tries"] > 1:
        parts.append(f"damping raised to {event['ratio']:g}")
    return "; ".join(parts)
