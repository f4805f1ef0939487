import pytest
import torch
from packed_samples import GROUPS, WIDTHS, layer, quantized

from trifold.kernels.rows import ALIGNMENT, DECODERS, dequantize, dequantize_rows, row_blocks


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16", "float32"])
def test_rows_equal_those_of_the_whole_weight(bits, group, symmetric, scale_dtype):
    weight = quantized(97, 172, bits, group, symmetric, scale_dtype)
    module = layer(weight)
    whole = weight.dequantize()
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for start, stop in ((0, 97), (0, 1), (64, 97), (33, 66)):
            part = dequantize_rows(module.portable(), module.spec, start, stop, dtype)
            assert part.dtype == dtype
            assert torch.equal(part, whole[start:stop].to(dtype))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("group", GROUPS)
def test_rows_by_index(bits, group):
    weight = quantized(71, 43, bits, group, False)
    module = layer(weight)
    index = torch.tensor([70, 0, 5, 5, 31, 32, 63])
    found = DECODERS["int"](module.portable(), module.spec, index).dequantize()
    assert torch.equal(found, weight.dequantize()[index])


def test_dequantize_in_the_scales_dtype_is_exact_for_all_codes_and_zero_points():
    from trifold.core.canonical import Quantized
    from trifold.core.scheme import Scheme

    codes = torch.arange(256, dtype=torch.uint8).expand(256, 256).contiguous()
    zero = torch.arange(256, dtype=torch.uint8).reshape(256, 1)
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        scale = torch.linspace(0.5, 2.0, 256).reshape(256, 1).to(dtype)
        weight = Quantized(codes, scale, zero, Scheme(8, "channel", False, name))
        assert torch.equal(dequantize(weight, dtype), weight.dequantize().to(dtype))


@pytest.mark.parametrize("rows, columns", [(1, 1), (64, 7), (65, 2**20), (1000, 4096), (200, 5000)])
def test_blocks_cover_all_rows_once(rows, columns):
    for device in ("cpu", "meta"):
        blocks = list(row_blocks(rows, columns, torch.device(device)))
        assert [r for a, b in blocks for r in range(a, b)] == list(range(rows))
        assert all(start % ALIGNMENT == 0 for start, _ in blocks)
