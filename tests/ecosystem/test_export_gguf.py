"""Checkpoints as GGUF files: read back by llama.cpp's package, run by other engines, refused before anything is
written."""

import json
import os
import shutil
import subprocess

import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import trifold
from tests.helpers import FAMILIES, LLAMA_LIKE, compressed_once, contents, make_model, trifold_cli
from trifold.api import load_tokenizer
from trifold.compress import export as exporting
from trifold.compress.packed_folder import open_packed
from trifold.core.errors import InputError, ProofError

SIZES = {"vocab_size": 264, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
LAYER = "model.layers.1.self_attn.q_proj"


def recipe(bits=4, group_size=32, symmetric=True, **rest):
    scheme = {"bits": bits, "group_size": group_size, "scale_dtype": "float16", "symmetric": symmetric, **rest}
    return {"steps": [{"method": "rtn", "scheme": scheme}]}


MIXED = {"steps": [{"method": "rtn", "scheme": {"group_size": 32, "scale_dtype": "float16"}, "overrides": [
    {"match": "*.v_proj", "scheme": {"bits": 8, "symmetric": True}},
    {"match": "*.k_proj", "scheme": {"bits": 3}},
    {"match": "*.o_proj", "skip": True}]}]}  # fmt: skip


def byte_tokenizer():
    """One token for each byte, behind `<s>` and `</s>`, and two of two bytes."""
    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ef", "Ġx"]
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, [("e", "f"), ("Ġ", "x")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def folds(tmp_path_factory):

    def save(folder, family, dtype, **config):
        sizes = {} if family in FAMILIES else {**LLAMA_LIKE, "num_experts_per_tok": 2}
        make_model(family, dtype, **{**sizes, **SIZES, **config}).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        (folder / "LICENSE").write_text("Do as you like.\n")

    return compressed_once(tmp_path_factory, save)


def tensors_of(file):
    """llama.cpp's name -> type and values."""
    found = {}
    for tensor in GGUFReader(file).tensors:
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        found[tensor.name] = tensor.tensor_type.name, values.reshape(tuple(reversed(tensor.shape.tolist())))
    return found


def unpermuted(values, heads):
    """transformers' rows of a query or key that llama.cpp's Llama has turned in pairs."""
    return values.reshape(heads, -1, 2, *values.shape[1:]).transpose(1, 2).reshape(values.shape)


NAMES = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_every_weight_is_read_back_as_it_was(tmp_path, folds, family, dtype):
    fold = folds(MIXED, family, dtype, head_dim=16, tie_word_embeddings=True)
    report = trifold.export(fold, "gguf", tmp_path / "out")
    assert report["layers"] == {"Q4_0": 2, "Q5_0": 8, "Q8_0": 2}
    files = contents(tmp_path / "out")
    assert {"model.gguf", "LICENSE"} <= files.keys() and "config.json" not in files
    assert report["total_bytes"] == len(files["model.gguf"])
    found, packed = tensors_of(tmp_path / "out" / "model.gguf"), open_packed(fold)
    heads = {"q_proj": 4, "k_proj": 2} if family == "llama" else {}
    for name in packed.modules:
        _, _, block, _, leaf = name.split(".")
        stored, values = found.pop(f"blk.{block}.{NAMES[leaf]}.weight")
        assert stored[0] == "Q"
        values = unpermuted(values, heads[leaf]) if leaf in heads else values
        assert torch.equal(values, packed.weight(name).dequantize()), name
    own = "F32" if dtype == torch.float32 else "BF16"
    assert found["token_embd.weight"][0] == found["blk.0.attn_output.weight"][0] == own
    assert found["blk.1.ffn_norm.weight"][0] == found["output_norm.weight"][0] == "F32"
    assert "output.weight" not in found  # llama.cpp takes the embedding
    embedding = packed.tensors["model.embed_tokens.weight"].load().float()
    assert torch.equal(found["token_embd.weight"][1], embedding)
    trifold.export(fold, "gguf", tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == files["model.gguf"]
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("bits", [2, 3, 5, 6])
def test_other_widths_keep_every_code(tmp_path, folds, bits):
    fold = folds(recipe(bits))
    trifold.export(fold, "gguf", tmp_path / "out.gguf")
    found, packed = tensors_of(tmp_path / "out.gguf"), open_packed(fold)
    weight = packed.weight("model.layers.1.mlp.down_proj")
    stored, values = found["blk.1.ffn_down.weight"]
    assert stored == {2: "Q4_0", 3: "Q4_0", 5: "Q5_0", 6: "Q8_0"}[bits] and torch.equal(values, weight.dequantize())


def test_rounded_embeddings_and_heads(tmp_path, folds):
    steps = [{"method": "rtn", "scheme": {"bits": 8, "group_size": 32, "symmetric": True, "scale_dtype": "float16"},
              "targets": ["embeddings", "head"]}]  # fmt: skip
    fold = folds({"steps": steps}, tie_word_embeddings=False)
    assert trifold.export(fold, "gguf", tmp_path / "out.gguf")["layers"] == {"Q8_0": 2}
    found, packed = tensors_of(tmp_path / "out.gguf"), open_packed(fold)
    for name, place in (("model.embed_tokens", "token_embd"), ("lm_head", "output")):
        assert torch.equal(found[f"{place}.weight"][1], packed.weight(name).dequantize())


@pytest.mark.parametrize(("family", "router"), [("mixtral", "F32"), ("qwen2_moe", "F32"), ("qwen3_moe", "F32")])
def test_experts_lie_side_by_side(tmp_path, folds, family, router):
    sizes = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64, "norm_topk_prob": family[4:5] == "3"}
    sizes = {"intermediate_size": 32} if family == "mixtral" else {**sizes, "num_experts": 4, "head_dim": 16}
    fold = folds(recipe(), family, tie_word_embeddings=True, **sizes)
    trifold.export(fold, "gguf", tmp_path / "out.gguf")
    found, packed = tensors_of(tmp_path / "out.gguf"), open_packed(fold)
    up = torch.stack([packed.weight(f"model.layers.1.mlp.experts.{e}.up").dequantize() for e in range(4)])
    down = torch.stack([packed.weight(f"model.layers.1.mlp.experts.{e}.down").dequantize() for e in range(4)])
    assert torch.equal(found["blk.1.ffn_gate_exps.weight"][1], up[:, :32])
    assert torch.equal(found["blk.1.ffn_up_exps.weight"][1], up[:, 32:])
    assert torch.equal(found["blk.1.ffn_down_exps.weight"][1], down)
    assert found["blk.1.ffn_gate_inp.weight"][0] == router
    # the only one of these that wants a head of its own
    assert ("output.weight" in found) == (family == "qwen2_moe")
    assert ("blk.1.ffn_up_shexp.weight" in found) == (family == "qwen2_moe")
    if family == "qwen2_moe":
        assert found["blk.1.ffn_gate_inp_shexp.weight"][1].shape == (64,)


@pytest.mark.parametrize(("group", "symmetric"), [(32, True), (64, True), (128, True), (64, False)])
def test_a_gptq_checkpoint_goes_out_as_compressed_tensors_and_gguf_with_every_code(tmp_path, folds, group, symmetric):
    fold = folds(recipe(4, group, symmetric), hidden_size=256, intermediate_size=512)
    trifold.export(fold, "gptq_v2", tmp_path / "gptq")
    trifold.export(tmp_path / "gptq", "compressed-tensors", tmp_path / "ct")
    report = trifold.export(tmp_path / "gptq", "gguf", tmp_path / "out.gguf")
    assert sum(report["layers"].values()) == 14 and report["layers"].get("Q4_0", 0) == 14 * symmetric
    theirs, ours, found = (
        open_packed(tmp_path / "ct"),
        open_packed(tmp_path / "gptq"),
        tensors_of(tmp_path / "out.gguf"),
    )
    for name in ours.modules:
        weight, other = ours.weight(name), theirs.weight(name)
        assert torch.equal(weight.codes, other.codes) and torch.equal(weight.dequantize(), other.dequantize())
        _, _, block, _, leaf = name.split(".")
        values = found[f"blk.{block}.{NAMES[leaf]}.weight"][1]
        values = unpermuted(values, {"q_proj": 4, "k_proj": 2}[leaf]) if leaf in ("q_proj", "k_proj") else values
        assert torch.equal(values, weight.dequantize()), name


def test_act_order_is_refused_with_the_way_out(tmp_path, folds):
    from tests.ecosystem.test_export import act_order

    trifold.export(folds(recipe(symmetric=False)), "gptq_v2", tmp_path / "gptq")
    act_order(tmp_path / "gptq")
    with pytest.raises(InputError, match=r"gguf cannot hold it: it is split\(.*--to dense can, and --requantize"):
        trifold.export(tmp_path / "gptq", "gguf", tmp_path / "out.gguf")


REFUSALS = [
    (recipe(group_size=16), {}, "q_proj: gguf cannot hold it: groups of 16 inputs are not whole blocks of 32; --to"),
    (recipe(8, symmetric=False), {}, "its codes less their zero-points, .* are not within -128..127; --to pack"),
    (recipe(), {"intermediate_size": 80}, "down_proj: gguf cannot hold it: its 80 inputs are not whole blocks of 32"),
    ("w4a16-nf4", {}, "its values are those of nf4, not integers; --to dense can, and --requantize rounds it again"),
    ("w4a16-hqq", {}, "its zero-points are real numbers"),
    ("w8a8", {}, r"it rounds activations \(a8\); --to pack-quantized can"),
    (recipe(), {"family": "olmo2"}, "olmo2 is not exported to gguf; known: llama"),
    (recipe(), {"hidden_act": "gelu"}, "hidden_act='gelu', which llama.cpp's llama does not run; --to dense can"),
]  # fmt: skip


@pytest.mark.parametrize(("chosen", "config", "reason"), REFUSALS, ids=[reason for *_, reason in REFUSALS])
def test_a_refusal_writes_nothing(tmp_path, folds, chosen, config, reason):
    with pytest.raises(InputError, match=reason):
        trifold.export(folds(chosen, **config), "gguf", tmp_path / "out.gguf")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_llama_cpp_has_not(tmp_path, folds):
    copy = shutil.copytree(folds(recipe()), tmp_path / "copy")
    whole = json.loads((copy / "tokenizer.json").read_text())
    whole["pre_tokenizer"] = {"type": "Whitespace"}
    (copy / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(InputError, match=r"tokenizer.json: it splits text by Whitespace .*export a copy of the check"):
        trifold.export(copy, "gguf", tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
    (copy / "tokenizer.json").unlink()
    trifold.export(copy, "gguf", tmp_path / "out.gguf")
    fields = GGUFReader(tmp_path / "out.gguf").fields
    assert fields["tokenizer.ggml.model"].contents() == "none" and fields["llama.vocab_size"].contents() == 264


def test_a_file_that_is_read_back_otherwise_is_thrown_away(tmp_path, folds, monkeypatch):
    from trifold.compress import export_gguf

    write = exporting.write_gguf

    def damaged(plan, file, tokenizer):
        def prove(plan, file, sums):
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)
            proof(plan, file, sums)

        proof = export_gguf._prove
        monkeypatch.setattr(export_gguf, "_prove", prove)
        return write(plan, file, tokenizer)

    monkeypatch.setattr(exporting, "write_gguf", damaged)
    with pytest.raises(ProofError, match=r"blk\.1\.ffn_up\.weight is read back as something else"):
        trifold.export(folds(recipe()), "gguf", tmp_path / "out.gguf")
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path, folds):
    code, stdout, _ = trifold_cli("export", folds(recipe()), "--to", "gguf", "-o", tmp_path / "x.gguf", "--json", "-")
    assert code == 0 and json.loads(stdout)["layers"] == {"Q4_0": 14} and (tmp_path / "x.gguf").is_file()
    code, _, stderr = trifold_cli("export", folds(recipe()), "--to", "gguf", "-o", tmp_path / "x.gguf")
    assert code == 2 and "already exists" in stderr


PEER = os.environ.get("TRIFOLD_GGUF_PYTHON", "")
"""A Python with transformers and gguf, and for the second test llama-cpp-python."""
TRANSFORMERS = """
import json, sys, torch
from transformers import AutoModelForCausalLM
assert "trifold" not in sys.modules
for folder in json.loads(sys.argv[1]):
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32)
    with torch.no_grad():
        torch.save(model(torch.arange(2, 42)[None]).logits, folder + "/logits.pt")
"""
LLAMA_CPP = """
import json, sys, numpy, torch
import llama_cpp
assert "trifold" not in sys.modules
for folder in json.loads(sys.argv[1]):
    options = {"type_k": 0, "type_v": 0}  # keys and values in float32
    model = llama_cpp.Llama(folder + "/model.gguf", n_ctx=64, n_threads=1, logits_all=True, verbose=False, **options)
    model.eval(list(range(2, 42)))
    torch.save(torch.from_numpy(numpy.array(model.scores[:40]))[None], folder + "/logits.pt")
    text = "def f(x):\\n  return x + 12 # it's ünïcödé"
    json.dump(model.tokenize(text.encode(), add_bos=True, special=True), open(folder + "/tokens.json", "w"))
"""
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
BOTH = [
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"head_dim": 32}),
    ("qwen3", {"head_dim": 128, "tie_word_embeddings": True}),
    ("qwen3_moe", {"head_dim": 16, "num_experts": 4, "norm_topk_prob": True, "moe_intermediate_size": 768}),
    ("qwen2_moe", {"num_experts": 4, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632}),
]
"""Sizes that transformers' reader of GGUF does not read from the file are those that it assumes."""
LLAMA_CPP_ONLY = [
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"rope_parameters": LLAMA3}),
    ("qwen3", {"head_dim": 16, "rope_parameters": YARN}),
    ("mixtral", {}),
]


def run_peer(script, folders):
    done = subprocess.run(
        [PEER, "-c", script, json.dumps([str(folder) for folder in folders])],
        capture_output=True,
        text=True,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [torch.load(folder / "logits.pt") for folder in folders]


def logits(folder):
    with torch.no_grad():
        return trifold.load(folder)(torch.arange(2, 42)[None]).logits


def written(tmp_path, folds, cases, chosen, **options):
    made = {}
    for number, (family, config) in enumerate(cases):
        fold = folds(chosen, family, **config)
        trifold.export(fold, "gguf", tmp_path / str(number), **options)
        made[tmp_path / str(number)] = fold
    return made


@pytest.mark.skipif(not PEER, reason="TRIFOLD_GGUF_PYTHON names no Python with transformers and gguf")
def test_transformers_gives_our_logits(tmp_path, folds):
    made = written(tmp_path, folds, BOTH, MIXED)
    for (folder, fold), found in zip(made.items(), run_peer(TRANSFORMERS, made), strict=True):
        assert (found - logits(fold)).abs().max() < 1e-3, folder


def has_llama_cpp():
    return bool(PEER) and subprocess.run([PEER, "-c", "import llama_cpp"], capture_output=True).returncode == 0


@pytest.mark.skipif(not has_llama_cpp(), reason="TRIFOLD_GGUF_PYTHON names no Python with llama-cpp-python")
def test_llama_cpp_gives_our_logits(tmp_path, folds):
    """Closely with rounded weights, where it rounds activations too; to 1e-3 with low-rank ones, which go out dense."""
    made = written(tmp_path, folds, BOTH[:3] + LLAMA_CPP_ONLY[:3], MIXED)
    for (folder, fold), found in zip(made.items(), run_peer(LLAMA_CPP, made), strict=True):
        ours = logits(fold)
        assert (found - ours).norm() / ours.norm() < 0.03, folder
        text = "def f(x):\n  return x + 12 # it's ünïcödé"
        tokens = load_tokenizer(fold)(text)["input_ids"]
        assert json.loads((folder / "tokens.json").read_text()) == tokens


@pytest.mark.skipif(not has_llama_cpp(), reason="TRIFOLD_GGUF_PYTHON names no Python with llama-cpp-python")
def test_llama_cpp_gives_our_logits_of_dense_weights(tmp_path, folds):
    lowrank = "rank80-svd"
    made = written(tmp_path, folds, BOTH + LLAMA_CPP_ONLY, lowrank, requantize=True)
    for (folder, fold), found in zip(made.items(), run_peer(LLAMA_CPP, made), strict=True):
        assert (found - logits(fold)).abs().max() < 1e-3, folder
