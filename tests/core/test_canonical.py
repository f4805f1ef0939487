import pytest
import torch

from trifold.core.canonical import Chain, Dense, LowRank, Quantized, Sparse, Split, Sum
from trifold.core.scheme import Scheme


def codes(rows):
    return torch.tensor(rows, dtype=torch.uint8)


def dense(*rows):
    return Dense(torch.tensor(rows, dtype=torch.float32))


def test_dense():
    weight = Dense(torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16))
    assert weight.shape == (1, 2)
    assert weight.dequantize().dtype == torch.float32 and weight.dequantize().tolist() == [[1.5, -2.0]]
    with pytest.raises(ValueError, match="two dimensions"):
        _ = Dense(torch.zeros(3)).shape


def test_quantized_asymmetric():
    scale = torch.tensor([[0.5, 2.0], [1.0, 4.0]]).bfloat16()
    weight = Quantized(codes([[0, 3, 7], [1, 2, 3]]), scale, codes([[1, 4], [0, 3]]), Scheme(3, 2, False))
    assert weight.shape == (2, 3)
    assert weight.dequantize().tolist() == [[-0.5, 1.0, 6.0], [1.0, 2.0, 0.0]]


def test_quantized_symmetric():
    weight = Quantized(codes([[0, 8, 15]]), torch.tensor([[0.5]]), None, Scheme(4, "channel", True, "float32"))
    assert weight.dequantize().tolist() == [[-4.0, 0.0, 3.5]]
    one_bit = Quantized(codes([[0, 1]]), torch.tensor([[3.0]]), None, Scheme(1, "channel", True, "float32"))
    assert one_bit.dequantize().tolist() == [[-1.5, 1.5]]


def test_quantized_with_one_scale():
    scheme = Scheme(8, "tensor", False)
    weight = Quantized(codes([[0, 255], [128, 1]]), torch.full((1, 1), 2.0), codes([[128]]), scheme)
    assert weight.dequantize().tolist() == [[-256.0, 254.0], [0.0, -254.0]]


def test_quantized_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"scale has shape \(2, 1\), the scheme says \(2, 2\)"):
        Quantized(codes([[0, 1, 2]] * 2), torch.ones(2, 1), None, Scheme(4, 2, True))
    for symmetric, zero in ((True, codes([[1]])), (False, None)):
        with pytest.raises(ValueError, match="zero_point"):
            Quantized(codes([[0, 1]]), torch.ones(1, 1), zero, Scheme(4, 2, symmetric))


def test_low_rank():
    weight = LowRank(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0, 5.0]]).bfloat16())
    assert weight.shape == (2, 3) and weight.rank == 1
    assert weight.dequantize().tolist() == [[3.0, 4.0, 5.0], [6.0, 8.0, 10.0]]
    with pytest.raises(ValueError, match="ranks differ"):
        LowRank(torch.zeros(2, 2), torch.zeros(3, 4))


def test_sparse():
    weight = Sparse(dense([1.0, float("nan"), 3.0]), torch.tensor([[True, False, True]]))
    assert weight.shape == (1, 3) and weight.dequantize().tolist() == [[1.0, 0.0, 3.0]]


@pytest.mark.parametrize(
    "pattern, mask, holds",
    [
        ("2:4", [1, 0, 1, 0, 0, 0, 0, 1], True),
        ("2:4", [1, 0, 1, 1, 0, 0, 0, 0], False),
        ("2:4", [0, 0, 0, 0, 1, 1], True),
        ("1:4", [0, 0, 0, 0, 1, 1], False),
        ("1x3", [1, 1, 1, 0, 0, 0, 1, 1], True),
        ("1x3", [1, 1, 1, 0, 0, 0, 1, 0], False),
        ("1x3", [1, 1, 0, 0, 0, 0], False),
        ("1x4", [1, 1], True),
        ("unstructured", [1, 0, 1, 1], True),
    ],
)
def test_patterns(pattern, mask, holds):
    tensor, values = torch.tensor([mask], dtype=torch.bool), Dense(torch.ones(1, len(mask)))
    if holds:
        assert torch.equal(Sparse(values, tensor, pattern).dequantize(), tensor.float())
    else:
        with pytest.raises(ValueError, match="does not follow the pattern"):
            Sparse(values, tensor, pattern)


def test_sparse_refuses_other_masks():
    for mask in (torch.ones(1, 3, dtype=torch.bool), torch.ones(1, 2)):
        with pytest.raises(ValueError, match="mask must be bool"):
            Sparse(dense([1.0, 2.0]), mask)


def test_chain():
    weight = Chain((dense([1.0, 2.0]), dense([1.0], [1.0]), dense([2.0, 0.0, 1.0])))
    assert weight.shape == (1, 3) and weight.dequantize().tolist() == [[6.0, 0.0, 3.0]]
    with pytest.raises(ValueError, match="do not chain"):
        Chain((dense([1.0, 2.0]), dense([1.0, 2.0])))


def test_sum():
    low = LowRank(torch.tensor([[1.0], [1.0]]), torch.tensor([[10.0, 20.0]]))
    weight = Sum((dense([1.0, 2.0], [3.0, 4.0]), low))
    assert weight.shape == (2, 2) and weight.dequantize().tolist() == [[11.0, 22.0], [13.0, 24.0]]
    with pytest.raises(ValueError, match="different shapes"):
        Sum((dense([1.0]), dense([1.0, 2.0])))


def test_split_by_rows_and_by_columns():
    index = torch.tensor([1, 0, 1])
    rows = Split(0, index, (dense([1.0, 2.0]), dense([3.0, 4.0], [5.0, 6.0])))
    assert rows.shape == (3, 2) and rows.dequantize().tolist() == [[3.0, 4.0], [1.0, 2.0], [5.0, 6.0]]
    columns = Split(1, index, (dense([1.0], [2.0]), dense([3.0, 4.0], [5.0, 6.0])))
    assert columns.shape == (2, 3) and columns.dequantize().tolist() == [[3.0, 1.0, 4.0], [5.0, 2.0, 6.0]]


@pytest.mark.parametrize("index", [[0, 0, 1], [0, 1], [0, 1, 2], [1, 1, 1]])
def test_split_refuses_an_index_that_does_not_fit(index):
    with pytest.raises(ValueError, match="index gives the parts"):
        Split(0, torch.tensor(index), (dense([1.0]), dense([2.0], [3.0])))
    with pytest.raises(ValueError, match="index gives the parts"):
        Split(0, torch.tensor([0, 1]), (dense([1.0]), dense([2.0, 3.0])))


def test_nesting():
    packed = Quantized(codes([[3, 1], [0, 2]]), torch.ones(2, 1), None, Scheme(2, 2, True, "float32"))
    weight = Sum((Sparse(packed, torch.tensor([[True, False], [True, True]])), Chain((packed, packed))))
    plain = torch.tensor([[1.0, -1.0], [-2.0, 0.0]])
    assert torch.equal(weight.dequantize(), plain * torch.tensor([[1.0, 0.0], [1.0, 1.0]]) + plain @ plain)
