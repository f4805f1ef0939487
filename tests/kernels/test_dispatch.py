import pytest
import torch
from packed_samples import layer, needs_int4, needs_int8, quantized

from trifold.core.canonical import Dense
from trifold.core.errors import InputError
from trifold.core.registry import Registry
from trifold.formats.base import FORMATS, Format
from trifold.kernels import PackedEmbedding, PackedLinear, explain, resolve
from trifold.kernels.dispatch import TABLE

CPU = torch.device("cpu")
INT4 = layer(quantized(96, 160, 4, 32, False)).spec
W8A8 = layer(quantized(96, 160, 8, "channel", False), input_bits=8).spec


class Plain(Format):
    """A format that the kernels know nothing of."""

    def holds(self, canonical):
        return isinstance(canonical, Dense)

    def describe(self, canonical):
        return {"format": "plain", "shape": list(canonical.shape)}

    def layout(self, spec):
        return {"weight": (tuple(spec["shape"]), torch.float32)}

    def pack(self, canonical):
        return {"weight": canonical.values}

    def unpack(self, tensors, spec):
        return Dense(tensors["weight"])


@pytest.fixture
def plain(monkeypatch):
    formats: Registry[Format] = Registry("format")
    formats.register("plain")(Plain())
    monkeypatch.setattr(FORMATS, "_entries", {**FORMATS._entries, **formats._entries})


@needs_int4
@needs_int8
def test_choices_and_reasons(no_compiler):
    choice = explain(INT4, torch.bfloat16, "cpu")
    assert choice.op == "weight_only.torch_int4"
    assert all(name.startswith("weight_only.cpu_") for name in choice.rejected)
    assert set(choice.rejected.values()) == {"there is no C compiler"}
    choice = explain(INT4, torch.float32, "cpu")
    assert choice.op == "weight_only.blockwise"
    reason = "takes torch.bfloat16 activations, not torch.float32"
    assert choice.rejected["weight_only.torch_int4"] == choice.rejected["weight_only.torch_int8"] == reason
    assert choice.rejected["weight_only.dense"] == "takes format dense, not int"
    choice = explain(INT4, torch.bfloat16, "cuda")
    assert choice.op == "weight_only.blockwise"
    assert choice.rejected["weight_only.torch_int4"] == "runs on cpu, not cuda"
    choice = explain({**INT4, "bits": 5}, torch.bfloat16, "cpu")
    assert choice.rejected["weight_only.torch_int4"] == "bits=5 is outside 2..4"
    assert choice.rejected["weight_only.torch_int8"] == "bits=5 with symmetric=False are not 8 and true"
    assert explain(W8A8, torch.float16, "cpu").op == "rounded_input.torch_int8"
    choice = explain({**W8A8, "group_size": 32}, torch.float32, "cpu")
    assert choice.op == "rounded_input.blockwise"
    assert choice.rejected == {
        "rounded_input.torch_int8": "group_size=32 is neither 'channel' nor 'tensor'",
        "rounded_input.cpu_amx": "there is no C compiler",
        "rounded_input.cpu_avx512_bf16": "there is no C compiler",
        "rounded_input.triton_int8": "runs on cuda, not cpu",
    }


def test_explain_agrees_with_resolve():
    for spec in (INT4, W8A8, {**INT4, "input": {"bits": 6}}):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            op = resolve(spec, dtype, torch.device("cpu"))
            assert explain(spec, dtype, "cpu").op == op.name
            assert op in [row.op for row in TABLE]


def test_a_forced_kernel_runs_or_says_why_not(monkeypatch, no_compiler):
    module, x = layer(quantized(96, 160, 4, 32, False)), torch.ones(2, 160)
    for name in ("weight_only.naive", "weight_only.blockwise", " weight_only.naive , rounded_input.naive"):
        monkeypatch.setenv("TRIFOLD_KERNEL", name)
        assert resolve(INT4, torch.float32, CPU).name == name.split(",")[0].strip()
        assert explain(INT4, torch.bfloat16, "cpu").op == name.split(",")[0].strip()
    assert resolve(W8A8, torch.float32, CPU).name == "rounded_input.naive"
    monkeypatch.setenv("TRIFOLD_KERNEL", "weight_only.torch_int4")
    with pytest.raises(
        InputError, match=r"torch_int4 cannot run int4 g32 asym.*takes torch.bfloat16.*not torch.float32"
    ):
        module(x)
    with pytest.raises(InputError, match="does not round them"):
        resolve(W8A8, torch.bfloat16, CPU)
    with pytest.raises(InputError, match="the tensors are shared"):
        resolve(INT4, torch.bfloat16, CPU, in_place=True)
    monkeypatch.setenv("TRIFOLD_KERNEL", "weight_only.cpu_amx")
    with pytest.raises(InputError, match="there is no C compiler"):
        module(x)
    monkeypatch.setenv("TRIFOLD_KERNEL", "rounded_input.naive")
    with pytest.raises(InputError, match="takes rounded activations"):
        resolve(INT4, torch.float32, CPU)
    monkeypatch.setenv("TRIFOLD_KERNEL", "weight_only.blokwise")
    with pytest.raises(InputError, match=r"unknown kernel 'weight_only.blokwise'; did you mean weight_only.blockwise"):
        resolve(INT4, torch.float32, CPU)
    monkeypatch.setenv("TRIFOLD_KERNEL", "")
    assert module(x).shape == (2, 96)


def test_integer_activations_are_refused():
    with pytest.raises(TypeError, match="floating point"):
        resolve(INT4, torch.int8, torch.device("cpu"))


def test_names_are_unique_and_every_folder_ends_with_its_reference():
    names = [row.op.name for row in TABLE]
    assert len(set(names)) == len(names)
    for folder in {name.split(".")[0] for name in names}:
        assert [name for name in names if name.startswith(folder + ".")][-1] == f"{folder}.naive"


def test_a_module_resolves_once_per_dtype(monkeypatch):
    calls = []
    monkeypatch.setattr("trifold.kernels.packed_linear.resolve", lambda *args: calls.append(args[1]) or resolve(*args))
    module = layer(quantized(7, 43, 4, 16, False))
    for dtype in (torch.float32, torch.bfloat16, torch.float32, torch.bfloat16):
        module(torch.zeros(2, 43, dtype=dtype))
    assert calls == [torch.float32, torch.bfloat16]


def test_a_new_format_works_through_the_references(plain):
    spec, dense = {"format": "plain", "shape": [7, 43]}, torch.randn(7, 43)
    choice = explain(spec, torch.float32, "cpu")
    assert choice.op == "weight_only.naive"
    assert choice.rejected["weight_only.blockwise"] == "format 'plain' cannot decode some rows alone"
    module = PackedLinear(spec, False, torch.float32)
    module.load_state_dict({"weight": dense})
    x = torch.randn(3, 43, requires_grad=True)
    y = module(x)
    assert torch.equal(y, x @ dense.T) or torch.allclose(y, x @ dense.T, atol=1e-5)
    y.sum().backward()
    assert torch.allclose(x.grad, dense.sum(0).expand(3, 43), atol=1e-5)
    rounding = PackedLinear({**spec, "input": {"bits": 8}}, False, torch.float32)
    rounding.load_state_dict({"weight": dense})
    assert explain(rounding.spec, torch.float32, "cpu").op == "rounded_input.naive"
    assert torch.allclose(rounding(x), y, atol=0.3)
    table = PackedEmbedding(spec, torch.float32)
    table.load_state_dict({"weight": dense})
    assert torch.equal(table(torch.tensor([2, 0])), dense[[2, 0]])
