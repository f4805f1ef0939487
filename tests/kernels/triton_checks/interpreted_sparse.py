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


@pytest.fixture
def short(monkeypatch):
    """Ranges of a few groups, so that rows lie in several and ranges in one row."""
    monkeypatch.setattr(groups, "_LEAST", 5)
    monkeypatch.setattr(groups, "_PROGRAMS", 4)
    monkeypatch.setattr(groups, "BLOCK", 8)


@pytest.mark.parametrize("bits", groups.WIDTHS)
def test_groups(bits, short):
    for number, group in enumerate((16, 32, 64, 128)):
        scheme = Scheme(bits, group, number % 2 == 0, ("bfloat16", "float16", "float32")[number % 3])
        weight = sparse_weight((7, 333), f"1x{group}", scheme)
        check(TritonGroups(), weight, activations(1 + 2 * (number % 2), 333, HALF[number % 2]))


def test_groups_of_rows_that_begin_and_end_anywhere(short):
    weight = sparse_weight((13, 160), "1x16", Scheme(4, 16))
    for rows in ([0, 1, 5, 11, 12], range(1, 13), range(12), [], range(13)):
        mask = weight.mask.clone()
        mask[6] = True
        mask[list(rows)] = False  # nothing survives there
        found = Sparse(weight.values, mask, "1x16").normalized()
        check(TritonGroups(), found, activations(1, 160, torch.float32))


def test_groups_are_summed_in_one_order_and_not_in_the_length_of_ranges(short, monkeypatch):
    weight = sparse_weight((3, 320), "1x16", Scheme(4, 16))
    x = activations(2, 320, torch.float16)
    first, again = check(TritonGroups(), weight, x), run(TritonGroups(), weight, x, True)
    assert torch.equal(first, again)
    monkeypatch.setattr(groups, "_LEAST", 10**6)
    assert torch.allclose(run(TritonGroups(), weight, x, True), first, rtol=1e-2, atol=1e-2)


def test_groups_of_many_tokens_and_what_is_not_finite():
    weight = sparse_weight((5, 64), "1x32", Scheme(4, 32))
    y = run(TritonGroups(), weight, activations(groups.MOST_TOKENS + 1, 64, torch.float32))
    assert y.shape == (groups.MOST_TOKENS + 1, 5)
    weight.mask[:, :32], weight.mask[:, 32:] = True, False
    weight = Sparse(weight.values, weight.mask, "1x32").normalized()
    x = activations(3, 64, torch.float16)
    clean = run(TritonGroups(), weight, x)
    x[1, 3], x[2, 40] = torch.nan, torch.inf
    y = run(TritonGroups(), weight, x)
    assert y[1].isnan().all() and torch.equal(y[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("pattern, columns", [("unstructured", 173), ("unstructured", 1056), ("2:4", 172)])
def test_bitmaps(pattern, columns):
    for number, share in enumerate((0.5, 0.0, 0.9) if columns == 173 else (0.5,)):
        dtype = HALF[number % 2]
        weight = sparse_weight((7, columns), pattern, str(dtype).removeprefix("torch."), share)
        for tokens in (1, 17):
            check(TritonBitmap(), weight, activations(tokens, columns, dtype), bias=bool(number))


def test_bitmaps_of_several_blocks_shared_by_programs(monkeypatch):
    monkeypatch.setattr(bitmap, "ROWS", 16)
    weight = sparse_weight((37, 1500), "unstructured", "bfloat16", 0.7)
    x = activations(3, 1500, torch.bfloat16)
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
            names = ("words", "start", "first", "number", "scale", "zero")
            torch.library.opcheck(groups.group_linear, (x, *(t[n] for n in names), None, 4, 32, 0.0), test_utils=tests)
        else:
            torch.library.opcheck(
                bitmap.bitmap_linear, (x, t["mask"], t["offset"], t["values"], None), test_utils=tests
            )
        module._ops[x.dtype, x.device] = op  # what the dispatch chooses on a GPU
        y = module(x)
        assert excess(y, x, weight.dequantize(), None) <= 1
        with torch.no_grad():
            assert torch.equal(torch.compile(module, backend="aot_eager", fullgraph=True)(x), y)
