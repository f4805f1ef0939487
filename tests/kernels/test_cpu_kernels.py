"""Compiled products: every variant that this machine runs, against float64."""

import pytest
import torch
from packed_samples import GROUPS, OTHERS, WIDTHS, activations, check_runtime, excess, layer, other, quantized, strict

from trifold.formats import FORMATS
from trifold.kernels import PackedEmbedding, TiedLinear
from trifold.kernels.native import VARIANTS, Library, lacking, load
from trifold.kernels.weight_only import cpu
from trifold.kernels.weight_only.cpu import Compiled, _packed_linear, stored

RUNNABLE = [name for name in VARIANTS if lacking(name) is None]
BEST = next((name for name in RUNNABLE if isinstance(load(name, 4), Library)), None)
CASES = [(name, bits) for name in RUNNABLE for bits in (WIDTHS if name == BEST else (4, 7, 8))]  # each is compiled
pytestmark = pytest.mark.skipif(BEST is None, reason="no C compiler")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def never_dense(monkeypatch):
    """Kernels for every number of tokens."""
    monkeypatch.setattr(cpu, "_DENSE_FROM", {name: dict.fromkeys(DTYPES, 10**9) for name in VARIANTS})


@pytest.fixture
def always_dense(monkeypatch):
    """Dequantised tiles, tiny ones, for every number of tokens."""
    monkeypatch.setattr(cpu, "_DENSE_FROM", {name: dict.fromkeys(DTYPES, 1) for name in VARIANTS})
    monkeypatch.setattr("trifold.kernels.rows._TILE", {"cpu": 64})


def compiled(variant, bits):
    """The op, or a skip where this compiler does not know the instructions."""
    library = load(variant, bits)
    if not isinstance(library, Library):
        pytest.skip(library)
    return Compiled(variant)


def check(op, weight, tokens=(1, 2, 3, 5), dtypes=DTYPES):
    check_runtime(op, weight, tokens, dtypes)


@pytest.mark.parametrize("variant, bits", CASES)
def test_every_width_and_group(variant, bits, never_dense):
    op = compiled(variant, bits)
    for group in GROUPS:
        for symmetric in (True, False):
            check(op, quantized(7, 43, bits, group, symmetric))
            check(op, quantized(33, 320, bits, group, symmetric), tokens=(1, 17), dtypes=DTYPES[:2])


@pytest.mark.parametrize("variant", RUNNABLE)
@pytest.mark.parametrize("scheme", OTHERS[:3], ids=str)
def test_real_zero_points_and_tables(variant, scheme, never_dense):
    op = compiled(variant, 4)
    for group in GROUPS:
        for scale_dtype in ("bfloat16", "float16", "float32"):
            check(op, other(19, 172, group, scale_dtype, **scheme), tokens=(1, 2, 3, 9))


@pytest.mark.parametrize("variant", RUNNABLE)
@pytest.mark.parametrize("shape", [(1, 17), (1, 256), (16, 16), (17, 31), (40, 97)])
def test_odd_shapes(variant, shape, never_dense):
    op = compiled(variant, 4)
    for symmetric in (True, False):
        check(op, quantized(*shape, 4, 32, symmetric, "float16"), tokens=(1, 4, 8, 15, 16, 33, 37))


@pytest.mark.parametrize("variant", RUNNABLE)
def test_several_panels_of_tokens(variant, never_dense):
    op, weight = compiled(variant, 4), quantized(50, 300, 4, 100, False)
    module = layer(weight, bias=True)
    runtime, dense = op.prepare(module.portable(), module.spec), weight.dequantize()
    for dtype in DTYPES:
        x, bias = activations(301, 300, dtype), module.bias.to(dtype)
        assert strict(op.run(x, runtime, module.spec, bias), x, dense, bias) <= 1


@pytest.mark.parametrize("variant", RUNNABLE)
@pytest.mark.parametrize("tokens", [1, 70])
def test_dequantised_tiles(variant, tokens, always_dense):
    """The platform's product rounds the weights to the dtype of the activations."""
    op, weight = compiled(variant, 4), quantized(150, 43, 4, 16, False)
    module = layer(weight, bias=True)
    runtime, dense = op.prepare(module.portable(), module.spec), weight.dequantize()
    for dtype in DTYPES:
        x, bias = activations(tokens, 43, dtype), module.bias.to(dtype)
        y = op.run(x, runtime, module.spec, bias)
        assert y.dtype == dtype and excess(y, x, dense, bias) <= 1


@pytest.mark.parametrize("variant", RUNNABLE)
def test_weights_that_are_rounded_for_many_tokens(variant, always_dense):
    """Tables, real zero-points and short groups, with tiles and tokens left over."""
    op = compiled(variant, 4)
    for scheme in OTHERS[:3]:
        for group in (16, 100):
            module = layer(other(83, 172, group, **scheme), bias=True)
            runtime, dense = op.prepare(module.portable(), module.spec), module.dequantize()
            for tokens in (9, 31):
                x, bias = activations(tokens, 172, torch.bfloat16), module.bias.bfloat16()
                assert excess(op.run(x, runtime, module.spec, bias), x, dense, bias) <= 1


@pytest.mark.parametrize("variant", RUNNABLE)
def test_the_same_for_any_number_of_threads(variant, monkeypatch):
    op = compiled(variant, 4)
    monkeypatch.setattr("trifold.kernels.native._WORTH", 1)
    before = torch.get_num_threads()
    try:
        for scheme in ({"zero_point": "real"}, {"grid": "nf4"}):
            module = layer(other(75, 160, 32, **scheme))
            for dtype in DTYPES[:2]:
                for tokens in (1, 7, 40):
                    found = []
                    for threads in (1, 2, 3):
                        torch.set_num_threads(threads)
                        runtime = op.prepare(module.portable(), module.spec)
                        found.append(op.run(activations(tokens, 160, dtype), runtime, module.spec, None))
                    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("variant", RUNNABLE)
def test_what_is_not_finite_stays_where_it_is(variant):
    op = compiled(variant, 4)
    module = layer(quantized(20, 70, 4, 32, True))
    runtime = op.prepare(module.portable(), module.spec)
    for dtype in (torch.float32, torch.bfloat16):
        for value in (float("nan"), float("inf")):
            x = activations(4, 70, dtype)
            clean = op.run(x, runtime, module.spec, None)
            x[1, 69] = value
            y = op.run(x, runtime, module.spec, None)
            assert not y[1].isfinite().any()
            assert torch.equal(y[[0, 2, 3]], clean[[0, 2, 3]])


def test_zero_activations_give_the_bias():
    module = layer(quantized(20, 70, 4, 32, False), bias=True)
    assert torch.equal(module(torch.zeros(3, 70)), module.bias.expand(3, -1))


def test_activations_that_are_not_contiguous():
    module = layer(quantized(20, 70, 4, 32, False))
    x = activations(6, 140)
    assert torch.equal(module(x[::2, ::2]), module(x[::2, ::2].contiguous()))


def test_a_stack_of_linears_compiles_whole():
    net = torch.nn.Sequential(
        layer(quantized(32, 40, 4, 32, False), True), torch.nn.ReLU(), layer(other(8, 32, 16, grid="nf4"))
    )
    graphs = []

    def backend(graph, _):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    with torch.no_grad():
        expected = [net(activations(n, 40)) for n in (3, 5)]
        whole = torch.compile(net, fullgraph=True, backend=backend)
        for n, y in zip((3, 5), expected, strict=True):
            assert torch.equal(whole(activations(n, 40)), y)
    assert all(calls.count(torch.ops.trifold.packed_linear) == 2 for calls in graphs)


def test_custom_operators_keep_torchs_rules():
    module = layer(quantized(20, 70, 4, 32, False))
    op = Compiled(BEST)
    held = stored(op.prepare(module.portable(), module.spec), module.spec)
    tests = ("test_schema", "test_faketensor")
    for x in (activations(3, 70), activations(2, 70, torch.bfloat16)):
        torch.library.opcheck(torch.ops.trifold.packed_linear.default, (x, None, *held, BEST), test_utils=tests)
        assert torch.equal(torch.ops.trifold.packed_linear(x, None, *held, BEST), _packed_linear(x, None, *held, BEST))
    rows = torch.tensor([3, 19])
    arguments = (*held, BEST, 0, 20, torch.bfloat16)
    torch.library.opcheck(torch.ops.trifold.dequantize_packed.default, arguments, test_utils=tests)
    arguments = (rows, *held, BEST, torch.bfloat16)
    torch.library.opcheck(torch.ops.trifold.gather_packed.default, arguments, test_utils=tests)


def test_a_tied_head_runs_compiled_while_rows_are_looked_up():
    weight = quantized(97, 64, 4, 32, False)
    form, ids = FORMATS.get("int"), torch.tensor([[0, 96], [5, 5]])
    table = PackedEmbedding(form.describe(weight), torch.bfloat16)
    table.load_state_dict(form.pack(weight))
    head = TiedLinear(table, False, torch.bfloat16)
    dense = weight.dequantize()
    x = activations(3, 64, torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in table.state_dict().items()}
    assert strict(head(x), x, dense) <= 1
    assert any(name.startswith("runtime_") for name in dict(table.named_buffers()))
    assert torch.equal(table(ids), dense[ids].bfloat16())
    assert any(name.startswith("runtime_") for name in dict(table.named_buffers()))
    for wrong in (97, -1):
        with pytest.raises(IndexError):
            table(torch.tensor([wrong]))
    assert table(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, 64)
    after = table.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
