"""Bit planes: the runtime layout, the choice of the op, and the assembly that unpacks words, run in Python."""

import random
import re

import pytest
import torch
from packed_samples import GROUPS, OTHERS, WIDTHS, layer, other, quantized

from trifold.core.tables import TABLES, Table
from trifold.formats import digest
from trifold.kernels import explain, gpu
from trifold.kernels.shares import share
from trifold.kernels.weight_only.planes import op as planes_op
from trifold.kernels.weight_only.planes import ops
from trifold.kernels.weight_only.planes.configs import CONFIGS, choose, choose_for, dense_from
from trifold.kernels.weight_only.planes.layout import SLOT, layout_of, pack_planes, unpack_planes
from trifold.kernels.weight_only.planes.op import PlaneGemm


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("rows, columns", [(1, 1), (1, 513), (7, 43), (33, 1024), (3, 127)])
def test_packing_is_undone_for_any_shape(bits, rows, columns):
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)
    planes = pack_planes(codes, bits)
    layout = layout_of(bits)
    words = sum(plane.numel() for plane in planes)
    assert words * 16 == rows * layout.tiles(columns) * layout.tile * bits  # nothing but codes and their padding
    assert all(plane.shape[1:] == (rows, SLOT) for plane in planes)
    assert torch.equal(unpack_planes(planes, bits, columns), codes)
    assert torch.equal(unpack_planes(planes, bits, columns, rows // 3, rows), codes[rows // 3 :])


def test_each_bit_has_a_place_of_its_own():
    for bits in WIDTHS:
        layout = layout_of(bits)
        for plane, width in enumerate(layout.planes):
            taken = [(word, bit + i) for word, bit in layout.places[plane] for i in range(width)]
            assert sorted(taken) == [(word, bit) for word in range(layout.words(plane)) for bit in range(16)]
        assert sum(layout.planes) == bits and max(layout.shifts) + bits <= 10  # a subnormal fp16 has ten bits


def test_a_word_by_hand():
    codes = torch.zeros(1, 128, dtype=torch.uint8)
    codes[0, 0], codes[0, 32], codes[0, 64], codes[0, 96], codes[0, 33] = 1, 2, 3, 4, 15
    (plane,) = pack_planes(codes, 4)
    assert plane[0, 0, 0] == 0x4321 and plane[0, 0, 1] == 0x00F0 and plane[0, 0, 2:].eq(0).all()


@pytest.mark.parametrize("group", [*GROUPS, 32, 96])
def test_the_portable_tensors_come_back(group):
    op = PlaneGemm()
    samples = [quantized(7, 172, bits, group, symmetric) for bits in WIDTHS for symmetric in (True, False)]
    for weight in [*samples, *[other(33, 300, group, **scheme) for scheme in OTHERS]]:
        module = layer(weight)
        portable = module.portable()
        before = digest(portable)
        runtime = op.prepare(portable, module.spec)
        assert digest(op.restore(runtime, module.spec)) == before == digest(portable)
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(op.rows(runtime, module.spec, 2, 7, dtype), weight.dequantize()[2:7].to(dtype))


@pytest.mark.parametrize(
    "change, dtype, word",
    [
        ({}, torch.float32, "activations, not torch.float32"),
        ({"group_size": 48}, torch.float16, "group_size=48 is not a multiple of 32"),
        ({"shape": [2**23, 64]}, torch.float16, "out_features=8388608 overflows an int32 index"),
        ({"format": "dense"}, torch.float16, "takes format int or affine or table or fp8, not dense"),
    ],
)
def test_it_says_why_not(change, dtype, word):
    spec = layer(quantized(64, 192, 4, 64, False)).spec | change
    assert word in explain(spec, dtype, "cuda").rejected["weight_only.planes"]


def test_a_table_of_another_width_is_refused(monkeypatch):
    monkeypatch.setattr(TABLES, "_entries", {**TABLES._entries, "three": Table(3, tuple(map(float, range(8))))})
    spec = layer(other(64, 192, 64, grid="three", bits=3)).spec
    assert "grid=three is a table of 3 bits" in explain(spec, torch.float16, "cuda").rejected["weight_only.planes"]


def test_without_a_gpu_it_says_so_and_the_next_takes_it(monkeypatch):
    spec = layer(quantized(64, 192, 4, 64, False)).spec
    assert explain(spec, torch.float64, "cpu").rejected["weight_only.planes"] == "runs on cuda, not cpu"
    monkeypatch.setattr(gpu, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.no_gpu.cache_clear()
    choice = explain(spec, torch.float16, "cuda")
    assert choice.op == "weight_only.blockwise"
    assert choice.rejected["weight_only.planes"] == "torch finds no GPU"
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    gpu.no_gpu.cache_clear()
    assert explain(spec, torch.float16, "cuda").rejected["weight_only.planes"] == "triton is not installed"
    monkeypatch.setattr(gpu, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    gpu.no_gpu.cache_clear()
    assert "(7, 5) is below (8, 0)" in explain(spec, torch.float16, "cuda").rejected["weight_only.planes"]
    gpu.no_gpu.cache_clear()


def test_on_a_gpu_it_is_chosen(monkeypatch):
    monkeypatch.setattr(planes_op, "no_gpu", lambda device: None)
    for scheme in [{"bits": 3}, {"bits": 8}, *OTHERS]:
        spec = layer(other(64, 192, 64, **scheme)).spec
        assert explain(spec, torch.bfloat16, "cuda").op == "weight_only.planes"


def test_every_number_of_tokens_has_a_configuration():
    for bits in WIDTHS:
        for tokens in (1, 8, 9, 16, 17, 64, 65, dense_from(bits) - 1):
            assert choose(bits, tokens) in CONFIGS[bits].values()
        assert [choose(bits, limit).bm for limit in CONFIGS[bits]] == list(CONFIGS[bits])
    config = choose(4, 1)
    assert share(config.warps, -(-8192 // config.bn), 64, 132) > 1  # 128 blocks do not fill an H200
    assert share(config.warps, -(-128256 // config.bn), 32, 132) == 1  # the head does
    assert share(config.warps, 1, 2, 132) == 1  # no inputs to share
    assert choose_for(4, 65, 8192, 132, True).bm == 64  # 128 blocks of 128 tokens do not fill an H200
    assert choose_for(4, 129, 8192, 132, True).bm == 128 and choose_for(4, 64, 10**6, 132, True).bm == 64
    assert choose_for(4, 129, 8192, 132, False).bm == choose_for(2, 511, 8192, 132, True).bm * 2 == 64


def test_the_operators_have_fakes():
    from torch._subclasses.fake_tensor import FakeTensorMode

    weight = quantized(33, 300, 3, 64, False)
    module = layer(weight)
    runtime = PlaneGemm().prepare(module.portable(), module.spec)
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(tensor) for name, tensor in runtime.items()}
        x = torch.empty(5, 300, dtype=torch.bfloat16)
        bias = torch.empty(33, dtype=torch.bfloat16)
        y = PlaneGemm().run(x, fake, module.spec, bias)
        assert y.shape == (5, 33) and y.dtype == torch.bfloat16
        planes = [fake["plane0"], fake["plane1"]]
        arguments = (planes, fake["scale"], fake["zero"], 3, 64, "int", 4.0, 300, 2, 9, torch.float16)
        w = ops.plane_rows(*arguments)
        assert w.shape == (7, 300) and w.dtype == torch.float16


def run_ptx(text, inputs):
    """The registers of straight PTX: those named in `inputs`, and what its few instructions make of them."""
    registers = dict(inputs)

    def value(word):
        return registers[word] if word in registers else int(word, 0)

    def prmt(a, b, selector):
        octets = [a >> 8 * i & 255 for i in range(4)] + [b >> 8 * i & 255 for i in range(4)]
        assert selector & 0x8888 == 0  # the fourth bit would spread a sign
        return sum(octets[selector >> 4 * i & 7] << 8 * i for i in range(4))

    def lop3(a, b, c, table):
        bits = ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1) for i in range(32))
        return sum((table >> bit & 1) << i for i, bit in enumerate(bits))

    known = {
        "shr.b32": lambda a, n: a >> n,
        "shl.b32": lambda a, n: a << n & 0xFFFFFFFF,
        "and.b32": lambda a, b: a & b,
        "or.b32": lambda a, b: a | b,
        "mov.b32": lambda a: a,
        "prmt.b32": prmt,
        "lop3.b32": lop3,
    }
    for line in re.sub(r"\.reg \.b32 [^;]*;", "", text.strip("{} ")).split(";"):
        if line.strip():
            name, rest = line.strip().split(maxsplit=1)
            target, *sources = [word.strip() for word in rest.split(",")]
            registers[target] = known[name](*map(value, sources))
    return registers


def halves(register):
    return torch.tensor([register & 0xFFFF, register >> 16], dtype=torch.int32).to(torch.int16).view(torch.float16)


def pair(plane, word):
    """A register of two neighbouring words of a plane."""
    return (int(plane[word, 0, 0]) & 0xFFFF) | (int(plane[word, 0, 1]) & 0xFFFF) << 16


@pytest.mark.parametrize("bits, grid", [*[(b, "int") for b in WIDTHS], (4, "fp4_e2m1"), (8, "fp8_e4m3")])
def test_the_assembly_gives_each_slot_its_numbers(bits, grid):
    unpacking = pytest.importorskip("trifold.kernels.weight_only.planes.unpacking", reason="triton is missing")
    layout = layout_of(bits)
    for trial in range(20):
        codes = torch.randint(0, 2**bits, (1, layout.tile), generator=torch.Generator().manual_seed(trial))
        if grid == "fp8_e4m3":
            codes[codes & 127 == 127] = 0
        planes = pack_planes(codes.to(torch.uint8), bits)
        for j in range(layout.slots):
            words = {f"${i + 1}": pair(plane, layout.places[i][j][0]) for i, plane in enumerate(planes)}
            found = halves(run_ptx(unpacking._assembly.fn(layout, j, grid), words)["$0"]).double()
            if grid == "int":
                expected = codes[0, j * SLOT : j * SLOT + 2].double() * 2 ** layout.shifts[j]
            else:
                expected = TABLES.get(grid).decode(codes[0, j * SLOT : j * SLOT + 2].to(torch.uint8)).double()
            assert torch.equal(found * unpacking.unit.fn(grid), expected)


def test_the_assembly_looks_up_all_sixteen_values():
    unpacking = pytest.importorskip("trifold.kernels.weight_only.planes.unpacking", reason="triton is missing")
    text, values = unpacking._lookup.fn(ops.grid_of("nf4")), torch.tensor(TABLES.get("nf4").values).half()
    rng = random.Random(0)
    for trial in range(64):
        codes = torch.tensor([[(trial + 5 * i) % 16 if trial < 16 else rng.randrange(16) for i in range(128)]])
        (plane,) = pack_planes(codes.to(torch.uint8), 4)
        registers = run_ptx(text, {"$4": pair(plane, 0)})
        for j in range(4):
            assert torch.equal(halves(registers[f"${j}"]), values[codes[0, j * SLOT : j * SLOT + 2]])
