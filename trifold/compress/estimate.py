"""What a compression would write, from a model without weights: `trifold plan`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from trifold.compress.calibration import CALIBRATION_TOKENS, PROOF_LENGTH, PROOF_WINDOWS
from trifold.compress.files import float_dtype, model_folder
from trifold.compress.folder import causal_config, meta_model
from trifold.compress.forecast import Forecast, Text, check_disk, check_memory, forecast
from trifold.compress.job import Job, Options, room_of
from trifold.compress.measure import measured
from trifold.compress.memory import available_bytes
from trifold.compress.plan import LayerPlan, Plan, make_plan
from trifold.compress.recipe import Recipe
from trifold.compress.slicing import Slices, check_known
from trifold.compress.source import tower_notice
from trifold.compress.summary import totals
from trifold.compress.text import clamp_seqlen
from trifold.core.dimensions import dimensions_of
from trifold.core.errors import RecipeError
from trifold.core.topology import find_blocks
from trifold.formats import Spec, describe, stored_bytes
from trifold.kernels import unstack

_CUT_NOTICE = ("which dimensions become how small follows from calibration text; only the sum is certain",)
DEFAULTS = Options()


@dataclass(frozen=True)
class Component:
    """Parts of one name in all blocks, or a part outside of them. dense_bytes: as the model has it. bytes: packed."""

    parameters: int
    dense_bytes: int
    bytes: int


@dataclass(frozen=True)
class Estimate:
    """parameters: of the dense model, tied ones once. components: name -> Component. bits_per_weight,
    model_bits_per_weight, total_bytes, dense_bytes: as a report counts them. memory, device_memory, disk: bytes by
    stage (see `Forecast`). seconds: by stage, if they were measured."""

    parameters: int
    blocks: int
    layers: int
    bits_per_weight: float
    model_bits_per_weight: float
    total_bytes: int
    dense_bytes: int
    components: dict[str, Component]
    memory: dict[str, int]
    device_memory: dict[str, int]
    disk: dict[str, int]
    seconds: dict[str, float] | None = None
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
    model: str | Path,
    recipe: Recipe,
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    options: Options = DEFAULTS,
    measure: bool = False,
) -> Estimate:
    """What a recipe makes of a folder, a hub id or a bare config.json, and what that takes; no weight is read.

    options: of these batch_size, device, stats_memory and offload_activations count. measure: solve a layer of random
    weights, and tell the time of all from it. Raises CheckpointError if there is no such model, RecipeError if the
    recipe does not fit it.
    """
    path = Path(model).expanduser()
    path = path if path.is_file() else model_folder(model)
    config = causal_config(path, str(model), trust_remote_code)
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    skeleton = meta_model(config, stored if dtype == "auto" else float_dtype(dtype), path, trust_remote_code)
    blocks = find_blocks(skeleton)
    plan = make_plan(recipe, skeleton, blocks)
    check_known(
        {step: method for step, method, _ in plan.rewrites},
        dimensions_of(config.get_text_config()),
        config.get_text_config().model_type,
    )
    gpu = torch.device(options.device).type != "cpu" if options.device != "auto" else torch.cuda.is_available()
    text = expected_text(recipe, config, options.batch_size, gpu)
    needed = forecast(skeleton, plan, known_specs(plan), blocks, text, room_of(options), gpu)
    found = _estimate(skeleton, plan, blocks, needed)
    return replace(found, seconds=measured(skeleton, plan, text)) if measure else found


def expected_text(recipe: Recipe, config: Any, batch_size: int | None, gpu: bool) -> Text:
    """The windows that a recipe asks for; of one that needs no text those of the proof."""
    if recipe.data_free:
        seqlen, _ = clamp_seqlen(PROOF_LENGTH, config)
        return Text(PROOF_WINDOWS, seqlen, PROOF_WINDOWS * seqlen, observed=False)
    seqlen, _ = clamp_seqlen(recipe.seqlen, config)
    windows = batch_size or max(1, CALIBRATION_TOKENS["cuda" if gpu else "cpu"] // seqlen)
    return Text(recipe.nsamples, seqlen, min(windows, recipe.nsamples) * seqlen)


def known_specs(plan: Plan) -> dict[str, Spec]:
    """The specs of the layers whose sizes are known before they are solved."""
    found, sketched = {}, dict[LayerPlan, Spec | None]()
    for name, layer in plan.layers.items():
        if layer not in sketched:
            try:
                sketched[layer] = spec_of(layer)
            except RecipeError:
                sketched[layer] = None
        spec = sketched[layer]
        if spec is not None:
            found[name] = spec
    return found


def check_room(job: Job, output: Path) -> None:
    """Raise ResourceError if the compression of a folder cannot fit into memory or on the disk of `output`."""
    source = job.source
    lengths = [ids.numel() for ids in job.ids]
    text = Text(1, sum(lengths), max(lengths), job.observed)
    specs, gpu = known_specs(job.plan), torch.device(source.device).type != "cpu"

    def needed(**changes: Any) -> Forecast:
        room = room_of(replace(job.options, **changes))
        return forecast(source.model, job.plan, specs, source.blocks, text, room, gpu)

    free = available_bytes()
    check_memory(source.name, needed, None if free is None else free // job.processes.size)
    check_disk(source.name, needed(), output)


def _estimate(model: Any, plan: Plan, blocks: str, needed: Forecast) -> Estimate:
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
        memory=needed.memory,
        device_memory=needed.device,
        disk=needed.disk,
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
