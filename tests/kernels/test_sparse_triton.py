"""Code of the sparse and low-rank kernels for GPUs that are not there. Values: `test_triton.py` runs all of them."""

import pytest

pytest.importorskip("triton")
from test_triton import CHECKS, process


@pytest.mark.parametrize("script", ["compiled_sparse.py", "compiled_lowrank.py"])
def test_compiled_code_keeps_the_budget(tmp_path, script):
    variables = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    assert " within the budget" in process(CHECKS / script, **variables)
