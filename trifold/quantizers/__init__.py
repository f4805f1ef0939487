"""Fewer bits: one file per method."""

from trifold.quantizers.gptq import GPTQ
from trifold.quantizers.rtn import RTN

__all__ = ["GPTQ", "RTN"]
