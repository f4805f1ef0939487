import pytest
import torch
from packed_samples import layer, quantized

from trifold.formats import digest
from trifold.kernels.weight_only.int4_layout import CHUNK, pack, packs_by_chunks, unpack
from trifold.kernels.weight_only.torch_int4 import TorchInt4


def codes(rows, columns):
    return torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(rows))


def test_packs_by_chunks_on_this_machine():
    assert packs_by_chunks()


@pytest.mark.parametrize("rows, columns", [(16, 32), (48, 96), (64, 64), (112, 160), (208, 256), (272, 1088)])
def test_inverse_and_whole(rows, columns):
    dense = codes(rows, columns)
    packed = pack(dense)
    assert torch.equal(packed, torch.ops.aten._convert_weight_to_int4pack_for_cpu(dense.int(), 1))
    assert torch.equal(unpack(packed), dense)
    assert torch.equal(unpack(packed[CHUNK:]), dense[CHUNK:])


def test_every_code_in_every_place():
    for code in range(16):
        dense = torch.full((80, 64), code, dtype=torch.uint8)
        assert torch.equal(unpack(pack(dense)), dense)
        assert (pack(dense) == code * 17).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 128, "channel", "tensor"])
def test_runtime_layout_is_bijective(bits, symmetric, group):
    module, op = layer(quantized(80, 160, bits, group, symmetric)), TorchInt4()
    portable = module.portable()
    before = digest(portable)
    runtime = op.prepare(portable, module.spec)
    assert digest(portable) == before  # the input is not modified
    restored = op.restore(runtime, module.spec)
    assert list(restored) == list(portable)
    assert digest(restored) == before


def test_rows_of_the_runtime_layout():
    weight = quantized(144, 96, 4, 32, False)
    module, op = layer(weight), TorchInt4()
    runtime = op.prepare(module.portable(), module.spec)
    for start, stop in ((0, 144), (64, 144), (0, 64), (70, 90), (143, 144)):
        rows = op.rows(runtime, module.spec, start, stop, torch.float32)
        assert torch.equal(rows, weight.dequantize()[start:stop])
