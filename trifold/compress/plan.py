"""From a recipe and layer names to one decision per layer. Loads no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from trifold.compress.recipe import BLOCKS, EMBEDDINGS, HEAD, Recipe, Step, matches
from trifold.core.errors import RecipeError
from trifold.core.inputs import InputScheme
from trifold.core.linears import is_compressible, is_embedding, is_transposed, linears
from trifold.core.method import BlockMethod, LayerMethod, Tuner
from trifold.core.scheme import Scheme
from trifold.core.topology import towers
from trifold.kernels import PackedExperts, is_stacked


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one linear. shape: (out, in). step: whose it is."""

    shape: tuple[int, int]
    method: LayerMethod
    scheme: Scheme | None
    input: InputScheme | None = None
    step: str = ""


@dataclass(frozen=True)
class Plan:
    """layers: full name -> its plan, blocks first. rewrites: (step, block method, layers it may touch), in order.
    tuners: (step, tuner, layers that it tunes). notices: what the user should know of what stays dense.
    min_expert_tokens: below it an expert is shown all."""

    layers: Mapping[str, LayerPlan]
    rewrites: tuple[tuple[str, BlockMethod, frozenset[str]], ...] = ()
    tuners: tuple[tuple[str, Tuner, frozenset[str]], ...] = ()
    notices: tuple[str, ...] = ()
    min_expert_tokens: int = 0

    @property
    def follows_dense(self) -> bool:
        """Whether a second stream of hidden states, the dense model's, has to be kept."""
        kinds = {kind for plan in self.layers.values() for kind in plan.method.gathers}
        aimed = any(tuner.follows_dense for _, tuner, _ in self.tuners)
        return aimed or any("x_dense" in kind.needs for kind in kinds)


def make_plan(recipe: Recipe, model: Any, blocks: str) -> Plan:
    """Resolve a recipe against a model, which may be on the meta device.

    blocks: path of the block list. Raises RecipeError if two steps solve one layer, a pattern fits nothing or
    a layer cannot be compressed.
    """
    beside = tuple(path + "." for path in towers(model))
    modules = {n: m for n, m in _linears(model).items() if not f"{n}.".startswith(beside)}
    inside = [name for name in modules if name.startswith(blocks + ".")]
    outside = (blocks + ".", *beside)
    modules |= {n: m for n, m in model.named_modules() if is_embedding(m) and not f"{n}.".startswith(outside)}
    others = [name for name in modules if not name.startswith(blocks + ".")]
    tied = _tied(model)
    ends = {
        EMBEDDINGS: _name_of(model, model.get_input_embeddings()),
        HEAD: _name_of(model, model.get_output_embeddings()),
    }
    layers: dict[str, LayerPlan] = {}
    owner: dict[str, str] = {}
    rewrites: list[tuple[str, BlockMethod, frozenset[str]]] = []
    tuners: list[tuple[str, Tuner, frozenset[str]]] = []
    for step in recipe.steps:
        names = list(dict.fromkeys(tied.get(name, name) for name in _targets(step, inside, others, ends)))
        if not step.solves:
            method = step.build()
            if isinstance(method, Tuner):
                tuners.append((step.name, method, _tuned(step, method, names, inside, layers)))
                continue
            if not isinstance(method, BlockMethod):
                raise RecipeError(
                    f"step {step.name!r}: {step.method} is neither a layer nor a block method nor a tuner"
                )
            solved = next((name for name in names if name in owner), None)
            if solved is not None:
                raise RecipeError(
                    f"step {step.name!r}: {owner[solved]!r} has solved {solved} before it; put {step.name!r} first"
                )
            cut = next((name for name, other, _ in rewrites if other.cuts), None)
            if cut is not None:
                raise RecipeError(f"step {step.name!r}: {cut!r} cuts dimensions before it; put {step.name!r} first")
            rewrites.append((step.name, method, frozenset(names) & frozenset(inside)))
            continue
        for name in names:
            if tuners:
                raise RecipeError(
                    f"step {step.name!r}: {tuners[0][0]!r} tunes what was decided before it; put {step.name!r} first"
                )
            if name in owner:
                raise RecipeError(
                    f"{name}: both {owner[name]!r} and {step.name!r} would solve it; add it to one step's `ignore`"
                )
            sharing = [other for other, source in tied.items() if source == name]
            if name not in modules or (sharing and not is_embedding(modules[name])):
                kind = type(model.get_submodule(name)).__name__
                with_it = "".join(f", which shares its weight with {other}," for other in sharing)
                raise RecipeError(f"{name}{with_it} is a {kind}, which cannot be packed; leave it out")
            plan = _layer_plan(step, name, modules[name], sharing)
            if plan is not None:
                owner[name], layers[name] = step.name, plan
    ordered = {name: layers[name] for name in (*inside, *others) if name in layers}
    whole = next((step for step, tuner, _ in tuners if tuner.level == "model"), None)
    if whole is not None and any(method.cuts for _, method, _ in rewrites):
        raise RecipeError(f"step {whole!r} tunes a whole model of the original dimensions; leave it out")
    if not ordered and not any(method.cuts for _, method, _ in rewrites):
        raise RecipeError(
            f"recipe {recipe.name!r} leaves every layer dense; add a step that quantises, or check `ignore`"
        )
    return Plan(ordered, tuple(rewrites), tuple(tuners), _stacked(model, blocks), recipe.min_expert_tokens)


def _name_of(model: nn.Module, wanted: nn.Module | None) -> list[str]:
    return [name for name, module in model.named_modules() if module is wanted]


def _tied(model: Any) -> dict[str, str]:
    """Layer -> the layer whose weight it shares."""
    pairs: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return {target.rpartition(".")[0]: source.rpartition(".")[0] for target, source in pairs.items()}


def _targets(step: Step, inside: list[str], others: list[str], ends: Mapping[str, list[str]]) -> list[str]:
    everything, chosen = [*inside, *others], dict[str, None]()
    for pattern in step.targets:
        named = {BLOCKS: inside, **ends}.get(pattern)
        found = [name for name in everything if matches(pattern, name)] if named is None else named
        if not found:
            raise RecipeError(
                f"step {step.name!r}: target {pattern!r} fits no linear layer or embedding, e.g. {everything[0]}"
            )
        chosen.update(dict.fromkeys(found))
    for pattern in (*step.ignore, *(o.match for o in step.overrides)):
        if not any(matches(pattern, name) for name in everything):
            raise RecipeError(f"step {step.name!r}: pattern {pattern!r} fits no linear layer, e.g. {everything[0]}")
    return [name for name in chosen if not any(matches(pattern, name) for pattern in step.ignore)]


def _tuned(
    step: Step, tuner: Tuner, names: list[str], inside: list[str], layers: Mapping[str, LayerPlan]
) -> frozenset[str]:
    """The layers inside the blocks that the step tunes."""
    chosen = [name for name in names if name in layers and name in inside]
    if not chosen:
        raise RecipeError(f"step {step.name!r}: nothing inside the blocks was decided before it; put it last")
    for name in chosen:
        try:
            tuner.check(layers[name].scheme)
            if layers[name].input is not None:
                raise RecipeError(f"{step.method} does not tune layers whose inputs are rounded; add it to `ignore`")
        except RecipeError as error:
            raise RecipeError(f"{name}: {error}") from error
    return frozenset(chosen)


def _layer_plan(step: Step, name: str, module: nn.Module, sharing: list[str]) -> LayerPlan | None:
    changes: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for override in step.overrides:
        if matches(override.match, name):
            if override.skip:
                return None
            changes.update(override.scheme)
            options.update(override.options)
    method, scheme = step.build(options), step.scheme_with(changes)
    assert isinstance(method, LayerMethod)
    if is_embedding(module) and (method.gathers or step.input):
        both = "".join(f" (and of {other}, which shares it)" for other in sharing)
        raise RecipeError(
            f"{name}{both}: an embedding has no inputs to calibrate on; use a step with method: rtn for it"
        )
    shape = tuple(module.get_parameter("weight").shape)
    rows, columns = reversed(shape) if is_transposed(module) else shape
    try:
        method.check((rows, columns), scheme)
    except RecipeError as error:
        raise RecipeError(f"{name}: {error}") from error
    return LayerPlan((rows, columns), method, scheme, step.input.build() if step.input else None, step.name)


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear by the name it is compressed under; those of stacked experts one by one."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if is_stacked(module):
            found.update(linears(PackedExperts(module), path))
        elif is_compressible(module):
            found[path] = module
    return found


def _stacked(model: Any, blocks: str) -> tuple[str, ...]:
    """A notice of three-dimensional weights whose layout is not known."""
    stacked = [
        parameter.numel()
        for path, module in model.named_modules()
        if path.startswith(blocks + ".") and not is_stacked(module)
        for parameter in module.parameters(recurse=False)
        if parameter.dim() == 3
    ]
    if not stacked:
        return ()
    return (f"{len(stacked)} stacked tensors ({sum(stacked) / 1e6:.1f} M parameters) stay dense",)
