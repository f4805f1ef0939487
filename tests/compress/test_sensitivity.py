"""How much of a layer's error reaches the hidden states behind its block."""

import pytest
import torch

from tests.helpers import make_model
from trifold.compress import sensitivity
from trifold.compress.capture import capture_calls
from trifold.compress.sensitivity import sensitivities
from trifold.core.linears import linears
from trifold.core.topology import find_blocks


def found_in(model, **changes):
    """Sensitivities of the first block's linears, with identity Gram matrices."""
    ids = torch.randint(2, 128, (2, 16), generator=torch.Generator().manual_seed(0))
    blocks = model.get_submodule(find_blocks(model))
    captured, block = capture_calls(model, blocks, ids), blocks[0]
    targets = linears(block)
    grams = {name: torch.eye(m.weight.shape[1], dtype=torch.float64) for name, m in targets.items()}
    return sensitivities(block, targets, captured.calls[0], captured.hidden, grams)


def test_what_is_not_passed_on_does_not_count_and_nothing_is_changed():
    model = make_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()  # what the gate says is multiplied by zero
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = found_in(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert len(found) == 7 and found == found_in(model)
    assert found["mlp.gate_proj"] == 0 == found["mlp.down_proj"]
    assert min(found["self_attn.v_proj"], found["self_attn.o_proj"]) > 0


def test_it_is_the_share_of_an_error_whatever_its_size(monkeypatch):
    model = make_model()
    monkeypatch.setattr(sensitivity, "_ERROR", 1e-2)
    large = found_in(model)
    monkeypatch.setattr(sensitivity, "_ERROR", 1e-6)
    small = found_in(model)
    for name, value in large.items():
        assert small[name] == pytest.approx(value, rel=0.3)
    # behind the MLP nothing follows: an error of down_proj is one of the block
    output = 4 * model.model.layers[0].mlp.down_proj.weight
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.copy_(output)
    assert found_in(model)["mlp.down_proj"] > small["mlp.down_proj"]


def test_numbers_in_names_are_no_experts():
    found = found_in(make_model("opt"))
    assert found["fc1"] != found["fc2"] and len(set(found.values())) == len(found)


def test_one_expert_stands_for_all():
    from trifold.kernels import unstack

    model = make_model("mixtral")
    block = model.model.layers[0]
    ids = torch.randint(2, 128, (2, 16), generator=torch.Generator().manual_seed(0))
    captured = capture_calls(model, model.model.layers, ids)
    unstack(block, {f"mlp.experts.{e}.{part}" for e in range(4) for part in ("up", "down")})
    targets = {name: m for name, m in linears(block).items() if "experts" in name}
    grams = {name: torch.eye(m.weight.shape[1], dtype=torch.float64) for name, m in targets.items()}
    found = sensitivities(block, targets, captured.calls[0], captured.hidden, grams)
    assert len(found) == 8 and len(set(found.values())) == 2
