"""What the walk over the blocks promises beyond the checkpoint it writes."""

import copy
import json

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

import trifold
from tests.helpers import contents, make_model, make_tokenizer, save_model, trifold_cli
from trifold.compress import checkpoint, pipeline
from trifold.compress.block import BlockCompressor
from trifold.compress.job import Options
from trifold.compress.preflight import prepare
from trifold.compress.progress import Reporter
from trifold.compress.recipe import Recipe
from trifold.compress.walk import Walk
from trifold.core.errors import RecipeError
from trifold.core.linears import linears
from trifold.core.obs import relative_error
from trifold.core.statistics import Gram, Observation
from trifold.kernels import PackedEmbedding, PackedLinear, TiedLinear

RUN = {"nsamples": 11, "seqlen": 32, "verbosity": -1}


def job_of(model, recipe, text, **options):
    chosen = Recipe.load(recipe).updated(["nsamples=11", "seqlen=32"])
    return prepare(model, chosen, text, Options(**options), Reporter(-1), make_tokenizer())


@pytest.mark.parametrize("size", [1, 2, 3, 64])
def test_every_window_is_seen_once(text, size):
    job = job_of(make_model(), "w4a16-gptq", text, batch_size=size)
    rows = [row for ids in job.ids for row in ids]
    assert len(rows) == len(job.windows.ids) == 11
    assert all(torch.equal(a, b) for a, b in zip(rows, job.windows.ids, strict=True))


def test_errors_after_awq_are_those_of_the_folded_layer(text, monkeypatch):
    """What the report says is recomputed from scratch: the folded weight on the inputs it now has."""
    seen = {}
    settle = BlockCompressor._settle

    def spy(self, name, solution, statistics, *rest):
        weight, rounded = self.weights[name], solution.canonical[name].dequantize()
        seen[self.prefix + name] = (self, name, weight.clone(), rounded)
        return settle(self, name, solution, statistics, *rest)

    monkeypatch.setattr(BlockCompressor, "_settle", spy)
    model = make_model()
    recipe = {"steps": [{"method": "awq"}, {"method": "rtn", "scheme": {"bits": 4, "group_size": 16}}]}
    job = job_of(model, recipe, text)
    walk = Walk(job)
    hidden = [h.clone() for h in walk.hidden]
    result = walk.block(0)
    folded = make_model().model.layers[0]
    for name, tensor in result.tensors.items():  # the norms as AWQ left them
        leaf = name.removeprefix("model.layers.0.")
        if "layernorm" in leaf:
            folded.get_parameter(leaf).data = tensor
    scaled = [e for e in result.report.values() if e["awq"]["scaling"] != "none"]
    assert scaled
    for linear in ("self_attn.q_proj", "mlp.gate_proj"):
        _, _, weight, rounded = seen[f"model.layers.0.{linear}"]
        for other in linears(folded):  # everything before is dense: AWQ's statistics are
            folded.get_submodule(other).weight.data = seen[f"model.layers.0.{other}"][2]
        gram = Gram(weight.shape[1])
        handle = folded.get_submodule(linear).register_forward_pre_hook(
            lambda _m, args, gram=gram: gram.update(Observation(args[0].flatten(0, 1)))
        )
        with torch.no_grad():
            for calls, states in zip(walk.calls, hidden, strict=True):
                calls[0].run(folded, states)
        handle.remove()
        reported = result.report[f"model.layers.0.{linear}"]["error"]
        assert reported == pytest.approx(relative_error(weight, rounded, gram.matrix), rel=1e-3)


def test_the_dense_stream_is_the_dense_model(text):
    model = make_model()
    job = job_of(model, "w2a16-gptaq", text)
    walk = Walk(job)
    start = [h.clone() for h in walk.hidden]
    for index in range(3):
        walk.block(index)
    with torch.no_grad():
        for calls, states, dense, packed in zip(walk.calls, start, walk.dense, walk.hidden, strict=True):
            for call, block in zip(calls, model.model.layers, strict=True):
                states = call.run(block, states)
            assert torch.equal(states, dense)
            assert not torch.allclose(states, packed, atol=1e-2)


def test_an_interrupted_live_model_is_whole(tmp_path, text, monkeypatch):
    model = make_model(tie_word_embeddings=False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    recipe = {"steps": [{"method": "rtn", "targets": ["blocks", "lm_head"], "input": {"bits": 8}}]}
    recipe["steps"][0]["scheme"] = {"bits": 8, "group_size": "channel", "symmetric": True}

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "prove", stop)
    with pytest.raises(KeyboardInterrupt):
        trifold.compress(model, recipe, text, tmp_path / "out", tokenizer=make_tokenizer(), **RUN)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_modes_of_submodules_are_given_back(text):
    model = make_model().train()
    model.model.norm.eval()
    trifold.compress(model, "w4a16-rtn", None, settings=["group_size=32"], verbosity=-1)
    assert model.training and not model.model.norm.training


def test_broken_off_before_the_rename_only_the_rename_is_repeated(tmp_path, tiny, text, monkeypatch):
    arguments = ["compress", tiny(), "-r", "w4a16-gptq", "--calib", text, "--nsamples", "8", "--seqlen", "32"]
    arguments = [*map(str, arguments), "-q"]

    def stop(*_):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "publish", stop)
        assert trifold_cli(*arguments, "-o", str(out))[0] == 130
    partial = tmp_path / "out.partial"
    assert not (partial / "journal").exists() and not out.exists()
    other = [*arguments, "-o", str(out), "--set", "group_size=32"]
    code, _, stderr = trifold_cli(*other)
    assert code == 2 and "another run" in stderr and partial.exists()
    written = contents(partial)
    assert trifold_cli(*arguments, "-o", str(out))[0] == 0
    assert contents(out) == written and not partial.exists()
    assert "fingerprint" in json.loads((out / "report.json").read_text())


@pytest.mark.parametrize("left_dense", ["*v_proj", "*q_proj", "*gate_proj"])
def test_awq_beside_layers_that_stay_dense(tmp_path, tiny, text, left_dense):
    recipe = {
        "steps": [
            {"method": "awq"},
            {"method": "rtn", "scheme": {"bits": 8, "group_size": 16}, "ignore": [left_dense]},
        ]
    }
    out = tmp_path / "out"
    trifold.compress(tiny(), recipe, text, out, **RUN)
    recipe["steps"][0]["ignore"] = [left_dense]
    recipe["steps"][1]["ignore"] = []
    trifold.compress(tiny(), recipe, text, tmp_path / "second", **RUN)
    ids = torch.arange(2, 42).reshape(2, 20)
    with torch.no_grad():
        reference = AutoModelForCausalLM.from_pretrained(tiny())(ids).logits
        for folder in (out, tmp_path / "second"):
            assert (trifold.load(folder)(ids).logits - reference).norm() / reference.norm() < 0.1


def test_bf16_proof_sees_the_same_rotary_tables(tmp_path, tiny, text, monkeypatch):
    monkeypatch.setenv("TRIFOLD_KERNEL", "weight_only.blockwise")  # rounds the weights as the reference does
    folder = tiny("llama", torch.bfloat16, max_position_embeddings=2048)
    report = trifold.compress(folder, "w8a16", text, tmp_path / "out", nsamples=2, seqlen=700, verbosity=-1)
    assert report["proof"]["relative_l2"] < 1e-3


def test_files_in_subfolders_come_along(tmp_path, text):
    folder = save_model(tmp_path / "model")
    (folder / "templates").mkdir()
    (folder / "templates" / "tool.jinja").write_text("{{ x }}")
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.pth").write_bytes(b"x")
    trifold.compress(folder, "w4a16-rtn", None, tmp_path / "out", verbosity=-1)
    assert (tmp_path / "out" / "templates" / "tool.jinja").read_text() == "{{ x }}"
    assert not (tmp_path / "out" / "original").exists()


@pytest.mark.parametrize("live", [False, True])
def test_untied_embeddings_can_be_addressed_by_pattern(tmp_path, tiny, text, live):
    folder = tiny("llama", tie_word_embeddings=False)
    steps = [
        {"method": "gptq", "scheme": {"bits": 4, "group_size": 16}},
        {"name": "ends", "method": "rtn", "targets": ["*embed_tokens", "lm_head"]},
    ]
    steps[1]["scheme"] = {"bits": 8, "group_size": "channel", "symmetric": True}
    model = AutoModelForCausalLM.from_pretrained(folder)
    table = model.model.embed_tokens.weight.detach().clone()
    out = tmp_path / "out"
    result = trifold.compress(
        model if live else folder,
        {"steps": steps},
        text,
        out,
        **RUN,
        **({"tokenizer": make_tokenizer()} if live else {}),
    )
    report = result.trifold_report if live else result
    assert report["layers"]["model.embed_tokens"]["error"] < 1e-4
    loaded = trifold.load(out)
    assert isinstance(loaded.model.embed_tokens, PackedEmbedding) and isinstance(loaded.lm_head, PackedLinear)
    assert (loaded.model.embed_tokens.dequantize() - table).abs().max() < 0.05 * table.abs().max()
    ids = torch.arange(2, 42).reshape(2, 20)
    with torch.no_grad():
        reference = loaded(ids).logits
        loaded.save_pretrained(tmp_path / "again")
        assert torch.equal(trifold.load(tmp_path / "again")(ids).logits, reference)
        if live:
            torch.testing.assert_close(model(ids).logits, reference)


def test_embeddings_take_only_what_needs_no_inputs(tiny, text):
    step = {"method": "gptq", "targets": ["*embed_tokens"]}
    with pytest.raises(RecipeError, match="no inputs to calibrate on; use a step with method: rtn"):
        job_of(str(tiny("llama", tie_word_embeddings=False)), {"steps": [step]}, text)


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", torch.float32), ("llama", torch.bfloat16), ("gpt2", torch.float32)]
)
def test_a_tied_pair_shares_one_packed_table(tmp_path, tiny, text, live, family, dtype):
    folder = tiny(family, dtype, tie_word_embeddings=True)
    steps = [
        {"method": "gptq", "scheme": {"bits": 4, "group_size": 16}},
        {"name": "ends", "method": "rtn", "targets": ["head"], "scheme": {"bits": 4, "group_size": 16}},
    ]
    model, out = AutoModelForCausalLM.from_pretrained(folder), tmp_path / "out"
    given = {"tokenizer": make_tokenizer()} if live else {}
    result = trifold.compress(model if live else folder, {"steps": steps}, text, out, **RUN, **given)
    report = result.trifold_report if live else result
    assert len(report["layers"]) == len(set(report["layers"])) and report["mean_error"] < 0.1
    loaded = trifold.load(out)
    table, head = loaded.get_input_embeddings(), loaded.get_output_embeddings()
    assert isinstance(table, PackedEmbedding) and isinstance(head, TiedLinear)
    assert not list(head.buffers()) and not list(head.parameters())
    stored = [
        name
        for name in safetensors.torch.load_file(out / "model.safetensors")
        if "wte" in name or "embed_tokens" in name
    ]
    assert len(stored) == 3 and "lm_head.weight" not in stored
    x = torch.randn(3, 5, table.embedding_dim, dtype=dtype)
    torch.testing.assert_close(
        head(x), torch.nn.functional.linear(x, table.dequantize().to(dtype)), rtol=2e-2, atol=1e-2
    )
    ids = torch.arange(2, 42).reshape(2, 20)
    with torch.no_grad():
        reference = loaded(ids).logits
        loaded.save_pretrained(tmp_path / "again")
        again = trifold.load(tmp_path / "again")
        assert isinstance(again.get_output_embeddings(), TiedLinear)
        assert torch.equal(again(ids).logits, reference)
        assert torch.equal(copy.deepcopy(loaded)(ids).logits, reference)
        if live:
            torch.testing.assert_close(model(ids).logits, reference)
    loaded.to(torch.float32)
    assert loaded.get_output_embeddings()(x.float()).dtype == torch.float32


def test_a_live_model_whose_blocks_cannot_be_captured_is_whole(text, monkeypatch):
    from trifold.compress import walk

    def stop(*_):
        raise KeyboardInterrupt

    model = make_model(tie_word_embeddings=False)
    table = model.model.embed_tokens.weight.detach().clone()
    job = job_of(model, {"steps": [{"method": "rtn", "targets": ["*embed_tokens"]}]}, None)
    monkeypatch.setattr(walk, "capture_calls", stop)
    with pytest.raises(KeyboardInterrupt):
        Walk(job)
    assert torch.equal(model.model.embed_tokens.weight, table)
