"""2:4 in torch's layout: there and back on any machine; the product needs a GPU."""

import pytest
import torch
from packed_samples import layer

from tests.sparse_samples import sparse_weight
from trifold.core.scheme import Scheme
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


def test_what_it_cannot_run_is_said():
    def reason(shape, values, dtype=torch.bfloat16):
        return explain(layer(sparse_weight(shape, "2:4", values)).spec, dtype, "cuda").rejected["sparse.torch24"]

    assert reason((64, 128), Scheme(4, 128)) == "torch has no 2:4 product with integer weights of 4 bits"
    assert "multiple of 32" in reason((63, 128), "bfloat16")
    assert "activations and survivors alike" in reason((64, 128), "bfloat16", torch.float32)
    if not torch.cuda.is_available():
        assert reason((64, 128), "bfloat16") == "torch finds no GPU"
