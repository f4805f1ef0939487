"""Models that see: the text decoder is compressed on text, towers and projectors stay as they are."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import trifold
from tests.families import VISION, config_of, make_family, unpacked, with_image
from tests.helpers import make_tokenizer, trifold_cli, write_text
from trifold.compress.integration.auto import auto_class, is_known
from trifold.compress.proof import compare_logits
from trifold.core.errors import InputError
from trifold.core.topology import find_blocks, towers

TOKENS = torch.randint(2, 118, (2, 11), generator=torch.Generator().manual_seed(7))
SAMPLES = list(torch.randint(2, 118, (4, 16), generator=torch.Generator().manual_seed(8)))


def save(folder, name, dtype=torch.float32):
    model = make_family(name, dtype)
    model.save_pretrained(folder)
    return model


def compress(folder, output, recipe="w4a16-awq", **options):
    return trifold.compress(folder, recipe, SAMPLES, output, nsamples=4, seqlen=16, verbosity=-1, **options)


@torch.no_grad()
def logits(model, **inputs):
    return model(**inputs, use_cache=False).logits


@pytest.mark.parametrize("name", VISION)
def test_text_and_images_through_the_compressed_decoder(name, tmp_path):
    dense = save(tmp_path / "dense", name)
    report = compress(tmp_path / "dense", tmp_path / "packed")
    packed = AutoModelForImageTextToText.from_pretrained(tmp_path / "packed").eval()
    assert type(packed) is type(dense)

    blocks, beside = find_blocks(dense), towers(dense)
    assert report["layers"] and all(layer.startswith(blocks + ".") for layer in report["layers"])
    assert beside and all(path in report["notices"][0] for path in beside) and "stay dense" in report["notices"][0]
    before, after = dense.state_dict(), packed.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before if key.startswith(beside))

    inputs = [{"input_ids": TOKENS}, with_image(name, 0), with_image(name, 1)]
    found = [logits(packed, **given) for given in inputs]
    assert (found[1] - found[2]).abs().max() > 1e-2  # the image counts
    plain = unpacked(packed)
    for given, values in zip(inputs, found, strict=True):
        compare_logits(values, logits(plain, **given), exact=True)
        expected = logits(dense, **given)
        assert (values - expected).norm() < 0.5 * expected.norm()


def test_the_command_line(tmp_path):
    save(tmp_path / "dense", "llava")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    text, packed = write_text(tmp_path / "calib.jsonl", 4, 40), tmp_path / "packed"
    settings = ["--calib", text, "--nsamples", 4, "--seqlen", 16]
    code, _, err = trifold_cli("compress", tmp_path / "dense", "-r", "w4a16-gptq", "-o", packed, *settings)
    assert code == 0 and "model.vision_tower, model.multi_modal_projector" in err
    assert type(trifold.load(packed)).__name__ == "LlavaForConditionalGeneration"
    code, out, err = trifold_cli("eval", packed, "--text", text, "--baseline", tmp_path / "dense", "--seqlen", 64)
    assert code == 0 and "perplexity" in out.lower(), err
    code, out, _ = trifold_cli("generate", packed, "--prompt", "w5 w6", "--max-new-tokens", 3)
    assert code == 0 and out.startswith("w5 w6")


def test_every_part_takes_the_wanted_dtype(tmp_path):
    save(tmp_path / "dense", "mistral3", torch.bfloat16)
    compress(tmp_path / "dense", tmp_path / "packed", dtype="float32")
    packed = AutoModelForImageTextToText.from_pretrained(tmp_path / "packed")
    assert {p.dtype for p in packed.parameters()} == {torch.float32}
    compress(tmp_path / "dense", tmp_path / "half")
    half = trifold.load(tmp_path / "half")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert stored["model.multi_modal_projector.linear_1.weight"].dtype == torch.bfloat16


def test_a_live_model_that_sees():
    model = make_family("gemma3")
    given = with_image("gemma3", 0)
    expected = logits(model, **given)
    model = trifold.compress(model, "w8a16", verbosity=-1)
    assert "model.vision_tower" in model.trifold_report["notices"][0]
    assert (logits(model, **given) - expected).norm() < 0.05 * expected.norm()


def test_cross_attention_to_images_stays_dense(tmp_path):
    dense = save(tmp_path / "dense", "mllama")
    report = compress(tmp_path / "dense", tmp_path / "packed", "w8a16")
    assert {name.split(".")[3] for name in report["layers"]} == {"0", "2"}
    before = {n: p for n, p in dense.state_dict().items() if n.startswith("model.language_model.layers.1.")}
    after = trifold.load(tmp_path / "packed").state_dict()
    assert before and all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_layers_of_a_tower_are_no_targets(tmp_path):
    save(tmp_path / "dense", "qwen2_vl")
    recipe = {"name": "all", "steps": [{"method": "rtn", "scheme": {"bits": 8}, "targets": ["model.visual.*"]}]}
    with pytest.raises(InputError, match=r"model\.visual\.\*' fits no linear layer"):
        compress(tmp_path / "dense", tmp_path / "packed", recipe)


def test_the_class_that_the_checkpoint_names():
    """One config class may serve a model that sees and the text model in it."""

    def found(name, *architectures):
        config = config_of(name)
        config.architectures = list(architectures)
        return auto_class(config).__name__, is_known(config)

    assert found("mllama", "MllamaForConditionalGeneration") == ("AutoModelForMultimodalLM", True)
    assert found("mllama", "MllamaForCausalLM") == ("AutoModelForCausalLM", True)
    assert found("llava") == ("AutoModelForMultimodalLM", True)
    assert found("llama", "LlamaForCausalLM") == ("AutoModelForCausalLM", True)
    assert found("llama", "LlamaForSequenceClassification") == ("AutoModelForCausalLM", False)
    assert found("llava", "LlavaModel") == ("AutoModelForMultimodalLM", False)


def test_encoder_decoders_are_refused(tmp_path):
    save(tmp_path / "dense", "llava")
    file = tmp_path / "dense" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"is_encoder_decoder": True}))
    with pytest.raises(InputError, match="LlavaForConditionalGeneration is not a causal language model"):
        compress(tmp_path / "dense", tmp_path / "packed")
