"""bfloat16 weights as the instructions take them."""

import copy
from pathlib import Path

import pytest
import torch
from packed_samples import strict

from trifold.core.canonical import Dense, LowRank
from trifold.core.native import NotCompiledError
from trifold.core.native import compiled as compiled_source
from trifold.formats import describe, pack
from trifold.kernels import PackedLinear
from trifold.kernels.native import VARIANTS, stages
from trifold.kernels.native import place as places
from trifold.kernels.weight_only.halves import Halves

SHAPES = [(6, 42), (123, 431), (1, 7), (7, 1), (64, 96)]
CPU = torch.device("cpu")
RUNNABLE = [name for name in VARIANTS if stages.lacking(name) is None]
compiled = pytest.mark.skipif(not RUNNABLE, reason="no C compiler")


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).bfloat16()


def module_of(canonical) -> PackedLinear:
    module = PackedLinear(describe(canonical), False, torch.bfloat16)
    module.load_state_dict(pack(canonical))
    return module


@pytest.mark.parametrize("variant", RUNNABLE)
@pytest.mark.parametrize("rows, columns", SHAPES)
def test_products_are_exact_but_for_sums_and_the_result(variant, rows, columns):
    op, weight = Halves(variant), Dense(numbers(rows, columns))
    spec, portable = describe(weight), pack(weight)
    runtime = op.prepare(portable, spec)
    assert torch.equal(op.restore(runtime, spec)["weight"], portable["weight"])
    assert torch.equal(op.rows(runtime, spec, 0, rows, torch.float32), weight.dequantize())
    assert torch.equal(op.rows(runtime, spec, rows - 1, rows, torch.bfloat16), weight.values[-1:])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for tokens in (1, 2, 3, 5, 8, 17, 33, 150):
            x, bias = numbers(tokens, columns, seed=1).to(dtype), numbers(rows, seed=2).to(dtype)
            if tokens <= op.most_tokens(torch.float32 if dtype == torch.float16 else dtype):
                assert strict(op.run(x, runtime, spec, bias), x, weight.dequantize(), bias) <= 1
                assert strict(op.bind(runtime, spec)(x, None), x, weight.dequantize()) <= 1
            else:
                expected = x.float() @ weight.dequantize().T + bias.float()
                assert float((op.run(x, runtime, spec, bias).float() - expected).norm()) <= 0.01 * float(
                    expected.norm()
                )


@compiled
def test_two_factors_in_one_module():
    for rows, columns in SHAPES:
        rank = max(1, min(rows, columns) // 3)
        weight = LowRank(numbers(rows, rank), numbers(rank, columns))
        module = module_of(weight)
        assert module.choice(torch.bfloat16, "cpu").op.startswith("weight_only.halves_")
        for tokens in (1, 5, 64):
            x = numbers(tokens, columns, seed=1)
            expected = x.float() @ weight.dequantize().T
            found = module(x)
            assert float((found.float() - expected).norm()) <= 0.01 * float(expected.norm())
            kept = module.state_dict()
            assert all(torch.equal(kept[name], tensor) for name, tensor in pack(weight).items())
            assert torch.equal(copy.deepcopy(module)(x), found)


def test_gradients_pass_through():
    for weight in (Dense(numbers(24, 40)), LowRank(numbers(24, 8), numbers(8, 40))):
        module, x = module_of(weight), numbers(3, 40).requires_grad_()
        module(x.detach())  # first without, so that the kernel's own order is in place
        grad = numbers(3, 24, seed=2)
        module(x).backward(grad)
        expected = grad.float() @ weight.dequantize()
        assert float((x.grad.float() - expected).norm()) <= 0.02 * float(expected.norm())


@compiled
def test_what_it_does_not_take():
    op = Halves(RUNNABLE[0])
    floats = describe(Dense(torch.ones(3, 4)))
    assert "takes bfloat16 weights, not float32" in op.supports(floats, torch.bfloat16, CPU)
    assert op.supports(describe(Dense(torch.ones(0, 4).bfloat16())), torch.bfloat16, CPU) == "the weight is empty"
    assert "not torch.float64" in op.supports(describe(Dense(numbers(3, 4))), torch.float64, CPU)
    assert module_of(Dense(torch.ones(3, 4))).choice(torch.bfloat16, "cpu").op == "weight_only.dense"


def test_without_a_compiler_torch_multiplies(no_compiler):
    weight, x = Dense(numbers(6, 42)), numbers(3, 42, seed=1)
    module = module_of(weight)
    assert module.choice(torch.bfloat16, "cpu").op == "weight_only.dense"
    expected = x.float() @ weight.dequantize().T
    assert float((module(x).float() - expected).norm()) <= 0.01 * float(expected.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_columns_reach_their_places(monkeypatch, dtype, tokens):
    own, other = torch.tensor([4, 0, 2]), torch.tensor([3, 1])
    a, b = torch.randn(tokens, 3).to(dtype), torch.randn(tokens, 4).to(dtype)[:, 1:3]  # not contiguous
    expected = torch.empty(tokens, 5, dtype=dtype)
    expected[:, own], expected[:, other] = a, b
    found = torch.empty(tokens, 5, dtype=dtype)
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(places, "_function", lambda size: None)
        found.fill_(-1)
        places.place(a, own, found)
        places.place(b, other, found)
        assert torch.equal(found, expected)


@pytest.mark.skipif("avx512_bf16" not in RUNNABLE, reason="the rest of the source needs AVX512-BF16")
def test_tiles_of_amx(monkeypatch):
    """With the instructions in plain C: what is loaded, from where, and what becomes of odd sizes."""
    header = Path(__file__).parent / "native_checks" / "tiles.h"
    emulated = ("-include", str(header), "-D__AMX_BF16__", *VARIANTS["avx512_bf16"].flags)
    try:
        library = compiled_source(stages._HALVES, ("-DBITS=16", *emulated))
    except NotCompiledError as error:
        pytest.skip(str(error))
    pair = stages._halves("avx512_bf16")
    monkeypatch.setattr(stages, "_halves", lambda variant: (stages._address(library), pair[1]))
    for rows, columns in (*SHAPES, (150, 80), (48, 300)):
        weight = numbers(rows, columns)
        part = stages.Part(16, (rows, columns, columns, 0, 0), stages.pack_halves("avx512_bf16", weight))
        call = stages.bind([stages.Layer.of(base=part)], "avx512_bf16")
        for tokens in (1, 4, 5, 15, 16, 17, 31, 32, 33, 130):
            x = numbers(tokens, columns, seed=1)
            assert strict(call(x, [None])[0], x, weight) <= 1
