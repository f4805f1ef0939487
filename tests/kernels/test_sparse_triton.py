"""Code of the sparse kernels for GPUs that are not there. Values: `test_triton.py` runs all interpreted ones."""

import pytest

pytest.importorskip("triton")
from test_triton import CHECKS, process


def test_compiled_code_keeps_the_budget(tmp_path):
    variables = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    assert " within the budget" in process(CHECKS / "compiled_sparse.py", **variables)
