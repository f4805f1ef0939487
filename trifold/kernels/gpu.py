"""Whether Triton's kernels can run."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

import torch

_CAPABILITY = (8, 0)


@lru_cache(maxsize=8)
def no_gpu(device: torch.device, needed: tuple[int, int] = _CAPABILITY) -> str | None:
    """Why they do not run on a device, or None. needed: the compute capability."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    if torch.version.hip is not None:
        return "it is made for NVIDIA's GPUs"
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= needed else f"compute capability {capability} is below {needed}"
