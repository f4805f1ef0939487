import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trifold.formats.bitstream import pack_bits, unpack_bits, words_for

WIDTHS = range(1, 9)


def hexadecimal(words):
    return [[f"{word & 0xFFFFFFFF:08x}" for word in row] for row in words.tolist()]


def by_definition(row, bits):
    """Words of one row: code k occupies bits k*b .. k*b+b-1 of one long little-endian number."""
    number = sum(code << k * bits for k, code in enumerate(row))
    return [f"{number >> 32 * i & 0xFFFFFFFF:08x}" for i in range(-(-len(row) * bits // 32))]


@pytest.mark.parametrize(
    "bits, codes, words",
    [
        (4, [0, 1, 7, 8, 9, 10, 14, 15], ["fea98710"]),
        (4, [0, 1, 2, 3, 4, 5], ["00543210"]),
        (8, [0, 127, 128, 255], ["ff807f00"]),
        (2, [0, 1, 2, 3] * 4, ["e4e4e4e4"]),
        (3, list(range(8)) * 4, ["88fac688", "c688fac6", "fac688fa"]),
        (1, [1] + [0] * 31 + [1], ["00000001", "00000001"]),
        (7, [127] * 5, ["ffffffff", "00000007"]),
    ],
)
def test_worked_examples(bits, codes, words):
    packed = pack_bits(torch.tensor([codes], dtype=torch.uint8), bits)
    assert packed.dtype == torch.int32
    assert hexadecimal(packed) == [words]


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 8), rows=st.integers(1, 5), columns=st.integers(1, 80), data=st.data())
def test_any_codes_as_defined_and_back(bits, rows, columns, data):
    row = st.lists(st.integers(0, 2**bits - 1), min_size=columns, max_size=columns)
    codes = data.draw(st.lists(row, min_size=rows, max_size=rows))
    tensor = torch.tensor(codes, dtype=torch.uint8)
    packed = pack_bits(tensor, bits)
    assert packed.shape == (rows, words_for(columns, bits))
    assert hexadecimal(packed) == [by_definition(row, bits) for row in codes]
    assert torch.equal(unpack_bits(packed, bits, columns), tensor)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_in_every_place_of_a_period(bits):
    codes = torch.arange(2**bits).repeat(65)[: 65 * 2**bits].reshape(-1, 65).to(torch.uint8)
    rolled = torch.cat([codes.roll(shift, dims=1) for shift in range(0, 65, 7)])
    assert torch.equal(unpack_bits(pack_bits(rolled, bits), bits, 65), rolled)


@pytest.mark.parametrize("bits", WIDTHS)
def test_tail_is_zero_and_inputs_are_left_alone(bits):
    codes = torch.full((3, 43), 2**bits - 1, dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    assert (codes == 2**bits - 1).all()
    used = 43 * bits % 32
    assert (packed[:, -1].long() & 0xFFFFFFFF == 2 ** (used or 32) - 1).all()


@pytest.mark.parametrize("bits", WIDTHS)
def test_tensors_of_any_stride(bits):
    codes = torch.randint(0, 2**bits, (40, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    assert torch.equal(pack_bits(codes.T, bits), pack_bits(codes.T.contiguous(), bits))
    words = pack_bits(codes, bits)
    spread = torch.zeros(words.shape[0], 3 * words.shape[1], dtype=torch.int32)
    spread[:, ::3] = words
    assert torch.equal(unpack_bits(spread[:, ::3], bits, 9), codes)
    column = words.T.contiguous().T[:, :1]  # one word per row, rows one element apart or more
    assert torch.equal(unpack_bits(column, bits, 32 // bits), unpack_bits(column.clone(), bits, 32 // bits))


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_transposed_single_word(bits):
    words = torch.arange(5, dtype=torch.int32).reshape(1, 5)
    expected = torch.tensor([[word & 2**bits - 1] for word in range(5)], dtype=torch.uint8)
    assert torch.equal(unpack_bits(words.T.contiguous(), bits, 1), expected)


@pytest.mark.parametrize("bits, count, words", [(4, 8, 1), (4, 9, 2), (3, 32, 3), (1, 33, 2), (8, 0, 0), (5, 1, 1)])
def test_words_for(bits, count, words):
    assert words_for(count, bits) == words
