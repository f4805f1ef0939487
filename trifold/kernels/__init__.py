"""Kernels: running packed weights without inflating them back."""

from trifold.kernels.dispatch import TABLE, Choice, explain, resolve
from trifold.kernels.op import Op
from trifold.kernels.packed_embedding import PackedEmbedding
from trifold.kernels.packed_experts import PackedExperts, is_stacked, unstack
from trifold.kernels.packed_linear import PackedLinear
from trifold.kernels.shared_input import SharedInput
from trifold.kernels.storage import PackedModule
from trifold.kernels.tied_linear import TiedLinear

__all__ = [
    "TABLE",
    "Choice",
    "Op",
    "PackedEmbedding",
    "PackedExperts",
    "PackedLinear",
    "PackedModule",
    "SharedInput",
    "TiedLinear",
    "explain",
    "is_stacked",
    "resolve",
    "unstack",
]
