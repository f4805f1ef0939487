"""docs/format.md is true: its decoder reads what Trifold writes, and its examples are what the code packs."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import trifold
from tests.nested import NESTED
from trifold.compress.files import shard_files
from trifold.core.canonical import Quantized
from trifold.core.scheme import Scheme
from trifold.core.tables import TABLES
from trifold.formats import FORMATS, describe, layout, pack
from trifold.formats.bitstream import pack_bits

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "format.md").read_text()

SCHEMES = [
    *({"bits": bits, "group_size": 32, "symmetric": False} for bits in range(1, 9)),
    *({"bits": bits, "group_size": 20, "symmetric": True} for bits in range(1, 9)),
    {"bits": 5, "group_size": "channel", "symmetric": False, "scale_dtype": "float16"},
    {"bits": 8, "group_size": "channel", "symmetric": True, "scale_dtype": "float32"},
    {"bits": 3, "group_size": "tensor", "symmetric": False, "scale_dtype": "float32"},
    {"bits": 1, "group_size": "tensor", "symmetric": True, "scale_dtype": "float16"},
    {"bits": 4, "group_size": 128, "symmetric": False},
]
"""One for each of 21 layers."""

OTHERS = [
    *({"grid": grid, "group_size": g} for grid in ("nf4", "fp4_e2m1", "fp8_e4m3") for g in (20, "channel", "tensor")),
    *({"bits": bits, "group_size": 20, "zero_point": "real"} for bits in range(1, 9)),
    {"bits": 4, "group_size": "channel", "zero_point": "real", "scale_dtype": "float16"},
    {"bits": 5, "group_size": "tensor", "zero_point": "real", "scale_dtype": "float32"},
    {"grid": "nf4", "group_size": 64, "scale_dtype": "float16"},
    {"grid": "fp8_e4m3", "group_size": 128, "scale_dtype": "float32"},
]
"""Tables, 8-bit floats and real zero-points: as many."""


@pytest.fixture(scope="module")
def decoder():
    namespace = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(block, "docs/format.md", "exec"), namespace)
    return namespace


def every_scheme(layers, schemes=SCHEMES, **more):
    overrides = [{"match": name, "scheme": s} for name, s in zip(layers, schemes * 2, strict=False)]
    return {"steps": [{"method": "rtn", "overrides": overrides, **more}]}


def check(decoder, folder):
    model = trifold.load(folder)
    packed = {n: m for n, m in model.named_modules() if isinstance(m, trifold.kernels.PackedLinear)}
    for name, module in packed.items():
        found, expected = decoder["read_layer"](folder, name), module.dequantize().numpy()
        assert found.dtype == np.float32 and found.shape == expected.shape, (name, module.spec)
        assert found.tobytes() == expected.tobytes(), (name, module.spec)
    return [module.spec for module in packed.values()]


@pytest.mark.parametrize("schemes", [SCHEMES, OTHERS], ids=["integers", "others"])
@pytest.mark.parametrize("limit", ["5GB", "3KB"])
def test_the_decoder_reads_every_scheme(tmp_path, tiny, decoder, limit, schemes):
    names = [f"model.layers.{i}.{n}" for i in range(3) for n in ("self_attn.q_proj", "self_attn.k_proj")]
    names += [f"model.layers.{i}.{n}" for i in range(3) for n in ("self_attn.v_proj", "self_attn.o_proj")]
    names += [f"model.layers.{i}.mlp.{n}_proj" for i in range(3) for n in ("gate", "up", "down")]
    recipe = every_scheme(names, schemes, input={"bits": 8})
    trifold.compress(tiny(), recipe, output=tmp_path / "out", max_shard_size=limit, verbosity=-1)
    specs = check(decoder, tmp_path / "out")
    assert len(specs) == len(schemes) == 21 and all(spec["input"] == {"bits": 8} for spec in specs)
    assert len({str(sorted(spec.items())) for spec in specs}) == 21
    assert (len(set(shard_files(tmp_path / "out").values())) > 1) == (limit == "3KB")


def test_the_decoder_reads_transposed_layers_in_a_tied_bf16_model(tmp_path, tiny, decoder):
    names = [
        f"transformer.h.{i}.{n}" for i in range(3) for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    folder = tiny("gpt2", torch.bfloat16)
    trifold.compress(folder, every_scheme(names), output=tmp_path / "out", verbosity=-1)
    assert {tuple(spec["shape"]) for spec in check(decoder, tmp_path / "out")} == {
        (144, 48),
        (48, 48),
        (86, 48),
        (48, 86),
    }
    assert "lm_head.weight" not in shard_files(tmp_path / "out")


@pytest.mark.parametrize("name", NESTED)
def test_the_reader_of_parts(tmp_path, decoder, name):
    weight = NESTED[name]
    modules = {"a.b": json.loads(json.dumps(describe(weight)))}
    config = {"quant_method": "trifold", "format_version": "1.0", "modules": modules}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    save_file({f"a.b.{leaf}": t.clone() for leaf, t in pack(weight).items()}, tmp_path / "model.safetensors")
    found, expected = decoder["read_weight"](tmp_path, "a.b"), weight.dequantize().numpy()
    assert found.dtype == np.float32 and found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
    if not re.search("chain|low rank|deep|three", name):  # no matrix products
        assert found.tobytes() == expected.tobytes()


def test_the_split_of_the_page_is_one():
    (text,) = [block for block in re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL) if '"split"' in block]
    assert sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in layout(json.loads(text)).values()) == (
        768 * 252 + 768 * 2 + 768 * 4 * 2 + 256 // 8
    )


def hexadecimal(words):
    return " ".join(f"{word & 0xFFFFFFFF:08x}" for word in words.reshape(-1).tolist())


def test_the_bitstreams_of_the_table():
    rows = re.findall(r"^\| (\d) \| ([\d ]+) \| ([\da-f ]+) \| ([\da-f ]+) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 7
    for bits, codes, words, octets in rows:
        packed = pack_bits(torch.tensor([[int(code) for code in codes.split()]], dtype=torch.uint8), int(bits))
        assert hexadecimal(packed) == words and packed.numpy().astype("<i4").tobytes().hex(" ") == octets


def test_the_layer_of_the_table():
    def line(label, convert):
        found = re.search(rf"^\| {re.escape(label)} \| (.*) \| (.*) \|$", PAGE, re.MULTILINE)
        return [[convert(value) for value in cell.split()] for cell in found.groups()]

    scale = torch.tensor(line("scales", float)).bfloat16()
    codes, zero = (torch.tensor(line(label, int), dtype=torch.uint8) for label in ("codes", "zero-points"))
    weight = Quantized(codes, scale, zero, Scheme(3, 4, False))
    tensors = FORMATS.get("int").pack(weight)
    assert [[hexadecimal(row)] for row in tensors["weight"]] == line("`weight`, int32 (2, 1)", str)
    stored = [[f"{value & 0xFFFF:04x}" for value in row] for row in tensors["weight_scale"].view(torch.int16).tolist()]
    assert stored == line("`weight_scale`, bfloat16 (2, 3)", str)
    assert f"the words {hexadecimal(tensors['weight_zero_point'])}" in PAGE
    assert weight.dequantize().tolist() == line("W", float)


def test_the_formats_of_the_table():
    rows = re.findall(
        r"^\| `(\w+)`[^|]*\| (?:`(\w+)` )?\| ([\d ]+) \| ([\da-f ]+) \| ([\d.]+) \| (?:([\d.]+) )?\| ([-\d. ]+) \|$",
        PAGE,
        re.M,
    )
    assert [row[0] for row in rows] == ["int", "affine", "table", "fp8"]
    for name, grid, codes, words, scale, zero, values in rows:
        scheme = Scheme(
            8 if name == "fp8" else 4, "channel", not zero, "bfloat16", grid or "int", "real" if zero else "integer"
        )
        codes = torch.tensor([[int(code) for code in codes.split()]], dtype=torch.uint8)
        zero = torch.tensor([[float(zero)]]).bfloat16() if zero else None
        weight = Quantized(codes, torch.tensor([[float(scale)]]).bfloat16(), zero, scheme)
        stored = FORMATS.get(name).pack(weight)["weight"]
        assert (stored.view(torch.uint8).numpy().tobytes().hex(" ") if name == "fp8" else hexadecimal(stored)) == words
        assert weight.dequantize().tolist() == [[float(value) for value in values.split()]]


def test_the_values_of_the_tables(decoder):
    for name in TABLES:
        ours, theirs = np.array(TABLES.get(name).values), decoder["TABLES"][name]
        known = ~np.isnan(ours)
        assert (ours[known] == theirs[known]).all() and f"`{name}`" in PAGE
    (values,) = re.findall(r"as float32:\n\n((?: {4}.*\n)+)", PAGE)
    assert [float(value) for value in values.split()] == list(TABLES.get("nf4").values)
