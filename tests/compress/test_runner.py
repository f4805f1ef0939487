"""One block in stages, against the plain way of doing it."""

import pytest
import torch

from tests.helpers import make_model
from trifold.compress.capture import Tail, capture_calls
from trifold.compress.runner import BlockRunner
from trifold.core.linears import linears, set_weight, weight_of
from trifold.core.method import Statistics
from trifold.core.observe import observe
from trifold.core.statistics import Gram

FAMILIES = ["llama", "qwen3", "gpt2", "olmo2"]
IDS = [torch.randint(2, 128, (3, 17), generator=torch.Generator().manual_seed(i)) for i in range(2)]


def prepare(family):
    model = make_model(family)
    blocks = model.transformer.h if family == "gpt2" else model.model.layers
    return model, blocks, [capture_calls(model, blocks, ids) for ids in IDS]


@pytest.mark.parametrize("family", FAMILIES)
def test_walking_the_blocks_gives_the_model_bit_for_bit(family):
    model, blocks, captured = prepare(family)
    for c, ids in zip(captured, IDS, strict=True):
        hidden = c.hidden
        with torch.no_grad():
            for block, call in zip(blocks, c.calls, strict=True):
                hidden = call.run(block, hidden)
            assert torch.equal(Tail(model, blocks, c.arity)(hidden, ids), model(ids).logits)
    assert not any("Stub" in type(b).__name__ or "Inject" in type(b).__name__ for b in blocks)


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_follow_execution_and_share_inputs(family):
    _, blocks, captured = prepare(family)
    runner = BlockRunner(blocks[0], linears(blocks[0]), [c.calls[0] for c in captured], [c.hidden for c in captured])
    names = [[name.rpartition(".")[2] for name in stage] for stage in runner.stages]
    if family == "gpt2":
        assert names == [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]]
    else:
        assert names == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


@pytest.mark.parametrize("memory", [None, 0])
@pytest.mark.parametrize("family", FAMILIES)
def test_staged_statistics_are_those_of_full_runs(family, memory):
    """Change each stage's weights in turn; what the next stage sees must come from the changed ones."""
    _, blocks, captured = prepare(family)
    block, calls, hidden = blocks[1], [c.calls[1] for c in captured], [c.hidden for c in captured]
    runner = BlockRunner(block, linears(block), calls, list(hidden), memory)
    for stage in runner.stages:
        columns = weight_of(runner.linears[stage[0]]).shape[1]
        staged, full = Statistics((Gram,), columns), Statistics((Gram,), columns)
        runner.observe({stage[0]: staged})
        with torch.no_grad(), observe(runner.linears, {stage[0]: full}):
            for call, states in zip(calls, hidden, strict=True):
                call.run(block, states)
        assert staged.tokens == full.tokens == 2 * 3 * 17
        assert torch.equal(staged.gram, full.gram)
        for name in stage:
            set_weight(runner.linears[name], weight_of(runner.linears[name]) * 1.5)
        runner.finish(stage)
    outputs = runner.advance()
    with torch.no_grad():
        for call, states, out in zip(calls, hidden, outputs, strict=True):
            assert torch.equal(call.run(block, states), out)


def test_how_often_each_linear_runs():
    """Once a batch, and once more to check the first."""
    _, blocks, captured = prepare("llama")
    block = blocks[0]
    runner = BlockRunner(block, linears(block), [c.calls[0] for c in captured], [c.hidden for c in captured])
    counts = dict.fromkeys(runner.linears, 0)

    for name, module in runner.linears.items():
        forward = module.forward

        def counted(x, forward=forward, name=name):
            counts[name] += 1
            return forward(x)

        module.forward = counted
    for stage in runner.stages:
        runner.observe({stage[0]: Statistics((Gram,), weight_of(runner.linears[stage[0]]).shape[1])})
        runner.finish(stage)
    runner.advance()
    assert set(counts.values()) == {len(IDS) + 1}


def test_hooks_and_replaced_forwards_are_gone_after_an_error():
    _, blocks, captured = prepare("llama")
    block = blocks[0]
    runner = BlockRunner(block, linears(block), [c.calls[0] for c in captured], [c.hidden for c in captured])
    runner.finish(runner.stages[0])
    wrong = Statistics((Gram,), 3)
    with pytest.raises(RuntimeError):
        runner.observe({runner.stages[1][0]: wrong})
    for module in block.modules():
        assert "forward" not in vars(module) and not module._forward_pre_hooks
