"""Other ecosystems' layouts of quantised weights: compressed-tensors, GPTQ, AWQ."""

from trifold.ecosystem import awq, compressed_tensors, gptq
from trifold.ecosystem.base import CODECS, Codec, Ecosystem, Settings, nearest

ECOSYSTEMS: dict[str, Ecosystem] = {
    each.method: each for each in (compressed_tensors.CompressedTensors(), gptq.Gptq(), awq.Awq())
}
"""By the `quant_method` of config.json."""

__all__ = ["CODECS", "ECOSYSTEMS", "Codec", "Ecosystem", "Settings", "nearest"]
