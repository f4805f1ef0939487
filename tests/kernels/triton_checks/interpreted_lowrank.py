"""Values of products of low rank, in Triton's interpreter. Run by `test_triton.py`, in a process of its own."""

import pytest
import torch
from packed_samples import activations, other, quantized

from trifold.core.canonical import Chain, Dense, Identity, LowRank, Split, Sum
from trifold.formats import describe, digest, pack
from trifold.kernels import PackedLinear, dispatch, packed_linear
from trifold.kernels.low_rank import fused as fusing
from trifold.kernels.low_rank import ops
from trifold.kernels.weight_only.planes import op as planes_op

HALF = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    resolve = dispatch.resolve
    monkeypatch.setattr(planes_op, "no_gpu", lambda device: None)
    monkeypatch.setattr(fusing, "no_gpu", lambda device: None)
    monkeypatch.setattr(fusing, "on_gpu", lambda device: True)
    cuda = torch.device("cuda")
    monkeypatch.setattr(packed_linear, "resolve", lambda spec, dtype, device, *rest: resolve(spec, dtype, cuda, *rest))


def layer(weight, bias=True):
    module = PackedLinear(describe(weight), bias, torch.float32)
    values = {"bias": torch.linspace(-1, 1, weight.shape[0])} if bias else {}
    module.load_state_dict(pack(weight) | values)
    return module


def check(weight, x, bias=True):
    """That it is one operator, and near the exact product: z is rounded to x's dtype or to fp16, y to x's dtype."""
    module, seen = layer(weight, bias), []
    before = digest(module.portable())
    real = fusing.low_rank_linear
    fusing.low_rank_linear = lambda *a: seen.append(1) or real(*a)
    try:
        y = module(x)
    finally:
        fusing.low_rank_linear = real
    assert seen == [1] and y.dtype == x.dtype and y.shape == (len(x), weight.shape[0])
    factors = weight.parts[1] if isinstance(weight, Sum) else weight
    left, right = (factors.left, factors.right) if isinstance(factors, LowRank) else factors.parts
    left, right = (getattr(part, "dequantize", lambda part=part: part)().double() for part in (left, right))
    base = weight.parts[0].dequantize().double() if isinstance(weight, Sum) else torch.zeros(1, x.shape[1]).double()
    z = x.double() @ right.T
    exact, size = z @ left.T + x.double() @ base.T, z.abs() @ left.abs().T
    inner = x.double().abs() @ right.abs().T @ left.abs().T + x.double().abs() @ base.abs().T
    if bias:
        exact, size = exact + module.bias.double(), size + module.bias.double().abs()
    eps = torch.finfo(x.dtype).eps
    allowed = eps * exact.abs() + eps * size + (x.shape[1] * 2**-24 + 2**-11) * inner
    assert ((y.double() - exact).abs() <= allowed).all()
    assert digest(module.portable()) == before
    return y


def pivoted(rows, rank, leaf):
    index = torch.ones(rows, dtype=torch.int64)
    index[torch.randperm(rows, generator=torch.Generator().manual_seed(rank))[:rank]] = 0
    return Split(0, index, (Identity(rank), leaf))


def dense(rows, columns, dtype):
    return Dense(torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(dtype) / columns**0.5)


@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_chains(bits):
    for number, dtype in enumerate(HALF):
        left, right = (quantized(*s, bits, 32, number == 0) for s in ((70, 41), (41, 300)))
        check(Chain((left, right)), activations((1, 11)[number], 300, dtype), bias=number == 0)


def test_chains_of_pivots_and_other_rows():
    for number, dtype in enumerate(HALF):
        left, right = quantized(70, 40, 4, 32, False), quantized(40, 300, 4, 128, False)
        check(Chain((pivoted(110, 40, left), right)), activations(1 + 8 * number, 300, dtype))
        check(Chain((pivoted(60, 40, dense(20, 40, dtype)), dense(40, 172, dtype))), activations(3, 172, dtype))


def test_sums_of_a_packed_weight_and_factors():
    for number, dtype in enumerate(HALF):
        base = quantized(70, 300, (2, 3)[number], 64, number == 1)
        for bits in (4, 3):
            factors = Chain((quantized(70, 33, bits, 32, False), quantized(33, 300, bits, 64, False)))
            check(Sum((base, factors)), activations((1, 11)[number], 300, dtype), bias=number == 1)
        low = LowRank(dense(70, 12, dtype).values, dense(12, 300, dtype).values)
        check(Sum((base, low)), activations(3, 300, dtype))
    check(Sum((other(70, 300, 64, grid="nf4"), factors)), activations(2, 300, torch.float16))


def test_sums_of_shares_are_added_up_in_their_order(monkeypatch):
    base = quantized(70, 128 * 5 - 7, 4, 128, False)
    factors = Chain((quantized(70, 33, 4, 32, False), quantized(33, base.shape[1], 4, 128, False)))
    x = activations(3, base.shape[1], torch.float16)
    alone = check(Sum((base, factors)), x)
    monkeypatch.setattr(ops, "share", lambda *_: 3)
    first, again = check(Sum((base, factors)), x), check(Sum((base, factors)), x)
    assert torch.equal(first, again) and torch.allclose(first, alone, rtol=1e-2, atol=1e-2)


def test_what_else_there_is_runs_part_by_part():
    table = other(33, 64, 32, grid="nf4")
    others = {
        "a table on the left": Chain((table, quantized(64, 96, 4, 32, True))),
        "three factors": Chain((table, quantized(64, 64, 4, 32, True), quantized(64, 96, 4, 32, True))),
        "a sum of two weights": Sum((quantized(33, 96, 4, 32, True), quantized(33, 96, 2, 32, True))),
    }
    x = activations(2, 96, torch.float16)
    for weight in others.values():
        module = layer(weight, False)
        assert fusing.fused(module, x, None) is None
        torch.testing.assert_close(module(x).float(), x.float() @ weight.dequantize().T, rtol=2e-2, atol=2e-2)
    many = activations(fusing.MOST_TOKENS + 1, 96, torch.float16)
    chain = Chain((quantized(33, 64, 4, 32, True), quantized(64, 96, 4, 32, True)))
    assert fusing.fused(layer(chain, False), many, None) is None


def test_the_operator_is_as_torch_wants_it():
    factors = Chain((quantized(35, 33, 4, 32, False), quantized(33, 96, 4, 32, False)))
    module, x = layer(Sum((quantized(35, 96, 4, 32, False), factors))), activations(2, 96, torch.float16)
    seen = []
    real, fusing.low_rank_linear = fusing.low_rank_linear, lambda *a: seen.append(a) or real(*a)
    y = module(x)
    fusing.low_rank_linear = real
    torch.library.opcheck(real, seen[0], test_utils=("test_schema", "test_faketensor"))
    with torch.no_grad():
        assert torch.equal(torch.compile(module, backend="aot_eager", fullgraph=True)(x), y)
