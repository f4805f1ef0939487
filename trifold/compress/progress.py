"""Progress of long work: one live line on a terminal, plain lines elsewhere. Always on stderr."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from trifold.compress.memory import resident_bytes


class Reporter:
    """What the pipeline tells while it works. level: -1 quiet, 0 normal, 1 every layer."""

    def __init__(self, level: int = 0, console: Console | None = None) -> None:
        self.level = level
        self.console = console or Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        self._started = 0.0
        self._total = 0

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
            columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task("compressing", total=blocks, completed=done)

    def layer(self, name: str, entry: dict[str, Any]) -> None:
        """A layer is solved."""
        line = f"{name}  error {entry['error']:.3e}  {entry['bits_per_weight']:.3f} bits"
        if self._bar is not None:
            self._bar.update(self._task, description=name)
        if self.level >= 1:
            self.notice(line)
        if "damping" in entry:
            self.notice(f"{name}: {_damping(entry['damping'])}")

    def block(self, index: int, blocks: int, done: int, loss: float) -> None:
        """A block is finished; `done` of them in this run."""
        elapsed = time.perf_counter() - self._started
        left = elapsed / done * (self._total - done)
        memory = resident_bytes() / 2**30
        if self._bar is not None:
            self._bar.update(self._task, completed=index + 1)
        else:
            self.notice(
                f"block {index + 1}/{blocks}  mean error {loss:.3e}  {elapsed / done:.2f} s/block  "
                f"ETA {left:.0f} s  peak memory {memory:.2f} GiB"
            )

    def end(self) -> None:
        """The walk is over, or was broken off."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _damping(event: dict[str, Any]) -> str:
    if event["diagonal"]:
        return "the Gram matrix cannot be factorised; rounded to nearest"
    parts = []
    if event["dead"]:
        parts.append(f"{event['dead']} inputs never differ from zero in the calibration text")
    if event["tries"] > 1:
        parts.append(f"damping raised to {event['ratio']:g}")
    return "; ".join(parts)
