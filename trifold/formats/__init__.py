"""Formats: how a compressed weight lies on disk."""

from trifold.formats import int as _int  # noqa: F401 - registers itself
from trifold.formats.base import FORMATS, Format, Spec, bits_per_weight, digest, format_for, stored_bytes

__all__ = ["FORMATS", "Format", "Spec", "bits_per_weight", "digest", "format_for", "stored_bytes"]
