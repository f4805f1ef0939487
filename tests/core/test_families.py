"""Every literal fold, on a tiny model of its family: moving a scale across it must not change the logits."""

from dataclasses import replace

import pytest
import torch

from tests.families import FAMILIES, VARIANTS, VISION, config_of, make_family
from trifold.compress.capture import capture_calls
from trifold.compress.runner import BlockRunner
from trifold.core.families import FOLDS, topology_of
from trifold.core.folding import divide_producer, foldable, folded_rows, rows_in_block
from trifold.core.linears import linears, set_weight, weight_of
from trifold.core.method import BlockContext
from trifold.core.scheme import Scheme
from trifold.core.topology import Fold, find_blocks

TOKENS = torch.randint(2, 100, (2, 14), generator=torch.Generator().manual_seed(5))


def contexts(model):
    """Each block with what a block method is handed of it."""
    blocks = model.get_submodule(find_blocks(model))
    captured = capture_calls(model, blocks, TOKENS)
    hidden = captured.hidden
    for block, call in zip(blocks, captured.calls, strict=True):
        if call.skipped:
            continue
        runner = BlockRunner(block, linears(block), [call], [hidden])
        weights = {name: weight_of(module) for name, module in runner.linears.items()}
        parameters = {n: p.data for n, p in block.named_parameters() if n.removesuffix(".weight") not in weights}
        leaders = {name: stage[0] for stage in runner.stages for name in stage}
        schemes = dict.fromkeys(weights, Scheme(4, 32))
        topology = topology_of(model.config.get_text_config())
        yield block, BlockContext(topology, weights, parameters, leaders, {}, schemes, lambda name, _: None)
        with torch.no_grad():
            hidden = call.run(block, hidden)


def apply(block, context, fold, rows, seed, only_consumers=False):
    """Random powers of two, with which float32 norms inside of a float64 model stay exact as well."""
    generator = torch.Generator().manual_seed(seed)
    weights = {n: weight_of(block.get_submodule(n)) for n in context.weights}
    parameters = {name: p.data for name, p in block.named_parameters()}
    consumed = weights[fold.consumers[0]].shape[1]
    exponents = torch.randint(-2, 3, (rows.numel(),), generator=generator).double()
    heads, features = rows.shape
    scale = (2.0**exponents).reshape(heads, 1, features).expand(-1, consumed // rows.numel(), -1).reshape(-1)
    scale = foldable(fold, rows, scale, parameters.get(f"{fold.producer}.weight"))
    if not only_consumers:
        dense = {k: v for k, v in parameters.items() if k.removesuffix(".weight") not in weights}
        new_weights, new_parameters = divide_producer(fold, rows, scale, weights, dense)
        for name, weight in new_weights.items():
            set_weight(block.get_submodule(name), weight)
        for name, value in new_parameters.items():
            block.get_parameter(name).data = value
    for name in fold.consumers:
        set_weight(block.get_submodule(name), weight_of(block.get_submodule(name)) * scale)


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS, use_cache=False).logits


def distance(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def text_type(name):
    return config_of(name).get_text_config().model_type


@pytest.mark.parametrize("family", FOLDS)
def test_a_scale_moved_across_a_fold_changes_nothing(family):
    found = set()
    names = [family] if family in FAMILIES else [n for n in VISION if text_type(n) == family]
    for name in [*names, *(name for name, (base, _) in VARIANTS.items() if base == family)]:
        dtype = torch.float32 if family == "xglm" else torch.float64  # its mask overflows in float64
        model = make_family(name, dtype)
        expected = logits(model)
        for block, context in contexts(model):
            kept = {key: value.clone() for key, value in block.state_dict().items()}
            for seed, fold in enumerate(context.topology.folds):
                rows = rows_in_block(fold, context)
                if rows is None:
                    continue
                apply(block, context, fold, rows, seed, only_consumers=True)
                assert distance(logits(model), expected) > 1e-6, f"{fold}: nothing depends on it"
                block.load_state_dict(kept)
                apply(block, context, fold, rows, seed)
                assert distance(logits(model), expected) <= 1e-9, fold
                block.load_state_dict(kept)
                found.add(fold)
            for seed, fold in enumerate(context.topology.folds):  # one after the other, as AWQ does
                rows = rows_in_block(fold, context)
                if rows is not None:
                    apply(block, context, fold, rows, seed)
            assert distance(logits(model), expected) <= 1e-9
    assert not set(FOLDS[family]) - found, "a literal that no configuration has"


@pytest.mark.parametrize(
    ("family", "fold"),
    [
        ("gpt2", Fold("linear", "mlp.c_fc", ("mlp.c_proj",), "mlp.c_proj")),  # GELU is between
        ("olmo2", Fold("linear", "self_attn.q_proj", ("self_attn.o_proj",), "self_attn.o_proj")),
        ("gemma", replace(FOLDS["gemma"][0], offset=0.0)),
        ("gpt_neox", replace(FOLDS["gpt_neox"][1], rows="last")),
        ("phi3", replace(FOLDS["phi3"][1], rows="grouped")),
        ("falcon", replace(FOLDS["gpt_neox"][2], producer="ln_attn")),
    ],
)
def test_a_wrong_literal_shows(family, fold):
    model = make_family(family, torch.float64)
    expected = logits(model)
    block, context = next(contexts(model))
    rows = rows_in_block(fold, context)
    assert rows is not None
    apply(block, context, fold, rows, 0)
    assert distance(logits(model), expected) > 1e-4


def test_settings_that_rule_folds_out():
    def producers(name):
        return {fold.producer for fold in topology_of(config_of(name)).folds}

    assert producers("bloom-residual") == {"self_attention.query_key_value"}
    assert "self_attn.v_proj" not in producers("olmo-clamped")
    assert producers("opt-post-norm") == {"self_attn.v_proj", "fc1"}
    assert "fc1" not in producers("opt-gelu") | producers("xglm")


def test_a_fold_is_left_out_where_another_compressed_layer_reads_the_norm():
    model = make_family("falcon-one-norm", torch.float64)
    _, context = next(contexts(model))
    sequential = Fold("norm", "input_layernorm", ("self_attention.query_key_value",), "self_attention")
    assert rows_in_block(sequential, context) is None


HEAD = 3


@pytest.mark.parametrize(
    ("rows", "produced", "consumed", "expected"),
    [
        ("all", 12, 12, [list(range(12))]),
        ("all", 6, 12, [[0, 1, 2], [3, 4, 5]]),
        ("second half", 10, 5, [[5, 6, 7, 8, 9]]),
        ("last", 18, 6, [[12, 13, 14, 15, 16, 17]]),  # q q k k v v
        ("last", 24, 12, [[18, 19, 20], [21, 22, 23]]),  # q q q q k k v v
        ("grouped", 18, 6, [[6, 7, 8], [15, 16, 17]]),  # q k v q k v
        ("grouped", 24, 12, [[9, 10, 11], [21, 22, 23]]),  # q q k v q q k v
        ("latent", 16, 6, [[5, 6, 7], [13, 14, 15]]),  # 5 of k and 3 of v per head
        ("all", 5, 12, None),
        ("all", 6, 9, None),
        ("second half", 11, 5, None),
        ("last", 6, 6, None),
        ("last", 13, 6, None),
        ("grouped", 6, 6, None),
        ("grouped", 19, 6, None),
        ("latent", 4, 6, None),
        ("latent", 16, 7, None),
    ],
)
def test_rows_of_the_values(rows, produced, consumed, expected):
    kind = "linear" if rows == "second half" else "value"
    found = folded_rows(Fold(kind, "p", ("c",), "c", rows=rows), produced, consumed, HEAD)
    assert expected is None if found is None else found.tolist() == expected


def test_grouped_queries_need_a_known_head():
    assert folded_rows(Fold("value", "v", ("o",), "o"), 6, 12, 0) is None
    assert folded_rows(Fold("linear", "up", ("down",), "down"), 6, 12, 3) is None


def test_a_norm_takes_the_scale_that_its_rounded_weight_undoes():
    fold = Fold("norm", "n", ("a",), "a", offset=1.0)
    weight = torch.tensor([0.3, -0.7, -1.0, 0.0]).bfloat16()
    scale = torch.tensor([1.7, 0.6, 3.0, 1.0])
    rows = folded_rows(fold, 4, 4, 0)
    taken = foldable(fold, rows, scale, weight)
    _, changed = divide_producer(fold, rows, taken, {}, {"n.weight": weight, "n.bias": torch.ones(4)})
    assert changed["n.weight"].dtype == torch.bfloat16
    torch.testing.assert_close((1 + changed["n.weight"].float()) * taken, 1 + weight.float(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(changed["n.bias"] * taken, torch.ones(4))
    assert (taken != scale)[:2].all() and taken[2] == 1 and taken[3] == 1
