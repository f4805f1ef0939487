"""`table`: places in a table of values, such as NF4's, with scales; see `formats/quantized.py` for both."""

from __future__ import annotations

from trifold.core.canonical import Canonical, Quantized
from trifold.core.scheme import Scheme
from trifold.formats.base import FORMATS, Spec
from trifold.formats.quantized import QuantizedFormat, group_label


class TableFormat(QuantizedFormat):
    """The spec's `grid` names the table."""

    name = "table"

    def stores(self, scheme: Scheme) -> bool:
        return scheme.table is not None and scheme.table.dtype is None

    def describe(self, canonical: Canonical) -> Spec:
        assert isinstance(canonical, Quantized)
        return super().describe(canonical) | {"grid": canonical.scheme.grid}

    def label(self, spec: Spec) -> str:
        return f"{spec['grid']} {group_label(spec)}"


FORMATS.register("table")(TableFormat())
