"""The three kinds of method, and what they are handed.

A method is one paper's idea: a frozen dataclass of its settings, pure, found by name in `METHODS`.

- A *layer* method solves the linears that share one input: RTN, GPTQ, SparseGPT, SVD.
- A *block* method rewrites a whole decoder block before it is solved, keeping its function: AWQ, SmoothQuant.
- A *tuner* optimises what was decided by gradient: block-wise or end-to-end recovery.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from trifold.core.allocation import Option
from trifold.core.canonical import Canonical, Dense, Quantized
from trifold.core.inputs import InputScheme
from trifold.core.registry import Registry
from trifold.core.scheme import SCALE_DTYPES, Scheme
from trifold.core.statistics import AbsMax, AbsMean, Drift, Gram, Mean, Sample, Statistic
from trifold.core.topology import Topology

Bounds = tuple[torch.Tensor, torch.Tensor | None]
"""Scale and zero-point, as `fit_ranges` returns them."""


class Statistics:
    """The accumulators of one layer input, by type."""

    def __init__(self, kinds: Sequence[type[Statistic]], in_features: int, device: torch.device | str = "cpu"):
        self.in_features = in_features
        self._by_kind = {kind: kind(in_features, device) for kind in kinds}

    def __iter__(self):
        return iter(self._by_kind.values())

    @property
    def tokens(self) -> int:
        return max((s.tokens for s in self), default=0)

    @property
    def gram(self) -> torch.Tensor:
        """(in, in) float64."""
        return self._by_kind[Gram].matrix  # type: ignore[attr-defined]

    def __contains__(self, kind: type[Statistic]) -> bool:
        return kind in self._by_kind

    @property
    def absmean(self) -> torch.Tensor:
        """(in,) float32."""
        return self._by_kind[AbsMean].value  # type: ignore[attr-defined]

    @property
    def total(self) -> torch.Tensor:
        """(in,) float64, the sum over tokens."""
        return self._by_kind[Mean].total  # type: ignore[attr-defined]

    @property
    def mean(self) -> torch.Tensor | None:
        """(in,) float32, if it was gathered."""
        return self._by_kind[Mean].value if Mean in self._by_kind else None  # type: ignore[attr-defined]

    @property
    def absmax(self) -> torch.Tensor | None:
        """(in,) float32, if it was gathered."""
        return self._by_kind[AbsMax].value if AbsMax in self._by_kind else None  # type: ignore[attr-defined]

    @property
    def sample(self) -> torch.Tensor | None:
        """(tokens, in) float32, if it was gathered."""
        return self._by_kind[Sample].rows if Sample in self._by_kind else None  # type: ignore[attr-defined]

    @property
    def drift(self) -> torch.Tensor | None:
        """(in, in) float64, if it was gathered."""
        return self._by_kind[Drift].matrix if Drift in self._by_kind else None  # type: ignore[attr-defined]


@dataclass(frozen=True)
class LayerProblem:
    """Linears that share one input.

    weights: name -> (out, in) float32. schemes: name -> Scheme, for methods that quantise. gram: (in, in)
    float64 of their common input, None without calibration. drift: sum of (x_dense - x) xᵀ, if the method
    needs it. bounds: ranges that an earlier step found. sample: (tokens, in) float32, some inputs as they are,
    if the method needs them. absmean, mean: (in,) float32, mean of |x| and of x, likewise. tokens: how many the Gram
    matrix is a sum over.
    """

    weights: Mapping[str, torch.Tensor]
    schemes: Mapping[str, Scheme]
    gram: torch.Tensor | None = None
    drift: torch.Tensor | None = None
    bounds: Mapping[str, Bounds] = field(default_factory=dict)
    sample: torch.Tensor | None = None
    absmean: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    tokens: int = 0


@dataclass(frozen=True)
class LayerSolution:
    """canonical: name -> what was decided. events: name -> what a reader of the report should know. shifts: name ->
    (out,) float32, to be added to the bias; a layer that has none gets one."""

    canonical: Mapping[str, Canonical]
    events: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    shifts: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class BlockContext:
    """A decoder block before it is solved.

    weights: linear name inside the block -> (out, in) float32, of the layers the recipe compresses.
    parameters: name -> every other parameter of the block (norms, biases, linears left dense).
    inputs: linear name -> name of the first linear that sees the same input. statistics: by that name.
    schemes: linear name -> scheme of the step that will quantise it. roundings: linear name -> how that step
    rounds its input, if it does. replay(module, weights): the outputs of
    a submodule on a sample of its own inputs, with some of its linears' weights replaced.
    """

    topology: Topology
    weights: Mapping[str, torch.Tensor]
    parameters: Mapping[str, torch.Tensor]
    inputs: Mapping[str, str]
    statistics: Mapping[str, Statistics]
    schemes: Mapping[str, Scheme]
    replay: Callable[[str, Mapping[str, torch.Tensor]], torch.Tensor]
    roundings: Mapping[str, InputScheme] = field(default_factory=dict)


@dataclass(frozen=True)
class Heads:
    """What is left of an attention's heads. qk_dim, v_dim: features of a query and key head, of a value head.
    frequencies: (kv heads, qk_dim / 2) int64, which of the model's own turns each pair; None if none is gone."""

    qk_dim: int
    v_dim: int
    frequencies: torch.Tensor | None = None


@dataclass(frozen=True)
class Rewrite:
    """What a block method changes. weights, parameters: new values by name, of other shapes if it cuts dimensions.
    divided: linear name -> (in,), by which its input is now smaller. bounds: ranges for the step that quantises.
    heads: what is left of the attention that the topology names. again: whether the method wants to see the block
    once more, as it is now. events: for the report."""

    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    parameters: Mapping[str, torch.Tensor] = field(default_factory=dict)
    divided: Mapping[str, torch.Tensor] = field(default_factory=dict)
    bounds: Mapping[str, Bounds] = field(default_factory=dict)
    events: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    heads: Heads | None = None
    again: bool = False


class Method:
    """Base of the three kinds. needs: the statistics that calibration must gather; () means data-free."""

    needs: ClassVar[tuple[type[Statistic], ...]] = ()
    instead: ClassVar[Mapping[str, str]] = {}
    """Setting -> another one, which it takes the place of when it is given later."""

    @property
    def gathers(self) -> tuple[type[Statistic], ...]:
        """What these settings need of them; by default all."""
        return self.needs


@dataclass(frozen=True)
class Budget:
    """share: what the layers of a step give up of their weights together. by: how it is divided among them. cost:
    instead of a share, what they may take together, in the unit of their curves. sensitive: whether what a layer loses
    counts by how much of it reaches the hidden states behind its block."""

    share: float
    by: Literal["curves", "owl", "uniform"]
    cost: float | None = None
    sensitive: bool = False


class LayerMethod(Method, ABC):
    """Decides the weights of linears that share one input. takes_scheme: whether it rounds them, too."""

    takes_scheme: ClassVar[Literal["always", "if given", "never"]] = "always"

    def check(self, shape: tuple[int, int], scheme: Scheme | None) -> None:
        """Raises RecipeError, which need not name the layer, if an (out, in) weight cannot be solved so."""

    @property
    def budget(self) -> Budget | None:
        """What the layers of a step share, if they do; the pipeline then asks for `at` of each."""
        return None

    def at(self, share: float, draft: bool = False) -> LayerMethod:
        """The method for one layer that gives up this share of its weights. draft: a cheap one, to compare shares."""
        raise NotImplementedError(f"{type(self).__name__} has no budget")

    def full_cost(self, shape: tuple[int, int], scheme: Scheme | None) -> float:
        """What a layer that gives up nothing takes of a budget; its weights, where nothing else is said."""
        return shape[0] * shape[1]

    def curve(self, weight: torch.Tensor, scheme: Scheme | None, gram: torch.Tensor) -> list[Option] | None:
        """What a layer would lose at each share, where that is known without trying. weight: (out, in) float32."""
        return None

    def by_rows(self, scheme: Scheme | None) -> bool:
        """Whether it makes `Quantized` rows, each without a look at the others, so that processes can share them."""
        return False

    @abstractmethod
    def solve(self, problem: LayerProblem) -> LayerSolution:
        """Pure: same problem, same solution."""

    def workspace(self, shapes: Sequence[tuple[int, int]]) -> int:
        """About how many bytes `solve` needs for weights (out, in) that share an input, beside these and their
        statistics; by default as if it held some copies of the largest in float32, and factorised the Gram."""
        factors = 12 * shapes[0][1] ** 2 if Gram in self.gathers else 0
        return factors + 6 * 4 * max(out * width for out, width in shapes)

    def sketch(self, shape: tuple[int, int], scheme: Scheme | None) -> Canonical:
        """A solution for a weight (out, in) on the meta device, which tells its size before there is one.

        Raises NotImplementedError if the size is not known by then.
        """
        if scheme is None:
            return Dense(torch.empty(shape, dtype=torch.bfloat16, device="meta"))
        codes = torch.empty(shape, dtype=torch.uint8, device="meta")
        dtype = SCALE_DTYPES[scheme.scale_dtype]
        scale = torch.empty(scheme.scale_shape(*shape), dtype=dtype, device="meta")
        zero = None if scheme.symmetric else scale.to(dtype if scheme.zero_point == "real" else torch.uint8)
        return Quantized(codes, scale, zero, scheme)


class BlockMethod(Method, ABC):
    """Rewrites a block: without changing its function, or with smaller dimensions if it `cuts`. `carry` passes from
    one block to the next."""

    cuts: ClassVar[bool] = False

    @property
    def kept(self) -> float:
        """Share of the weights that is left of the linears it is given."""
        return 1.0

    def workspace(self, shape: tuple[int, int]) -> int:
        """About how many bytes a cut needs, beside what a block's context holds, for the linear (out, in) with the most
        inputs; asked of a method that cuts."""
        return 0

    def survey(self, context: BlockContext, influence: float) -> Any:
        """What the division of a budget wants to know of a dense block, as JSON; asked of a method that cuts.

        influence: 1 - mean cosine of what enters and leaves the block.
        """
        raise NotImplementedError(f"{type(self).__name__} cuts nothing")

    def begin(self, surveys: Sequence[Any]) -> Any:
        """The carry that enters the first block, from the surveys of all. Raises RecipeError if they leave no way."""
        raise NotImplementedError(f"{type(self).__name__} cuts nothing")

    @abstractmethod
    def rewrite(self, context: BlockContext, carry: Any) -> tuple[Rewrite, Any]:
        """Pure: same context and carry, same rewrite."""


@dataclass(frozen=True)
class TuningProblem:
    """What was decided, and a loss that may be differentiated.

    canonical: linear name -> what was decided. loss(batch, weights): the scalar loss of one batch with these
    weights, name -> a function that gives (out, in) float32; it may be called again in the backward pass. learn,
    judge: numbers of the batches to learn from and to choose by. judged(batch, weights): what has to fall on the
    latter, every number of it, the loss first; by default the loss alone. seed: of the order of batches. note: shown
    as progress. keep, kept: state for a run that is broken off; None where it is not worth keeping.
    """

    canonical: Mapping[str, Canonical]
    loss: Callable[[int, Mapping[str, Callable[[], torch.Tensor]]], torch.Tensor]
    learn: Sequence[int]
    judge: Sequence[int]
    judged: Callable[[int, Mapping[str, Callable[[], torch.Tensor]]], Sequence[float]] | None = None
    seed: int = 0
    note: Callable[[str], None] = lambda message: None
    keep: Callable[[Mapping[str, torch.Tensor]], None] = lambda state: None
    kept: Callable[[], Mapping[str, torch.Tensor] | None] = lambda: None


@dataclass(frozen=True)
class TuningSolution:
    """canonical: of the same structure as before. event: for the report."""

    canonical: Mapping[str, Canonical]
    event: Mapping[str, Any]


class Tuner(Method, ABC):
    """Optimises scales, zero-points or surviving weights by gradient. level: of a block at a time, against the dense
    one's outputs, or of the whole model, on the text itself."""

    level: ClassVar[Literal["block", "model"]]

    @property
    def follows_dense(self) -> bool:
        """Whether it compares with the dense model, whose hidden states are then kept, too."""
        return True

    @property
    def more_text(self) -> int:
        """So many times the windows of calibration it wants in addition, which nothing before it has seen."""
        return 0

    def check(self, scheme: Scheme | None) -> None:
        """Raises RecipeError, which need not name the layer, if a layer of this scheme has nothing to tune."""

    @abstractmethod
    def tune(self, problem: TuningProblem) -> TuningSolution:
        """Never worse on the batches to judge by than what was decided."""


METHODS: Registry[type[Method]] = Registry("method")
