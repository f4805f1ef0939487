"""What a compression would write, from a model without weights: `trifold plan`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from trifold.compress.files import float_dtype, model_folder
from trifold.compress.folder import causal_config, meta_model
from trifold.compress.plan import LayerPlan, Plan, make_plan
from trifold.compress.recipe import Recipe
from trifold.compress.slicing import Slices, check_known
from trifold.compress.source import tower_notice
from trifold.compress.summary import totals
from trifold.core.dimensions import dimensions_of
from trifold.core.errors import RecipeError
from trifold.core.topology import find_blocks
from trifold.formats import Spec, describe, stored_bytes
from trifold.kernels import unstack

_CUT_NOTICE = ("which dimensions become how small follows from calibration text; only the sum is certain",)


@dataclass(frozen=True)
class Component:
    """Parts of one name in all blocks, or a part outside of them. dense_bytes: as the model has it. bytes: packed."""

    parameters: int
    dense_bytes: int
    bytes: int


@dataclass(frozen=True)
class Estimate:
    """parameters: of the dense model, tied ones once. components: name -> Component. bits_per_weight,
    model_bits_per_weight, total_bytes, dense_bytes: as a report counts them."""

    parameters: int
    blocks: int
    layers: int
    bits_per_weight: float
    model_bits_per_weight: float
    total_bytes: int
    dense_bytes: int
    components: dict[str, Component]
    notices: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def spec_of(plan: LayerPlan) -> Spec:
    """The spec that a layer will have. Where it depends on the data, as outliers do, that of a layer without.

    Raises RecipeError if nobody can tell.
    """
    try:
        spec = describe(plan.method.sketch(plan.shape, plan.scheme))
    except NotImplementedError:
        name = type(plan.method).__name__
        raise RecipeError(
            f"{name}: its sizes are not known before it has run; `compress --dry-run` lists layers"
        ) from None
    return spec if plan.input is None else spec | {"input": plan.input.to_dict()}


def estimate_model(
    model: str | Path, recipe: Recipe, dtype: str | torch.dtype = "auto", trust_remote_code: bool = False
) -> Estimate:
    """Sizes of the checkpoint that a recipe makes of a folder, a hub id or a bare config.json; no weight is read.

    Raises CheckpointError if there is no such model, RecipeError if the recipe does not fit it.
    """
    path = Path(model).expanduser()
    path = path if path.is_file() else model_folder(model)
    config = causal_config(path, str(model), trust_remote_code)
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    skeleton = meta_model(config, stored if dtype == "auto" else float_dtype(dtype), path, trust_remote_code)
    blocks = find_blocks(skeleton)
    plan, text = make_plan(recipe, skeleton, blocks), config.get_text_config()
    check_known({step: method for step, method, _ in plan.rewrites}, dimensions_of(text), text.model_type)
    return _estimate(skeleton, plan, blocks)


def _estimate(model: Any, plan: Plan, blocks: str) -> Estimate:
    unstack(model, set(plan.layers))
    known = cache(spec_of)  # most layers are of a few kinds
    specs = {name: known(layer) for name, layer in plan.layers.items()}
    shared = sorted({layer.step for layer in plan.layers.values() if layer.method.budget})
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    other = {
        name: (tensor.numel(), tensor.nbytes)
        for name, tensor in model.state_dict().items()
        if name not in tied and name.removesuffix(".weight") not in specs
    }
    slices, cut = _cut(plan, other)
    item, found = model.dtype.itemsize, defaultdict[str, list[int]](lambda: [0, 0, 0])

    def add(name: str, parameters: int, dense: int, packed: int) -> None:
        entry = found[_component(name, blocks)]
        for place, value in enumerate((parameters, dense, packed)):
            entry[place] += value

    for name, (count, size) in other.items():
        add(name, count, size, cut.get(name, size))
    for name, spec in specs.items():
        count = spec["shape"][0] * spec["shape"][1]
        add(name, count, count * item, stored_bytes(spec))
    return Estimate(
        parameters=sum(entry[0] for entry in found.values()),
        blocks=len(model.get_submodule(blocks)),
        layers=len(specs) + len(slices),
        components={name: Component(*entry) for name, entry in found.items()},
        notices=(
            *plan.notices,
            *tower_notice(model),
            *(f"{step}: its budget is divided when it runs; sizes are as if evenly" for step in shared),
            *(_CUT_NOTICE if slices else ()),
        ),
        **totals(specs, {n: (count, cut.get(n, size)) for n, (count, size) in other.items()}, item, slices),
    )


def _cut(plan: Plan, other: Mapping[str, tuple[int, int]]) -> tuple[Slices, dict[str, int]]:
    """Linears whose dimensions a step makes smaller, and the bytes of their weights: of each alike, though only the sum
    is certain. other: name -> (elements, bytes) of what stays dense. Raises RecipeError if another step stores them.
    """
    shares = {name: method.kept for _, method, names in plan.rewrites if method.cuts for name in names}
    both = next((name for name in shares if name in plan.layers), None)
    if both is not None:
        raise RecipeError(f"{both}: of layers that are cut and then compressed sizes are not known before it has run")
    slices: Slices = {name: {"shape": [], "of": [other[f"{name}.weight"][0]]} for name in shares}
    return slices, {f"{name}.weight": int(share * other[f"{name}.weight"][1]) for name, share in shares.items()}


def _component(name: str, blocks: str) -> str:
    """`self_attn` of `model.layers.3.self_attn.q_proj.weight`; outside the blocks the module's own name."""
    inside = name.removeprefix(blocks + ".")
    if inside != name:
        return inside.split(".")[1]
    return name.removesuffix(".weight").removesuffix(".bias")
