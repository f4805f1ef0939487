import copy

import pytest
import torch
from packed_samples import GROUPS, WIDTHS, quantized

from trifold.formats import FORMATS, digest
from trifold.kernels import PackedEmbedding


def table(weight, dtype=torch.float32):
    form = FORMATS.get("int")
    module = PackedEmbedding(form.describe(weight), dtype)
    module.load_state_dict(form.pack(weight))
    return module


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("group", GROUPS)
def test_equals_the_dense_table(bits, group):
    ids = torch.tensor([[0, 96, 5], [5, 33, 64]])
    for symmetric in (True, False):
        weight = quantized(97, 43, bits, group, symmetric)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            found = table(weight, dtype)(ids)
            assert found.dtype == dtype
            assert torch.equal(found, weight.dequantize()[ids].to(dtype))


def test_casting_changes_the_output_alone():
    module = table(quantized(97, 43, 4, 16, False, "float32"))
    before = digest(module.state_dict())
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        module.to(dtype)
        assert module(torch.tensor([3])).dtype == dtype
        assert digest(module.state_dict()) == before
    module.share_memory()
    assert module.to(torch.bfloat16).to("meta").dtype == torch.bfloat16


def test_shapes_and_ranges_of_ids():
    module = table(quantized(9, 43, 4, 16, False))
    assert module(torch.tensor(3)).shape == (43,)
    assert module(torch.zeros(2, 0, dtype=torch.int32)).shape == (2, 0, 43)
    assert (module.num_embeddings, module.embedding_dim) == (9, 43)
    for wrong in (9, -1):
        with pytest.raises(IndexError):
            module(torch.tensor([wrong]))


def test_copies():
    module = table(quantized(9, 43, 4, 16, False), torch.bfloat16)
    other = copy.deepcopy(module)
    assert torch.equal(other(torch.arange(9)), module(torch.arange(9)))
    assert "dtype=torch.bfloat16" in repr(other)
