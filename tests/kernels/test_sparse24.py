"""2:4 in torch's layout: there and back on any machine; the product needs a GPU."""

import pytest
import torch
from packed_samples import layer

from tests.sparse_samples import sparse_weight
from trifold.core.scheme import Scheme
from trifold.formats.sparse24 import index_of, mask_of
from trifold.kernels import explain
from trifold.kernels.sparse.torch24 import TorchSparse24


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_torchs_layout_is_the_dense_weight_and_goes_back_exactly(dtype):
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass as to_dense

    weight = sparse_weight((64, 128), "2:4", dtype)
    weight.values.values[0, :8] = torch.where(weight.mask[0, :8], -0.0, 0.0)  # survivors may be zero
    module, op = layer(weight), TorchSparse24()
    portable = module.portable()
    runtime = op.prepare(portable, module.spec)
    assert torch.equal(to_dense(runtime["packed"], runtime["meta"]).float(), weight.dequantize())
    assert sum(t.nbytes for t in runtime.values()) == 64 * 128 * 9 // 8
    restored = op.restore(runtime, module.spec)
    assert restored.keys() == portable.keys()
    for name, tensor in portable.items():
        bits = torch.int16 if tensor.is_floating_point() else tensor.dtype
        assert torch.equal(restored[name].view(bits), tensor.view(bits))
    rows = op.rows(runtime, module.spec, 3, 9, torch.float32)
    assert torch.equal(rows, weight.dequantize()[3:9])


@pytest.mark.parametrize("tokens", [1, 7, 8, 13])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_product_as_torch_is_asked_for_it(monkeypatch, tokens, with_bias):
    """torch's operators, which have no CPU version, by the dense weight; they refuse what the real ones refuse."""
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass as to_dense

    def mm(packed, meta, right):
        outside = torch.ops.aten._sparse_semi_structured_mm(*(t.to("meta") for t in (packed, meta, right)))
        assert right.shape[0] % 16 == right.shape[1] % 8 == 0 and right.stride(0) == 1
        y = to_dense(packed, meta) @ right
        assert y.shape == outside.shape and y.dtype == outside.dtype
        return y

    def addmm(bias, packed, meta, right):
        outside = torch.ops.aten._sparse_semi_structured_addmm(*(t.to("meta") for t in (bias, packed, meta, right)))
        y = mm(packed, meta, right) + bias[:, None]
        assert y.shape == outside.shape
        return y

    monkeypatch.setattr(torch, "_sparse_semi_structured_mm", mm)
    monkeypatch.setattr(torch, "_sparse_semi_structured_addmm", addmm)
    weight = sparse_weight((96, 64), "2:4", "bfloat16")
    module, op = layer(weight), TorchSparse24()
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 64, generator=generator).bfloat16()
    bias = torch.randn(96, generator=generator).bfloat16() if with_bias else None
    y = op.run(x, op.prepare(module.portable(), module.spec), module.spec, bias)
    wanted = torch.nn.functional.linear(x, weight.dequantize().bfloat16(), bias)
    assert y.shape == (tokens, 96) and y.dtype == torch.bfloat16 and y.is_contiguous()
    torch.testing.assert_close(y, wanted, rtol=0.02, atol=0.02)


def test_every_place_that_two_of_four_may_have():
    """The codes on disk are those of the tensor cores; torch turns them round within tiles and nothing else."""
    from itertools import combinations

    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass as from_dense

    quads = torch.zeros(6, 4)
    for row, places in enumerate(combinations(range(4), 2)):
        quads[row, list(places)] = 1.0
    mask = quads[torch.randint(6, (32, 16), generator=torch.Generator().manual_seed(0))].flatten(1)
    assert index_of(quads.bool()).flatten().tolist() == [0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110]
    assert torch.equal(mask_of(index_of(mask.bool())), mask.bool())
    _, meta = from_dense(mask.bfloat16())
    theirs = torch.stack([meta.int() >> shift & 15 for shift in (0, 4, 8, 12)], -1).flatten()
    assert torch.equal(theirs.sort().values, index_of(mask.bool()).flatten().int().sort().values)


def test_what_it_cannot_run_is_said():
    def reason(shape, values, dtype=torch.bfloat16):
        return explain(layer(sparse_weight(shape, "2:4", values)).spec, dtype, "cuda").rejected["sparse.torch24"]

    assert reason((64, 128), Scheme(4, 128)) == "torch has no 2:4 product with integer weights of 4 bits"
    assert "multiple of 32" in reason((63, 128), "bfloat16")
    assert "activations and survivors alike" in reason((64, 128), "bfloat16", torch.float32)
    if not torch.cuda.is_available():
        assert reason((64, 128), "bfloat16") == "torch finds no GPU"
