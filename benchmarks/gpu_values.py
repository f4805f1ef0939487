"""The first part of `gpu_check.py`: every kernel against float64."""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from gpu_layers import DTYPES, FP8, INT8, Gpu, random_experts, random_layer

from trifold.core.inputs import InputScheme, quantize_input, round_input
from trifold.core.scheme import Scheme
from trifold.kernels import PackedLinear
from trifold.kernels.rounded_input.triton_product import round_tokens
from trifold.kernels.weight_only.planes.configs import dense_from

Case = tuple[Scheme, dict[str, Any] | None]
OURS = ("weight_only.planes", "rounded_input.triton_int8", "rounded_input.triton_fp8")
SHAPES = [(7, 43), (33, 300), (130, 1031), (512, 4096)]
TENSOR_CORES = 2.0**-12
"""Of |x| |W|ᵀ: what tensor cores may lose when they add FP8 products, of which Hopper keeps about 14 bits."""
_LATE = "no time left"


def cases() -> list[Case]:
    """Weights, and how their activations are rounded."""
    widths = [Scheme(bits, group) for bits in range(1, 9) for group in (96 if bits % 2 else "channel", 128)]
    more = [Scheme(4, 128, True), Scheme(4, 64, zero_point="real"), Scheme(4, "tensor", True, "float16"), Scheme(4, 48)]
    grids = [Scheme(4, 64, grid="nf4"), Scheme(4, 32, grid="fp4_e2m1")]
    floats = [Scheme(8, group, grid="fp8_e4m3") for group in ("channel", 128)]
    whole = [Scheme(8, "channel", symmetric) for symmetric in (True, False)]
    rounded = [(scheme, INT8 | more) for scheme, more in zip(whole, ({}, {"static": True}), strict=True)]
    return [*((s, None) for s in [*widths, *more, *grids, *floats]), *rounded, *((s, FP8) for s in floats)]


def name_of(case: Case) -> str:
    scheme, rounding = case
    grid = scheme.grid if scheme.grid != "int" else f"int{scheme.bits}"
    words = [grid, str(scheme.group_size), "sym" if scheme.symmetric else str(scheme.zero_point)]
    return " ".join([*words, *([InputScheme(**rounding).label] if rounding else [])])


def poison(device: str) -> None:
    """Leave memory full of NaN for the next to be given it."""
    pieces = [
        torch.full((size // 4,), torch.nan, device=device) for size in (2**12, 2**16, 2**20, 2**24) for _ in "1234"
    ]
    del pieces


def excess(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, lost: float) -> float:
    """Largest error against float64 over what rounding weights and result, with sums in float32, may make it; and
    `lost`, of |x| |W|ᵀ."""
    exact, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    eps = torch.finfo(y.dtype).eps
    allowed = eps * exact.abs() + (x.shape[1] * 2**-24 + eps / 2 + lost) * size
    return float(((y.double() - exact).abs() / allowed.clamp(min=1e-30)).nan_to_num(torch.inf).max())


def problems_of(gpu: Gpu, layer: PackedLinear, weight: torch.Tensor, x: torch.Tensor) -> tuple[float, list[str]]:
    """The excess of a layer on x, and what is wrong: an excess above 1, other bits the second time or in a graph."""
    poison(gpu.device)
    y, seen, lost = layer(x), x, 0.0
    if "input" in layer.spec:
        rounding = InputScheme(**layer.spec["input"])
        seen = round_input(x.float(), rounding, layer.input_scale if rounding.static else None)
        lost = 0.0 if rounding.grid == "int" else TENSOR_CORES
        y = layer(x)  # in the runtime layout again
    found = excess(y, seen, weight, layer.bias.to(x.dtype), lost)
    problems = [f"error {found:.3g}"] if found > 1 else []
    poison(gpu.device)
    if not torch.equal(layer(x), y):
        problems.append("other bits the second time")
    if gpu.op(layer, x.dtype) in OURS:
        copied = torch.empty_like(y)
        replay = gpu.graph([lambda: copied.copy_(layer(x))])
        copied.fill_(torch.nan)
        replay()
        if not torch.equal(copied, y):
            problems.append("other bits in a CUDA graph")
    return found, problems


def check_case(gpu: Gpu, case: Case, deadline: float) -> list[str]:
    """(weights, op, largest excess, problems) of one case. Dtypes take turns, since each is another compilation."""
    scheme, rounding = case
    worst, problems, ops = 0.0, [], set()
    for shape in SHAPES[: 2 if gpu.dry else None]:
        if time.time() > deadline:
            problems.append(_LATE)
            break
        layer, weight = random_layer(shape, scheme, gpu.device, True, rounding)
        tokens = (1, 3, 9, 17, 65, dense_from(scheme.bits) + 1)
        for count, dtype in list(zip(tokens, DTYPES * 3, strict=True))[: 2 if gpu.dry else None]:
            x = torch.randn(count, shape[1], device=gpu.device).to(dtype)
            ops.add(gpu.op(layer, dtype))
            found, wrong = problems_of(gpu, layer, weight.dequantize(), x)
            worst = max(worst, found)
            problems += [f"{shape} {dtype} {count} tokens: {text}" for text in wrong]
    return [name_of(case), ", ".join(sorted(ops)), f"{worst:.3f}", "; ".join(problems) or "none"]


def check_experts(gpu: Gpu) -> list[str]:
    """All experts in one product against one at a time, some of them without tokens, and the same bits again."""
    worst, problems = 0.0, []
    schemes, sizes = (Scheme(4, 32), Scheme(3, "channel"), Scheme(4, 64, grid="nf4")), (60, 256, 200)
    for scheme, dtype in zip(schemes, DTYPES * 2, strict=False):
        experts = random_experts(*((5, 43, 33) if gpu.dry else sizes), scheme, gpu.device)
        for tokens in (1, 7) if gpu.dry else (1, 7, 300):
            x = torch.randn(tokens, experts.get_submodule("0.up").in_features, device=gpu.device).to(dtype)
            index = torch.randint(0, experts.count - 1, (tokens, 3), device=gpu.device)
            index[-1, 0] = experts.count  # another process's
            weights = torch.rand(tokens, 3, device=gpu.device)
            with torch.no_grad():
                watched = experts.get_submodule("0").register_forward_hook(lambda *_: None)
                expected = experts(x, index, weights).double()
                watched.remove()
                poison(gpu.device)
                y = experts(x, index, weights)
                again = experts(x, index, weights)
            error = float((y.double() - expected).norm() / expected.norm())
            worst = max(worst, error / (8 * torch.finfo(dtype).eps))
            if not error <= 8 * torch.finfo(dtype).eps:
                problems.append(f"{tokens} tokens: relative error {error:.3g}")
            if not torch.equal(y, again):
                problems.append(f"{tokens} tokens: other bits the second time")
    return ["experts", "experts.planes", f"{worst:.3f}", "; ".join(problems) or "none"]


def check_rounding(gpu: Gpu) -> list[str]:
    """Activations rounded by a kernel have the bits that `core.inputs` gives them."""
    problems = []
    for scheme in (InputScheme(8), InputScheme(4), InputScheme(8, "fp8_e4m3")):
        for dtype in (*DTYPES, torch.float32):
            x = torch.randn(9, 1031, device=gpu.device)
            x[1], x[2], x[3, 7], x[4, 8] = x[1] * 1e-6, 0, torch.nan, torch.inf
            codes, scale, _ = round_tokens(x.to(dtype), scheme, None)
            expected, scales = quantize_input(x.to(dtype), scheme)
            for found, wanted in ((codes.float(), expected.float()), (scale, scales)):
                if not torch.equal(found.nan_to_num(9e9), wanted.nan_to_num(9e9)):
                    problems.append(f"{scheme.label} of {dtype} differ")
    return ["rounded activations", "round_tokens", "", "; ".join(problems) or "none"]


def _in_process(numbers: list[int], deadline: float) -> list[list[str]]:
    return [_guarded(check_case, Gpu(), cases()[number], deadline) for number in numbers]


def _guarded(check: Any, *arguments: Any) -> list[str]:
    try:
        return check(*arguments)
    except Exception as error:  # one kernel that does not run must not hide what the others do
        what = name_of(arguments[1]) if len(arguments) > 1 else check.__name__
        return [what, "", "", f"{type(error).__name__}: {str(error)[:300]}"]


def check(gpu: Gpu, deadline: float) -> list[list[str]]:
    """A row for each kind of weight. Compiling is what takes the time, so several processes do it. deadline: of
    `time.time()`, after which what is left is said to be so."""
    rows = [_guarded(check_rounding, gpu), _guarded(check_experts, gpu)]
    if gpu.dry:
        return rows + [_guarded(check_case, gpu, case, deadline) for case in cases()[-8:]]
    workers = max(1, min(8, (os.cpu_count() or 2) // 2))
    parts = [list(range(start, len(cases()), workers)) for start in range(workers)]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [(numbers, pool.submit(_in_process, numbers, deadline)) for numbers in parts]
        for numbers, future in futures:
            try:
                rows += future.result()
            except Exception as error:  # a process that died
                rows += [[name_of(cases()[number]), "", "", f"{type(error).__name__}: {error}"] for number in numbers]
    return rows


def wrong(rows: list[list[str]]) -> bool:
    """Whether anything but the time was."""
    return any(row[-1] not in ("none", _LATE) for row in rows)
