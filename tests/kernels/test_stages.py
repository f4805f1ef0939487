"""Both factors in one call, a residual beside its base, several layers of one input."""

import copy

import pytest
import torch

from tests.nested import dense, index, rounded
from trifold.core.canonical import Chain, Identity, LowRank, Split, Sum
from trifold.core.product import product
from trifold.formats import describe, pack
from trifold.kernels import PackedLinear
from trifold.kernels.native import VARIANTS, stages
from trifold.kernels.native.stages import bind
from trifold.kernels.staged import staged

RUNNABLE = [name for name in VARIANTS if stages.lacking(name) is None]
pytestmark = pytest.mark.skipif(not RUNNABLE, reason="no C compiler")


def pivoted(rows, columns, rank, leaf):
    others = Split(0, index(rank, rows - rank), (Identity(rank), leaf(rows - rank, rank)))
    return Chain((others, leaf(rank, columns)))


def factors(rows, columns, rank):
    return LowRank(dense(rows, rank).values, dense(rank, columns).values)


def int4(rows, columns):
    return rounded(rows, columns, 4, symmetric=rows % 2 == 0)


WEIGHTS = {
    "pivots": pivoted(123, 431, 40, dense),
    "one pivot": pivoted(40, 75, 1, dense),
    "few others": pivoted(40, 96, 39, dense),
    "int4 pivots": pivoted(75, 96, 43, int4),
    "int4 factors": Chain((int4(64, 24), int4(24, 96))),
    "two widths": Chain((rounded(64, 24, 5), rounded(24, 96, 8, "channel", symmetric=True))),
    "bfloat16 factors": factors(6, 42, 3),
    "residual over int3": Sum((rounded(70, 96, 3), Chain((int4(70, 9), int4(9, 96))))),
    "bfloat16 residual": Sum((int4(33, 50), factors(33, 50, 5))),
    "plain": int4(17, 43),
    "dense": dense(17, 43),
}
NOT = {
    "rounded input": rounded(7, 43),
    "real zero-points": Chain((rounded(7, 5), rounded(5, 43, zero_point="real"))),
    "groups of no blocks": Chain((rounded(7, 5), rounded(5, 43, group=20))),
    "three factors": Chain((dense(7, 5), dense(5, 5), dense(5, 43))),
    "columns": Split(1, index(41, 2), (rounded(7, 41), dense(7, 2))),
    "float32": Chain((dense(7, 5, torch.float32), dense(5, 43, torch.float32))),
    "two pairs of factors": Sum((factors(9, 43, 3), factors(9, 43, 4))),
    "factors in a chain": Chain((dense(9, 7), factors(7, 43, 4))),
    "residual with pivots": Sum((rounded(9, 43), pivoted(9, 43, 4, dense))),
}


def layer(weight, bias=True, **more):
    module = PackedLinear(describe(weight) | more, bias, torch.bfloat16)
    tensors = pack(weight)
    if bias:
        tensors["bias"] = torch.linspace(-1, 1, weight.shape[0]).bfloat16()
    module.load_state_dict(tensors)
    return module


def tokens(count, columns, dtype=torch.bfloat16):
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(count)).to(dtype)


def far(found, weight, x, bias=None):
    """Relative error, in units of what rounding to the dtype of x makes; in float32, beside sums that cancel."""
    expected = product(weight, torch.float32)(x.float()).double()
    expected += 0 if bias is None else bias.double()
    size = expected if x.dtype == torch.bfloat16 else x.double().abs() @ weight.dequantize().double().abs().T
    return float((found.double() - expected).norm() / size.norm()) / torch.finfo(x.dtype).eps


@pytest.mark.parametrize("variant", RUNNABLE)
@pytest.mark.parametrize("name", WEIGHTS)
def test_every_instruction_set(variant, name, monkeypatch):
    monkeypatch.setenv("TRIFOLD_KERNEL", f"weight_only.cpu_{variant},weight_only.halves_{variant},weight_only.identity")
    module = layer(WEIGHTS[name])
    for dtype in (torch.bfloat16, torch.float32):
        found = staged(module, dtype)
        assert found is not None and found.variant == variant and found.holds()
        call = bind([found.layer], variant)
        for count in (1, 2, 3, 7, 8, 33, 150):  # for codes more than `most`, too
            x, bias = tokens(count, WEIGHTS[name].shape[1], dtype), module.bias.to(dtype)
            assert far(call(x, [bias])[0], WEIGHTS[name], x, bias) < 1
            assert far(call(x, [None])[0], WEIGHTS[name], x) < 1


def test_what_has_no_stages():
    for name, weight in NOT.items():
        module = layer(weight, **({"input": {"bits": 8}} if name == "rounded input" else {}))
        assert module.stages(torch.bfloat16) is None, name
    assert layer(WEIGHTS["pivots"]).stages(torch.float16) is None


@pytest.mark.parametrize("name", WEIGHTS)
def test_modules_are_multiplied_in_stages_and_keep_their_tensors(name):
    weight, module = WEIGHTS[name], layer(WEIGHTS[name])
    x = tokens(3, weight.shape[1])
    assert module.stages(x.dtype).most >= 3
    y = module(x)
    before = module.stages(x.dtype)
    assert far(y, weight, x, module.bias) < 1 and module.stages(x.dtype) is before
    kept = module.state_dict()
    assert all(torch.equal(kept[key], tensor) for key, tensor in pack(weight).items())
    assert not before.holds() and torch.equal(module(x), y) and module.stages(x.dtype).holds()
    assert torch.equal(copy.deepcopy(module)(x), y)
    assert torch.equal(module.to(torch.float32)(x), y)


@pytest.mark.parametrize("name", ["int4 pivots", "bfloat16 residual"])
def test_compiled_graphs_have_it_as_one_operator(name):
    torch._dynamo.reset()
    module, x = layer(WEIGHTS[name]), tokens(3, WEIGHTS[name].shape[1])
    with torch.no_grad():
        y, graphs = module(x), []
        compiled = torch.compile(module, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
        assert torch.equal(compiled(x), y)
    (graph,) = graphs
    assert [str(n.target) for n in graph.graph.nodes if "trifold" in str(n.target)] == ["trifold.staged_linear"]
    zeros = {leaf: torch.zeros_like(t) for leaf, t in module.state_dict().items() if leaf != "weight"}
    module.load_state_dict(zeros, strict=False)
    with torch.no_grad():
        assert torch.equal(module(x), torch.zeros_like(y)) and torch.equal(compiled(x), torch.zeros_like(y))


def test_the_same_for_any_number_of_threads(monkeypatch):
    monkeypatch.setattr("trifold.kernels.native.stages._WORTH", 1)
    modules = [layer(WEIGHTS[name]) for name in ("int4 pivots", "int4 factors", "residual over int3")]
    before = torch.get_num_threads()
    try:
        for dtype in (torch.bfloat16, torch.float32):
            made = [module.stages(dtype) for module in modules]
            call = bind([one.layer for one in made], made[0].variant)
            for count in (1, 5, 70):
                x, found = tokens(count, 96, dtype), []
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    found.append(call(x, [None, modules[1].bias.to(dtype), None]))
                alone = [bind([one.layer], one.variant)(x, [None])[0] for one in made]
                assert torch.equal(found[0][0], alone[0]) and torch.equal(found[0][2], alone[2])
                assert all(torch.equal(a, b) for more in found[1:] for a, b in zip(found[0], more, strict=True))
    finally:
        torch.set_num_threads(before)


def test_what_is_not_finite_stays_where_it_is():
    module = layer(WEIGHTS["int4 pivots"])
    x = tokens(5, 96)
    clean = module(x)
    x[2, 7] = torch.nan
    y = module(x)
    assert y[2].isnan().any() and torch.equal(y[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


def test_elsewhere_it_has_no_stages_and_back_it_has():
    module, x = layer(WEIGHTS["pivots"]), tokens(2, 431)
    y = module(x)
    weights = copy.deepcopy(module).to("meta")
    assert weights.stages(x.dtype) is None and weights.to_empty(device="cpu").stages(x.dtype) is not None
    assert torch.equal(module(x), y)


def test_gradients_go_by_the_parts():
    module, x = layer(WEIGHTS["int4 pivots"]), tokens(3, 96, torch.float32)
    with torch.no_grad():
        y = module(x)
    x.requires_grad_()
    module(x).sum().backward()
    torch.testing.assert_close(module(x.detach()), y)
    torch.testing.assert_close(x.grad, WEIGHTS["int4 pivots"].dequantize().sum(0).expand(3, -1), rtol=1e-3, atol=1e-3)
    bias = layer(WEIGHTS["pivots"])
    bias.bias.requires_grad_()
    bias(tokens(4, 431)).float().sum().backward()
    assert torch.equal(bias.bias.grad, torch.full((123,), 4.0).bfloat16())
