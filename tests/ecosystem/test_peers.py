"""Exports read by their own loaders, in environments without Trifold; checkpoints of other tools read by us.

TRIFOLD_PEER_PYTHON names the Pythons of these environments, with a colon between them: transformers with
compressed-tensors, GPTQModel, llm-compressor; a test whose tool is in none of them is skipped.
"""

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import trifold
from tests.helpers import save_model
from trifold.compress.packed_folder import open_packed

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "peers" / "checkpoints.py"
NAIVE = "weight_only.naive,rounded_input.naive"
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}


@cache
def peer(module):
    """The Python that has a module."""
    for python in os.environ.get("TRIFOLD_PEER_PYTHON", sys.executable).split(os.pathsep):
        code = f"from importlib.util import find_spec as f; assert f({module!r}) and not f('trifold')"
        if shutil.which(python) and subprocess.run([python, "-c", code], env=ALONE, cwd=os.sep).returncode == 0:
            return python
    return None


ALONE = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
ALONE |= {"GPTQMODEL_CPU_WORKERS": "2", "TORCHDYNAMO_DISABLE": "1"}


def script(module, mode, folder, *options):
    done = subprocess.run(
        [peer(module), str(SCRIPT), mode, str(folder), *options],
        capture_output=True,
        text=True,
        cwd=folder,
        env=ALONE,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def needs(module):
    return pytest.mark.skipif(peer(module) is None, reason=f"TRIFOLD_PEER_PYTHON names no Python with {module}")


def recipe(bits=4, group_size=32, **rest):
    scheme = {"bits": bits, "group_size": group_size, "scale_dtype": "float16", **rest}
    return {"steps": [{"method": "rtn", "scheme": scheme}]}


MIXED = {"steps": [{"method": "rtn", "scheme": {"group_size": 32, "symmetric": True}, "overrides": [
    {"match": "*.down_proj", "scheme": {"bits": 8}}, {"match": "*.o_proj", "skip": True}]}]}  # fmt: skip
W8A8 = {"steps": [{"method": "rtn", "scheme": {"bits": 8, "group_size": "channel", "symmetric": True},
        "input": {"full_range": True}}]}  # fmt: skip
COMPRESSED_TENSORS = [
    ("llama", recipe(4, symmetric=True), True),
    ("llama", recipe(3, symmetric=True), False),
    ("llama", recipe(8, "channel", symmetric=True), False),
    ("llama", recipe(), True),
    ("llama", W8A8, False),
    ("llama", "w8a16-fp8", False),
    ("llama", "w8a8-fp8", False),
    ("qwen3", recipe(4, symmetric=True), True),
    ("qwen3", MIXED, False),
    ("mixtral", recipe(4, symmetric=True), False),
    ("qwen3_moe", recipe(4, symmetric=True), False),
]
GPTQMODEL = [
    ("llama", recipe(4, symmetric=True), "gptq"),
    ("llama", recipe(3), "gptq_v2"),
    ("llama", recipe(8, "channel", symmetric=True), "gptq_v2"),
    ("qwen3", recipe(2), "gptq_v2"),
    ("qwen3", recipe(), "awq"),
]


def exported(root, number, family, chosen, to, tied):
    save_model(root / f"dense-{number}", family, **SIZES, tie_word_embeddings=tied, head_dim=16)
    trifold.compress(root / f"dense-{number}", chosen, None, root / f"fold-{number}", verbosity=-1)
    (root / "out").mkdir(exist_ok=True)
    trifold.export(root / f"fold-{number}", to, root / "out" / str(number))


@torch.no_grad()
def logits(folder):
    return trifold.load(folder, dtype=torch.float32)(torch.arange(2, 66).reshape(2, 32)).logits


def compare(root, monkeypatch):
    """Every checkpoint that was read, on our naive kernels, which sum as the peers do; a fold gives the same."""
    monkeypatch.setenv("TRIFOLD_KERNEL", NAIVE)
    found = sorted((root / "out").glob("*/peer/reference.safetensors"))
    for file in found:
        expected, name = load_file(file), file.parent.parent.name
        for folder in (root / "out" / name, root / f"fold-{name}"):
            if folder.exists():
                assert (logits(folder) - expected["logits"]).abs().max() < 1e-3, folder
        packed = open_packed(root / "out" / name)
        for key in expected.keys() - {"logits", "logits16"}:
            assert torch.equal(packed.weight(key.removesuffix(".weight")).dequantize(), expected[key]), (name, key)
    return len(found)


@needs("compressed_tensors")
def test_transformers_with_compressed_tensors_gives_our_logits(tmp_path, monkeypatch):
    for number, (family, chosen, tied) in enumerate(COMPRESSED_TENSORS):
        exported(tmp_path, number, family, chosen, "compressed-tensors", tied)
    script("compressed_tensors", "read", tmp_path / "out")
    assert compare(tmp_path, monkeypatch) == len(COMPRESSED_TENSORS)


@needs("gptqmodel")
def test_gptqmodel_gives_our_weights_and_logits(tmp_path, monkeypatch):
    for number, (family, chosen, to) in enumerate(GPTQMODEL):
        exported(tmp_path, number, family, chosen, to, tied=False)
    script("gptqmodel", "read", tmp_path / "out")
    assert compare(tmp_path, monkeypatch) == len(GPTQMODEL)


@pytest.mark.parametrize(
    ("tool", "names"),
    [
        pytest.param("llmcompressor", ["ct-gptq-w4a16", "ct-w8a8", "ct-fp8-dynamic"], marks=needs("llmcompressor")),
        pytest.param("gptqmodel", ["gptq-w4-g32-actorder"], marks=needs("gptqmodel")),
    ],
)
def test_checkpoints_of_other_tools_give_their_logits(tmp_path, monkeypatch, tool, names):
    (tmp_path / "out").mkdir()
    script(tool, "make", tmp_path / "out", "--only", *names)
    assert compare(tmp_path, monkeypatch) == len(names)
    made = json.loads((tmp_path / "out" / names[0] / "peer" / "read.json").read_text())
    assert tool in made["versions"]
