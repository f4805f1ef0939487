import itertools
import json

import pytest
import torch

from tests.sparse_samples import KINDS, TWO_LEVELS, sparse_weight
from trifold.core.canonical import Dense, Quantized, Sparse
from trifold.core.errors import InputError
from trifold.core.row_scales import from_row_scales, to_row_scales
from trifold.core.scheme import Scheme
from trifold.formats import FORMATS, bits_per_weight, digest, format_for, label, layout, pack, stored_bytes, unpack
from trifold.formats.bitstream import codes_at, pack_bits, unpack_range
from trifold.formats.sparse24 import index_of, mask_of

SHAPES = [(1, 8), (7, 44), (8, 32), (33, 172), (5, 1004)]


def fits(shape, pattern):
    return ":" not in pattern or shape[1] % int(pattern.split(":")[1]) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.95, 1.0])
def test_unpack_inverts_pack_as_the_layout_says(kind, share):
    pattern, values, name = KINDS[kind]
    for shape in SHAPES:
        if not fits(shape, pattern):
            continue
        weight = sparse_weight(shape, pattern, values, share)
        assert format_for(weight) == name
        fmt = FORMATS.get(name)
        spec, tensors = json.loads(json.dumps(fmt.describe(weight))), pack(weight)
        assert {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()} == layout(spec)
        assert stored_bytes(spec) == sum(t.nbytes for t in tensors.values())
        assert all(t.is_contiguous() for t in tensors.values())
        assert tensors["weight"].dim() == 1 and tuple(tensors["weight"].shape) != shape
        before, back = digest(tensors), unpack(tensors, spec)
        assert isinstance(back, Sparse) and back.pattern == pattern and torch.equal(back.mask, weight.mask)
        assert torch.equal(back.dequantize(), weight.dequantize())
        assert digest(tensors) == before == digest(pack(back))
        if isinstance(weight.values, Quantized):
            assert torch.equal(back.values.codes, weight.values.codes) and back.values.scheme == values
            assert torch.equal(back.values.scale, weight.values.scale)
            assert values.symmetric or torch.equal(back.values.zero_point, weight.values.zero_point)
        else:
            assert torch.equal(back.values.values, weight.values.values)


@pytest.mark.parametrize("kind", KINDS)
def test_some_rows_are_those_of_the_whole(kind):
    pattern, values, name = KINDS[kind]
    weight = sparse_weight((33, 1024), pattern, values)
    spec, tensors, whole = FORMATS.get(name).describe(weight), pack(weight), weight.dequantize()
    for start, stop in ((0, 33), (0, 1), (32, 33), (5, 19), (7, 7)):
        part = FORMATS.get(name).rows(tensors, spec, slice(start, stop))
        assert torch.equal(part.dequantize(), whole[start:stop])
    index = torch.tensor([32, 0, 5, 5, 31])
    assert torch.equal(FORMATS.get(name).rows(tensors, spec, index).dequantize(), whole[index])


def test_what_is_stored_where_a_weight_is_dropped_does_not_matter():
    weight = sparse_weight((6, 64), "1x16", Scheme(4, 16))
    values = weight.values
    noise = torch.randint(0, 16, values.codes.shape, dtype=torch.uint8)
    codes = torch.where(weight.mask, values.codes, noise)
    scale = torch.where(weight.mask[:, ::16], values.scale, 7.0)
    other = Sparse(Quantized(codes, scale, values.zero_point, values.scheme), weight.mask, "1x16")
    assert digest(pack(other)) == digest(pack(weight)) and torch.equal(other.dequantize(), weight.dequantize())


def test_bits_by_hand():
    """Of 4096 inputs: codes, scales, zero-points, columns, row starts."""
    row_start = 32 * 65 / 64
    for size, share, expected in (
        (16, 0.5, 0.5 * (4 + (16 + 4 + 8) / 16)),
        (32, 0.5, 0.5 * (4 + (16 + 4 + 8) / 32)),
        (16, 0.25, 0.75 * (4 + (16 + 4 + 8) / 16)),
    ):
        weight = sparse_weight((64, 4096), f"1x{size}", Scheme(4, size), share, "row")
        spec = FORMATS.get("group_sparse_int").describe(weight)
        assert bits_per_weight(spec) == pytest.approx(expected + row_start / 4096, abs=1e-9)
    two = sparse_weight((64, 4096), "1x16", TWO_LEVELS, 0.5, "row")
    spec = FORMATS.get("group_sparse_int").describe(two)
    assert spec["scale_bits"] == 8 and pack(two)["weight_scale"].dtype == torch.uint8
    assert bits_per_weight(spec) == pytest.approx(0.5 * (4 + (8 + 4 + 8) / 16) + (row_start + 16) / 4096, abs=1e-9)
    wide = sparse_weight((2, 16 * 512), "1x16", Scheme(4, 16), 0.5, "row")
    assert pack(wide)["weight_column"].dtype == torch.int16
    assert bits_per_weight(FORMATS.get("sparse24").describe(sparse_weight((8, 128), "2:4", "bfloat16"))) == 9
    w24 = FORMATS.get("sparse24").describe(sparse_weight((64, 256), "2:4", Scheme(4, 128)))
    assert bits_per_weight(w24) == 2 + 1 + (16 + 4) / 128
    for share in (0.5, 0.75):
        spec = FORMATS.get("bitmask").describe(sparse_weight((64, 4096), "unstructured", "bfloat16", share))
        assert bits_per_weight(spec) == pytest.approx(16 * (1 - share) + 1 + row_start / 4096)


@pytest.mark.parametrize("seed", range(5))
def test_scales_of_two_levels(seed):
    """They are near, keep their form, and tell their parts."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** (2 * torch.randn(33, 1, generator=generator)) * (0.02 + torch.rand(33, 7, generator=generator))
    kept = torch.rand(33, 7, generator=generator) < 0.6
    kept[0], kept[1, 1:], kept[2] = False, False, True
    found = to_row_scales(scale, kept)
    assert torch.equal(found[~kept], scale[~kept])
    top = scale.masked_fill(~kept, 0).amax(1, keepdim=True).expand_as(scale)
    assert ((found - scale).abs()[kept] <= (top / 255 * 0.51 + scale / 256)[kept]).all()
    codes, row = from_row_scales(found, kept)
    assert torch.equal((codes * row.float()[:, None])[kept], found[kept]) and row.dtype == torch.bfloat16
    assert (codes.amax(1)[kept.any(1)] == 255).all() and (codes[kept] > 0).all()
    assert torch.equal(to_row_scales(found, kept), found)
    assert from_row_scales(found * (1 + 1e-3 * torch.rand(33, 7, generator=generator)), kept) is None


def test_labels():
    found = {
        kind: label(FORMATS.get(name).describe(sparse_weight((8, 64), p, v))) for kind, (p, v, name) in KINDS.items()
    }
    assert found["bitmask bf16"] == "50% zeros bfloat16"
    assert found["bitmask int4"] == "50% zeros int4 g32 asym"
    assert found["bitmask real"] == "50% zeros int4 g32 affine"
    assert found["bitmask nf4 groups"] == "50% zeros 1x16 nf4 g16"
    assert found["bitmask int5 tensor"] == "50% zeros 4:8 int5 tensor asym"
    assert found["2:4 int4"] == "2:4 int4 g32 asym"
    assert found["group int4 scales8"] == "int4 g16 asym, 8-bit scales, 50% of groups dropped"
    assert found["group int4"] == "int4 g16 asym, 50% of groups dropped"


def test_every_choice_of_two_in_four():
    choices = list(itertools.combinations(range(4), 2))
    mask = torch.zeros(1, 24, dtype=torch.bool)
    for i, places in enumerate(choices):
        for place in places:
            mask[0, 4 * i + place] = True
    assert index_of(mask).tolist() == [[a | b << 2 for a, b in choices]]
    assert index_of(mask).tolist() == [[0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110]]
    assert torch.equal(mask_of(index_of(mask)), mask)


def test_what_sparse24_cannot_hold_goes_to_the_bitmask():
    weight = sparse_weight((4, 16), "2:4", "bfloat16")
    fewer = weight.mask.clone()
    fewer[0, :4] = False
    assert format_for(Sparse(weight.values, fewer, "2:4")) == "bitmask"
    with pytest.raises(InputError, match="sparse24 holds rows of whole fours, not of 18; bitmask holds any"):
        layout({"format": "sparse24", "shape": [4, 18], "dtype": "bfloat16"})


def test_rows_of_too_many_groups():
    spec = {"format": "group_sparse_int", "shape": [1, 2**16], "groups": 3}
    spec |= {"bits": 4, "group_size": 1, "symmetric": True, "scale_dtype": "bfloat16"}
    with pytest.raises(InputError, match=r"holds rows of 32768 groups at most.*use a larger group_size"):
        layout(spec)


def test_no_format_holds_a_sparse_low_rank():
    from trifold.core.canonical import LowRank

    with pytest.raises(TypeError, match="no format stores a Sparse"):
        format_for(Sparse(LowRank(torch.ones(4, 1), torch.ones(1, 8)), torch.ones(4, 8, dtype=torch.bool)))
    double = Sparse(Dense(torch.ones(4, 8, dtype=torch.float64)), torch.ones(4, 8, dtype=torch.bool))
    with pytest.raises(TypeError, match="no format stores"):
        format_for(double)


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_from_the_middle_of_a_stream(bits):
    codes = torch.randint(0, 2**bits, (1, 301), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    words = pack_bits(codes, bits)[0]
    for first, count in ((0, 301), (0, 0), (31, 2), (33, 64), (300, 1), (301, 0), (96, 32)):
        assert torch.equal(unpack_range(words, bits, first, count), codes[0, first : first + count])
    places = torch.tensor([[300, 0], [31, 32]])
    assert torch.equal(codes_at(words, bits, places), codes[0][places])
