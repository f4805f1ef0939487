"""The reader of sparse weights in docs/format.md reads what is packed."""

import re
from pathlib import Path

import pytest
import torch

from tests.sparse_samples import KINDS, sparse_weight
from trifold.formats import describe, pack

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "format.md").read_text()


@pytest.fixture(scope="module")
def reader():
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(block, "docs/format.md", "exec"), names)
    return names["read_sparse"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(7, 64), (3, 136), (1, 1000)])
def test_it_reads_every_kind_bit_for_bit(reader, kind, shape):
    pattern, values, _ = KINDS[kind]
    weight = sparse_weight(shape, pattern, values)
    tensors = {name: t.float() if t.is_floating_point() else t for name, t in pack(weight).items()}
    found = reader(describe(weight), lambda leaf: tensors[leaf].numpy())
    assert torch.equal(torch.from_numpy(found.copy()), weight.dequantize())


def test_the_formats_are_named():
    for name in {name for _, _, name in KINDS.values()}:
        assert f"| `{name}` |" in PAGE
