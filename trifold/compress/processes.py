"""Several processes on one compression, as `torchrun` starts them.

Each process has its share of the calibration batches and all blocks. Statistics are added up over the processes in
float64; the layers of a stage are shared out by cost, and what each decides is sent to all. The first process alone
writes. For one process everything here does nothing.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from trifold.core.errors import InputError, ResourceError
from trifold.core.statistics import Statistic

_PATIENCE = timedelta(hours=12)  # the first process may be writing and proving meanwhile


def world() -> tuple[int, int]:
    """Rank and number of processes, as the launcher says; (0, 1) without one."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True)
class Processes:
    """rank: of this process. size: how many there are."""

    rank: int = 0
    size: int = 1

    @property
    def writes(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def reduce(self, statistics: Iterable[Statistic]) -> None:
        """Make each of these what all processes together have seen."""
        if self.size == 1:
            return
        from torch import distributed

        for statistic in statistics:
            for name, tensor in statistic.merged("sum"):
                setattr(statistic, name, self._reduced(tensor, distributed.ReduceOp.SUM))
            for name, tensor in statistic.merged("max"):
                setattr(statistic, name, self._reduced(tensor, distributed.ReduceOp.MAX))
            for name, tensor in statistic.merged("rows"):
                rows = [self.same(tensor if rank == self.rank else None, rank) for rank in range(self.size)]
                setattr(statistic, name, torch.cat([r.to(tensor.device) for r in rows]))
            statistic.tokens = int(self._reduced(torch.tensor(statistic.tokens), distributed.ReduceOp.SUM))
            statistic.settle()

    def total(self, *values: float) -> list[float]:
        """Each value summed over the processes."""
        if self.size == 1:
            return list(values)
        from torch import distributed

        return self._reduced(torch.tensor(values, dtype=torch.float64), distributed.ReduceOp.SUM).tolist()

    def _reduced(self, tensor: torch.Tensor, how: Any) -> torch.Tensor:
        from torch import distributed

        try:
            distributed.all_reduce(tensor, how)
        except RuntimeError as error:
            raise DesertedError from error
        return tensor

    def same(self, value: Any, owner: int = 0, device: torch.device | str = "cpu") -> Any:
        """What process `owner` has, in all of them. Tensors arrive on `device`."""
        if self.size == 1:
            return value
        from torch import distributed

        data = io.BytesIO()
        if self.rank == owner:
            torch.save(value, data)
        size = torch.tensor(data.getbuffer().nbytes)
        try:
            distributed.broadcast(size, owner)
            mine = self.rank == owner
            sent = torch.frombuffer(data.getbuffer(), dtype=torch.uint8) if mine else torch.empty(int(size)).byte()
            distributed.broadcast(sent, owner)
        except RuntimeError as error:
            raise DesertedError from error
        if self.rank == owner:
            return value
        return torch.load(io.BytesIO(sent.numpy().data), map_location=device, weights_only=False)

    def wait(self) -> None:
        """Until all processes are here."""
        self.same(None)

    def shares(self, costs: Mapping[str, float]) -> list[list[str]]:
        """The names that each process solves: the dearest first, each to the one that has least to do."""
        shares: list[list[str]] = [[] for _ in range(self.size)]
        loads = [0.0] * self.size
        for name in sorted(costs, key=lambda name: -costs[name]):
            least = loads.index(min(loads))
            shares[least].append(name)
            loads[least] += costs[name]
        return shares


ALONE = Processes()


class DesertedError(ResourceError):
    """Another process has ended, and has said why."""

    def __init__(self) -> None:
        super().__init__("another process of this run has ended; its message says why")


def join() -> Processes:
    """The processes that `torchrun` has started, this one among them. Raises InputError where torch cannot."""
    rank, size = world()
    if size == 1:
        return ALONE
    from torch import distributed

    if not distributed.is_available():
        raise InputError(f"WORLD_SIZE={size}, but this torch cannot run on several processes; start one")
    if not distributed.is_initialized():
        gpu = torch.cuda.is_available()
        if gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())
        distributed.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=_PATIENCE)
    return Processes(rank, size)


def leave() -> None:
    """End what `join` began."""
    if world()[1] > 1:
        from torch import distributed

        if distributed.is_initialized():
            distributed.destroy_process_group()


def speaks() -> bool:
    """Whether this process tells of an error: the first that fails does, and the others keep quiet."""
    rank, size = world()
    if size == 1:
        return True
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return rank == 0
    try:
        return distributed.distributed_c10d._get_default_store().add("trifold-failed", 1) == 1
    except RuntimeError:
        return rank == 0
