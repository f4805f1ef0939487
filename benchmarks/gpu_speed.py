"""The second part of `gpu_check.py`: how fast the kernels are, beside others."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_layers import FP8, INT8, Gpu, random_experts, random_layer

from trifold.core.scheme import Scheme

Product = Callable[[torch.Tensor], torch.Tensor]
SHAPES = [(8192, 8192), (28672, 8192), (8192, 28672), (4096, 4096)]
TOKENS = [1, 16, 64, 256, 1024, 4096]
SCHEMES = {
    "int4 g128": Scheme(4, 128),
    "int4 g128 sym": Scheme(4, 128, True),
    "int2 g128": Scheme(2, 128),
    "int3 g128": Scheme(3, 128),
    "int8 channel": Scheme(8, "channel", True),
    "nf4 g64": Scheme(4, 64, grid="nf4"),
    "fp4 g32": Scheme(4, 32, grid="fp4_e2m1"),
    "fp8 channel": Scheme(8, "channel", grid="fp8_e4m3"),
}
ROUNDED = {
    "int8 channel a8": (SCHEMES["int8 channel"], INT8),
    "fp8 channel a8 fp8": (SCHEMES["fp8 channel"], FP8),
    "fp8 g128 a8 fp8": (Scheme(8, 128, grid="fp8_e4m3"), FP8),
}
MIXTURE = {"count": 128, "hidden": 2048, "intermediate": 768}
"""The experts of Qwen3 30B A3B, of which a token gets 8."""
LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8}


def ceilings(gpu: Gpu) -> dict[str, float]:
    """Bytes per second of a copy, read and written, and operations per second of bfloat16 products."""
    size, side = (2**20, 64) if gpu.dry else (2**30, 8192)
    source = torch.empty(size, dtype=torch.uint8, device=gpu.device)
    target = torch.empty_like(source)
    copy = gpu.microseconds([lambda: target.copy_(source)])
    a, b = (torch.randn(side, side, device=gpu.device).bfloat16() for _ in range(2))
    product = gpu.microseconds([lambda: a @ b])
    return {"bytes": 2 * size / copy * 1e6, "operations": 2 * side**3 / product * 1e6}


def cublas(shape: tuple[int, int], device: str) -> Product:
    """The vendor's, of random bfloat16 weights."""
    weight = torch.randn(shape, device=device).bfloat16()
    return lambda x: torch.nn.functional.linear(x, weight)


def torch_int4(shape: tuple[int, int], device: str) -> Product:
    """torch's own int4 product, of random codes in groups of 128."""
    codes = torch.randint(0, 256, (shape[0], shape[1] // 2), dtype=torch.uint8, device=device)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    scales = torch.rand(shape[1] // 128, shape[0], 2, device=device).bfloat16()
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, 128, scales)


def gemlite_int4(shape: tuple[int, int], device: str) -> Product:
    """gemlite's, the same."""
    from gemlite.core import DType, GemLiteLinear

    linear = GemLiteLinear(4, 128, shape[1], shape[0], input_dtype=DType.BF16, output_dtype=DType.BF16)
    codes = torch.randint(0, 16, shape, dtype=torch.uint8, device=device)
    scales, zeros = (torch.rand(shape[0] * shape[1] // 128, 1, device=device).bfloat16() for _ in range(2))
    linear.pack(codes, scales, zeros, None)
    return linear


def copies(gpu: Gpu, make: Callable[[], Product], size: int) -> list[Product]:
    """As many products as make their weights, of `size` bytes each, 400 MB together, at least two."""
    return [make() for _ in range(2 if gpu.dry else max(2, min(64, -(-400_000_000 // size))))]


def _row(
    name: str, shape: list[int], tokens: int, limits: dict[str, float], moved: float, operations: float,
    timed: Callable[[], float],
) -> dict[str, Any]:  # fmt: skip
    row: dict[str, Any] = {"product": name, "shape": shape, "tokens": tokens}
    try:
        took = timed()
        row["microseconds"] = round(took, 2)
        row["of_copy_bandwidth"] = round(moved / took * 1e6 / limits["bytes"], 3)
        row["of_bf16_rate"] = round(operations / took * 1e6 / limits["operations"], 3)
    except Exception as error:  # a peer that is missing or broken must not end the run
        row["failed"] = f"{type(error).__name__}: {str(error)[:120]}"
    print(row, flush=True)
    return row


def speed(gpu: Gpu, deadline: float, limits: dict[str, float]) -> list[dict[str, Any]]:
    """One row for each product, shape and number of tokens; what cannot run says why."""
    rows: list[dict[str, Any]] = []
    shapes, counts = ([(64, 256)], [1]) if gpu.dry else (SHAPES, TOKENS)
    for shape in shapes:
        for name, (make, bits) in _products(shape, gpu.device).items():
            products: list[Product] = []
            for tokens in counts:
                if time.time() > deadline:
                    return rows
                x = torch.randn(tokens, shape[1], device=gpu.device).bfloat16()
                size = shape[0] * shape[1] * bits / 8

                def timed(x: torch.Tensor = x, make: Any = make, size: float = size, held: Any = products) -> float:
                    held += [] if held else copies(gpu, make, int(size))
                    return gpu.microseconds([lambda p=p: p(x) for p in held])

                moved, operations = size + 2 * tokens * sum(shape), 2 * shape[0] * shape[1] * tokens
                rows.append(_row(name, list(shape), tokens, limits, moved, operations, timed))
                if "failed" in rows[-1]:
                    break
            del products
            gpu.free()
    return rows


def _products(shape: tuple[int, int], device: str) -> dict[str, tuple[Callable[[], Product], float]]:
    """By name: what makes a product of that shape, and bits per weight that it reads."""
    made: dict[str, tuple[Callable[[], Product], float]] = {"bf16 cuBLAS": (lambda: cublas(shape, device), 16)}
    every = {**{name: (scheme, None) for name, scheme in SCHEMES.items()}, **ROUNDED}
    for name, (scheme, rounding) in every.items():
        group = scheme.group_width(shape[1])
        bits = scheme.bits + (16 if scheme.symmetric or scheme.grid != "int" else 24) / group
        made[name] = (lambda s=scheme, r=rounding: random_layer(shape, s, device, rounding=r)[0], bits)
    made["torch int4 g128"] = (lambda: torch_int4(shape, device), 4.25)
    made["gemlite int4 g128"] = (lambda: gemlite_int4(shape, device), 4.25)
    return made


def experts(gpu: Gpu, deadline: float, limits: dict[str, float]) -> list[dict[str, Any]]:
    """Rows of a mixture in int4, all experts in one product; what counts as read is the experts that were chosen."""
    sizes = {"count": 4, "hidden": 64, "intermediate": 32} if gpu.dry else MIXTURE
    k, weights_of_one = min(8, sizes["count"] // 2), 3 * sizes["hidden"] * sizes["intermediate"]
    rows: list[dict[str, Any]] = []
    mixtures: list[Any] = []
    for tokens in [1] if gpu.dry else [1, 4, 16, 64, 256]:
        if time.time() > deadline:
            break
        x = torch.randn(tokens, sizes["hidden"], device=gpu.device).bfloat16()
        weights, index = torch.rand(tokens, sizes["count"], device=gpu.device).topk(k)

        def timed(x: torch.Tensor = x, index: torch.Tensor = index, weights: torch.Tensor = weights) -> float:
            while len(mixtures) < 2:
                mixtures.append(random_experts(**sizes, scheme=Scheme(4, 32), device=gpu.device))
            return gpu.microseconds([lambda m=m: m(x, index, weights) for m in mixtures])

        moved = len(index.unique()) * weights_of_one * (4 + 24 / 32) / 8
        with torch.no_grad():
            operations = 2 * tokens * k * weights_of_one
            rows.append(_row("experts int4 g32", [*sizes.values()], tokens, limits, moved, operations, timed))
        if "failed" in rows[-1]:
            break
    return rows


def decode(gpu: Gpu) -> dict[str, Any]:
    """Milliseconds for one token, without a cache, through a random model of 8 billion weights, dense and packed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 96}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1} if gpu.dry else HEADS
    config = LlamaConfig(**(tiny if gpu.dry else LLAMA_8B), **heads, tie_word_embeddings=False)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device=gpu.device).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    with torch.device(gpu.device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    ids = torch.ones(1, 1, dtype=torch.int64, device=gpu.device)
    found: dict[str, Any] = {}
    with torch.no_grad():
        found["bf16"] = _step(gpu, lambda: model(ids, use_cache=False), found)
        for block in model.model.layers:
            for name, module in list(block.named_modules()):
                if isinstance(module, torch.nn.Linear):
                    shape = (module.out_features, module.in_features)
                    block.set_submodule(name, random_layer(shape, SCHEMES["int4 g128 sym"], gpu.device)[0])
        gpu.free()
        found["int4 g128"] = _step(gpu, lambda: model(ids, use_cache=False), found)
        found["times faster"] = round(found["bf16"] / found["int4 g128"], 2)
    return found


def _step(gpu: Gpu, call: Callable[[], Any], found: dict[str, Any]) -> float:
    """Milliseconds in a CUDA graph; if the model cannot be captured, without."""
    try:
        took = gpu.microseconds([call])
    except RuntimeError as error:
        found["not in a graph"] = str(error)[:120]
        took = gpu.microseconds([call], graphed=False)
    return round(took / 1e3, 3)
