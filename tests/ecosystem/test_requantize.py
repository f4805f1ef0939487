"""Rounding a second time: the nearest scheme, codes kept where it has them, and the loss as one computes it by hand."""

import json
import math

import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file

import trifold
from tests.helpers import save_model, trifold_cli
from trifold.compress.packed_folder import open_packed
from trifold.compress.requantize import Losses, Way, find_way, on_grids, parts_of, plain, rounded
from trifold.core.canonical import Dense, LowRank, Quantized, RoundedInput, Sparse, Split
from trifold.core.inputs import InputScheme
from trifold.core.ranges import fit_ranges
from trifold.core.scheme import SCALE_DTYPES, Scheme
from trifold.ecosystem import CODECS
from trifold.ecosystem.gguf.blocks import refusal as no_block
from trifold.quantizers.rtn import round_to_nearest


def sample(bits=4, group=32, symmetric=False, dtype="float16", rows=32, columns=128, least_zero=1, grid="int"):
    generator = torch.Generator().manual_seed(bits)
    scheme = Scheme(bits, group, symmetric, dtype, grid)
    shape = scheme.scale_shape(rows, columns)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = (0.25 + torch.rand(shape, generator=generator)).to(SCALE_DTYPES[dtype])
    zero = torch.randint(least_zero, 2**bits, shape, generator=generator, dtype=torch.uint8)
    return Quantized(codes, scale, None if scheme.symmetric else zero, scheme)


def half(target):
    """What refuses for a model in float16."""
    return no_block if target == "gguf" else lambda weight: CODECS.get(target).refusal(weight, torch.float16)


F16 = {"scale_dtype": "float16"}


@pytest.mark.parametrize(
    ("target", "weight", "expected"),
    [
        ("awq", sample(3), Scheme(4, 32, False, **F16)),
        ("awq", sample(8, symmetric=True), Scheme(4, 32, True, **F16)),
        ("gptq_v2", sample(5), Scheme(8, 32, False, **F16)),
        ("gptq", sample(4, least_zero=0), Scheme(4, 32, True, **F16)),  # version 1 has no zero-point of 0
        ("gptq_v2", sample(4, dtype="float32"), Scheme(4, 32, False, **F16)),
        ("pack-quantized", sample(4, group=32, columns=80), Scheme(4, 16, False, **F16)),
        ("pack-quantized", sample(4, grid="nf4"), Scheme(4, 32, True, **F16)),
        ("float-quantized", sample(4), Scheme(8, "channel", True, "float16", "fp8_e4m3")),
        ("gguf", sample(8), Scheme(8, 32, True, **F16)),
        ("gguf", sample(4, group=16), Scheme(4, 32, False, **F16)),
        ("gguf", sample(4, group=64, dtype="float32"), Scheme(4, 64, False, **F16)),
    ],
)
def test_the_nearest_scheme(target, weight, expected):
    way = find_way(weight, half(target))
    assert way == Way(expected)
    assert half(target)(way(weight)) is None and half(target)(way.header(weight)) is None


def test_nothing_of_this_shape():
    assert find_way(sample(columns=80), no_block) is None


def test_codes_are_kept_in_a_wider_scheme():
    weight = sample(3)
    found = rounded(weight, Scheme(4, 32, False, "float16"))
    assert torch.equal(found.codes, weight.codes) and torch.equal(found.dequantize(), weight.dequantize())


def test_only_scales_change_where_that_is_all_that_has_to():
    weight = sample(4, dtype="float32")
    found = rounded(weight, Scheme(4, 32, False, "float16"))
    assert torch.equal(found.codes, weight.codes) and torch.equal(found.scale, weight.scale.half())


def test_what_does_not_fit_is_rounded_in_searched_ranges():
    weight, scheme = sample(4), Scheme(4, 32, True, "float16")
    found, values = rounded(weight, scheme), weight.dequantize()
    expected = round_to_nearest(values, fit_ranges(values, scheme, "mse"), scheme)
    assert torch.equal(found.codes, expected.codes) and torch.equal(found.scale, expected.scale)
    widest = round_to_nearest(values, fit_ranges(values, scheme), scheme)
    assert 0 < (found.dequantize() - values).norm() < (widest.dequantize() - values).norm()


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_mask_becomes_codes_of_zero(symmetric):
    weight = sample(symmetric=symmetric)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    sparse = Sparse(weight, mask)
    found = plain(RoundedInput(sparse, InputScheme()))
    assert isinstance(found, Quantized) and torch.equal(found.dequantize(), sparse.dequantize())
    assert find_way(sparse, half("awq")) == Way() and on_grids(sparse)


def test_rows_of_what_is_stored_whole():
    left, right = torch.randn(8, 2), torch.randn(2, 32)
    weight = LowRank(left, right)
    _, second = parts_of(weight, 2)
    assert torch.equal(second.dequantize(), weight.dequantize()[4:]) and parts_of(weight, 1) == [weight]
    split = Split(0, torch.arange(8) // 4, (sample(rows=4), Dense(torch.ones(4, 128))))
    assert not on_grids(split) and not on_grids(weight)


def test_the_loss_by_hand():
    """sqrt(3**2) / sqrt(1 + 4 + 4 + 16) of one layer; with another of norm 75 that stays, 3 / 10."""
    before, after = Dense(torch.tensor([[1.0, 2.0], [2.0, 4.0]])), Dense(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    losses = Losses()
    losses.add("a", before, after)
    assert losses.report()["error"] == pytest.approx(3 / 5)
    same = Dense(torch.tensor([[math.sqrt(75)]]))
    losses.add("b", same, same)
    report = losses.report()
    assert report["requantized"].keys() == {"a"} and report["requantized"]["a"]["error"] == pytest.approx(3 / 5)
    assert report["error"] == pytest.approx(3 / 10)


@pytest.fixture(scope="module")
def fold(tmp_path_factory):
    """4 bits with zero-points; o_proj with 3 bits, v_proj with 8, down_proj in NF4; no tokenizer."""
    root = tmp_path_factory.mktemp("fold")
    save_model(root / "dense", "llama", hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    scheme = {"bits": 4, "group_size": 32, "scale_dtype": "float16"}
    overrides = [
        {"match": "*.o_proj", "scheme": {"bits": 3}},
        {"match": "*.v_proj", "scheme": {"bits": 8, "symmetric": True}},
        {"match": "*.down_proj", "scheme": {"grid": "nf4"}},
    ]
    recipe = {"steps": [{"method": "rtn", "scheme": scheme, "overrides": overrides}]}
    trifold.compress(root / "dense", recipe, None, root / "out", verbosity=-1)
    (root / "out" / "tokenizer.json").unlink()
    return root / "out"


def relative(before, after):
    return float((after - before).double().norm() / before.double().norm())


@pytest.mark.parametrize("to", ["gptq_v2", "awq", "compressed-tensors"])
def test_an_export_reports_what_it_changed(tmp_path, fold, to):
    report = trifold.export(fold, to, tmp_path / "out", requantize=True)
    before, after = open_packed(fold), open_packed(tmp_path / "out")
    norm = error = 0.0
    for name in before.modules:
        own, other = (each.weight(name).dequantize().double() for each in (before, after))
        norm, error = norm + own.square().sum(), error + (other - own).square().sum()
        lost = report["requantized"].get(name)
        assert (lost or {"error": 0.0})["error"] == pytest.approx(relative(own, other), rel=1e-6, abs=1e-12), name
        if name.endswith(("q_proj", "up_proj")):  # their codes have a place everywhere
            assert torch.equal(own, other)
    assert report["error"] == pytest.approx(math.sqrt(error / norm), rel=1e-6) and 0 < report["error"] < 0.2
    widths = {name.split(".")[-1]: spec["bits"] for name, spec in after.modules.items()}
    assert widths["q_proj"] == {"gptq_v2": 8, "awq": 4, "compressed-tensors": 4}[to]
    assert widths["v_proj"] == {"gptq_v2": 8, "awq": 4, "compressed-tensors": 8}[to]
    assert trifold.load(tmp_path / "out")(torch.arange(8)[None]).logits.isfinite().all()


def test_gguf_takes_what_is_rounded_again(tmp_path, fold):
    report = trifold.export(fold, "gguf", tmp_path / "x.gguf", requantize=True)
    assert report["layers"] == {"Q4_0": 4, "Q5_0": 8, "Q8_0": 2}  # NF4 becomes symmetric integers
    assert {name.split(".")[-1] for name in report["requantized"]} == {"down_proj"}
    found = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "x.gguf").tensors}
    own = open_packed(fold).weight("model.layers.1.mlp.down_proj").dequantize()
    tensor = found["blk.1.ffn_down.weight"]
    other = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
    lost = report["requantized"]["model.layers.1.mlp.down_proj"]
    assert lost["from"] == "nf4 g32" and lost["to"] == "int4 g32 sym" and 0 < lost["error"] < 0.2
    assert lost["error"] == pytest.approx(relative(own, other), rel=1e-6)


@pytest.mark.parametrize("to", ["awq", "gguf"])
def test_experts_are_rounded_again_one_by_one(tmp_path, to):
    save_model(tmp_path / "dense", "mixtral", hidden_size=64, intermediate_size=32, num_hidden_layers=1)
    recipe = {"steps": [{"method": "rtn", "scheme": {"grid": "nf4", "group_size": 32, "scale_dtype": "float16"}}]}
    trifold.compress(tmp_path / "dense", recipe, None, tmp_path / "out", verbosity=-1)
    (tmp_path / "out" / "tokenizer.json").unlink()
    report = trifold.export(tmp_path / "out", to, tmp_path / "again", requantize=True)
    names = {"awq": "block_sparse_moe.experts.3.w1", "gguf": "mlp.experts.3.gate_proj"}
    assert len(report["requantized"]) == 4 + 4 * 3 and 0 < report["error"] < 0.2
    assert report["requantized"][f"model.layers.0.{names[to]}"]["from"] == "nf4 g32"


def test_low_rank_goes_into_gguf_dense(tmp_path):
    save_model(tmp_path / "dense", "llama", torch.bfloat16, hidden_size=64, intermediate_size=96, num_hidden_layers=1)
    trifold.compress(tmp_path / "dense", "rank80-svd", None, tmp_path / "out", verbosity=-1)
    (tmp_path / "out" / "tokenizer.json").unlink()
    report = trifold.export(tmp_path / "out", "gguf", tmp_path / "x.gguf", requantize=True)
    assert report["layers"].keys() == {"BF16"} and 0 < report["error"] < 2**-8
    own = open_packed(tmp_path / "out").weight("model.layers.0.self_attn.v_proj").dequantize()
    tensor = next(t for t in GGUFReader(tmp_path / "x.gguf").tensors if t.name == "blk.0.attn_v.weight")
    assert torch.equal(torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)), own.bfloat16().float())


def test_the_command_says_so(tmp_path, fold):
    code, _, stderr = trifold_cli("export", fold, "--to", "awq", "-o", tmp_path / "no")
    assert code == 2 and "--requantize rounds it again" in stderr and not (tmp_path / "no").exists()
    code, stdout, _ = trifold_cli("export", fold, "--to", "awq", "-o", tmp_path / "awq", "--requantize")
    assert code == 0 and "rounded again" in stdout and "without calibration" in stdout
    assert "model.layers.1.mlp.down_proj" in stdout and "nf4 g32" in stdout
    arguments = ("export", fold, "--to", "awq", "-o", tmp_path / "again", "--requantize", "--json", "-")
    report = json.loads(trifold_cli(*arguments)[1])
    assert report["requantized"]["model.layers.1.self_attn.o_proj"] == {
        "from": "int3 g32 asym",
        "to": "int4 g32 asym",
        "error": 0.0,
    }
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("awq", "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)
