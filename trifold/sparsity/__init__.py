"""Fewer weights: one file per method."""

from trifold.sparsity.alps import ALPS
from trifold.sparsity.gqsa import GQSA
from trifold.sparsity.magnitude import Magnitude
from trifold.sparsity.sparsegpt import SparseGPT
from trifold.sparsity.wanda import Wanda

__all__ = ["ALPS", "GQSA", "Magnitude", "SparseGPT", "Wanda"]
