"""Random sparse weights of every kind that can be stored."""

import torch

from trifold.core.canonical import Dense, Quantized, Sparse
from trifold.core.pattern import Pattern
from trifold.core.row_scales import to_row_scales
from trifold.core.scheme import SCALE_DTYPES, Scheme

TWO_LEVELS = Scheme(4, 16, scale_dtype="float32")
"""Weights of this scheme get 8-bit scales that a number of the row multiplies."""


def mask_for(pattern, shape, share=0.5, scope="matrix", seed=0):
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return Pattern.parse(pattern).mask(scores, share, scope)


def sparse_weight(shape, pattern, values, share=0.5, scope="matrix"):
    """values: a Scheme, or the name of a dtype."""
    generator = torch.Generator().manual_seed(shape[0])
    mask = mask_for(pattern, shape, share, scope)
    if isinstance(values, str):
        dense = Dense(torch.randn(shape, generator=generator).to(SCALE_DTYPES[values]))
        return Sparse(dense, mask, pattern).normalized()
    size, dtype = values.scale_shape(*shape), SCALE_DTYPES[values.scale_dtype]
    codes = torch.randint(0, 2**values.bits, shape, dtype=torch.uint8, generator=generator)
    if values.grid == "fp8_e4m3":
        codes[codes & 127 == 127] = 0
    scale = (0.01 + 0.02 * torch.rand(size, generator=generator)).to(dtype)
    zero = torch.randint(0, 2**values.bits, size, dtype=torch.uint8, generator=generator)
    if values.zero_point == "real":
        zero = zero.to(dtype)
    if values == TWO_LEVELS:
        scale = to_row_scales(scale, mask[:, :: values.group_size])
    weight = Quantized(codes, scale, None if values.symmetric else zero, values)
    return Sparse(weight, mask, pattern).normalized()


KINDS = {
    "bitmask bf16": ("unstructured", "bfloat16", "bitmask"),
    "bitmask fp32": ("unstructured", "float32", "bitmask"),
    "bitmask fp16 groups": ("1x8", "float16", "bitmask"),
    "bitmask int4": ("unstructured", Scheme(4, 32), "bitmask"),
    "bitmask int3 row": ("unstructured", Scheme(3, "channel", True), "bitmask"),
    "bitmask int5 tensor": ("4:8", Scheme(5, "tensor"), "bitmask"),
    "bitmask real": ("unstructured", Scheme(4, 32, zero_point="real"), "bitmask"),
    "bitmask nf4 groups": ("1x16", Scheme(4, 16, grid="nf4"), "bitmask"),
    "bitmask fp8": ("unstructured", Scheme(8, "channel", grid="fp8_e4m3"), "bitmask"),
    "2:4 bf16": ("2:4", "bfloat16", "sparse24"),
    "2:4 int4": ("2:4", Scheme(4, 32), "sparse24"),
    "2:4 int3": ("2:4", Scheme(3, 32, True), "sparse24"),
    "group int4": ("1x16", Scheme(4, 16), "group_sparse_int"),
    "group int3": ("1x8", Scheme(3, 8), "group_sparse_int"),
    "group int2 sym": ("1x32", Scheme(2, 32, True, "float16"), "group_sparse_int"),
    "group int4 scales8": ("1x16", TWO_LEVELS, "group_sparse_int"),
    "group int8": ("1x5", Scheme(8, 5, scale_dtype="float32"), "group_sparse_int"),
}
"""Name -> pattern, values, the format that holds it."""
