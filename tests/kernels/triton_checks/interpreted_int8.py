"""Values of the int8 kernel, in Triton's interpreter. Run by `test_triton.py`, in a process of its own."""

import pytest
import torch
from packed_samples import activations, excess, layer, quantized

from trifold.core.inputs import round_input
from trifold.kernels.rounded_input.naive import input_scheme_of
from trifold.kernels.rounded_input.torch_int8 import TorchInt8
from trifold.kernels.rounded_input.triton_int8 import TritonInt8, int8_linear

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def run(op, module, x, bias):
    tensors = op.prepare(module.portable(), module.spec)
    return op.run(x, tensors, module.spec, None if bias is None else bias.to(x.dtype))


@pytest.mark.parametrize("shape", [(7, 43), (1, 172), (70, 300), (65, 256)], ids=str)
@pytest.mark.parametrize("group", ["channel", "tensor"])
def test_values(shape, group):
    for number, (tokens, dtype) in enumerate((tokens, dtype) for tokens in (1, 17, 65) for dtype in DTYPES):
        symmetric, bias = number % 2 == 0, number % 3 > 0
        weight = quantized(*shape, 8, group, symmetric)
        module = layer(weight, bias, input_bits=(8, 6)[number % 2])
        x = activations(tokens, shape[1], dtype)
        y = run(TritonInt8(), module, x, module.bias)
        rounded = round_input(x.float(), input_scheme_of(module.spec))
        assert y.dtype == dtype and excess(y, rounded, weight.dequantize(), module.bias) <= 1
        if dtype == torch.float32 and number % 2 == 0:  # TorchInt8 takes 8 bits alone
            assert torch.equal(y, run(TorchInt8(), module, x, module.bias))


def test_the_largest_codes_are_summed_exactly():
    x = torch.full((2, 1000), -127, dtype=torch.int8)
    codes = torch.full((3, 1000), 127, dtype=torch.int8)
    offset, ones = torch.full((3,), 128, dtype=torch.int32), torch.ones(3)
    y = int8_linear(x, torch.ones(2, 1), codes, ones, offset, None, torch.float32)
    assert y.eq(-127 * 255 * 1000).all()


def test_a_token_that_is_no_number_spoils_no_other():
    module = layer(quantized(33, 300, 8, "channel", False), input_bits=8)
    x = activations(3, 300)
    x[1, 5] = torch.nan
    y = run(TritonInt8(), module, x, None)
    assert y[1].isnan().all() and y[::2].isfinite().all()


def test_the_operator_is_as_torch_wants_it():
    arguments = (torch.ones(2, 43, dtype=torch.int8), torch.ones(2, 1), torch.ones(7, 44, dtype=torch.int8))
    rest = (torch.ones(7), None, None, torch.float16)
    torch.library.opcheck(int8_linear, (*arguments, *rest), test_utils=("test_schema", "test_faketensor"))
