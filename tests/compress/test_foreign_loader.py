"""Our checkpoints in other hands: without Trifold, with an older Trifold, or damaged."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import trifold
from tests.helpers import trifold_cli
from trifold.core.errors import CheckpointError

PLAIN = """
import sys
from transformers import AutoModelForCausalLM
assert "trifold" not in sys.modules
AutoModelForCausalLM.from_pretrained(sys.argv[1])
print("loaded")
"""
LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, tiny):
    """Recipe -> folder."""
    made = {}
    for recipe in ("w4a16-rtn", "w8a16-fp8"):
        made[recipe] = tmp_path_factory.mktemp("foreign") / "out"
        trifold.compress(tiny(), recipe, None, made[recipe], verbosity=-1)
    return made


@pytest.fixture
def copy(tmp_path, checkpoints):
    return shutil.copytree(checkpoints["w4a16-rtn"], tmp_path / "copy")


@pytest.mark.parametrize("recipe", ["w4a16-rtn", "w8a16-fp8"])
def test_without_trifold_loading_fails_loudly(tmp_path, checkpoints, recipe):
    """Never a model with random weights, or with 8-bit floats whose scales are forgotten: the codes bear the dense
    name in a shape that does not fit."""
    process = subprocess.run(
        [sys.executable, "-c", PLAIN, str(checkpoints[recipe])],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "warning"},
        timeout=300,
    )
    assert process.returncode != 0 and "loaded" not in process.stdout
    assert "size mismatch" in process.stderr and "mlp.up_proj.weight" in process.stderr, process.stderr


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "olmo2"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_no_packed_weight_has_a_dense_shape(tmp_path, tiny, family, bits):
    folder = tiny(family)
    trifold.compress(folder, f"w{bits}a16-rtn", None, tmp_path / "out", verbosity=-1)
    packed, dense = load_file(tmp_path / "out" / "model.safetensors"), load_file(folder / "model.safetensors")
    modules = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["modules"]
    assert len(modules) >= 12
    assert all(packed[f"{name}.weight"].shape != dense[f"{name}.weight"].shape for name in modules)


def change_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def assert_refused(folder, *facts):
    """By the function, by `generate`, and with the same words."""
    with pytest.raises(CheckpointError) as caught:
        trifold.load(folder)
    assert all(fact in str(caught.value) for fact in facts), caught.value
    code, stdout, stderr = trifold_cli("generate", folder, "--prompt", "w1")
    assert (code, stdout) == (2, "")
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in stderr
    assert all(fact in lines[0] for fact in facts)


@pytest.mark.parametrize("version", ["2.0", "13", 2])
def test_newer_format_is_refused_naming_what_is_needed(copy, version):
    change_config(copy, lambda q: q.update(format_version=version))
    needed = str(version).split(".")[0]
    assert_refused(copy, f"checkpoint format {version} is newer", f"reads format {needed}", "pip install --upgrade")
    code, stdout, stderr = trifold_cli("inspect", copy)
    assert (code, stdout) == (2, "") and f"reads format {needed}" in stderr


def test_newer_minor_format_is_read(copy):
    change_config(copy, lambda q: q.update(format_version="1.7", something_new=True))
    assert isinstance(trifold.load(copy).get_submodule(LAYER), trifold.kernels.PackedLinear)


def test_unknown_format_of_a_layer_is_refused(copy):
    change_config(copy, lambda q: q["modules"][LAYER].update(format="float"))
    assert_refused(copy, LAYER, "'float', which this Trifold does not read", "pip install --upgrade trifold")


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        (lambda q: q.update(format_version="new"), ["format_version 'new' is no version"]),
        (lambda q: q.update(modules=[LAYER]), ["`modules` is not a mapping"]),
        (lambda q: q["modules"].update({LAYER: 4}), [LAYER, "names no format"]),
        (lambda q: q["modules"][LAYER].pop("bits"), [LAYER, "damaged", "bits"]),
        (lambda q: q["modules"][LAYER].update(bits=3), [f"{LAYER}.weight is of shape (86, 6), not (86, 5)"]),
        (lambda q: q["modules"][LAYER].update(shape=[86, 49]), [LAYER, "[86, 48]", "[86, 49]"]),
        (lambda q: q["modules"].update({"model.odd": q["modules"][LAYER]}), ["no layer 'model.odd'"]),
        (lambda q: q["modules"].update({"model.norm": q["modules"][LAYER]}), ["model.norm is a LlamaRMSNorm"]),
        (lambda q: q["modules"].pop(LAYER), ["mismatched", f"{LAYER}.weight"]),
    ],
)
def test_damaged_config_is_refused(copy, change, facts):
    change_config(copy, change)
    assert_refused(copy, *facts)


@pytest.mark.parametrize("leaf", ["weight", "weight_scale", "weight_zero_point"])
def test_missing_packed_tensor_is_named(copy, leaf):
    change_tensors(copy, lambda t: t.pop(f"{LAYER}.{leaf}"))
    assert_refused(copy, f"{LAYER}.{leaf} is missing")


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        (lambda t: t.pop("model.norm.weight"), ["1 missing tensor(s)", "model.norm.weight"]),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), ["mismatched", "model.norm.weight"]),
        (lambda t: t.update({"model.odd": torch.ones(3)}), ["1 unexpected tensor(s)", "model.odd"]),
        (lambda t: t.update({f"{LAYER}.weight": t[f"{LAYER}.weight"][1:].clone()}), [f"{LAYER}.weight", "(85, 6)"]),
        (lambda t: t.update({f"{LAYER}.weight": t[f"{LAYER}.weight"].float()}), [f"{LAYER}.weight", "codes", "F32"]),
    ],
)
def test_damaged_tensors_are_refused(copy, change, facts):
    change_tensors(copy, change)
    assert_refused(copy, *facts)


@pytest.mark.parametrize("size", [0, 100, -100])
def test_truncated_checkpoint_is_refused(copy, size):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert_refused(copy, str(copy))


def test_checkpoint_without_weights_config_or_tokenizer(copy, tmp_path):
    (copy / "model.safetensors").unlink()
    assert_refused(copy, str(copy), "model.safetensors")
    (copy / "tokenizer.json").write_text("{")
    code, _, stderr = trifold_cli("generate", copy, "--prompt", "w1")
    assert code == 2 and "no tokenizer that can be read" in stderr
    (copy / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        trifold.load(copy)
    with pytest.raises(CheckpointError, match="no such model folder"):
        trifold.load(tmp_path / "absent")


def test_dense_model_with_tensors_to_spare_is_read(tmp_path, tiny):
    """As by transformers itself; it may be the baseline of an evaluation."""
    folder = shutil.copytree(tiny(), tmp_path / "dense")
    change_tensors(folder, lambda t: t.update({"odd.weight": torch.ones(3)}))
    plain, spare = trifold.load(tiny()).state_dict(), trifold.load(folder).state_dict()
    assert plain.keys() == spare.keys() and all(torch.equal(plain[name], spare[name]) for name in plain)


def test_nobody_is_asked_on_the_terminal(tmp_path, tiny, monkeypatch):
    """transformers would ask whether to run the model's own code, and wait."""
    folder = shutil.copytree(tiny(), tmp_path / "own")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(CheckpointError, match="trust_remote_code"):
        trifold.load(folder)
