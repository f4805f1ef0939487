"""Lower rank: one file per method."""

from trifold.lowrank.asvd import ASVD
from trifold.lowrank.modegpt import MoDeGPT
from trifold.lowrank.reduced_rank import ReducedRank
from trifold.lowrank.residual import Residual
from trifold.lowrank.svd import SVD
from trifold.lowrank.svd_llm import SVDLLM

__all__ = ["ASVD", "SVD", "SVDLLM", "MoDeGPT", "ReducedRank", "Residual"]
