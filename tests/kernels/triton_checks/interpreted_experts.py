"""Values of the product for all experts, in Triton's interpreter. Run by `test_triton.py`, in a process of its own."""

import copy

import pytest
import torch
from packed_samples import OTHERS, activations, excess, layer, other, quantized

from trifold.core.canonical import Quantized
from trifold.formats import digest
from trifold.kernels import PackedExperts
from trifold.kernels.experts.naive import expert_linear
from trifold.kernels.experts.planes import PlaneExperts
from trifold.kernels.experts.routing import route
from trifold.kernels.experts.stack import Stack
from trifold.kernels.weight_only.planes import ops
from trifold.kernels.weight_only.planes.op import PlaneGemm, arguments


def experts(weight, count, bias):
    """Linears of the same scheme whose codes differ."""
    made = []
    for e in range(count):
        codes = weight.codes.roll(e, 0)
        made.append(layer(Quantized(codes, weight.scale * (1 + e), weight.zero_point, weight.scheme), bias))
        if bias:
            made[-1].bias.data += e
    return made


def product(linears, x, index, weights=None):
    routing = route(index, len(linears))
    slots = None if weights is None else weights.reshape(-1)
    y = Stack(linears, PlaneGemm()).run(PlaneExperts(), x, routing, slots)
    return y, routing, slots


def check(weight, x, index, weights=None, bias=False):
    """Against each expert alone, in float64; and slots of no expert are zero."""
    linears = experts(weight, 5, bias)
    dense = [linear.dequantize() for linear in linears]
    y, routing, slots = product(linears, x, index, weights)
    again, _, _ = product(linears, x, index, weights)
    assert y.dtype == x.dtype and torch.equal(y, again)
    chosen = index.reshape(-1)
    assert y[(chosen < 0) | (chosen >= 5)].eq(0).all()
    rows = x.repeat_interleave(len(chosen) // len(x), 0)
    for e, linear in enumerate(linears):
        mine = chosen == e
        if mine.any():
            by = torch.ones(int(mine.sum())) if slots is None else slots[mine].float()
            found = y[mine] if slots is None else (y[mine].double() / by[:, None]).to(y.dtype)
            assert excess(found, rows[mine], dense[e], linear.bias, roundings=1 if slots is None else 2) <= 1
    biases = [linear.bias.double() for linear in linears] if bias else None
    reference = expert_linear(x.double(), routing, slots, [w.double() for w in dense], biases)
    torch.testing.assert_close(y.double(), reference, rtol=0.02, atol=0.02 * float(reference.abs().max() + 1e-9))
    return y


def choices(tokens, k, seed=0):
    return torch.randint(0, 5, (tokens, k), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits, group", [(4, 64), (3, "channel"), (8, 32), (6, 96)])
def test_every_expert_gets_its_own_tokens(bits, group):
    weight = quantized(33, 172, bits, group, bits == 3)
    check(weight, activations(6, 172, torch.float16), choices(6, 2), torch.rand(6, 2), bias=True)
    check(weight, activations(1, 172, torch.bfloat16), torch.tensor([[3, 0, 1]]))


@pytest.mark.parametrize("scheme", OTHERS, ids=str)
def test_every_grid(scheme):
    check(other(7, 43, 32, **scheme), activations(5, 43, torch.float16), choices(5, 1), bias=True)


def test_experts_with_no_tokens_and_with_all():
    weight = quantized(70, 130, 4, 64, False)
    x = activations(20, 130, torch.bfloat16)
    check(weight, x, torch.full((20, 1), 4))  # more than a block of one expert, and none of the others
    check(weight, x, torch.full((20, 1), 2), bias=True)
    index = choices(20, 1)
    index[::3], index[1] = 5, -1  # another process has these
    check(weight, x, index)
    assert check(weight, x, torch.full((20, 1), 7)).eq(0).all()


def test_one_row_for_each_slot():
    check(quantized(7, 43, 5, "channel", False), activations(9, 43, torch.float16), choices(9, 1).view(3, 3))


def test_shares_are_added_up_in_their_order(monkeypatch):
    weight = quantized(40, 128 * 5 - 7, 4, 128, False)
    x, index = activations(3, weight.shape[1], torch.float16), choices(3, 2)
    for parts in (3, 9):  # 9: some of them have nothing to add
        monkeypatch.setattr(ops, "share", lambda *_, parts=parts: parts)
        check(weight, x, index, torch.rand(3, 2).bfloat16(), bias=True)


def test_what_is_no_number_stays_with_its_token():
    linears = experts(quantized(33, 172, 4, 64, True), 5, False)
    x, index = activations(4, 172, torch.float16), choices(4, 2)
    expected, _, _ = product(linears, x, index)
    x[2, 5] = torch.nan
    y, _, _ = product(linears, x, index)
    assert y[4:6].isnan().all()
    assert torch.equal(y[:4], expected[:4]) and torch.equal(y[6:], expected[6:])


def test_the_operator_is_as_torch_wants_it():
    linears = experts(quantized(7, 43, 3, 32, False), 5, True)
    stack = Stack(linears, PlaneGemm())
    keywords = arguments(stack.tensors(), linears[0].spec) | {"bias": stack.bias(), "weight": torch.rand(6)}
    x, routing = activations(3, 43, torch.float16), route(choices(3, 2), 5)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.plane_experts, (x, *routing), keywords, test_utils=checks)


class Stacked(torch.nn.Module):
    """Experts as transformers stacks them: gate and up, down, and how to activate what is between."""

    is_transposed, has_bias, has_gate = False, False, True

    def __init__(self, count, hidden, intermediate):
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(torch.zeros(count, 2 * intermediate, hidden))
        self.down_proj = torch.nn.Parameter(torch.zeros(count, hidden, intermediate))

    def _apply_gate(self, x):
        gate, up = x.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up


class Llama4TextExperts(torch.nn.Module):
    """The other kind: every token for every expert, zero where the router did not choose it."""

    act_fn = torch.nn.SiLU()

    def __init__(self, count, hidden, intermediate):
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(torch.zeros(count, hidden, 2 * intermediate))
        self.down_proj = torch.nn.Parameter(torch.zeros(count, intermediate, hidden))


def packed(kind=Stacked, bias=False):
    module = PackedExperts(kind(5, 43, 33)).eval()
    ups, downs = experts(quantized(66, 43, 4, 32, False), 5, bias), experts(quantized(43, 33, 4, 32, True), 5, bias)
    for e in range(5):
        expert = module.get_submodule(str(e))
        expert.up, expert.down = ups[e], downs[e]
        for linear in (expert.up, expert.down):
            linear._ops[torch.float16, torch.device("cpu")] = PlaneGemm()  # what the dispatch chooses on a GPU
    return module


@torch.no_grad()
def one_by_one(module, *arguments):
    hook = module.get_submodule("0").register_forward_hook(lambda *_: None)
    expected = module(*arguments)
    hook.remove()
    return expected


@torch.no_grad()
def test_a_mixture_that_runs_on_it(monkeypatch):
    launches = []
    run = PlaneExperts.run
    monkeypatch.setattr(PlaneExperts, "run", lambda *a: launches.append(1) or run(*a))
    module = packed(bias=True)
    x, index, weights = activations(6, 43, torch.float16), choices(6, 2), torch.rand(6, 2)
    index[4] = 5
    expected = one_by_one(module, x, index, weights)
    assert not launches
    before = {name: digest(linear.portable()) for name, linear in module.named_modules() if hasattr(linear, "portable")}
    y = module(x, index, weights)
    assert len(launches) == 2 and torch.equal(module(x, index, weights), y)
    assert y.dtype == x.dtype and y[4].eq(0).all()
    torch.testing.assert_close(y, expected, rtol=5e-3, atol=5e-3 * float(expected.abs().max()))

    planes = [module.get_submodule(f"{e}.up").get_buffer("runtime_plane0") for e in range(5)]
    assert len({plane.untyped_storage().data_ptr() for plane in planes}) == 1  # one piece of memory, nothing twice
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, index, weights), y)
    twin = copy.deepcopy(module)
    after = {name: digest(linear.portable()) for name, linear in module.named_modules() if hasattr(linear, "portable")}
    assert after == before and torch.equal(module(x, index, weights), y)

    twin.get_submodule("2.down").bias.data += 1
    assert not torch.equal(twin(x, index, weights), y) and torch.equal(module(x, index, weights), y)
    module.get_submodule("1.up").weight_scale *= 2  # portable again, and changed: the stack is made anew
    module.get_submodule("3.down").bias.data = module.get_submodule("3.down").bias + 1
    changed = module(x, index, weights)
    assert not torch.equal(changed, y)
    torch.testing.assert_close(changed, one_by_one(module, x, index, weights), rtol=5e-3, atol=5e-2)


def test_single_experts_run_where_somebody_looks_or_they_differ(monkeypatch):
    launches = []
    run = PlaneExperts.run
    monkeypatch.setattr(PlaneExperts, "run", lambda *a: launches.append(1) or run(*a))
    module = packed()
    x, index, weights = activations(3, 43, torch.float16), choices(3, 2), torch.rand(3, 2).half()
    module(x.clone().requires_grad_(), index, weights).sum().backward()
    module(x, index, weights.clone().requires_grad_()).sum().backward()
    module.shown = frozenset({1})
    module(x, index, weights)
    module.shown = frozenset()
    many = activations(5 * 512, 43, torch.float16)
    assert PlaneExperts().supports(module.get_submodule("0.up").spec, 5, len(many)) is not None
    module.get_submodule("3").up = layer(quantized(66, 43, 3, 32, False))
    module.get_submodule("3.up")._ops[torch.float16, torch.device("cpu")] = PlaneGemm()
    module(x, index, weights)
    assert not launches


@torch.no_grad()
def test_a_mixture_whose_experts_get_every_token():
    module = packed(Llama4TextExperts)
    x = activations(15, 43, torch.float16)
    x[1:3], x[6:10] = 0, 0
    y = module(x)
    assert y.shape == x.shape and y[1:3].eq(0).all() and y[6:10].eq(0).all()
    torch.testing.assert_close(y, one_by_one(module, x), rtol=5e-3, atol=5e-3 * float(y.abs().max()))
