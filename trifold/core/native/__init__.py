"""C sources of loops that are too fine for torch's operators, compiled on first use.

Built with the system's C compiler into a cache and loaded through ctypes, which lets go of the interpreter's lock.
Plain C rather than torch's C++ extensions: a library is built in a second or two instead of a minute, stays valid
when torch changes, and needs neither headers nor ninja. Without a compiler, or with TRIFOLD_NATIVE=0, `library`
returns None, `compiled` raises, and callers take their torch path.
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
from typing import Any

FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")


class NotCompiledError(RuntimeError):
    """A library cannot be had; the message says why in a few words."""


def pointer(tensor: Any) -> ctypes.c_void_p:
    """Where a tensor's numbers begin, for a function of a library."""
    return ctypes.c_void_p(tensor.data_ptr())


@cache
def library(name: str) -> ctypes.CDLL | None:
    """The compiled `name`.c of this folder, for this processor, or None where it cannot be had."""
    try:
        return compiled(Path(__file__).parent / f"{name}.c", ("-march=native",))
    except NotCompiledError:
        return None


def compiled(source: Path, flags: tuple[str, ...]) -> ctypes.CDLL:
    """A source compiled with further flags, from the cache if it is there. Raises NotCompiledError.

    A cache that cannot be written to, or whose files the system will not load, is done without: the library is then
    built for this process alone.
    """
    if os.environ.get("TRIFOLD_NATIVE") == "0":
        raise NotCompiledError("switched off by TRIFOLD_NATIVE=0")
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or platform.system() == "Windows":
        raise NotCompiledError("there is no C compiler")
    command = [*shlex.split(compiler), *FLAGS, *flags]
    key = hashlib.sha256("\0".join([*_texts(source), *command, _processor()]).encode()).hexdigest()[:16]
    target = cache_folder() / f"{source.stem}-{key}.so"
    for _ in range(2):  # a damaged file is built again
        try:
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                _build(command, source, target)
            return ctypes.CDLL(str(target))
        except OSError:
            try:
                target.unlink(missing_ok=True)
            except OSError:
                break
    try:
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / target.name
            _build(command, source, target)
            return ctypes.CDLL(str(target))
    except OSError as error:
        raise NotCompiledError(f"a compiled library cannot be loaded: {error}") from error


def _build(command: list[str], source: Path, target: Path) -> None:
    """Whole or not at all, whoever else builds it."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built = Path(folder) / target.name
        try:
            subprocess.run([*command, str(source), "-o", str(built), "-lm"], check=True, capture_output=True)
        except (subprocess.SubprocessError, FileNotFoundError) as error:
            raise NotCompiledError(f"{command[0]} does not compile {source.name} for it") from error
        with built.open("rb") as file:
            os.fsync(file.fileno())  # a damaged library would end the process that loads it
        os.replace(built, target)


def _texts(source: Path) -> list[str]:
    """What is compiled, headers included."""
    return [path.read_text() for path in (source, *sorted(source.parent.glob("*.h")))]


def cache_folder() -> Path:
    """Where compiled libraries are kept: TRIFOLD_CACHE, else `trifold` in the user's cache folder."""
    base = os.environ.get("TRIFOLD_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trifold"


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()}"
