"""Building the compiled kernels: caches, compilers and processes that go wrong."""

import os
import subprocess
import sys

import pytest
import torch
from packed_samples import activations, layer, quantized

from trifold.core.native import NotCompiledError, compiled
from trifold.kernels import explain, native
from trifold.kernels.native import SOURCE, VARIANTS, Library, load

FLAGS = ("-DBITS=4", "-O0")  # quick to build
needs_compiler = pytest.mark.skipif(not isinstance(load("portable", 4), Library), reason="no C compiler")
RUN = f"""
from trifold.core.native import compiled
from trifold.kernels.native import SOURCE
assert compiled(SOURCE, {FLAGS}).ready() == 1
"""


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRIFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@needs_compiler
def test_processes_that_start_at_once(cache):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    running = [
        subprocess.Popen([sys.executable, "-c", RUN], env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in running:
        assert process.wait() == 0, process.stderr.read()
        process.stderr.close()
    assert len(list(cache.iterdir())) == 1  # one library, nothing half-built


@needs_compiler
def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, tmp_path):
    for cache in (tmp_path / "file", tmp_path / "file" / "below"):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("TRIFOLD_CACHE", str(cache))
        assert compiled(SOURCE, FLAGS).ready() == 1
    assert (tmp_path / "file").read_text() == ""


@needs_compiler
def test_a_damaged_library_is_built_again(cache, monkeypatch, tmp_path):
    compiled(SOURCE, FLAGS)
    (whole,) = cache.iterdir()
    damaged = tmp_path / "other" / whole.name
    damaged.parent.mkdir()
    damaged.write_bytes(b"not a library")
    monkeypatch.setenv("TRIFOLD_CACHE", str(damaged.parent))
    assert compiled(SOURCE, FLAGS).ready() == 1
    assert damaged.read_bytes() == whole.read_bytes()


@needs_compiler
def test_a_build_belongs_to_compiler_flags_and_sources_not_to_torch(cache, monkeypatch):
    compiled(SOURCE, FLAGS)
    monkeypatch.setattr(torch, "__version__", "99.0")
    compiled(SOURCE, FLAGS)
    assert len(list(cache.iterdir())) == 1
    compiled(SOURCE, ("-DBITS=3", "-O0"))
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("compiler, reason", [("no-such-compiler", "does not compile"), ("false", "does not compile")])
def test_a_compiler_that_fails(cache, monkeypatch, compiler, reason):
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(NotCompiledError, match=reason):
        compiled(SOURCE, FLAGS)


def test_without_a_compiler_the_next_kernel_runs(monkeypatch):
    monkeypatch.setenv("TRIFOLD_NATIVE", "0")
    load.cache_clear()
    try:
        module = layer(quantized(96, 160, 4, 32, False))
        for dtype in (torch.float32, torch.bfloat16):
            choice = explain(module.spec, dtype, "cpu")
            assert choice.op in ("weight_only.torch_int4", "weight_only.blockwise")
            assert choice.rejected["weight_only.cpu_portable" if dtype == torch.float32 else "weight_only.cpu_avx2"]
            x = activations(3, 160, dtype)
            expected = x.double() @ module.dequantize().double().T
            assert torch.allclose(module(x).double(), expected, atol=0.05, rtol=0.02)
        assert load("portable", 4) == "switched off by TRIFOLD_NATIVE=0"
    finally:
        load.cache_clear()


def test_a_processor_without_the_instructions_says_so(monkeypatch):
    monkeypatch.setattr(native, "_features", lambda: frozenset({"avx2", "bmi2", "f16c", "fma"}))
    native.lacking.cache_clear()
    try:
        assert native.lacking("avx2") is None and native.lacking("portable") is None
        assert "avx512f" in native.lacking("avx512") and "amx_tile" in native.lacking("amx")
    finally:
        native.lacking.cache_clear()


@needs_compiler
def test_threads_are_torchs_own():
    """One OpenMP runtime in the process: two would each keep threads spinning."""
    if not os.path.exists("/proc/self/maps"):
        pytest.skip("no /proc")
    script = """
from trifold.kernels.native import load
load("portable", 4)
print(len({line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}))
"""  # a process of its own: other libraries that tests use bring runtimes too
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 1


def test_every_variant_has_a_row():
    from trifold.kernels.dispatch import TABLE

    names = [row.op.name for row in TABLE]
    assert [f"weight_only.cpu_{name}" for name in VARIANTS] == [n for n in names if n.startswith("weight_only.cpu_")]
