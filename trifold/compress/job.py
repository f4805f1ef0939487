"""A compression that passed its preflight: what to do, to what, with which text."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from trifold.compress.calibration import PROOF_WINDOWS
from trifold.compress.files import parse_size
from trifold.compress.memory import Room
from trifold.compress.plan import Plan
from trifold.compress.processes import ALONE, Processes
from trifold.compress.progress import Reporter
from trifold.compress.recipe import Recipe
from trifold.compress.source import Source
from trifold.compress.text import Windows, batches
from trifold.core.topology import Topology


@dataclass(frozen=True)
class Options:
    """How to run, as opposed to what to do."""

    batch_size: int | None = None
    dtype: str | torch.dtype = "auto"
    device: str = "auto"
    max_shard_size: str = "5GB"
    fresh: bool = False
    inplace: bool = False
    trust_remote_code: bool = False
    stats_memory: str | int | None = None
    offload_activations: bool = False


def room_of(options: Options, folder: Path | None = None) -> Room:
    """What calibration may hold in memory, with its files in `folder`. Raises InputError for a size that is none."""
    limit = options.stats_memory
    statistics = None if limit is None else parse_size(limit, "--stats-memory")
    return Room(statistics, options.offload_activations, folder or Path(tempfile.gettempdir()))


@dataclass
class Job:
    """A compression that passed its preflight. windows: of calibration. more: further text, for tuners of the model.
    repository: what the result will be called on the hub."""

    source: Source
    recipe: Recipe
    plan: Plan
    windows: Windows
    more: Windows | None
    observed: bool
    topology: Topology
    batch_size: int
    options: Options
    report: Reporter
    processes: Processes = ALONE
    repository: str | None = None

    @cached_property
    def batches(self) -> list[torch.Tensor]:
        """Batches of token ids; the first is small, since it is also the one that the proof runs."""
        few = replace(self.windows, ids=self.windows.ids[:PROOF_WINDOWS])
        rest = replace(self.windows, ids=self.windows.ids[PROOF_WINDOWS:])
        return [*batches(few, self.batch_size), *batches(rest, self.batch_size)]

    @property
    def more_batches(self) -> list[torch.Tensor]:
        """Those of text that nothing has seen before the model is tuned."""
        return [] if self.more is None else list(batches(self.more, self.batch_size))

    @property
    def ids(self) -> list[torch.Tensor]:
        """This process's share of them; all of them where nothing is calibrated."""
        return self.batches[self.processes.rank :: self.processes.size] if self.observed else self.batches

    @property
    def dtype_name(self) -> str:
        return str(self.source.dtype).removeprefix("torch.")
