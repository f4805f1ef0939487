"""What can go wrong, and the exit code that the command line gives it.

    TrifoldError                1   a bug of ours
    ├── InputError              2   wrong input; nothing was written
    │   ├── RecipeError             unknown name, impossible value
    │   ├── CalibrationError        calibration or evaluation text
    │   └── CheckpointError         a model folder that cannot be read
    ├── ProofError              3   the written checkpoint does not give what was promised
    └── ResourceError           4   disk, memory, permissions: mend it and run the same command again

Every message is one line that names the layer or file, the value and the way out.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TrifoldError(Exception):
    """Base of every error that Trifold raises on purpose."""

    exit_code = 1


class InputError(TrifoldError):
    """The caller gave something that cannot work."""

    exit_code = 2


class RecipeError(InputError):
    """A recipe names something unknown or asks for an impossible value."""


class CalibrationError(InputError):
    """Calibration or evaluation text is missing, unreadable or too short."""


class CheckpointError(InputError):
    """A model folder or file cannot be read, or is not what it should be."""


class ProofError(TrifoldError):
    """The checkpoint on disk differs from what compression decided."""

    exit_code = 3


class ResourceError(TrifoldError):
    """The environment failed: disk full, no permission, out of memory."""

    exit_code = 4


def unknown_name(kind: str, name: object, known: Iterable[str]) -> str:
    """One line for an unknown `name`: the nearest known ones first, else all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    if close:
        return f"unknown {kind} {name!r}; did you mean {' or '.join(close)}?"
    return f"unknown {kind} {name!r}; known: {', '.join(names)}"
