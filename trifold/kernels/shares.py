"""Into how many shares a sum is split, so that a GPU whose processors are more than the pieces of a result has work."""

from __future__ import annotations

from functools import lru_cache

import torch

_WARPS = 12  # of a processor, that have work; six blocks of two keep enough loads under way
_STEPS = 4  # in which a pipeline fills
_MOST = 32


@lru_cache(maxsize=8)
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@lru_cache(maxsize=8)
def is_hopper(device: torch.device) -> bool:
    """Compute capability 9.x; true of a CPU, which takes its part in the interpreter."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9


def share(warps: int, blocks: int, steps: int, processors: int) -> int:
    """How many programs of `warps` each share one of the blocks that a result is cut into, of `steps` steps."""
    return max(1, min(processors * _WARPS // warps // max(blocks, 1), steps // _STEPS, _MOST))


def workspace(
    result: torch.Tensor, parts: int, blocks: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the programs that share a block leave their sums, and counters of those that have; empty for one."""
    several = parts > 1
    partial = result.new_empty((parts, *result.shape) if several else 0, dtype=dtype)
    return partial, result.new_empty(blocks if several else 0, dtype=torch.int32)
