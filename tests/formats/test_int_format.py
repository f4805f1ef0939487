import json

import pytest
import torch

from trifold.core.canonical import Dense, Quantized, Sparse
from trifold.core.errors import InputError, RecipeError
from trifold.core.scheme import SCALE_DTYPES, Scheme
from trifold.formats import FORMATS, bits_per_weight, digest, format_for, stored_bytes

INT = FORMATS.get("int")
SHAPES = [(1, 2), (7, 43), (8, 32), (33, 172), (96, 256)]
GROUPS = [16, 100, "channel", "tensor"]


def random_weight(shape, bits, group, symmetric, scale_dtype="bfloat16"):
    scheme = Scheme(bits, group, symmetric, scale_dtype)
    generator = torch.Generator().manual_seed(bits)
    size = scheme.scale_shape(*shape)
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator)
    zero = torch.randint(0, 2**bits, size, dtype=torch.uint8, generator=generator)
    scale = torch.rand(size, generator=generator).add(0.1).to(SCALE_DTYPES[scale_dtype])
    return Quantized(codes, scale, None if symmetric else zero, scheme)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_unpack_inverts_pack_as_the_layout_says(bits, group, symmetric):
    for shape in SHAPES:
        for scale_dtype in SCALE_DTYPES:
            weight = random_weight(shape, bits, group, symmetric, scale_dtype)
            spec = json.loads(json.dumps(INT.describe(weight)))
            tensors = INT.pack(weight)
            assert {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()} == INT.layout(spec)
            assert stored_bytes(spec) == sum(t.nbytes for t in tensors.values())
            assert all(t.is_contiguous() for t in tensors.values())
            before = digest(tensors)
            back = INT.unpack(tensors, spec)
            assert torch.equal(back.codes, weight.codes) and torch.equal(back.scale, weight.scale)
            assert back.scheme == weight.scheme and back.scale.dtype == weight.scale.dtype
            assert symmetric or torch.equal(back.zero_point, weight.zero_point)
            assert torch.equal(back.dequantize(), weight.dequantize())
            assert digest(tensors) == before == digest(INT.pack(back))


@pytest.mark.parametrize("bits", range(1, 9))
def test_all_codes_and_all_zero_points(bits):
    count = 2**bits
    codes = torch.arange(count, dtype=torch.uint8).repeat(count, 1)
    zero = torch.arange(count, dtype=torch.uint8).reshape(-1, 1)
    scheme = Scheme(bits, "channel", False, "float32")
    weight = Quantized(codes, torch.ones(len(codes), 1), zero, scheme)
    back = INT.unpack(INT.pack(weight), INT.describe(weight))
    expected = codes.float() - zero.float()
    assert torch.equal(back.dequantize(), expected)


def test_zero_points_run_down_the_columns():
    zero = torch.tensor([[0, 1, 7, 8, 9, 10, 14, 15]], dtype=torch.uint8).T.contiguous()
    weight = Quantized(torch.zeros(8, 16, dtype=torch.uint8), torch.ones(8, 1).bfloat16(), zero, Scheme(4, 16, False))
    stored = INT.pack(weight)["weight_zero_point"]
    assert stored.shape == (1, 1) and f"{stored.item() & 0xFFFFFFFF:08x}" == "fea98710"


def test_few_rows_with_several_groups():
    """All zero-points of a column in one word, which lies next to those of the other columns."""
    for bits in (1, 2, 4, 8):
        weight = random_weight((32 // bits, 64), bits, 16, False)
        back = INT.unpack(INT.pack(weight), INT.describe(weight))
        assert torch.equal(back.zero_point, weight.zero_point)


@pytest.mark.parametrize(
    "scheme, bits",
    [
        (Scheme(4, 128, False), 4 + 16 / 128 + 4 / 128),
        (Scheme(4, 128, True), 4 + 16 / 128),
        (Scheme(3, 64, False, "float32"), 3 + 32 / 64 + 3 / 64),
        (Scheme(8, "channel", True), 8 + 16 / 1024),
        (Scheme(2, "channel", False, "float16"), 2 + 16 / 1024 + 2 / 1024),
        (Scheme(8, "tensor", True, "float32"), 8 + 32 / 2**20),
        (Scheme(1, 1024, False, "bfloat16"), 1 + 16 / 1024 + 1 / 1024),
    ],
)
def test_bits_per_weight_by_hand(scheme, bits):
    shape = scheme.scale_shape(1024, 1024)
    zero = None if scheme.symmetric else torch.zeros(shape, dtype=torch.uint8)
    scale = torch.ones(shape, dtype=SCALE_DTYPES[scheme.scale_dtype])
    weight = Quantized(torch.zeros(1024, 1024, dtype=torch.uint8), scale, zero, scheme)
    assert bits_per_weight(INT.describe(weight)) == bits


def test_the_usual_four_bits_cost_4_15625():
    spec = {"format": "int", "shape": [4096, 4096], "bits": 4, "group_size": 128, "symmetric": False}
    assert bits_per_weight({**spec, "scale_dtype": "bfloat16"}) == 4.15625


def test_padding_is_counted():
    spec = {"format": "int", "shape": [1, 33], "bits": 1, "group_size": "channel", "symmetric": False}
    assert stored_bytes({**spec, "scale_dtype": "bfloat16"}) == 8 + 2 + 4


def test_one_input_cannot_be_packed():
    with pytest.raises(InputError, match="too few inputs"):
        INT.layout(INT.describe(random_weight((7, 1), 4, 16, True)))


def test_formats_by_what_they_hold():
    assert format_for(random_weight((7, 43), 4, 16, True)) == "int"
    with pytest.raises(TypeError, match="no format stores a Sparse"):
        format_for(Sparse(Dense(torch.zeros(2, 2).double()), torch.ones(2, 2, dtype=torch.bool)))
    with pytest.raises(RecipeError, match="unknown format 'itn'; did you mean int"):
        FORMATS.get("itn")


def test_digest_sees_names_dtypes_shapes_and_bits():
    base = {"a": torch.zeros(2, 3)}
    others = [{"b": torch.zeros(2, 3)}, {"a": torch.zeros(3, 2)}, {"a": torch.zeros(2, 3).int()}]
    others += [{"a": torch.tensor([[0.0, 0, 0], [0, 0, -0.0]])}, {}]
    assert len({digest(tensors) for tensors in [base, *others]}) == 6
    assert digest({"a": torch.zeros(3, 2).T}) == digest(base)
    assert digest({"x": torch.ones(1), "a": torch.zeros(0)}) == digest({"a": torch.zeros(0), "x": torch.ones(1)})
