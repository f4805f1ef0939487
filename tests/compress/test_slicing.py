"""Smaller dimensions through the pipeline: compressed, proved, reloaded, run with a cache, broken off and gone on."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import trifold
from tests import families
from tests.helpers import FAMILIES, make_model, make_tokenizer, save_model, trifold_cli, write_text
from trifold.compress.integration.sliced_attention import SlicedAttention
from trifold.compress.slicing import slice_attention
from trifold.core.dimensions import DIMENSIONS, dimensions_of
from trifold.core.errors import CheckpointError
from trifold.core.method import Heads

QUICK = ("--nsamples", "6", "--seqlen", "32")
OPT = {"hidden_size": 48, "ffn_dim": 86, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 48}
MORE = {"opt": {**OPT, "max_position_embeddings": 128}, "mistral": FAMILIES["llama"]}
MORE |= {"gemma": {**FAMILIES["llama"], "head_dim": 12}, "phi3": FAMILIES["llama"]}


@pytest.fixture(autouse=True)
def _more_families(monkeypatch):
    for name, config in MORE.items():
        monkeypatch.setitem(FAMILIES, name, config)


def compress(folder, family, *more, preset="rank60-modegpt", **changes):
    model, text = save_model(folder / "model", family, **changes), write_text(folder / "calib.jsonl", lines=12)
    arguments = ("compress", model, "-r", preset, "-o", folder / "out", "--calib", text, *QUICK, *more)
    code, _, stderr = trifold_cli(*arguments)
    assert code == 0, stderr
    return folder / "out", stderr, arguments


def slices(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]["slices"]


def ids(batch=2, tokens=11, seed=0):
    return torch.randint(2, 128, (batch, tokens), generator=torch.Generator().manual_seed(seed))


# -- the attention itself ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(f for f, known in DIMENSIONS.items() if known.attention))
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_whole_heads_give_what_the_model_gives(monkeypatch, family, attention):
    config = families.FAMILIES.get(family, FAMILIES.get(family))
    if config is None:
        pytest.skip(f"no small {family} to try it on")
    monkeypatch.setitem(FAMILIES, family, {k: v for k, v in config.items() if family != "opt" or "key_value" not in k})
    model = make_model(family)
    if attention == "sdpa" and not model._supports_sdpa:
        pytest.skip("its scores are capped, which sdpa cannot do")
    model.set_attn_implementation(attention)
    layout = dimensions_of(model.config).attention
    x, mask = ids(tokens=13), torch.ones(2, 13, dtype=torch.long)
    mask[0, :4] = 0
    with torch.no_grad():
        wanted = model(x, attention_mask=mask).logits
        for name in [name for name, _ in model.named_modules()]:
            if name.endswith("." + layout.module):
                slice_attention(
                    model, layout, Heads(layout.head_dim, layout.head_dim), name.removesuffix(layout.module)
                )
        found = model(x, attention_mask=mask).logits
    assert any(isinstance(module, SlicedAttention) for module in model.modules())
    assert torch.allclose(found[1], wanted[1], atol=1e-4) and torch.allclose(found[0, 4:], wanted[0, 4:], atol=1e-4)


def inflated(folder, model):
    """A dense model of the original dimensions that does the same: rows at their old places, zeros elsewhere."""
    packed = trifold.load(folder)
    heads, kv, d = 4, 2, model.config.head_dim
    with torch.no_grad():
        for ours, theirs in zip(packed.model.layers, model.model.layers, strict=True):
            width = ours.mlp.down_proj.in_features
            for name in ("gate_proj", "up_proj"):
                weight = getattr(theirs.mlp, name).weight
                weight.zero_()[:width] = getattr(ours.mlp, name).weight
            theirs.mlp.down_proj.weight.zero_()[:, :width] = ours.mlp.down_proj.weight
            a, b = ours.self_attn, theirs.self_attn
            if not isinstance(a, SlicedAttention):
                continue
            pairs = torch.arange(d // 2).expand(kv, -1) if a.rotary_index is None else a.rotary_index.long()
            places = torch.cat([pairs, pairs + d // 2], 1)
            for name, count in (("q_proj", heads), ("k_proj", kv)):
                rows = getattr(a, name).weight.reshape(count, a.qk_dim, -1)
                whole = torch.zeros(count, d, rows.shape[-1])
                for head in range(count):
                    whole[head, places[head // (count // kv)]] = rows[head]
                getattr(b, name).weight.copy_(whole.reshape(count * d, -1))
            values = a.v_proj.weight.reshape(kv, a.v_dim, -1)
            b.v_proj.weight.zero_().view(kv, d, -1)[:, : a.v_dim] = values
            b.o_proj.weight.zero_().view(-1, heads, d)[:, :, : a.v_dim] = a.o_proj.weight.view(-1, heads, a.v_dim)
    return packed, model


def test_it_is_the_model_with_rows_left_out(tmp_path):
    out, _, _ = compress(tmp_path, "llama", preset="rank60-modegpt-published")
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    packed, dense = inflated(out, config)
    cut = [m for m in packed.modules() if isinstance(m, SlicedAttention)]
    assert len(cut) == 3 and all(m.qk_dim < 12 and m.v_dim < 12 and m.rotary_index is not None for m in cut)
    positions = torch.tensor([[3, 4, 5, 40, 41, 60, 61, 99]])  # anywhere
    with torch.no_grad():
        for more in ({}, {"position_ids": positions}):
            x = ids(1, 8, seed=4)
            assert torch.allclose(packed(x, **more).logits, dense(x, **more).logits, atol=1e-4)
        packed, dense, cache = packed.double(), dense.double(), None
        wanted = dense(x, position_ids=positions).logits
        for at, position in enumerate(positions[0]):  # a token at a time, rotated keys from the cache
            step = packed(x[:, at : at + 1], position_ids=position[None, None], past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            assert torch.allclose(step.logits[:, 0], wanted[:, at], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "gpt2", "opt"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generation_with_a_cache_of_the_reduced_size(tmp_path, family, attention):
    out, _, _ = compress(tmp_path, family, "--set", "allocation=uniform")
    model = AutoModelForCausalLM.from_pretrained(out, attn_implementation=attention).eval()
    x = ids(2, 9, seed=5)
    mask = torch.ones_like(x)
    mask[0, :5] = 0  # the first prompt is shorter, padded on the left
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 1}
    with torch.no_grad():
        found = model.generate(x, attention_mask=mask, **settings)
        again = model.generate(x, attention_mask=mask, use_cache=False, **settings)
        assert torch.equal(found, again)
        alone = model.generate(x[:1, 5:], **settings)
        assert torch.equal(alone[0, 4:], found[0, 9:])
        grown = x[1:]
        for _ in range(8):  # full recomputation, by hand
            grown = torch.cat([grown, model(grown).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(grown[0], found[1])
        whole, cache, logits = model(x).logits, None, []
        for piece in x.split([4, 1, 3, 1], 1):  # a prompt in pieces, single tokens between them
            step = model(piece, past_key_values=cache, use_cache=True)
            cache, logits = step.past_key_values, [*logits, step.logits]
        assert torch.allclose(torch.cat(logits, 1), whole, atol=1e-5)
    heads = next(m for m in model.modules() if isinstance(m, SlicedAttention))
    assert heads.v_dim < heads.layout.head_dim and (heads.qk_dim < heads.layout.head_dim) == (family != "qwen3")
    assert cache.layers[0].keys.shape[-1] == heads.qk_dim and cache.layers[0].values.shape[-1] == heads.v_dim


def test_flash_attention_is_given_heads_of_one_size(tmp_path):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def like_flash(module, q, k, v, *more, **settings):
        assert q.shape[-1] == k.shape[-1] == v.shape[-1]
        return sdpa_attention_forward(module, q, k, v, *more, **settings)

    out, _, _ = compress(tmp_path, "llama")
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    ALL_ATTENTION_FUNCTIONS.register("like_flash", like_flash)
    ALL_MASK_ATTENTION_FUNCTIONS.register("like_flash", sdpa_mask)
    with torch.no_grad():
        wanted = model(ids()).logits
        model.config._attn_implementation_internal = "like_flash"  # the setter would look for the real one
        assert any(m.qk_dim != m.v_dim for m in model.modules() if isinstance(m, SlicedAttention))
        assert torch.allclose(model(ids()).logits, wanted, atol=1e-5)


# -- the pipeline ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "mistral", "opt", "gpt2", "phi3", "olmo2"])
def test_families_are_cut_to_the_budget_and_proved(tmp_path, family):
    out, stderr, _ = compress(tmp_path, family, preset="rank80-modegpt")
    found = {name: entry for name, entry in slices(out).items() if "shape" in entry}
    left, of = (sum(e[key][0] * e[key][1] for e in found.values()) for key in ("shape", "of"))
    assert 0.785 * of < left <= 0.8 * of
    cut = [name for name, entry in slices(out).items() if "qk_dim" in entry]
    assert bool(cut) == (family != "olmo2") and ("attention stays whole" in stderr) == (family == "olmo2")
    assert ("norm over their whole head" in stderr) == (family == "qwen3")
    report = json.loads((out / "report.json").read_text())
    assert report["bits_per_weight"] == pytest.approx(32 * left / of) and report["proof"]["max_abs"] < 1e-4
    assert all(0 <= entry["error"] < 1 for entry in report["layers"].values())
    code, stdout, _ = trifold_cli("inspect", out, "--json", "-")
    layers = json.loads(stdout)["layers"]
    assert code == 0 and set(layers) == set(slices(out))
    for name in cut:
        sizes = slices(out)[name]
        assert layers[name]["describe"] == f"heads of {sizes['head_dim']}: q, k {sizes['qk_dim']}, v {sizes['v_dim']}"
    code, stdout, stderr = trifold_cli("plan", tmp_path / "model", "-r", "rank80-modegpt", "--json", "-")
    assert code == 0, stderr
    plan = json.loads(stdout)
    assert plan["total_bytes"] == pytest.approx(report["total_bytes"], rel=0.02) and plan["layers"] == len(found)
    assert "only the sum is certain" in plan["notices"][-1]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("preset", ["rank60-modegpt", "rank80-modegpt-published"])
def test_fewer_tokens_than_features(tmp_path, family, preset):
    out, _, _ = compress(tmp_path, family, "--nsamples", "1", "--seqlen", "5", preset=preset)
    assert torch.isfinite(trifold.load(out)(ids()).logits).all()


def test_everything_kept_is_the_model_itself(tmp_path):
    out, _, _ = compress(tmp_path, "llama", "--set", "keep=1.0", preset="rank80-modegpt")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(trifold.load(out)(ids()).logits, dense(ids()).logits)


def test_what_is_left_can_be_rounded(tmp_path):
    recipe = {
        "steps": [
            {"method": "modegpt", "options": {"keep": 0.7}},
            {"method": "gptq", "scheme": {"bits": 4, "group_size": 16}},
        ],
        "nsamples": 6,
        "seqlen": 32,
    }
    model, text = save_model(tmp_path / "model"), write_text(tmp_path / "calib.jsonl", lines=12)
    trifold.compress(model, recipe, text, tmp_path / "out", verbosity=-1)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert 0.65 * 4 < report["bits_per_weight"] < 0.7 * 6
    loaded = trifold.load(tmp_path / "out")
    assert {type(m).__name__ for n, m in loaded.named_modules() if n.endswith("proj")} == {"PackedLinear"}
    assert torch.isfinite(loaded(ids()).logits).all()
    found = trifold.compress(make_model(), recipe, text, tokenizer=make_tokenizer(), verbosity=-1)
    assert torch.allclose(found(ids()).logits, loaded(ids()).logits, atol=1e-4)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_live_model_saves_what_loads_again(tmp_path, inplace):
    text = write_text(tmp_path / "calib.jsonl", lines=12)
    recipe = {"steps": [{"method": "modegpt", "options": {"keep": 0.6}}], "nsamples": 6, "seqlen": 32}
    model = trifold.compress(make_model(), recipe, text, tokenizer=make_tokenizer(), inplace=inplace, verbosity=-1)
    assert any(isinstance(module, SlicedAttention) for module in model.modules())
    model.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(trifold.load(tmp_path / "saved")(ids()).logits, model(ids()).logits)


def test_refusals_are_one_line(tmp_path):
    text = write_text(tmp_path / "calib.jsonl", lines=12)
    mixture = save_model(tmp_path / "mixture", "mixtral")
    command = ("compress", mixture, "-r", "rank80-modegpt", "-o", tmp_path / "out", "--calib", text, *QUICK)
    code, _, stderr = trifold_cli(*command)
    assert code == 2 and "it is not known which dimensions of mixtral can be cut" in stderr
    code, _, stderr = trifold_cli("plan", mixture, "-r", "rank80-modegpt")
    assert code == 2 and "dimensions of mixtral" in stderr
    model = save_model(tmp_path / "model")
    for settings, said in (
        (("keep=0.01",), "keep at least 0."),
        (("keep=0",), "the share that stays is in 0..1"),
        (("temperature=0",), "temperature above 0"),
    ):
        more = [part for setting in settings for part in ("--set", setting)]
        command = ("compress", model, "-r", "rank80-modegpt", "-o", tmp_path / "out", "--calib", text, *QUICK, *more)
        code, _, stderr = trifold_cli(*command)
        assert code == 2 and said in stderr, stderr
    steps = [{"method": "modegpt"}, {"method": "awq"}, {"method": "rtn"}]
    with pytest.raises(trifold.core.errors.RecipeError, match="put 'awq' first"):
        trifold.compress(model, {"steps": steps}, text, tmp_path / "out", verbosity=-1)
    steps = [{"method": "modegpt"}, {"method": "rtn"}, {"method": "e2e_oqp"}]
    with pytest.raises(trifold.core.errors.RecipeError, match="tunes a whole model"):
        trifold.compress(model, {"steps": steps}, text, tmp_path / "out", verbosity=-1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s["model.layers.1.self_attn"].update(head_dim=16), "no attention with heads of 16"),
        (lambda s: s["model.layers.1.self_attn"].pop("v_dim"), "damaged"),
        (lambda s: s.update({"model.layers.9.self_attn": {"qk_dim": 4, "v_dim": 4}}), "no layer"),
        (lambda s: s["model.layers.1.mlp.up_proj"].update(of=[1, 2]), "is not a linear layer of shape"),
        (lambda s: s["model.layers.1.mlp.up_proj"].update(shape=[3, 48]), "mismatched"),
    ],
)
def test_a_damaged_config_is_refused_by_name(tmp_path, change, said):
    out, _, _ = compress(tmp_path, "llama", "--set", "allocation=uniform")
    config = json.loads((out / "config.json").read_text())
    change(config["quantization_config"]["slices"])
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=said):
        trifold.load(out)


def test_no_other_layout_can_say_what_was_cut(tmp_path):
    out, _, _ = compress(tmp_path, "llama")
    code, _, stderr = trifold_cli("export", out, "--to", "dense", "-o", tmp_path / "dense")
    assert code == 2 and "was cut to a size that no other layout can say" in stderr
    assert not (tmp_path / "dense").exists()
