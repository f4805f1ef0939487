"""What engines run: their kernels as data, and the first thing that stands in the way of a layer.

vLLM 0.33: Marlin, CompressedTensorsWNA16, CompressedTensorsW8A8Int8, CompressedTensorsW8A8Fp8. SGLang 0.5:
CompressedTensorsWNA16 and its marlin_utils. transformers 5 with compressed-tensors 0.20, which dequantises. GPTQModel
7.7: TorchLinear. The last two were run; of vLLM and SGLang these limits, and that fused layers and experts share one
scheme, were read in sources of several versions up to those.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from trifold.core.canonical import Canonical, Quantized, RoundedInput
from trifold.core.errors import InputError, unknown_name
from trifold.ecosystem.base import Codec, Settings, group_of, inner
from trifold.formats.base import describe, label

_ROW = "channel"  # a scale per row
_MARLIN = (32, 64, 128, _ROW)
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("q_a_proj", "kv_a_proj_with_mqa"))
_EXPERTS = re.compile(r"(.+\.experts)\.\d+\.")


@dataclass(frozen=True)
class Kernel:
    """What it takes; None: anything.

    layout: names of codecs. bits: of codes. groups: inputs that share a scale. symmetric: True without zero-points
    only. inputs: "none", "int" or "float", what activations are rounded to. rows, columns: the shape is a multiple.
    experts: whether it runs those of a mixture.
    """

    layout: tuple[str, ...]
    bits: tuple[int, ...] | None = None
    groups: tuple[int | str, ...] | None = None
    symmetric: bool | None = None
    inputs: tuple[str, ...] = ("none",)
    rows: int = 1
    columns: int = 1
    experts: bool = True


@dataclass(frozen=True)
class Engine:
    """formats: what `--to` can be, the first that serves is chosen. fuses: whether it joins q, k and v, and gate and
    up, which then share one scheme, as all experts of a mixture do. uniform: one scheme for all layers if any are of
    experts. zero_points: a notice for a checkpoint that has some. full_range: as `InputScheme` says, of integer
    activations."""

    name: str
    formats: tuple[str, ...]
    kernels: tuple[Kernel, ...] = ()
    fuses: bool = False
    uniform: bool = False
    zero_points: str = ""
    full_range: bool = False


_MARLIN_KERNELS = (
    Kernel(("pack-quantized", "gptq"), (4, 8), _MARLIN, True),
    Kernel(("pack-quantized",), (4,), _MARLIN, None, experts=False),
    Kernel(("awq",), (4,), _MARLIN),
    Kernel(("int-quantized",), (8,), (_ROW,), True, ("int",)),
    Kernel(("float-quantized",), (8,), (_ROW,), True, ("none", "float")),
)
_SGLANG_KERNELS = tuple(
    Kernel(k.layout, k.bits, k.groups, k.symmetric, k.inputs, 64, 128, k.experts) if k.inputs == ("none",) else k
    for k in _MARLIN_KERNELS
)
ENGINES: dict[str, Engine] = {
    engine.name: engine
    for engine in (
        Engine("vllm", ("compressed-tensors", "gptq", "awq"), _MARLIN_KERNELS, fuses=True),
        Engine("sglang", ("compressed-tensors", "gptq", "awq"), _SGLANG_KERNELS, fuses=True, uniform=True),
        Engine(
            "transformers",
            ("compressed-tensors", "gptq_v2", "awq"),
            (
                Kernel(("pack-quantized",), symmetric=True, inputs=("none", "int", "float")),
                Kernel(("pack-quantized",), inputs=("none", "int", "float"), experts=False),
                Kernel(("int-quantized",), inputs=("none", "int")),
                Kernel(("float-quantized",), inputs=("none", "float")),
                Kernel(("gptq", "gptq_v2", "awq")),
            ),
            zero_points="transformers loads packed zero-points only with dequantize=True; docs/engines/transformers.md",
            full_range=True,
        ),
        Engine(
            "gptqmodel",
            ("gptq", "gptq_v2", "awq"),
            (
                Kernel(("gptq", "gptq_v2"), (2, 3, 4, 8), (16, 32, 64, 128, 256, 512, 1024, _ROW)),
                Kernel(("awq",), (4,), (16, 32, 64, 128, _ROW)),
            ),
        ),
        Engine("llama.cpp", ("gguf",)),
    )
}


def engine_of(name: str) -> Engine:
    """The engine of a name. Raises InputError with the nearest ones."""
    if name not in ENGINES:
        raise InputError(unknown_name("engine", name, ENGINES))
    return ENGINES[name]


def check_layers(
    engine: Engine, layers: Mapping[str, tuple[Codec, Settings, Canonical]], dense: frozenset[str]
) -> list[str]:
    """What the user should know of running layers in an engine. layers: by the names they have in the checkpoint; the
    weights' codes are not read. dense: names of linear layers that stay so.

    Raises InputError for the first layer that the engine does not run: with its reason, and a way out.
    """
    for name, (codec, _, weight) in layers.items():
        why = engine_refusal(engine, name, codec, weight)
        if why is not None:
            raise InputError(f"{name}: {why}")
    if engine.fuses:
        _check_fused(engine, layers, dense)
    experts = next((name for name in layers if _EXPERTS.match(name)), None)
    kinds = {_kind(codec, settings): name for name, (codec, settings, _) in layers.items()}
    if engine.uniform and experts and len(kinds) > 1:
        first, other = list(kinds.values())[:2]
        raise InputError(
            f"{other}: {engine.name} wants one scheme for all layers of a mixture of experts, and {first} has another; "
            "compress without overrides"
        )
    return _notices(engine, [weight for _, _, weight in layers.values()])


def runs(engine: Engine, layers: Mapping[str, tuple[Codec, Settings, Canonical]], dense: frozenset[str]) -> bool:
    """Whether `check_layers` has nothing against it."""
    try:
        check_layers(engine, layers, dense)
    except InputError:
        return False
    return True


def engine_refusal(engine: Engine, name: str, codec: Codec, weight: Canonical) -> str | None:
    """Why an engine does not run a layer, and what to do; None if it does. weight: what a codec does not refuse."""
    expert = _EXPERTS.match(name) is not None
    left = [kernel for kernel in engine.kernels if codec.name in kernel.layout and (kernel.experts or not expert)]
    if not left:
        return f"{engine.name} does not load {codec.name}; --to {engine.formats[0]}, or leave --to out"
    found = inner(weight)
    assert isinstance(found, Quantized)
    (rows, columns), group, bits = found.shape, group_of(found) or _ROW, found.scheme.bits
    symmetric, inputs, of = found.zero_point is None, _inputs(weight), "experts of " if expert else ""
    tests: tuple[tuple[Callable[[Kernel], bool], str, Callable[[list[Kernel]], str]], ...] = (
        (lambda k: inputs in k.inputs, f"its activations are {_ACTIVATIONS[inputs]}", _other_inputs),
        (lambda k: k.bits is None or bits in k.bits, f"it has {bits} bits", _other_bits),
        (lambda k: symmetric or not k.symmetric, f"{of}{bits} bits have no zero-points there", _no_zero_points),
        (lambda k: k.groups is None or group in k.groups, f"its group_size is {group}", _other_groups),
        (lambda k: rows % k.rows == 0, f"its {rows} outputs are no multiple of {left[0].rows}", _stay_dense),
        (lambda k: columns % k.columns == 0, f"its {columns} inputs are no multiple of {left[0].columns}", _stay_dense),
    )
    for fits, reason, way in tests:
        kept = [kernel for kernel in left if fits(kernel)]
        if not kept:
            return f"{engine.name} does not run it as {codec.name}: {reason}; {way(left)}"
        left = kept
    return None


_ACTIVATIONS = {"none": "not rounded", "int": "rounded to integers", "float": "rounded to 8-bit floats"}


def _no_zero_points(kernels: list[Kernel]) -> str:
    return "compress with symmetric=true"


def _stay_dense(kernels: list[Kernel]) -> str:
    return "leave it dense, with `ignore` in the recipe"


def _other_inputs(kernels: list[Kernel]) -> str:
    wanted = sorted({_ACTIVATIONS[each] for kernel in kernels for each in kernel.inputs})
    return f"compress with activations {' or '.join(wanted)}"


def _other_bits(kernels: list[Kernel]) -> str:
    return f"compress with bits={' or '.join(map(str, sorted({b for k in kernels for b in k.bits or ()})))}"


def _other_groups(kernels: list[Kernel]) -> str:
    known = dict.fromkeys(group for kernel in kernels for group in kernel.groups or ())
    return f"compress with group_size={', '.join(map(str, known))}"


def _inputs(weight: Canonical) -> str:
    if not isinstance(weight, RoundedInput):
        return "none"
    return "int" if weight.scheme.grid == "int" else "float"


def _kind(codec: Codec, settings: Settings) -> str:
    return f"{codec.name} {settings!r}"


def _check_fused(
    engine: Engine, layers: Mapping[str, tuple[Codec, Settings, Canonical]], dense: frozenset[str]
) -> None:
    """Layers that the engine joins to one need one scheme, or none."""
    first: dict[str, str] = {}

    def said(name: str) -> tuple[str, str]:
        if name not in layers:
            return "", "dense"
        codec, settings, weight = layers[name]
        return _kind(codec, settings), label(describe(weight))

    for name in (*layers, *sorted(dense)):
        joint = _joint(name)
        if joint is None:
            continue
        other = first.setdefault(joint, name)
        (kind, own), (expected, wanted) = said(name), said(other)
        if kind != expected:
            raise InputError(
                f"{name}: {engine.name} joins it with {other}, and it is {own}, the other {wanted}; "
                "give both one scheme in the recipe, or skip both"
            )


def _joint(name: str) -> str | None:
    """What a layer is joined to: the layers of one name are one."""
    experts = _EXPERTS.match(name)
    if experts is not None:
        return experts[1]
    parent, _, leaf = name.rpartition(".")
    members = next((members for members in _FUSED if leaf in members), None)
    return f"{parent}.{'+'.join(members)}" if members else None


def _notices(engine: Engine, weights: list[Canonical]) -> list[str]:
    found = [engine.zero_points] if engine.zero_points and any(_has_zero_points(w) for w in weights) else []
    integers = {w.scheme.full_range for w in weights if isinstance(w, RoundedInput) and w.scheme.grid == "int"}
    if integers - {engine.full_range}:
        rule, other = ("127.5", "true") if engine.full_range else ("127", "false")
        found.append(
            f"{engine.name} finds a token's scale as its largest magnitude over {rule}, which is not as the checkpoint "
            f"was compressed: logits differ a little; input.full_range={other} in the recipe is its rule"
        )
    return found


def _has_zero_points(weight: Canonical) -> bool:
    found = inner(weight)
    return isinstance(found, Quantized) and found.zero_point is not None
