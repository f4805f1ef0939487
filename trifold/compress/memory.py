"""What the process holds, and what it could take."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

_M_MMAP_THRESHOLD = -3  # of malloc.h
_LARGE = 6 * 2**20  # bytes: above the slabs that are used again and again
STATISTICS_SHARE = 0.25  # of the free memory may hold the statistics of one pass


@dataclass(frozen=True)
class Room:
    """How much of what calibration gathers may be in memory. What is written does not depend on it.

    statistics: bytes of those of one pass; by default a quarter of the free memory. More of them take several
    passes, and wait in files. offload: whether hidden states are in files, too. folder: of these files.
    """

    statistics: int | None = None
    offload: bool = False
    folder: Path = field(default_factory=lambda: Path(tempfile.gettempdir()))

    def for_statistics(self) -> float:
        """Bytes that statistics may take now."""
        return free_bytes() * STATISTICS_SHARE if self.statistics is None else self.statistics

    @property
    def remembered(self) -> int | None:
        """Bytes of outputs that are remembered within a block; None leaves it to the runner."""
        return 0 if self.offload else None


ROOM = Room()


def free_bytes() -> int:
    """Memory that could be taken now; 2 GiB where the system does not tell."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, AttributeError, OSError):
        return 2**31


def available_bytes() -> int | None:
    """Memory that the system could give this process, files in its cache and limits of its group counted; None if it
    does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # none, or "max"
        return found
    return min(found, max(limit - used, 0))


def current_bytes() -> int:
    """Memory that is resident now; the peak where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return resident_bytes()


def resident_bytes() -> int:
    """Peak resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def leave_the_heap() -> None:
    """Let the C library (glibc) get large tensors from the system, and give them back when they are freed.

    By itself it learns to keep up to 32 MB of each size on its heap, which small ones that stay then break into
    pieces, more with each block. The setting is the whole process's: for those who own it, as the command line does.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option is not None:
        set_option(_M_MMAP_THRESHOLD, _LARGE)


def give_back() -> None:
    """Return what was freed to the system, where the C library keeps it (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
