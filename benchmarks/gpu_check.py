"""Checks and times the kernels for GPUs on the GPU of this machine; `make gpu-check`. Takes less than 8 minutes.

    python benchmarks/gpu_check.py [--seconds 420] [--only check|speed|decode]

1. Values: every width, grid and kind of group, odd shapes, both dtypes in turn, against float64, in memory full of
   NaN; the same bits again, and in a CUDA graph.
2. Speed, in CUDA graphs, over more copies of a weight than the second-level cache holds: as a fraction of the copy
   bandwidth and of the matrix rate of bfloat16, both measured here, beside other products of the same shape.
3. One token through a random model of the shape of Llama 3 8B, packed and in bfloat16.

Results go to `benchmarks/results/gpu.json` and `.md`. Nothing is written where there is no GPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from common import machine, markdown, save

from trifold.core.canonical import Quantized
from trifold.core.inputs import InputScheme, round_input
from trifold.core.scheme import SCALE_DTYPES, Scheme
from trifold.formats import describe, pack
from trifold.kernels import PackedLinear, explain
from trifold.kernels.weight_only.planes.configs import dense_from

Product = Callable[[torch.Tensor], torch.Tensor]
GIB = 2**30
DTYPES = (torch.float16, torch.bfloat16)
OURS = ("weight_only.planes", "rounded_input.triton_int8")
SHAPES = [(8192, 8192), (28672, 8192), (8192, 28672), (4096, 4096)]
TOKENS = [1, 16, 64, 256, 1024, 4096]
SCHEMES = {
    "int2 g128": Scheme(2, 128),
    "int3 g128": Scheme(3, 128),
    "int4 g128": Scheme(4, 128),
    "int4 g128 sym": Scheme(4, 128, True),
    "int8 channel": Scheme(8, "channel", True),
    "nf4 g64": Scheme(4, 64, grid="nf4"),
    "fp4 g32": Scheme(4, 32, grid="fp4_e2m1"),
    "fp8 channel": Scheme(8, "channel", grid="fp8_e4m3"),
}
ROUNDED = "int8 channel a8"


def random_layer(
    shape: tuple[int, int], scheme: Scheme, device: str, bias: bool = False, input_bits: int | None = None
) -> tuple[PackedLinear, Quantized]:
    """A layer of random codes, and the canonical tensor."""
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
        rounds = {"input": {"bits": input_bits}} if input_bits else {}
        layer = PackedLinear(describe(weight) | rounds, bias, torch.float32)
    values = {"bias": torch.linspace(-1, 1, shape[0], device=device)} if bias else {}
    layer.load_state_dict(pack(weight) | values)
    return layer, weight


def poison(device: torch.device) -> None:
    """Leave memory full of NaN for the next to be given it."""
    pieces = [
        torch.full((size // 4,), torch.nan, device=device) for size in (2**12, 2**16, 2**20, 2**24) for _ in "1234"
    ]
    del pieces


def excess(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> float:
    """Largest error against float64 over what rounding weights and result, with sums in float32, may make it."""
    exact, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    eps = torch.finfo(y.dtype).eps
    allowed = eps * exact.abs() + (x.shape[1] * 2**-24 + eps / 2) * size
    return float(((y.double() - exact).abs() / allowed.clamp(min=1e-30)).nan_to_num(torch.inf).max())


def problems_of(layer: PackedLinear, weight: torch.Tensor, x: torch.Tensor) -> tuple[float, list[str]]:
    """The excess of a layer on x, and what is wrong: an excess above 1, other bits the second time or in a graph."""
    poison(x.device)
    y = layer(x)
    seen = round_input(x.float(), InputScheme(**layer.spec["input"])) if "input" in layer.spec else x
    found = excess(y, seen, weight, layer.bias.to(x.dtype))
    problems = [f"error {found:.3g}"] if found > 1 else []
    poison(x.device)
    if not torch.equal(layer(x), y):
        problems.append("other bits the second time")
    if explain(layer.spec, x.dtype, x.device).op in OURS:
        copied = torch.empty_like(y)
        graph = graph_of([lambda: copied.copy_(layer(x))])
        copied.fill_(torch.nan)
        graph.replay()
        if not torch.equal(copied, y):
            problems.append("other bits in a CUDA graph")
    return found, problems


def check(device: str, deadline: float) -> list[list[Any]]:
    """Rows of (weights, op, largest excess, problems). Each kind of call is compiled when it is first met, which is
    what takes the time; so dtypes take turns."""
    groups = [Scheme(bits, 96 if bits % 2 else "channel") for bits in range(1, 9)]
    others = [Scheme(4, 64, zero_point="real"), Scheme(4, "tensor", True, "float16"), Scheme(4, 48)]
    cases: list[tuple[Scheme, int | None]] = [(scheme, None) for scheme in [*SCHEMES.values(), *others, *groups]]
    cases += [(Scheme(8, "channel", symmetric), 8) for symmetric in (True, False)]
    rows = []
    for scheme, input_bits in cases:
        worst, problems, ops = 0.0, [], set()
        for shape in ((7, 43), (33, 300), (130, 1031), (512, 4096)):
            if time.monotonic() > deadline:
                problems.append(f"{shape}: no time left")
                continue
            layer, weight = random_layer(shape, scheme, device, True, input_bits)
            for tokens, dtype in zip((1, 3, 9, 17, 65, dense_from(scheme.bits) + 1), DTYPES * 3, strict=True):
                ops.add(explain(layer.spec, dtype, device).op)
                x = torch.randn(tokens, shape[1], device=device).to(dtype)
                found, wrong = problems_of(layer, weight.dequantize(), x)
                worst = max(worst, found)
                problems += [f"{shape} {dtype} {tokens} tokens: {text}" for text in wrong]
        grid = scheme.grid if scheme.grid != "int" else f"int{scheme.bits}"
        zero = "sym" if scheme.symmetric else scheme.zero_point
        name = f"{grid} {scheme.group_size} {zero}" + (f" a{input_bits}" if input_bits else "")
        rows.append([name, ", ".join(sorted(ops)), f"{worst:.3f}", "; ".join(problems) or "none"])
        print(*rows[-1], sep=" | ", flush=True)
    return rows


def graph_of(calls: list[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """All calls, one after the other, captured after they ran once outside."""
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
    return graph


def microseconds(calls: list[Callable[[], Any]]) -> float:
    """Median time of one call."""
    graph = graph_of(calls)
    graph.replay()
    times = []
    for _ in range(15):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / len(calls))
    return sorted(times)[len(times) // 2]


def ceilings(device: str) -> dict[str, float]:
    """Bytes per second of a copy, read and written, and operations per second of bfloat16 products."""
    source = torch.empty(GIB, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = microseconds([lambda: target.copy_(source)])
    a, b = (torch.randn(8192, 8192, device=device).bfloat16() for _ in range(2))
    product = microseconds([lambda: a @ b])
    return {"bytes": 2 * GIB / copy * 1e6, "operations": 2 * 8192**3 / product * 1e6}


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


def copies(make: Callable[[], Product], size: int) -> list[Product]:
    """As many products as make their weights, of `size` bytes each, 400 MB together, at least two."""
    return [make() for _ in range(max(2, min(64, -(-400_000_000 // size))))]


def speed(device: str, deadline: float, limits: dict[str, float]) -> list[dict[str, Any]]:
    """One row for each product, shape and number of tokens; what cannot run says why."""
    rows = []
    for shape in SHAPES:
        elements = shape[0] * shape[1]
        made: dict[str, tuple[Callable[[], Product], float]] = {"bf16 cuBLAS": (lambda s=shape: cublas(s, device), 16)}
        for name, scheme in SCHEMES.items():
            group = scheme.group_width(shape[1])
            bits = scheme.bits + (16 if scheme.symmetric else 24) / group
            made[name] = (lambda scheme=scheme, shape=shape: random_layer(shape, scheme, device)[0], bits)
        made[ROUNDED] = (lambda s=shape: random_layer(s, SCHEMES["int8 channel"], device, input_bits=8)[0], 8)
        made["torch int4 g128"] = (lambda shape=shape: torch_int4(shape, device), 4.25)
        made["gemlite int4 g128"] = (lambda shape=shape: gemlite_int4(shape, device), 4.25)
        for name, (make, bits) in made.items():
            products: list[Product] = []
            for tokens in TOKENS:
                if time.monotonic() > deadline:
                    return rows
                row: dict[str, Any] = {"product": name, "shape": list(shape), "tokens": tokens}
                x = torch.randn(tokens, shape[1], device=device).bfloat16()
                try:
                    products = products or copies(make, int(elements * bits / 8))
                    took = microseconds([lambda p=p, x=x: p(x) for p in products])
                    moved = elements * bits / 8 + 2 * tokens * (shape[0] + shape[1])
                    row["microseconds"] = round(took, 2)
                    row["of_copy_bandwidth"] = round(moved / took * 1e6 / limits["bytes"], 3)
                    row["of_bf16_rate"] = round(2 * elements * tokens / took * 1e6 / limits["operations"], 3)
                except Exception as error:  # a peer that is missing or broken must not end the run
                    row["failed"] = f"{type(error).__name__}: {str(error)[:120]}"
                rows.append(row)
                print(row, flush=True)
                if "failed" in row:
                    break
            del products
            torch.cuda.empty_cache()
    return rows


def decode(device: str) -> dict[str, Any]:
    """Milliseconds for one token, without a cache, through a random model of 8 billion weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    config = LlamaConfig(**sizes, num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device=device).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(config, device=device)
    ids = torch.ones(1, 1, dtype=torch.int64, device=device)
    found = {}
    with torch.no_grad():
        found["bf16"] = round(microseconds([lambda: model(ids, use_cache=False)]) / 1e3, 3)
        for block in model.model.layers:
            for name, module in list(block.named_modules()):
                if isinstance(module, torch.nn.Linear):
                    shape = (module.out_features, module.in_features)
                    block.set_submodule(name, random_layer(shape, SCHEMES["int4 g128"], device)[0])
        found["int4 g128"] = round(microseconds([lambda: model(ids, use_cache=False)]) / 1e3, 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=420, help="after which no new row is begun")
    parser.add_argument("--only", choices=["check", "speed", "decode"])
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu-check: torch finds no GPU here, so nothing was checked or measured")
    device, begun = "cuda", time.monotonic()
    properties = torch.cuda.get_device_properties(device)
    data: dict[str, Any] = {"gpu": properties.name, "machine": machine()}
    text = f"# Kernels on a {properties.name}\n\n"
    wrong = False
    if options.only in (None, "check"):
        data["values"] = check(device, begun + options.seconds * 0.45)
        wrong = any(row[-1] != "none" for row in data["values"])
        text += markdown(["weights", "op", "error over what is allowed", "problems"], data["values"]) + "\n"
    if options.only in (None, "decode"):
        data["decode_ms"] = decode(device)
        text += f"One token through a random 8B model, ms: {data['decode_ms']}\n\n"
        torch.cuda.empty_cache()
    if options.only in (None, "speed"):
        limits = ceilings(device)
        data["ceilings"], data["speed"] = limits, speed(device, begun + options.seconds, limits)
        text += f"Copy: {limits['bytes'] / 1e12:.2f} TB/s; bfloat16: {limits['operations'] / 1e12:.0f} TFLOP/s.\n\n"
        names = ["product", "shape", "tokens", "microseconds", "of_copy_bandwidth", "of_bf16_rate", "failed"]
        text += markdown(names, [[row.get(name, "") for name in names] for row in data["speed"]])
    print(text)
    save("gpu", data, text)
    if wrong:
        sys.exit("gpu-check: values are wrong; see the table")


if __name__ == "__main__":
    main()
