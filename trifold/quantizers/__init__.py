"""Fewer bits: one file per method."""

from trifold.quantizers.awq import AWQ
from trifold.quantizers.gptaq import GPTAQ
from trifold.quantizers.gptq import GPTQ
from trifold.quantizers.hqq import HQQ
from trifold.quantizers.llm_int8 import LLMInt8
from trifold.quantizers.rtn import RTN
from trifold.quantizers.smoothquant import SmoothQuant

__all__ = ["AWQ", "GPTAQ", "GPTQ", "HQQ", "RTN", "LLMInt8", "SmoothQuant"]
