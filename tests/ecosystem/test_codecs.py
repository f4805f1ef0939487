"""Codecs of other ecosystems: words written by hand from their layouts, both ways; refusals."""

from dataclasses import replace

import pytest
import torch

from trifold.core.canonical import Quantized, RoundedInput, Split
from trifold.core.errors import InputError
from trifold.core.inputs import InputScheme
from trifold.core.scheme import SCALE_DTYPES, Scheme
from trifold.ecosystem import CODECS, ECOSYSTEMS, nearest
from trifold.ecosystem.act_order import grouped
from trifold.ecosystem.experts import PLAIN, joined, names_of, parted
from trifold.formats import describe, pack, unpack


def words(*hexadecimal):
    values = torch.tensor([int(word, 16) for word in hexadecimal], dtype=torch.int64)
    return torch.where(values >= 2**31, values - 2**32, values).to(torch.int32)


def sample(rows=32, columns=64, bits=4, group=32, symmetric=False, dtype="float16", seed=0, least_zero=1, **scheme):
    generator = torch.Generator().manual_seed(seed)
    scheme = Scheme(bits, group, symmetric, dtype, **scheme)
    shape = scheme.scale_shape(rows, columns)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    if scheme.grid == "fp8_e4m3":
        codes = codes.masked_fill(codes % 128 == 127, 3)
    scale = (0.25 + torch.rand(shape, generator=generator)).to(SCALE_DTYPES[dtype])
    zero = torch.randint(least_zero, 2**bits, shape, generator=generator, dtype=torch.uint8)
    return Quantized(codes, scale, None if scheme.symmetric else zero, scheme)


def same(a, b):
    """Codes, scales and zero-points, whatever scales are shared."""
    assert torch.equal(a.codes, b.codes) and torch.equal(a.dequantize(), b.dequantize())
    if a.scheme.group_size != "tensor":
        assert torch.equal(a.scale.float(), b.scale.float())
    assert a.scheme.symmetric == b.scheme.symmetric


CASES = [
    *[("pack-quantized", {"bits": bits}) for bits in range(1, 9)],
    *[("pack-quantized", {"bits": bits, "symmetric": True, "least_zero": 0}) for bits in range(2, 9)],
    ("pack-quantized", {"group": "channel", "rows": 7, "columns": 43, "bits": 3}),
    ("pack-quantized", {"group": "tensor", "rows": 7}),
    ("pack-quantized", {"group": 1000}),
    ("int-quantized", {"bits": 8, "group": "channel"}),
    ("int-quantized", {"bits": 8, "group": "tensor", "symmetric": True}),
    ("int-quantized", {"bits": 8, "group": "tensor"}),
    ("int-quantized", {"bits": 5, "rows": 3}),
    ("float-quantized", {"bits": 8, "grid": "fp8_e4m3", "group": "channel", "rows": 5}),
    ("float-quantized", {"bits": 8, "grid": "fp8_e4m3", "group": "tensor"}),
    *[(name, {"bits": bits}) for name in ("gptq", "gptq_v2") for bits in (2, 3, 4, 8)],
    *[(name, {"bits": bits, "symmetric": True}) for name in ("gptq", "gptq_v2") for bits in (2, 3, 4, 8)],
    ("gptq_v2", {"least_zero": 0, "group": "channel"}),
    ("gptq", {"group": "tensor", "symmetric": True}),
    ("awq", {}),
    ("awq", {"group": "channel", "rows": 8}),
]


@pytest.mark.parametrize(("name", "case"), CASES, ids=str)
def test_a_codec_gives_back_every_code_zero_point_and_scale(name, case):
    weight, codec = sample(**case), CODECS.get(name)
    assert codec.refusal(weight, torch.float16) is None
    settings, tensors = codec.settings(weight), codec.encode(weight, torch.float16)
    assert codec.codes in tensors and tensors.keys() <= codec.leaves(settings)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    same(weight, codec.decode(tensors, settings))


@pytest.mark.parametrize(("name", "case"), CASES, ids=str)
def test_the_spec_is_known_without_the_codes(name, case):
    weight, codec = sample(**case), CODECS.get(name)
    settings, tensors = codec.settings(weight), codec.encode(weight, torch.float16)
    headers = {**tensors, codec.codes: tensors[codec.codes].to("meta")}
    assert describe(codec.decode(headers, settings)) == describe(codec.decode(tensors, settings))


def test_pack_quantized_by_hand():
    codec = CODECS.get("pack-quantized")
    codes = torch.tensor([[0, 1, 7, 8, 9, 10, 14, 15]], dtype=torch.uint8)  # signed: -8 -7 -1 0 1 2 6 7
    weight = Quantized(codes, torch.ones(1, 1).half(), None, Scheme(4, "channel", True, "float16"))
    assert torch.equal(codec.encode(weight, torch.float16)["weight_packed"], words("fea98710")[None])
    weight = Quantized(
        codes.T.contiguous().expand(8, 2), torch.ones(8, 1).half(), codes.T, Scheme(4, 2, False, "float16")
    )
    tensors = codec.encode(weight, torch.bfloat16)
    assert torch.equal(tensors["weight_zero_point"], words("fea98710")[None])
    assert tensors["weight_shape"].tolist() == [8, 2] and tensors["weight_shape"].dtype == torch.int64
    assert tensors["weight_scale"].dtype == torch.bfloat16
    assert not weight.dequantize().any()


@pytest.mark.parametrize("old", [False, True])
def test_pack_quantized_of_3_bits_in_both_layouts(old):
    """Versions before 0.18 left the upper bits of words empty."""
    dense, spaced = ("88fac688", "c688fac6", "fac688fa"), ("08fac688", "1a23eb1a", "2c688fac", "0000003e")
    tensors = {
        "weight_packed": words(*(spaced if old else dense))[None],
        "weight_scale": torch.ones(1, 1).half(),
        "weight_shape": torch.tensor([1, 32]),
    }
    args = {"num_bits": 3, "type": "int", "symmetric": True, "strategy": "channel"}
    found = CODECS.get("pack-quantized").decode(tensors, {"weights": args})
    assert found.codes.tolist() == [list(range(8)) * 4]


def test_pack_quantized_where_only_the_version_tells_the_layout():
    """40 codes of 3 bits take 4 words in either."""
    codec, codes = CODECS.get("pack-quantized"), torch.arange(40, dtype=torch.uint8)[None] % 8
    weight = Quantized(codes, torch.ones(1, 1).half(), None, Scheme(3, "channel", True, "float16"))
    settings, tensors = codec.settings(weight), codec.encode(weight, torch.float16)
    assert torch.equal(codec.decode(tensors, {**settings, "version": "0.18.1"}).codes, codes)
    shifted = [sum(int(c) << 3 * k for k, c in enumerate(codes[0, i : i + 10])) for i in range(0, 40, 10)]
    old = {**tensors, "weight_packed": torch.tensor([shifted], dtype=torch.int32)}
    assert torch.equal(codec.decode(old, {**settings, "version": "0.15.0.1"}).codes, codes)


def gptq_column(*hexadecimal):
    return words(*hexadecimal)[:, None]


@pytest.mark.parametrize(
    ("version", "zeros", "expected"),
    [("gptq", "77777777", 8), ("gptq_v2", "88888888", 8), ("gptq", "22222222", 3), ("gptq_v2", "22222222", 2)],
)
def test_gptq_zero_points_of_both_versions(version, zeros, expected):
    tensors = {
        "qweight": words("76543210")[:, None].expand(1, 8),
        "qzeros": words(zeros)[None],
        "scales": torch.full((1, 8), 0.5).half(),
        "g_idx": torch.zeros(8, dtype=torch.int32),
    }
    found = CODECS.get(version).decode(tensors, {"bits": 4, "group_size": -1, "sym": False})
    assert found.zero_point.unique().tolist() == [expected]
    assert torch.equal(found.dequantize(), ((torch.arange(8) - expected) * 0.5).expand(8, 8))


def test_gptq_of_3_bits_by_hand():
    weight = sample(rows=32, columns=32, bits=3, symmetric=True)
    weight = Quantized(torch.arange(32).expand(32, 32).to(torch.uint8) % 8, weight.scale, None, weight.scheme)
    codec = CODECS.get("gptq")
    tensors = codec.encode(weight, torch.float16)
    assert torch.equal(tensors["qweight"], gptq_column("88fac688", "c688fac6", "fac688fa").expand(3, 32))
    # 32 fields of 3, zero-points of 4 minus one
    assert torch.equal(tensors["qzeros"], words("db6db6db", "b6db6db6", "6db6db6d")[None])
    same(weight, codec.decode(tensors, {**codec.settings(weight), "sym": True}))
    read = codec.decode(tensors, {"bits": 3, "group_size": 32, "sym": False})
    assert read.zero_point.unique().tolist() == [4]


def test_gptq_version_1_reads_the_borrowed_zero_point_of_gptqmodel():
    """Fields 0, 5, 1...: 0x11111150 - 0x11111111 as one number."""
    tensors = {
        "qweight": torch.zeros(1, 8, dtype=torch.int32),
        "qzeros": torch.tensor([[0x11111150 - 0x11111111]], dtype=torch.int32),
        "scales": torch.ones(1, 8).half(),
    }
    found = CODECS.get("gptq").decode(tensors, {"bits": 4, "group_size": -1, "sym": False})
    assert found.zero_point.T.tolist() == [[0, 5, 1, 1, 1, 1, 1, 1]]
    assert "version 1" in CODECS.get("gptq").refusal(sample(least_zero=0, columns=640), torch.float16)


@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_act_order_becomes_a_split_of_the_columns(symmetric):
    weight, codec = sample(columns=96, group=32, symmetric=symmetric), CODECS.get("gptq_v2")
    tensors, settings = codec.encode(weight, torch.float16), codec.settings(weight)
    g_idx = torch.randperm(96, generator=torch.Generator().manual_seed(1)).to(torch.int32) // 32
    found = codec.decode({**tensors, "g_idx": g_idx}, settings)
    zero = torch.full(weight.scale.shape, 8) if symmetric else weight.zero_point
    expected = (weight.codes.float() - zero.float()[:, g_idx.long()]) * weight.scale.float()[:, g_idx.long()]
    assert isinstance(found, Split) and len(found.parts) == 3
    assert torch.equal(found.dequantize(), expected)
    spec = describe(found)
    assert torch.equal(unpack(pack(found), spec).dequantize(), expected)
    headers = {**tensors, "g_idx": g_idx, "qweight": tensors["qweight"].to("meta")}
    assert describe(codec.decode(headers, settings)) == spec


def test_act_order_that_cannot_be_held_or_makes_no_sense():
    weight = sample(rows=1, columns=514, group=2)
    backwards = torch.arange(513, -1, -1) // 2
    with pytest.raises(InputError, match="257 groups is not read, at most 256"):
        grouped(weight.codes, weight.scale, weight.zero_point, 4, 2, backwards)
    with pytest.raises(ValueError, match="which of 257 groups"):
        grouped(weight.codes, weight.scale, weight.zero_point, 4, 2, backwards + 1)


def test_a_group_of_act_order_without_columns_is_left_out():
    weight = sample(rows=2, columns=8, group=2)
    g_idx = torch.tensor([0, 2, 0, 2, 3, 3, 3, 0])
    found = grouped(weight.codes, weight.scale, weight.zero_point, 4, 2, g_idx)
    expected = (weight.codes.float() - weight.zero_point[:, g_idx].float()) * weight.scale[:, g_idx].float()
    assert torch.equal(found.dequantize(), expected) and len(found.parts) == 3


@pytest.mark.parametrize("name", ["gptq_v2", "awq"])
@pytest.mark.parametrize(("group", "written"), [(32, 32), (64, 64), (128, -1), ("channel", -1)])
def test_a_group_as_wide_as_the_row_is_still_one(name, group, written):
    """So that layers of other widths can have the same setting."""
    assert CODECS.get(name).settings(sample(columns=64, group=group))["group_size"] == written


def test_awq_by_hand():
    codes = torch.arange(8, dtype=torch.uint8)[:, None].expand(8, 2)
    weight = Quantized(codes, torch.ones(8, 1).half(), None, Scheme(4, "channel", True, "float16"))
    tensors = CODECS.get("awq").encode(weight, torch.float16)
    assert torch.equal(tensors["qweight"], gptq_column("75316420", "75316420"))
    assert torch.equal(tensors["qzeros"], gptq_column("88888888"))
    found = CODECS.get("awq").decode(tensors, CODECS.get("awq").settings(weight))
    assert torch.equal(found.codes, codes) and torch.equal(found.dequantize(), weight.dequantize())


def test_int_quantized_by_hand():
    codes = torch.tensor([[0, 128, 255]], dtype=torch.uint8)
    weight = Quantized(
        codes, torch.ones(1, 1), torch.tensor([[3]], dtype=torch.uint8), Scheme(8, "channel", False, "float32")
    )
    tensors = CODECS.get("int-quantized").encode(weight, torch.float32)
    assert tensors["weight"].tolist() == [[-128, 0, 127]] and tensors["weight_zero_point"].tolist() == [[-125]]


def test_blocks_of_fp8_become_groups():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(50, 64, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 2, generator=generator)
    args = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 32]}
    found = CODECS.get("float-quantized").decode({"weight": values, "weight_scale": scale}, {"weights": args})
    rows, columns = torch.arange(50) // 32, torch.arange(64) // 32
    assert torch.equal(found.dequantize(), values.float() * scale[rows][:, columns])


@pytest.mark.parametrize(
    ("codec", "scheme"),
    [
        ("int-quantized", InputScheme()),
        ("int-quantized", InputScheme(static=True)),
        ("pack-quantized", InputScheme(grid="fp8_e4m3")),
        ("float-quantized", InputScheme(grid="fp8_e4m3")),
        ("float-quantized", InputScheme(grid="fp8_e4m3", static=True)),
    ],
    ids=str,
)
def test_rounded_activations_go_both_ways(codec, scheme):
    codec = CODECS.get(codec)
    inside = sample(bits=8, group="channel", **({"grid": "fp8_e4m3"} if codec.name[0] == "f" else {}))
    weight = RoundedInput(inside, scheme, torch.tensor([0.37]) if scheme.static else None)
    assert codec.refusal(weight, torch.float16) is None
    settings, tensors = codec.settings(weight), codec.encode(weight, torch.float16)
    found = codec.decode(tensors, settings)
    theirs = replace(scheme, full_range=scheme.grid == "int")  # their rule for integers
    assert found.scheme == theirs and ("input_scale" in tensors) == scheme.static
    same(inside, found.weight)
    if scheme.static:
        assert torch.equal(found.scale, weight.scale)


@pytest.mark.parametrize(
    ("codec", "case", "reason", "instead"),
    [
        ("pack-quantized", {"columns": 86}, "groups of 32 do not divide its 86 inputs", "dense"),
        ("pack-quantized", {"bits": 1, "symmetric": True}, "single symmetric bit", "dense"),
        ("pack-quantized", {"bits": 8, "grid": "fp8_e4m3", "group": "channel"}, "fp8_e4m3", "float-quantized"),
        ("float-quantized", {"bits": 8, "grid": "fp8_e4m3"}, "a scale for every 32 inputs", "dense"),
        ("float-quantized", {}, "it is int4 g32 asym, not 8-bit floats", "pack-quantized"),
        ("gptq", {"bits": 5}, "5 bits, not one of 2, 3, 4, 8", "pack-quantized"),
        ("gptq", {"rows": 36}, "36 x 64 codes of 4 bits do not fill whole words", "pack-quantized"),
        ("awq", {"bits": 8}, "it has 8 bits, not 4", "pack-quantized"),
        ("awq", {"rows": 12}, "12 outputs do not fill words of 8", "pack-quantized"),
        ("awq", {"bits": 4, "grid": "nf4"}, "nf4, not integers", "dense"),
    ],
)
def test_a_refusal_says_why_and_what_holds_it(codec, case, reason, instead):
    weight = sample(**case)
    assert reason in CODECS.get(codec).refusal(weight, torch.float16)
    assert nearest(weight, torch.float16) == instead


def test_scales_that_would_be_rounded_are_refused():
    weight = sample(dtype="float32")
    assert "float32 scales would be rounded to bfloat16" in CODECS.get("pack-quantized").refusal(weight, torch.bfloat16)
    assert "rounded to float16" in CODECS.get("awq").refusal(weight, torch.float32)
    assert CODECS.get("pack-quantized").refusal(weight, torch.float32) is None


def test_weights_with_more_to_them_are_refused():
    rounded, split = RoundedInput(sample(), InputScheme()), Split(1, torch.arange(64) % 2, (sample(columns=32),) * 2)
    assert "rounds activations (a8)" in CODECS.get("gptq").refusal(rounded, torch.float16)
    assert nearest(rounded, torch.float16) == "pack-quantized"
    for name in CODECS:
        assert "split(" in CODECS.get(name).refusal(split, torch.float16)


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ({"strategy": "group", "group_size": 128, "dynamic": True}, "strategy='group'"),
        ({"strategy": "tensor", "dynamic": True}, "strategy='tensor' dynamic=True"),
        ({"strategy": "token", "dynamic": True, "symmetric": False}, "symmetric=False"),
    ],
)
def test_activations_that_are_not_run(args, reason):
    weight, codec = sample(bits=8, group="channel"), CODECS.get("int-quantized")
    settings = {**codec.settings(weight), "input_activations": {"num_bits": 8, "type": "int", **args}}
    with pytest.raises(InputError, match="are not run") as caught:
        codec.decode(codec.encode(weight, torch.float16), settings)
    assert reason in str(caught.value)


def test_compressed_tensors_config_prefers_names_to_patterns_to_classes():
    args = [
        {"weights": {"num_bits": bits}, "targets": targets}
        for bits, targets in ((2, ["Linear"]), (3, ["re:.*down_proj$"]), (4, ["a.down_proj"]))
    ]
    config = {"config_groups": {f"g{i}": group for i, group in enumerate(args)}, "quantization_status": "compressed"}
    tensors = {f"{name}.weight_packed": torch.int32 for name in ("a.down_proj", "b.down_proj", "c.up_proj")}
    found = ECOSYSTEMS["compressed-tensors"].read(config, {**tensors, "norm.weight": torch.float16})
    assert {name: settings["weights"]["num_bits"] for name, (_, settings) in found.items()} == {
        "a.down_proj": 4,
        "b.down_proj": 3,
        "c.up_proj": 2,
    }


@pytest.mark.parametrize(
    ("method", "config", "tensors", "reason"),
    [
        ("compressed-tensors", {"transform_config": {"config_groups": {}}}, {}, "transform_config is not read"),
        ("compressed-tensors", {"kv_cache_scheme": {"num_bits": 8}}, {}, "kv_cache_scheme is not read"),
        ("compressed-tensors", {"quantization_status": "frozen"}, {}, "'frozen'"),
        ("compressed-tensors", {}, {"a.weight_packed": torch.uint8}, "packed floats"),
        ("compressed-tensors", {"config_groups": {}}, {"a.weight_packed": torch.int32}, "a: quantised, but no group"),
        ("compressed-tensors", {"config_groups": {"W4A16": ["Linear"]}}, {"a.weight_packed": torch.int32}, "W4A16"),
        ("gptq", {"checkpoint_format": "marlin"}, {}, "layout 'marlin'"),
        ("gptq", {"bits": 5}, {"a.qweight": torch.int32}, "a: GPTQ with 5 bits"),
        ("awq", {"version": "gemv"}, {}, "'gemv'"),
        ("awq", {}, {"a.qweight": torch.int32}, "without zero-points"),
    ],
)
def test_configs_that_are_not_read(method, config, tensors, reason):
    with pytest.raises(InputError, match=reason):
        ECOSYSTEMS[method].read(config, tensors)


def test_overrides_of_gptqmodel():
    config = {"bits": 4, "group_size": 128, "dynamic": {"-:lm_head": {}, "+:.*\\.1\\.": {"bits": 8, "group_size": 32}}}
    found = ECOSYSTEMS["gptq"].read(config, {"l.0.q.qweight": torch.int32, "l.1.q.qweight": torch.int32})
    assert [settings["bits"] for _, settings in found.values()] == [4, 8]


def layers(name, **weights):
    codec = CODECS.get(name)
    return {layer: (codec, codec.settings(weight)) for layer, weight in weights.items()}


def test_compressed_tensors_config_names_layers_only_if_schemes_differ():
    kinds = layers("pack-quantized", **{"m.0.a": sample(), "m.1.a": sample(), "head": sample()})
    alike = ECOSYSTEMS["compressed-tensors"].write(kinds, ["lm_head"])
    (group,) = alike["config_groups"].values()
    assert (
        group["targets"] == ["Linear", "head"]
        and alike["ignore"] == ["lm_head"]
        and alike["format"] == "pack-quantized"
    )
    mixed = {**layers("pack-quantized", a=sample()), **layers("int-quantized", b=sample(bits=8), c=sample(bits=8))}
    found = ECOSYSTEMS["compressed-tensors"].write(mixed, [])
    assert [group["targets"] for group in found["config_groups"].values()] == [["a"], ["b", "c"]]
    assert found["format"] == "mixed-precision"
    assert [group["format"] for group in found["config_groups"].values()] == ["pack-quantized", "int-quantized"]


@pytest.mark.parametrize(
    ("weights", "dense", "reason"),
    [
        (
            {"m.0.a": sample(), "m.1.a": sample(bits=8)},
            [],
            "m.1.a: gptq has one setting .* bits=8 differs from 4 of m.0.a",
        ),
        ({"m.0.a": sample()}, ["m.0.b", "lm_head"], "m.0.b: .* this one is dense"),
        ({"lm_head": sample()}, [], "lm_head: gptq stores the layers of decoder blocks"),
    ],
)
def test_gptq_has_one_setting_for_all_layers(weights, dense, reason):
    with pytest.raises(InputError, match=reason):
        ECOSYSTEMS["gptq"].write(layers("gptq", **weights), dense)


def test_awq_config():
    found = ECOSYSTEMS["awq"].write(layers("awq", a=sample()), ["lm_head"])
    assert found["zero_point"] is True and found["modules_to_not_convert"] == ["lm_head"]
    with pytest.raises(InputError, match=r"b: awq has one group size .* -1 differs from 32 of a"):
        ECOSYSTEMS["awq"].write(layers("awq", a=sample(), b=sample(group="channel")), [])


@pytest.mark.parametrize("other", [{}, {"bits": 8}, {"group": 16}, {"symmetric": True}, {"group": "tensor"}], ids=str)
def test_gate_and_up_become_one_weight_whatever_their_schemes(other):
    gate, up = sample(seed=1), sample(rows=16, **{"seed": 2, **other})
    found = joined([gate, up])
    assert isinstance(found, Quantized if not other else Split)
    assert torch.equal(found.dequantize(), torch.cat([gate.dequantize(), up.dequantize()]))
    assert torch.equal(unpack(pack(found), describe(found)).dequantize(), found.dequantize())
    assert joined([gate]) is gate


def test_gate_and_up_with_rounded_activations():
    scheme, static = InputScheme(), InputScheme(static=True)
    halves = [sample(seed=seed, symmetric=True) for seed in (1, 2)]
    found = joined([RoundedInput(half, scheme) for half in halves])
    assert isinstance(found, RoundedInput) and isinstance(found.weight, Quantized) and found.shape == (64, 64)
    scales = torch.tensor([0.1]), torch.tensor([0.2])
    found = joined([RoundedInput(half, static, scale) for half, scale in zip(halves, scales, strict=True)])
    assert isinstance(found, Split) and [float(part.scale) for part in found.parts] == [
        pytest.approx(0.1),
        pytest.approx(0.2),
    ]


@pytest.mark.parametrize("case", [{}, {"group": "tensor"}, {"symmetric": True}, {"group": "channel"}], ids=str)
def test_parts_of_rows(case):
    weight = sample(**case)
    parts = parted(weight, 2)
    assert torch.equal(torch.cat([part.dequantize() for part in parts]), weight.dequantize())
    rounded = parted(RoundedInput(weight, InputScheme()), 2)
    assert [part.shape for part in rounded] == [(16, 64)] * 2


def test_names_of_experts_go_both_ways():
    for names in (PLAIN, names_of("mixtral")):
        for leaf, count in (("up", 2), ("down", 1)):
            ours = f"model.layers.1.mlp.experts.12.{leaf}"
            outward = names.outward(ours)
            assert [names.inward(each) for each in outward] == [(ours, place) for place in range(count)]
        for plain in ("model.layers.1.mlp.shared_experts.up_proj", "model.layers.0.self_attn.q_proj", "lm_head"):
            assert names.inward(names.outward(plain)[0]) == (plain, 0)
    assert names_of("llama") is None and names_of(None) is None
