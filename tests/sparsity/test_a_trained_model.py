"""The order of the pruners on the layers of a trained model, whose inputs are as correlated as they come."""

import itertools
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.sparsity.problems import error
from trifold.compress.calibration import text_windows
from trifold.core.linears import linears, weight_of
from trifold.core.observe import watch
from trifold.sparsity import Magnitude, SparseGPT, Wanda

SHARED = Path(__file__).parents[3] / "shared"
PYCODE = SHARED / "models" / "pycode-5m"
KINDS = ("q_proj", "v_proj", "o_proj", "down_proj")


@pytest.fixture(scope="module")
def layers():
    """Name -> weight and Gram matrix, of layers in one block of pycode-5m on its calibration text."""
    model = AutoModelForCausalLM.from_pretrained(PYCODE, dtype=torch.float32).eval()
    text = SHARED / "data" / "pycode" / "calib.jsonl"
    ids = text_windows(text, AutoTokenizer.from_pretrained(PYCODE), model.config, 12, 256).ids
    found = {name: module for name, module in linears(model.model.layers[2]).items() if name.endswith(KINDS)}
    grams = {}

    def see(name, x):
        x = x.flatten(0, -2).double()
        grams[name] = grams.get(name, 0) + x.T @ x

    with watch(found, see), torch.no_grad():
        model.model(torch.stack(ids))
    return {name: (weight_of(module).detach(), grams[name]) for name, module in found.items()}


@pytest.mark.skipif(not PYCODE.is_dir(), reason="needs the model pycode-5m")
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_each_idea_is_worth_its_price(layers, pattern):
    """In every layer but for Wanda, whose assumption of independent inputs need not help in each."""
    methods = [
        SparseGPT(pattern=pattern, dtype="float32"),
        SparseGPT(pattern=pattern, refit=False, dtype="float32"),
        Wanda(pattern=pattern, refit=False, dtype="float32"),
        Magnitude(pattern=pattern, dtype="float32"),
    ]
    assert len(layers) == len(KINDS)
    errors = torch.tensor([[error(method, *layer) for layer in layers.values()] for method in methods])
    refitted, swept, wanda, _ = errors
    assert (refitted < 0.8 * swept).all() and (swept < 0.6 * wanda).all()
    assert all(a < 0.95 * b for a, b in itertools.pairwise(errors.mean(1)))
