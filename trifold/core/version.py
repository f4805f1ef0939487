"""The version of the package, and those of what it stands on."""

from __future__ import annotations

import importlib.metadata

VERSION = "0.1.0"


def versions() -> dict[str, str]:
    """What the result may depend on."""
    libraries = ("torch", "transformers", "safetensors")
    return {"trifold": VERSION, **{name: importlib.metadata.version(name) for name in libraries}}
