"""Fewer bits: one file per method."""

from trifold.quantizers.awq import AWQ
from trifold.quantizers.gptaq import GPTAQ
from trifold.quantizers.gptq import GPTQ
from trifold.quantizers.hqq import HQQ
from trifold.quantizers.rtn import RTN

__all__ = ["AWQ", "GPTAQ", "GPTQ", "HQQ", "RTN"]
