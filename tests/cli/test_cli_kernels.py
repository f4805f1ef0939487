"""`inspect --kernels` and `build-kernels`."""

import json

import pytest
import torch

from tests.helpers import trifold_cli
from trifold.kernels import explain
from trifold.kernels.native import Library, load
from trifold.kernels.sparse import library as sparse

SMALL = ("--set", "group_size=32")


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny):
    out = tmp_path_factory.mktemp("kernels") / "out"
    code, _, err = trifold_cli("compress", tiny(), "-r", "w4a16-rtn", "-o", out, *SMALL)
    assert code == 0, err
    return out


def test_inspect_names_the_kernel_of_every_layer(made):
    code, out, err = trifold_cli("inspect", made, "--kernels", "--json", "-")
    assert code == 0, err
    found = json.loads(out)["kernels"]
    modules = json.loads((made / "config.json").read_text())["quantization_config"]["modules"]
    assert found.keys() == modules.keys()
    for name, spec in modules.items():
        choice = explain(spec, torch.float32, "cpu")
        assert (found[name]["kernel"], found[name]["rejected"]) == (choice.op, choice.rejected)
    code, out, err = trifold_cli("inspect", made, "--kernels")
    assert code == 0 and all(name in out and entry["kernel"] in out for name, entry in found.items()), err


def test_a_forced_kernel_is_shown_or_refused(made, monkeypatch):
    monkeypatch.setenv("TRIFOLD_KERNEL", "weight_only.blockwise")
    code, out, _ = trifold_cli("inspect", made, "--kernels", "--json", "-")
    assert code == 0 and {entry["kernel"] for entry in json.loads(out)["kernels"].values()} == {"weight_only.blockwise"}
    monkeypatch.setenv("TRIFOLD_KERNEL", "weight_only.torch_int8")
    code, out, err = trifold_cli("inspect", made, "--kernels")
    assert (code, out) == (2, "") and "TRIFOLD_KERNEL=weight_only.torch_int8 cannot run int4 g32" in err
    code, out, err = trifold_cli("generate", made, "--prompt", "w1 w2", "--max-new-tokens", 1)
    assert code == 2 and "TRIFOLD_KERNEL" in err


@pytest.mark.skipif(not isinstance(load("portable", 4), Library), reason="no C compiler")
def test_kernels_are_built_ahead_of_time():
    code, out, err = trifold_cli("build-kernels", "--bits", 4, "--json", "-")
    assert code == 0, err
    built = [name for name, entry in json.loads(out)["variants"].items() if entry["bits"] == [4]]
    assert len(built) == 1
    for kind, widths in (("groups", [4]), ("bitmap", [4, 16])):
        (*lacking, best) = json.loads(out)["sparse"][kind].values()
        assert best == {"bits": widths, "reason": None} and all(other["reason"] for other in lacking)
    code, out, err = trifold_cli("build-kernels", "--bits", 4)
    assert code == 0 and built[0] in out, err


def test_building_without_a_compiler_is_an_error_of_the_environment(monkeypatch):
    monkeypatch.setenv("TRIFOLD_NATIVE", "0")
    for each in (load, sparse.load):
        each.cache_clear()
    try:
        code, _, err = trifold_cli("build-kernels", "--bits", 4)
        assert code == 4 and "install a C compiler" in err
    finally:
        for each in (load, sparse.load):
            each.cache_clear()
