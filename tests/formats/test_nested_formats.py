import copy

import pytest
import torch
from safetensors.torch import load, save

from tests.nested import NESTED, dense, index, rounded
from trifold.core.canonical import LowRank, Split
from trifold.core.errors import InputError
from trifold.formats import (
    bits_per_weight,
    describe,
    digest,
    label,
    layout,
    pack,
    rounds_input,
    stored_bytes,
    unpack,
)


@pytest.mark.parametrize("name", NESTED)
def test_bit_exact_both_ways(name):
    weight = NESTED[name]
    spec, tensors = describe(weight), pack(weight)
    assert {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()} == layout(spec)
    assert list(spec["shape"]) == list(weight.shape)
    again = unpack(load(save(tensors)), copy.deepcopy(spec))  # through a file
    assert describe(again) == spec and digest(pack(again)) == digest(tensors)
    assert again.dequantize().numpy().tobytes() == weight.dequantize().numpy().tobytes()
    assert stored_bytes(spec) == sum(t.nbytes for t in tensors.values())
    assert rounds_input(spec) is (", a" in name and not name.startswith(("dense", "low rank", "chain,")))


@pytest.mark.parametrize("name", [name for name in NESTED if ", a" not in name])
def test_no_dense_weight_has_the_shape(name):
    """A loader without Trifold has to find `weight` and stop."""
    shape, _ = layout(describe(NESTED[name]))["weight"]
    assert len(shape) == 1


def test_bits_count_the_index():
    weight = Split(1, index(96, 32), (rounded(64, 96, 8, "channel", symmetric=True), dense(64, 32)))
    expected = 8 * (64 * 96 + 2 * 64 + 2 * 64 * 32 + 128 // 8) / (64 * 128)
    assert bits_per_weight(describe(weight)) == expected


def test_the_index_takes_as_many_bits_as_it_needs():
    for parts, bits in ((1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (256, 8)):
        weight = Split(0, index(*[1] * parts), tuple(dense(1, 3) for _ in range(parts)))
        assert layout(describe(weight))["weight"] == ((-(-parts * bits // 32),), torch.int32)
        assert torch.equal(unpack(pack(weight), describe(weight)).index, weight.index)
    many = Split(0, index(*[1] * 257), tuple(dense(1, 3) for _ in range(257)))
    with pytest.raises(TypeError, match="no format stores a Split"):
        describe(many)


def test_labels_say_what_is_inside():
    assert label(describe(NESTED["columns, a8"])) == ("split(41 columns int8 channel sym a8 | 2 columns bfloat16)")
    assert label(describe(NESTED["sum"])) == "sum(int4 g16 asym | rank 3 float16)"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("columns", lambda spec: spec["shape"].__setitem__(1, 44)),
        ("columns", lambda spec: spec["parts"].pop()),
        ("rows", lambda spec: spec["parts"][0]["shape"].__setitem__(1, 42)),
        ("sum", lambda spec: spec["shape"].__setitem__(0, 8)),
        ("chain", lambda spec: spec["parts"].pop(1)),
        ("chain", lambda spec: spec["parts"].clear()),
        ("sum", lambda spec: spec.update(input={"bits": 8})),
        ("two deep", lambda spec: spec["parts"][0]["parts"][1].update(format="later")),
    ],
)
def test_parts_that_do_not_fit_are_refused(name, change):
    spec = copy.deepcopy(describe(NESTED[name]))
    change(spec)
    with pytest.raises(InputError):
        layout(spec)


def test_factors_of_different_dtypes_have_no_format():
    with pytest.raises(TypeError, match="no format stores a LowRank"):
        describe(LowRank(torch.zeros(2, 1), torch.zeros(1, 2).half()))
