"""What a decoder may do with its blocks, and what is refused instead of being walked wrongly."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.families import make_family
from trifold.compress.capture import Tail, capture_calls
from trifold.core.errors import InputError
from trifold.core.topology import find_blocks

TOKENS = torch.tensor([[3, 1, 4, 1, 5]])


class Block(nn.Module):
    def __init__(self, arity):
        super().__init__()
        self.linear, self.arity = nn.Linear(6, 6), arity

    def forward(self, hidden, mask=None):
        out = hidden + self.linear(hidden)
        return (out, *[None] * (self.arity - 1)) if self.arity else out


class Decoder(nn.Module):
    """arity: length of what its blocks return. order: which blocks run. between: what happens between them."""

    def __init__(self, arity=0, order=(0, 1, 2), between=lambda hidden: hidden):
        super().__init__()
        self.embed, self.blocks = nn.Embedding(8, 6), nn.ModuleList(Block(arity) for _ in range(3))
        self.arity, self.order, self.between = arity, order, between

    def forward(self, input_ids, use_cache=False):
        hidden = self.embed(input_ids)
        for index in self.order:
            out = self.blocks[index](self.between(hidden), mask=index)
            if self.arity:
                hidden, *rest = out
                assert len(rest) == self.arity - 1
            else:
                hidden = out
        return SimpleNamespace(logits=hidden)


@pytest.mark.parametrize("arity", [0, 1, 2, 3])
def test_blocks_return_a_tensor_or_a_tuple_of_any_length(arity):
    model = Decoder(arity)
    captured = capture_calls(model, model.blocks, TOKENS)
    assert captured.arity == arity and [call.kwargs["mask"] for call in captured.calls] == [0, 1, 2]
    hidden = captured.hidden
    with torch.no_grad():
        for block, call in zip(model.blocks, captured.calls, strict=True):
            hidden = call.run(block, hidden)
        assert torch.equal(Tail(model, model.blocks, arity)(hidden, TOKENS), model(TOKENS).logits)


@pytest.mark.parametrize("left_out", [0, 1, 2])
def test_a_block_that_is_left_out_passes_the_states_on(left_out):
    model = Decoder(order=[index for index in range(3) if index != left_out])
    captured = capture_calls(model, model.blocks, TOKENS)
    assert [call.skipped for call in captured.calls] == [index == left_out for index in range(3)]
    hidden = captured.hidden
    with torch.no_grad():
        for block, call in zip(model.blocks, captured.calls, strict=True):
            hidden = call.run(block, hidden)
        assert torch.equal(hidden, model(TOKENS).logits)


@pytest.mark.parametrize("decoder", [{"order": (0, 1, 1, 2)}, {"order": (1, 0, 2)}, {"order": ()}])
def test_other_orders_are_refused(decoder):
    model = Decoder(**decoder)
    with pytest.raises(InputError, match="called in the order"):
        capture_calls(model, model.blocks, TOKENS)


def test_work_between_the_blocks_is_refused():
    model = Decoder(between=lambda hidden: hidden / 2)
    with pytest.raises(InputError, match="hidden states are changed between its blocks"):
        capture_calls(model, model.blocks, TOKENS)


def test_a_decoder_that_changes_weights_is_refused():
    model = make_family("rwkv")
    model.config.rescale_every = model.rwkv.config.rescale_every = 6
    blocks = model.get_submodule(find_blocks(model))
    with pytest.raises(InputError, match="changes the weights of its blocks when it runs"):
        capture_calls(model, blocks, TOKENS)
