"""Experts taken apart give what the stacked module gives."""

import copy

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.helpers import COMMON, MIXTURES
from trifold.kernels import PackedExperts, is_stacked, unstack


def mixture(family, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**{**COMMON, **MIXTURES[family]})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
    return model


def logits(model, tokens=24):
    ids = torch.randint(2, 128, (2, tokens), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("family", MIXTURES)
def test_the_function_stays(family):
    model = mixture(family)
    expected = logits(model)
    paths = [path for path, module in model.named_modules() if is_stacked(module)]
    assert paths and sorted(unstack(model, {f"{path}.0.up" for path in paths})) == sorted(paths)
    assert not any(is_stacked(module) for module in model.modules())
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", MIXTURES)
def test_showing_every_token_does_not_change_the_output(family):
    model = mixture(family)
    unstack(model, {f"{path}.0.up" for path, module in model.named_modules() if is_stacked(module)})
    expected = logits(model)
    seen = {}
    for path, module in model.named_modules():
        if isinstance(module, PackedExperts):
            module.shown = frozenset(range(module.count))
            for e in range(module.count):
                up = module.get_submodule(f"{e}.up")
                up.register_forward_pre_hook(lambda _m, args, key=(path, e): seen.update({key: args[0]}))
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    mixtures = [m for m in model.modules() if isinstance(m, PackedExperts)]
    assert len(seen) == sum(m.count for m in mixtures)
    assert {len(x) for x in seen.values()} == {48}  # all tokens
    assert all(x.any(-1).all() for x in seen.values())  # also where the router gave this expert nothing


def test_only_wanted_mixtures_are_taken_apart():
    model = mixture("mixtral")
    assert unstack(model, {"model.layers.1.mlp.experts.3.down"}) == ["model.layers.1.mlp.experts"]
    assert is_stacked(model.model.layers[0].mlp.experts)


def test_the_stacked_module_is_not_changed():
    model = mixture("gpt_oss")
    stacked = model.model.layers[0].mlp.experts
    before = copy.deepcopy(stacked.state_dict())
    apart = PackedExperts(stacked)
    apart.get_submodule("0.up").weight.data = torch.zeros_like(apart.get_submodule("0.up").weight)
    assert before.keys() == stacked.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in stacked.state_dict().items())
    assert sum(p.numel() for p in apart.parameters()) == sum(p.numel() for p in stacked.parameters())


def test_experts_without_tokens_do_not_run():
    model = mixture("mixtral")
    unstack(model, {"model.layers.0.mlp.experts.0.up"})
    experts = model.model.layers[0].mlp.experts
    ran = []
    for e in range(experts.count):
        experts.get_submodule(str(e)).register_forward_hook(lambda *_, e=e: ran.append(e))
    x = torch.randn(3, 48)
    experts(x, torch.tensor([[1, 3], [3, 1], [1, 3]]), torch.full((3, 2), 0.5))
    assert ran == [1, 3]
    assert experts(x[:0], torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2)).shape == (0, 48)
    skipped = experts(x, torch.full((3, 2), experts.count), torch.full((3, 2), 0.5))  # another process has these
    assert torch.equal(skipped, torch.zeros(3, 48))
