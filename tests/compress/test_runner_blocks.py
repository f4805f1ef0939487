"""Staged replay on blocks made to mislead it: shortcuts must never change what a plain run gives."""

import pytest
import torch
from torch import nn

from trifold.compress.capture import Call
from trifold.compress.runner import BlockRunner
from trifold.core.linears import linears, set_weight, weight_of
from trifold.core.method import Statistics
from trifold.core.observe import Memory, observe
from trifold.core.statistics import Drift, Gram

H = 8


class MLP(nn.Module):
    def __init__(self, outputs=H):
        super().__init__()
        self.up, self.down = nn.Linear(H, 12), nn.Linear(12, outputs)

    def inner(self, x):
        return self.down(torch.relu(self.up(x)))

    def forward(self, x):
        return self.inner(x)


class Flattened(MLP):
    def forward(self, x):
        return self.inner(x.reshape(-1, H)).view(x.shape)


class Transposed(MLP):
    def forward(self, x):
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


class Halved(MLP):
    def __init__(self):
        super().__init__(2 * H)

    def forward(self, x):
        return self.inner(x).chunk(2, -1)[0]


class Pair(MLP):
    def forward(self, x):
        return self.inner(x), x.mean()


class Named(MLP):
    def forward(self, x):
        return {"y": self.inner(x)}


class Wrap(nn.Module):
    """Linear, submodule, linear; `read` takes the hidden states from what the submodule returns."""

    def __init__(self, inner, read=lambda y: y, change=False):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(H, H), inner, nn.Linear(H, H)
        self.read, self.change = read, change

    def forward(self, x):
        x = x + self.first(x)
        y = self.read(self.inner(x))
        if self.change:
            y += x  # in place
        return x + self.last(y)


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(H, H), nn.Linear(H, H)

    def forward(self, x):
        return self.b(self.a(torch.relu(self.a(x))))


class Routed(nn.Module):
    """Experts that the first batch does not reach, and a linear behind them."""

    def __init__(self):
        super().__init__()
        self.experts, self.out = nn.ModuleList(nn.Linear(H, H) for _ in range(3)), nn.Linear(H, H)

    def forward(self, x):
        flat = x.reshape(-1, H)
        choice = (flat.sum(-1) > 0).long() + (len(x) > 2) * 1
        y = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            if (choice == i).any():
                y[choice == i] = expert(flat[choice == i])
        return x + self.out(y.view(x.shape))


class Speaks(nn.Module):
    """A block that reads what a submodule notes on itself."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = MLP(), nn.Linear(H, H)

    def forward(self, x):
        y = self.inner(x)
        self.inner.note = getattr(self.inner, "note", 0)
        return x + self.last(y)


BLOCKS = {
    "plain": lambda: Wrap(MLP()),
    "flattened": lambda: Wrap(Flattened()),
    "transposed": lambda: Wrap(Transposed()),
    "halved": lambda: Wrap(Halved()),
    "pair": lambda: Wrap(Pair(), lambda y: y[0] * y[1]),
    "mapping": lambda: Wrap(Named(), lambda y: y["y"]),
    "mapping changed in place": lambda: Wrap(Named(), lambda y: y["y"], change=True),
    "changed in place": lambda: Wrap(MLP(), change=True),
    "reused": Reused,
    "routed": Routed,
    "speaks": Speaks,
}


def hidden_states(shapes):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, H, generator=generator) for shape in shapes]


@pytest.mark.parametrize("shapes", [((2, 5), (3, 5), (3, 5)), ((5, 5), (5, 5))], ids=str)
@pytest.mark.parametrize("kind", BLOCKS)
def test_shortcuts_change_nothing(kind, shapes):
    torch.manual_seed(0)
    block, hidden = BLOCKS[kind](), hidden_states(shapes)
    calls = [Call((), {}, True) for _ in hidden]
    runner = BlockRunner(block, linears(block), calls, [h.clone() for h in hidden])
    for stage in runner.stages:
        columns = weight_of(runner.linears[stage[0]]).shape[1]
        staged, plain = Statistics((Gram,), columns), Statistics((Gram,), columns)
        runner.observe({stage[0]: staged})
        with torch.no_grad(), observe(runner.linears, {stage[0]: plain}):
            for call, states in zip(calls, hidden, strict=True):
                call.run(block, states)
        assert staged.tokens == plain.tokens
        assert torch.equal(staged.gram, plain.gram)
        for name in stage:
            set_weight(runner.linears[name], weight_of(runner.linears[name]) * 1.5)
        runner.finish(stage)
    outputs = runner.advance()
    with torch.no_grad():
        for call, states, output in zip(calls, hidden, outputs, strict=True):
            assert torch.equal(call.run(block, states), output)


def test_the_budget_is_kept():
    torch.manual_seed(0)
    block, hidden = Wrap(MLP()), hidden_states(((2, 5),) * 4)
    runner = BlockRunner(block, linears(block), [Call((), {}, True)] * 4, hidden, memory=0)
    for stage in runner.stages:
        runner.observe({stage[0]: Statistics((Gram,), weight_of(runner.linears[stage[0]]).shape[1])})
        runner.finish(stage)
        assert runner._held == 0


def test_memory_forgets_what_was_changed_and_refuses_what_it_cannot_watch():
    memory, tensor = Memory(), torch.zeros(3)
    memory.keep("a", (tensor, None))
    assert "a" in memory and memory["a"][0] is tensor and memory.nbytes == 12
    tensor += 1
    assert "a" not in memory
    memory.keep("b", {"y": tensor})
    assert "b" not in memory


def test_a_linear_whose_weight_is_read_stays_out():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(H, H), nn.Linear(H, H)

        def forward(self, x):
            return self.b(x @ self.a.weight.T)

    block = Reads()
    runner = BlockRunner(block, linears(block), [Call((), {}, True)], hidden_states(((2, 3),)))
    assert runner.bypassed == ["a"] and list(runner.linears) == ["b"] and runner.stages == [["b"]]


def test_drift_pairs_the_dense_stream_and_not_routed_tokens():
    torch.manual_seed(0)
    block, hidden = Wrap(MLP()), hidden_states(((2, 5), (2, 5)))
    dense_hidden = [h + 0.1 for h in hidden]
    calls = [Call((), {}, True)] * 2
    runner = BlockRunner(block, linears(block), calls, hidden)
    dense = BlockRunner(block, linears(block), calls, dense_hidden)
    statistics = Statistics((Gram, Drift), H)
    runner.observe({"first": statistics}, dense)
    x, moved = torch.cat(hidden).reshape(-1, H), torch.cat(dense_hidden).reshape(-1, H)
    torch.testing.assert_close(statistics.drift, ((moved - x).T @ x).double(), rtol=1e-5, atol=1e-6)  # float32 sums

    routed, states = Routed(), hidden_states(((3, 5),))
    a = BlockRunner(routed, linears(routed), calls[:1], states)
    b = BlockRunner(routed, linears(routed), calls[:1], [states[0].neg()])
    for stage in a.stages:
        statistics = Statistics((Gram, Drift), H)
        a.observe({stage[0]: statistics}, b)
        if stage[0].startswith("experts"):
            assert not statistics.drift.any()


def test_states_may_change_their_dtype():
    """Some decoders carry the residual in float32 from the first block on."""

    class Widens(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(8, 8, dtype=torch.bfloat16)

        def forward(self, hidden):
            return hidden.float() + self.proj(hidden.bfloat16()).float() / 3

    torch.manual_seed(0)
    block = Widens()
    hidden = [torch.randn(2, 5, 8).bfloat16(), torch.randn(3, 5, 8).bfloat16()]
    expected = [block(states).detach() for states in hidden]
    runner = BlockRunner(block, linears(block), [Call((), {}, True)] * 2, [states.clone() for states in hidden])
    for out, wanted in zip(runner.advance(), expected, strict=True):
        assert out.dtype == torch.float32 and torch.equal(out, wanted)
