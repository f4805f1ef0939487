"""Values of the sparse kernels, in Triton's interpreter. Run by `test_triton.py`, in a process of its own."""

import pytest
import torch
from packed_samples import activations, excess, layer

from tests.sparse_samples import sparse_weight
from trifold.core.canonical import Sparse
from trifold.core.scheme import Scheme
from trifold.formats import digest
from trifold.kernels.sparse.gpu import bitmap, groups
from trifold.kernels.sparse.gpu.bitmap import TritonBitmap
from trifold.kernels.sparse.gpu.groups import TritonGroups

HALF = (torch.float16, torch.bfloat16)


def run(op, weight, x, bias=False):
    module = layer(weight, bias)
    before = digest(module.portable())
    tensors = op.prepare(module.portable(), module.spec)
    assert digest(op.restore(tensors, module.spec)) == before
    return op.run(x, tensors, module.spec, module.bias.to(x.dtype) if bias else None)


def check(op, weight, x, bias=True):
    y = run(op, weight, x, bias)
    assert y.dtype == x.dtype and y.shape == (len(x), weight.shape[0])
    assert excess(y, x, weight.dequantize(), layer(weight, bias).bias if bias else None) <= 1
    return y


@pytest.mark.parametrize("bits", groups.WIDTHS)
def test_groups(bits):
    for number, group in enumerate((16, 32, 64, 128)):
        scheme = Scheme(bits, group, number % 2 == 0, ("bfloat16", "float16", "float32")[(number + bits) % 3])
        weight = sparse_weight((37 if number == 1 else 7, 333), f"1x{group}", scheme)
        for tokens in (1, 3) if bits == 4 else (2,):
            check(TritonGroups(), weight, activations(tokens, 333, HALF[number % 2]))


@pytest.mark.parametrize("group", (16, 32))
def test_groups_of_as_many_tokens_as_a_block_has(group):
    weight = sparse_weight((35, 300), f"1x{group}", Scheme(4, group))
    for tokens in (2, 4, 8, 9):
        check(TritonGroups(), weight, activations(tokens, 300, torch.float16))


def test_groups_of_rows_with_nothing_or_everything():
    weight = sparse_weight((67, 160), "1x16", Scheme(4, 16))
    for rows in ([0, 1, 31, 66], range(32, 64), range(66), [], range(67)):
        mask = weight.mask.clone()
        mask[6] = True
        mask[list(rows)] = False  # nothing survives there
        found = Sparse(weight.values, mask, "1x16").normalized()
        check(TritonGroups(), found, activations(1, 160, torch.float16), bias=False)


def test_groups_are_summed_in_one_order(monkeypatch):
    weight = sparse_weight((3, 1000), "1x16", Scheme(4, 16))
    x = activations(2, 1000, torch.float16)
    alone = check(TritonGroups(), weight, x)
    for parts in (3, 9):  # the last program has two tiles of eight; or none
        monkeypatch.setattr(groups, "share", lambda *_, parts=parts: parts)
        first, again = check(TritonGroups(), weight, x), run(TritonGroups(), weight, x, True)
        assert torch.equal(first, again)
        assert torch.allclose(alone, first, rtol=1e-2, atol=1e-2)


def test_groups_of_many_tokens_and_what_is_not_finite():
    weight = sparse_weight((5, 64), "1x32", Scheme(4, 32))
    y = run(TritonGroups(), weight, activations(groups.MOST_TOKENS + 1, 64, torch.float32))
    assert y.shape == (groups.MOST_TOKENS + 1, 5)
    for bad in (torch.nan, torch.inf):
        x = activations(3, 64, torch.float16)
        clean = run(TritonGroups(), weight, x)
        x[1, 3] = bad
        y = run(TritonGroups(), weight, x)
        assert not y[1].isfinite().any() and torch.equal(y[[0, 2]], clean[[0, 2]])


def test_groups_of_activations_of_any_magnitude():
    weight = sparse_weight((33, 320), "1x16", Scheme(4, 16))
    for magnitude in (2.0**-100, 1e-6, 3e4, 2.0**100):
        x = activations(4, 320, torch.float32)
        x[1] *= torch.linspace(0, 1, 320) ** 4  # small ones beside large ones
        x[2] = 0
        check(TritonGroups(), weight, (x * magnitude).bfloat16(), bias=False)


@pytest.mark.parametrize("pattern, columns", [("unstructured", 173), ("unstructured", 1056), ("2:4", 172)])
def test_bitmaps(pattern, columns):
    for number, share in enumerate((0.5, 0.0, 0.9) if columns == 173 else (0.5,)):
        dtype = HALF[number % 2]
        weight = sparse_weight((7, columns), pattern, str(dtype).removeprefix("torch."), share)
        for tokens in (1, 17):
            check(TritonBitmap(), weight, activations(tokens, columns, dtype), bias=bool(number))


def test_bitmaps_of_several_blocks_shared_by_programs(monkeypatch):
    monkeypatch.setattr(bitmap, "ROWS", 16)
    weight = sparse_weight((20, 1100), "unstructured", "bfloat16", 0.7)
    x = activations(3, 1100, torch.bfloat16)
    monkeypatch.setattr(bitmap, "share_of", lambda *_: 2)  # the last program has one chunk of three
    first, again = check(TritonBitmap(), weight, x), run(TritonBitmap(), weight, x, True)
    assert torch.equal(first, again)
    monkeypatch.setattr(bitmap, "share_of", lambda *_: 3)
    assert torch.allclose(check(TritonBitmap(), weight, x).float(), first.float(), rtol=2e-2, atol=2e-2)


def test_the_operators_are_as_torch_wants_them():
    tests = ("test_schema", "test_faketensor")
    for op, weight in (
        (TritonGroups(), sparse_weight((3, 64), "1x32", Scheme(4, 32))),
        (TritonBitmap(), sparse_weight((3, 64), "unstructured", "float16")),
    ):
        module = layer(weight)
        t, x = op.prepare(module.portable(), module.spec), activations(2, 64, torch.float16)
        if isinstance(op, TritonGroups):
            torch.library.opcheck(
                groups.group_linear, (x, t["words"], t["meta"], t["map"], None, 3, 4, 32), test_utils=tests
            )
        else:
            torch.library.opcheck(
                bitmap.bitmap_linear, (x, t["mask"], t["offset"], t["values"], None), test_utils=tests
            )
        module._ops[x.dtype, x.device] = op  # what the dispatch chooses on a GPU
        y = module(x)
        assert excess(y, x, weight.dequantize(), None) <= 1
        with torch.no_grad():
            assert torch.equal(torch.compile(module, backend="aot_eager", fullgraph=True)(x), y)
