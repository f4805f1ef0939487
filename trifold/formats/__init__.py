"""Formats: how a compressed weight lies on disk."""

from trifold.formats import affine as _affine  # noqa: F401 - registers itself
from trifold.formats import bitmask as _bitmask  # noqa: F401
from trifold.formats import dense as _dense  # noqa: F401
from trifold.formats import fp8 as _fp8  # noqa: F401
from trifold.formats import group_sparse as _group_sparse  # noqa: F401
from trifold.formats import int as _int  # noqa: F401
from trifold.formats import nested as _nested  # noqa: F401
from trifold.formats import sparse24 as _sparse24  # noqa: F401
from trifold.formats import table as _table  # noqa: F401
from trifold.formats.base import (
    FORMATS,
    Format,
    Spec,
    bits_per_weight,
    describe,
    digest,
    format_for,
    label,
    layout,
    pack,
    rounds_input,
    stored_bytes,
    unpack,
)

__all__ = [
    "FORMATS",
    "Format",
    "Spec",
    "bits_per_weight",
    "describe",
    "digest",
    "format_for",
    "label",
    "layout",
    "pack",
    "rounds_input",
    "stored_bytes",
    "unpack",
]
