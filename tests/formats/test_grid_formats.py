"""The formats `table`, `fp8` and `affine`: bit-exact both ways over every code and odd shapes."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from trifold.core.canonical import Quantized
from trifold.core.errors import InputError
from trifold.core.scheme import SCALE_DTYPES, Scheme
from trifold.core.tables import TABLES
from trifold.formats import FORMATS, bits_per_weight, digest, format_for, stored_bytes
from trifold.formats.quantized import QuantizedFormat

SHAPES = [(1, 2), (1, 43), (7, 43), (13, 101), (33, 172), (96, 256)]
GROUPS = [16, 64, 100, "channel", "tensor"]
KINDS = [("nf4", 4, "table"), ("fp4_e2m1", 4, "table"), ("fp8_e4m3", 8, "fp8")]
KINDS += [("int", bits, "affine") for bits in range(1, 9)]


def weight(shape, grid, bits, group, scale_dtype="bfloat16"):
    """Random codes of a number each, scales and, for integers, real zero-points."""
    scheme = Scheme(bits, group, False, scale_dtype, grid, "real" if grid == "int" else "integer")
    generator = torch.Generator().manual_seed(bits)
    size, dtype = scheme.scale_shape(*shape), SCALE_DTYPES[scale_dtype]
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator)
    if grid == "fp8_e4m3":
        codes[codes & 127 == 127] = 0x7E
    scale = torch.rand(size, generator=generator).add(0.1).to(dtype)
    zero = (torch.randn(size, generator=generator) * 2**bits).to(dtype) if grid == "int" else None
    return Quantized(codes, scale, zero, scheme)


@pytest.mark.parametrize("grid, bits, name", KINDS)
@pytest.mark.parametrize("group", GROUPS)
def test_unpack_inverts_pack_as_the_layout_says(tmp_path, grid, bits, name, group):
    for shape, scale_dtype in itertools.product(SHAPES, SCALE_DTYPES):
        made = weight(shape, grid, bits, group, scale_dtype)
        assert format_for(made) == name
        fmt = FORMATS.get(name)
        spec, tensors = json.loads(json.dumps(fmt.describe(made))), fmt.pack(made)
        assert {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()} == fmt.layout(spec)
        assert stored_bytes(spec) == sum(t.nbytes for t in tensors.values())
        assert bits_per_weight(spec) == 8 * stored_bytes(spec) / made.codes.numel()
        assert all(t.is_contiguous() for t in tensors.values())
        save_file(tensors, tmp_path / "t.safetensors")
        read, before = load_file(tmp_path / "t.safetensors"), digest(tensors)
        back = fmt.unpack(read, spec)
        assert torch.equal(back.codes, made.codes) and torch.equal(back.scale, made.scale)
        assert back.scheme == made.scheme and (grid != "int" or torch.equal(back.zero_point, made.zero_point))
        assert torch.equal(back.dequantize(), made.dequantize())
        assert digest(read) == before == digest(fmt.pack(back)) == digest(tensors)
        assert tuple(tensors["weight"].shape) != shape


@pytest.mark.parametrize("grid, bits, name", KINDS[:3])
def test_every_code_by_its_value(grid, bits, name):
    """value = table[code] * scale, whatever the code; also FP8's that stand for no number."""
    codes = torch.arange(2**bits, dtype=torch.uint8).repeat(3, 1)
    scale = torch.tensor([[0.5], [1.0], [2.0]])
    made = Quantized(codes, scale, None, Scheme(bits, "channel", True, "float32", grid))
    fmt = FORMATS.get(name)
    back = fmt.unpack(fmt.pack(made), fmt.describe(made))
    assert torch.equal(back.codes, codes)
    expected = torch.tensor(TABLES.get(grid).values) * scale
    assert torch.equal(back.dequantize().nan_to_num(9e9), expected.nan_to_num(9e9))


def test_real_zero_points_by_hand():
    scheme = Scheme(2, 2, False, "float16", zero_point="real")
    codes = torch.tensor([[0, 3, 1]], dtype=torch.uint8)
    made = Quantized(codes, torch.tensor([[0.5, 2.0]]).half(), torch.tensor([[1.5, -0.25]]).half(), scheme)
    tensors = FORMATS.get("affine").pack(made)
    assert tensors["weight"].tolist() == [[0 + (3 << 2) + (1 << 4)]]
    assert tensors["weight_zero_point"].tolist() == [[1.5, -0.25]]
    assert made.dequantize().tolist() == [[-0.75, 0.75, 2.5]]


def test_nf4_words_are_those_of_four_bit_integers():
    codes = torch.tensor([[0, 1, 7, 8, 9, 10, 14, 15]], dtype=torch.uint8)
    made = Quantized(codes, torch.ones(1, 1).bfloat16(), None, Scheme(4, "channel", grid="nf4"))
    assert f"{FORMATS.get('table').pack(made)['weight'].item() & 0xFFFFFFFF:08x}" == "fea98710"


def test_fp8_is_what_torch_casts():
    values = torch.randn(5, 43, generator=torch.Generator().manual_seed(0)) * 100
    table = TABLES.get("fp8_e4m3")
    made = Quantized(
        table.encode(table.snap(values)), torch.ones(5, 1), None, Scheme(8, "channel", True, "float32", "fp8_e4m3")
    )
    stored = FORMATS.get("fp8").pack(made)["weight"]
    assert stored.dtype == torch.float8_e4m3fn and stored.shape == (5, 43, 1)
    assert torch.equal(stored.squeeze(-1).view(torch.uint8), values.to(torch.float8_e4m3fn).view(torch.uint8))
    assert torch.equal(made.dequantize(), values.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize(
    "grid, bits, group, expected, label",
    [
        ("nf4", 4, 64, 4 + 16 / 64, "nf4 g64"),
        ("fp4_e2m1", 4, 32, 4 + 16 / 32, "fp4_e2m1 g32"),
        ("fp8_e4m3", 8, "channel", 8 + 16 / 1024, "fp8_e4m3 channel"),
        ("fp8_e4m3", 8, "tensor", 8 + 16 / 2**20, "fp8_e4m3 tensor"),
        ("int", 4, 64, 4 + 16 / 64 + 16 / 64, "int4 g64 affine"),
        ("int", 3, 128, 3 + 16 / 128 + 16 / 128, "int3 g128 affine"),
    ],
)
def test_bits_per_weight_and_labels_by_hand(grid, bits, group, expected, label):
    made = weight((1024, 1024), grid, bits, group)
    fmt = FORMATS.get(format_for(made))
    assert bits_per_weight(fmt.describe(made)) == expected and fmt.label(fmt.describe(made)) == label


def test_one_input_fits_bytes_but_no_bitstream():
    for grid, bits, name in KINDS:
        fmt, made = FORMATS.get(name), weight((7, 1), grid, bits, 16)
        if name == "fp8":
            assert torch.equal(fmt.unpack(fmt.pack(made), fmt.describe(made)).codes, made.codes)
        else:
            with pytest.raises(InputError, match="too few inputs"):
                fmt.layout(fmt.describe(made))


def test_one_format_for_each_scheme():
    schemes = [Scheme(), Scheme(symmetric=True), Scheme(zero_point="real")]
    schemes += [Scheme(bits, grid=grid) for grid, bits, _ in KINDS[:3]]
    kinds = {name: FORMATS.get(name) for name in FORMATS if isinstance(FORMATS.get(name), QuantizedFormat)}
    names = [[name for name, kind in kinds.items() if kind.stores(scheme)] for scheme in schemes]
    assert names == [["int"], ["int"], ["affine"], ["table"], ["table"], ["fp8"]]
