"""What `gpu_check.py` runs: layers and experts of random codes, and how calls are repeated and timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from trifold.core.canonical import Canonical, Quantized
from trifold.core.scheme import SCALE_DTYPES, Scheme
from trifold.formats import describe, pack
from trifold.kernels import PackedExperts, PackedLinear, dispatch

Call = Callable[[], Any]
DTYPES = (torch.float16, torch.bfloat16)
INT8, FP8 = {"bits": 8}, {"bits": 8, "grid": "fp8_e4m3"}


class Gpu:
    """The GPU of this machine: calls in CUDA graphs, times from its own clock."""

    device, dry = "cuda", False

    def graph(self, calls: list[Call]) -> Call:
        """All calls, one after the other, captured after they ran once outside; what it returns repeats them."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph.replay

    def microseconds(self, calls: list[Call], graphed: bool = True) -> float:
        """Median time of one call."""
        replay = self.graph(calls) if graphed else lambda: [call() for call in calls]
        replay()
        times = []
        for _ in range(15):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replay()
            stop.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(stop) * 1e3 / len(calls))
        return sorted(times)[len(times) // 2]

    def free(self) -> None:
        torch.cuda.empty_cache()

    def op(self, layer: PackedLinear, dtype: torch.dtype) -> str:
        """What runs a layer."""
        return layer.op(torch.empty(1, 1, dtype=dtype, device=self.device)).name

    def place(self) -> Any:
        """In which everything runs."""
        return ExitStack()


class Rehearsal(Gpu):
    """The same on a CPU, with tiny shapes, in Triton's interpreter: that nothing is left to go wrong but the GPU."""

    device, dry = "cpu", True

    def graph(self, calls: list[Call]) -> Call:
        return lambda: [call() for call in calls]

    def microseconds(self, calls: list[Call], graphed: bool = True) -> float:
        start = time.perf_counter()
        self.graph(calls)()
        return (time.perf_counter() - start) * 1e6 / len(calls)

    def free(self) -> None:
        pass

    @contextmanager
    def place(self) -> Iterator[None]:
        """Layers are given the ops that a GPU would have."""
        there = "trifold.kernels."
        modules = ["weight_only.planes.op", "rounded_input.triton_int8", "rounded_input.triton_fp8"]
        modules += ["sparse.gpu.groups", "sparse.gpu.bitmap", "low_rank.fused"]
        resolve = dispatch.resolve
        with ExitStack() as stack:
            for module in modules:
                stack.enter_context(mock.patch(f"{there}{module}.no_gpu", lambda *_: None))
            stack.enter_context(mock.patch(f"{there}low_rank.fused.on_gpu", lambda device: True))
            cuda = lambda spec, dtype, device, *rest: resolve(spec, dtype, torch.device("cuda"), *rest)  # noqa: E731
            stack.enter_context(mock.patch(f"{there}packed_linear.resolve", cuda))
            yield


def random_layer(
    shape: tuple[int, int], scheme: Scheme, device: str, bias: bool = False, rounding: dict[str, Any] | None = None
) -> tuple[PackedLinear, Quantized]:
    """A layer of random codes, and the canonical tensor. rounding: the `input` of its spec."""
    codes = torch.randint(0, 2**scheme.bits, shape, dtype=torch.uint8, device=device)
    if scheme.grid == "fp8_e4m3":
        codes[codes & 127 == 127] = 0
    dtype, grid = SCALE_DTYPES[scheme.scale_dtype], scheme.scale_shape(*shape)
    scale = (0.5 + torch.rand(grid, device=device)).to(dtype) / 2**scheme.bits
    zero = None
    if not scheme.symmetric:
        zero = torch.randint(0, 2**scheme.bits, grid, dtype=torch.uint8, device=device)
        zero = zero if scheme.zero_point == "integer" else zero.to(dtype)
    weight = Quantized(codes, scale, zero, scheme)
    with torch.device(device):
        layer = PackedLinear(describe(weight) | ({"input": rounding} if rounding else {}), bias, torch.float32)
    values = {"bias": torch.linspace(-1, 1, shape[0], device=device)} if bias else {}
    given = {"input_scale": torch.full((1,), 0.02, device=device)} if rounding and rounding.get("static") else {}
    layer.load_state_dict(pack(weight) | given | values)
    return layer, weight


def layer_of(weight: Canonical, device: str) -> PackedLinear:
    """A layer that holds a canonical tensor."""
    with torch.device(device):
        layer = PackedLinear(describe(weight), False, torch.float32)
    layer.load_state_dict(pack(weight))
    return layer


class _Stacked(torch.nn.Module):
    """Experts as a model has them, with nothing in them yet."""

    is_transposed, has_bias, has_gate = False, False, True

    def __init__(self, count: int, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(torch.empty(count, 2 * intermediate, hidden, device="meta"))
        self.down_proj = torch.nn.Parameter(torch.empty(count, hidden, intermediate, device="meta"))

    def _apply_gate(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up


def random_experts(count: int, hidden: int, intermediate: int, scheme: Scheme, device: str) -> PackedExperts:
    """A mixture of packed experts of random codes."""
    experts = PackedExperts(_Stacked(count, hidden, intermediate)).eval()
    for e in range(count):
        expert = experts.get_submodule(str(e))
        expert.up = random_layer((2 * intermediate, hidden), scheme, device)[0]
        expert.down = random_layer((hidden, intermediate), scheme, device)[0]
    return experts
