"""C sources of loops that are too fine for torch's operators, compiled on first use.

Built with the system's C compiler into a cache and loaded through ctypes; one file is about half a second.
Without a compiler, or with TRIFOLD_NATIVE=0, `library` returns None and callers take their torch path.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")


@cache
def library(name: str) -> ctypes.CDLL | None:
    """The compiled `name`.c of this folder, or None where it cannot be had."""
    if os.environ.get("TRIFOLD_NATIVE") == "0":
        return None
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or platform.system() == "Windows":
        return None
    source = Path(__file__).parent / f"{name}.c"
    try:
        return ctypes.CDLL(str(_built(source, compiler)))
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError):
        return None


def cache_folder() -> Path:
    """Where compiled libraries are kept: TRIFOLD_CACHE, else `trifold` in the user's cache folder."""
    base = os.environ.get("TRIFOLD_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trifold"


def _built(source: Path, compiler: str) -> Path:
    key = hashlib.sha256("\0".join([source.read_text(), compiler, *FLAGS, _processor()]).encode()).hexdigest()[:16]
    target = cache_folder() / f"{source.stem}-{key}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            built = Path(folder) / target.name
            subprocess.run(
                [*shlex.split(compiler), *FLAGS, str(source), "-o", str(built), "-lm"], check=True, capture_output=True
            )
            os.replace(built, target)  # whole or not at all, whoever else builds it
    return target


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()}"
