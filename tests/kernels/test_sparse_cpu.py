"""Compiled sparse products: every variant that this machine runs, against float64."""

import pytest
import torch
from packed_samples import activations, check_runtime, excess, layer, strict

from tests.sparse_samples import KINDS, sparse_weight
from trifold.core.canonical import Dense, Quantized, Sparse
from trifold.core.errors import CheckpointError
from trifold.core.scheme import Scheme
from trifold.formats import FORMATS
from trifold.kernels import PackedEmbedding, TiedLinear, explain
from trifold.kernels.sparse import cpu
from trifold.kernels.sparse.bitmap import CompiledBitmap
from trifold.kernels.sparse.groups import CompiledGroups
from trifold.kernels.sparse.library import VARIANTS, Library, lacking, load

RUNNABLE = [name for name in VARIANTS if lacking(name) is None]
BEST = next((name for name in RUNNABLE if isinstance(load("group_sparse.c", name, 4), Library)), None)
CASES = [(name, bits) for name in RUNNABLE for bits in (range(1, 9) if name == BEST else (4, 7))]  # each is compiled
pytestmark = pytest.mark.skipif(BEST is None, reason="no C compiler")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")
BITMAPS = [
    ("unstructured", 173, "bfloat16", 0.5),
    ("unstructured", 320, "bfloat16", 0.9),
    ("2:4", 172, "bfloat16", 0.5),
    ("unstructured", 333, Scheme(4, 128), 0.6),
    ("unstructured", 320, Scheme(4, 64, True), 0.5),
    ("unstructured", 320, Scheme(4, 128), 0.5),
    ("1x8", 173, Scheme(4, "channel", False, "float16"), 0.5),
    ("2:4", 172, Scheme(4, "tensor"), 0.5),
    ("2:4", 172, Scheme(4, 32, True), 0.5),
    ("unstructured", 173, Scheme(4, 100, False, "float32"), 0.0),
]


@pytest.fixture
def never_dense(monkeypatch):
    """Kernels for every number of tokens."""
    monkeypatch.setattr(cpu, "_DENSE_FROM", {name: dict.fromkeys(DTYPES, 10**9) for name in VARIANTS})


def check(op, weight, tokens=(1, 2, 5, 29), dtypes=DTYPES[:2]):
    reason = op.supports(layer(weight).spec, torch.float32, CPU)
    if reason is not None and "compile" in reason:
        pytest.skip(reason)
    assert reason is None
    check_runtime(op, weight, tokens, dtypes)


@pytest.mark.parametrize("variant, bits", CASES)
def test_groups_of_every_width_and_size(variant, bits, never_dense):
    op = CompiledGroups(variant)
    for number, group in enumerate((16, 32, 64, 128, 48, 5)):
        scale_dtype = ("bfloat16", "float16", "float32")[number % 3]
        for symmetric in (True, False):
            check(op, sparse_weight((19, 333), f"1x{group}", Scheme(bits, group, symmetric, scale_dtype)))


@pytest.mark.parametrize("variant", RUNNABLE)
def test_rows_without_survivors_one_row_and_numbers_of_16_bits(variant, never_dense):
    op = CompiledGroups(variant)
    for share in (0.0, 0.9, 1.0):
        check(op, sparse_weight((1, 17), "1x16", Scheme(4, 16), share))
        check(op, sparse_weight((33, 130), "1x16", Scheme(4, 16, True), share))
    weight = sparse_weight((7, 160), "1x32", Scheme(4, 32))
    weight.mask[2:6] = False
    check(op, Sparse(weight.values, weight.mask, "1x32").normalized())
    check(op, sparse_weight((3, 16 * 300 + 1), "1x16", Scheme(4, 16), 0.7), tokens=(1, 4))  # more than 256 groups


@pytest.mark.parametrize("variant", RUNNABLE)
@pytest.mark.parametrize("pattern, columns, values, share", BITMAPS, ids=str)
def test_bitmaps(variant, pattern, columns, values, share, never_dense):
    check(CompiledBitmap(variant), sparse_weight((19, columns), pattern, values, share))


@pytest.mark.parametrize("variant", RUNNABLE)
def test_bitmaps_without_survivors_and_of_one_row(variant, never_dense):
    op = CompiledBitmap(variant)
    for values in ("bfloat16", Scheme(4, 32)):
        for shape, share in (((1, 17), 0.5), ((5, 64), 1.0), ((2, 33), 0.0)):
            check(op, sparse_weight(shape, "unstructured", values, share))


@pytest.mark.parametrize("variant", RUNNABLE)
def test_many_tokens_take_dense_tiles(variant, monkeypatch):
    """The platform's product rounds the weights to the dtype of the activations."""
    monkeypatch.setattr("trifold.kernels.rows._TILE", {"cpu": 64})
    for op, weight in (
        (CompiledGroups(variant), sparse_weight((150, 43), "1x16", Scheme(4, 16))),
        (CompiledBitmap(variant), sparse_weight((150, 44), "2:4", "bfloat16")),
    ):
        module = layer(weight, bias=True)
        runtime = op.prepare(module.portable(), module.spec)
        for dtype in DTYPES:
            x, bias = activations(70, weight.shape[1], dtype), module.bias.to(dtype)
            y = op.run(x, runtime, module.spec, bias)
            assert y.dtype == dtype and excess(y, x, weight.dequantize(), bias) <= 1


@pytest.mark.parametrize("variant", RUNNABLE)
def test_the_same_for_any_number_of_threads(variant, monkeypatch, never_dense):
    monkeypatch.setattr("trifold.kernels.sparse.library._WORTH", 1)
    lopsided = sparse_weight((75, 320), "1x16", Scheme(4, 16))
    lopsided.mask[5:70] = False  # a few rows have all the work
    weights = [
        (CompiledGroups(variant), Sparse(lopsided.values, lopsided.mask, "1x16").normalized()),
        (CompiledBitmap(variant), sparse_weight((75, 320), "unstructured", "bfloat16", 0.8)),
        (CompiledBitmap(variant), sparse_weight((75, 320), "unstructured", Scheme(4, 128))),
    ]
    before = torch.get_num_threads()
    try:
        for op, weight in weights:
            module = layer(weight)
            for dtype in DTYPES[:2]:
                for tokens in (1, 7):
                    found = []
                    for threads in (1, 2, 3):
                        torch.set_num_threads(threads)
                        runtime = op.prepare(module.portable(), module.spec)
                        found.append(op.run(activations(tokens, 320, dtype), runtime, module.spec, None))
                    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    finally:
        torch.set_num_threads(before)


def test_what_is_not_finite_stays_in_its_token_and_dropped_groups_do_not_see_it():
    weight = sparse_weight((20, 64), "1x32", Scheme(4, 32))
    weight.mask[:, 32:] = False
    weight.mask[:, :32] = True
    module = layer(Sparse(weight.values, weight.mask, "1x32").normalized())
    for dtype in DTYPES[:2]:
        x = activations(4, 64, dtype)
        clean = module(x)
        x[1, 3], x[2, 40] = float("nan"), float("inf")
        y = module(x)
        assert not y[1].isfinite().any()
        assert torch.equal(y[[0, 2, 3]], clean[[0, 2, 3]])


def test_damaged_tensors_are_refused_before_compiled_code_sees_them():
    def broken(op, weight, name, change):
        module = layer(weight)
        tensors = {key: tensor.clone() for key, tensor in module.portable().items()}
        change(tensors[name])
        with pytest.raises(CheckpointError, match="damaged"):
            op.prepare(tensors, module.spec)

    group = sparse_weight((19, 100), "1x16", Scheme(4, 16))
    for index, value in ((0, 1), (5, 10**6), (19, -1)):
        broken(CompiledGroups(BEST), group, "weight_row_start", lambda t, i=index, v=value: t.__setitem__(i, v))
    broken(CompiledGroups(BEST), group, "weight_column", lambda t: t.__setitem__(3, 7))
    for values in ("bfloat16", Scheme(4, 32)):
        bitmap = sparse_weight((19, 100), "unstructured", values)
        broken(CompiledBitmap(BEST), bitmap, "weight_row_start", lambda t: t.__setitem__(3, 10**6))
        broken(CompiledBitmap(BEST), bitmap, "weight_mask", lambda t: t.__setitem__((0, 0), -1))
        broken(CompiledBitmap(BEST), sparse_weight((19, 100), "2:4", values), "weight_index", lambda t: t.fill_(0))


@pytest.mark.parametrize("kind", KINDS)
def test_the_choice_of_the_op(kind):
    pattern, values, name = KINDS[kind]
    choice = explain(layer(sparse_weight((65, 136), pattern, values)).spec, torch.bfloat16, "cpu")
    if "scales8" in kind:
        assert choice.rejected[f"sparse.groups_{BEST}"] == "takes scales of one level, not scale_bits=8"
    elif name == "group_sparse_int":
        assert choice.op == f"sparse.groups_{BEST}"
    elif values == "bfloat16" or values == Scheme(4, 32):
        assert choice.op == f"sparse.bitmap_{BEST}"
    else:
        assert choice.op == "weight_only.blockwise"
        assert "not" in choice.rejected[f"sparse.bitmap_{BEST}"]


def test_every_variant_has_rows_and_a_forced_one_runs(monkeypatch):
    weight = sparse_weight((20, 64), "1x32", Scheme(4, 32))
    x = activations(2, 64)
    for variant in RUNNABLE:
        monkeypatch.setenv("TRIFOLD_KERNEL", f"sparse.groups_{variant}")
        module = layer(weight)
        assert explain(module.spec, torch.float32, "cpu").op == f"sparse.groups_{variant}"
        assert strict(module(x), x, weight.dequantize()) <= 1
    monkeypatch.setenv("TRIFOLD_KERNEL", "sparse.naive")
    assert strict(layer(weight)(x), x, weight.dequantize()) <= 1


def test_without_a_compiler_rows_are_dequantised(monkeypatch):
    monkeypatch.setenv("TRIFOLD_NATIVE", "0")
    load.cache_clear()
    try:
        choice = explain(layer(sparse_weight((20, 64), "1x32", Scheme(4, 32))).spec, torch.float32, "cpu")
        assert choice.op == "weight_only.blockwise"
        assert choice.rejected["sparse.groups_portable"] == "switched off by TRIFOLD_NATIVE=0"
    finally:
        load.cache_clear()


def test_linears_compile_whole_and_keep_torchs_rules():
    net = torch.nn.Sequential(
        layer(sparse_weight((32, 40), "1x16", Scheme(4, 16)), True),
        torch.nn.ReLU(),
        layer(sparse_weight((8, 32), "2:4", "bfloat16")),
    )
    targets = []

    def backend(graph, _):
        targets.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    with torch.no_grad():
        expected = net(activations(3, 40))
        assert torch.equal(torch.compile(net, fullgraph=True, backend=backend)(activations(3, 40)), expected)
    assert targets.count(torch.ops.trifold.sparse_linear) == 2
    for op, weight in ((CompiledGroups(BEST), net[0]), (CompiledBitmap(BEST), net[2])):
        arguments = op._arguments(op.prepare(weight.portable(), weight.spec), weight.spec)
        x = activations(3, weight.in_features, torch.bfloat16)
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(torch.ops.trifold.sparse_linear.default, (x, None, *arguments, 1), test_utils=tests)
        rows = (*arguments, None, 0, 5, torch.bfloat16)
        torch.library.opcheck(torch.ops.trifold.sparse_rows.default, rows, test_utils=tests)


def test_a_tied_head_runs_compiled_while_rows_are_looked_up():
    weight = sparse_weight((97, 64), "1x32", Scheme(4, 32))
    form, ids = FORMATS.get("group_sparse_int"), torch.tensor([[0, 96], [5, 5]])
    table = PackedEmbedding(form.describe(weight), torch.bfloat16)
    table.load_state_dict(form.pack(weight))
    head = TiedLinear(table, False, torch.bfloat16)
    x = activations(3, 64, torch.bfloat16)
    assert strict(head(x), x, weight.dequantize()) <= 1
    assert torch.equal(table(ids), weight.dequantize()[ids].bfloat16())
    assert any(name.startswith("runtime_") for name in dict(table.named_buffers()))
    with pytest.raises(IndexError):
        table(torch.tensor([97]))


def test_zero_points_far_from_all_codes_and_the_largest_codes_are_exact():
    scheme = Scheme(8, 32, False)
    codes = torch.full((3, 64), 255, dtype=torch.uint8)
    zero = torch.tensor([[0, 255], [255, 0], [254, 1]], dtype=torch.uint8)
    weight = Sparse(Quantized(codes, torch.ones(3, 2).bfloat16(), zero, scheme), torch.ones(3, 64).bool(), "1x32")
    for dtype in DTYPES[:2]:
        x = torch.ones(1, 64, dtype=dtype)
        assert torch.equal(layer(weight)(x).float(), weight.dequantize().sum(1)[None].to(dtype).float())
    ones = Sparse(Dense(torch.ones(3, 64).bfloat16()), torch.eye(3, 64).bool()).normalized()
    assert torch.equal(layer(ones)(torch.ones(1, 64)), torch.ones(1, 3))
