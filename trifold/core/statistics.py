"""Statistics: what calibration accumulates about the inputs of a layer.

Each is a streaming accumulator: `update` takes one batch, `merge` adds another accumulator of the same kind
(another process, another expert). Products are float32, sums float64, so that the order of merging does not
matter beyond the last bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch


@dataclass(frozen=True)
class Observation:
    """One batch at a layer. x: (tokens, in). x_dense: the same tokens in the dense model, (tokens, in).

    y: the layer's output, (tokens, out). grad: the loss gradient at the output, (tokens, out). Only what a
    statistic `needs` is filled in.
    """

    x: torch.Tensor
    x_dense: torch.Tensor | None = None
    y: torch.Tensor | None = None
    grad: torch.Tensor | None = None


class Statistic(ABC):
    """A streaming accumulator over observations of one layer input."""

    needs: ClassVar[frozenset[str]] = frozenset({"x"})

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.in_features = in_features
        self.device = torch.device(device)
        self.tokens = 0

    @classmethod
    def nbytes(cls, in_features: int) -> int:
        """About what it holds of an input of this width; by default a few numbers for each feature."""
        return 8 * in_features

    @abstractmethod
    def update(self, observation: Observation) -> None:
        """Add a batch."""

    @abstractmethod
    def _absorb(self, other: Self) -> None:
        """Add the sums of `other`."""

    def merge(self, other: Self) -> None:
        """Add what another accumulator of the same kind has seen."""
        if type(other) is not type(self) or other.in_features != self.in_features:
            raise TypeError(f"cannot merge {type(other).__name__}({other.in_features}) into {self!r}")
        self._absorb(other)
        self.tokens += other.tokens

    shared: ClassVar[Mapping[str, Literal["sum", "max", "rows"]]] = {"total": "sum"}
    """Attributes that processes put together, and how."""

    def merged(self, how: Literal["sum", "max", "rows"]) -> list[tuple[str, torch.Tensor]]:
        """Those that are put together so, with their values."""
        return [(name, getattr(self, name)) for name, way in self.shared.items() if way == how]

    def settle(self) -> None:
        """Called when they have been put together."""
        return

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.in_features})"


_MIRRORED = 512  # rows of a Gram matrix that are mirrored at once


class Gram(Statistic):
    """H = sum over tokens of x xᵀ, (in, in) float64. The Hessian of the layer's squared output error is 2H.

    Only the upper triangle is summed up; `matrix` fills in the lower one.
    """

    shared: ClassVar[Mapping[str, Literal["sum", "max", "rows"]]] = {"_sums": "sum"}

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        super().__init__(in_features, device)
        self._sums = torch.zeros(in_features, in_features, dtype=torch.float64, device=self.device)

    @classmethod
    def nbytes(cls, in_features: int) -> int:
        return 8 * in_features**2

    def update(self, observation: Observation) -> None:
        x = observation.x.float()
        # Blocks of the upper triangle alone: the lower one is its mirror, so nearly half of the products go.
        block = max(128, -(-self.in_features // 8))
        for start in range(0, self.in_features, block):
            stop = min(start + block, self.in_features)
            self._sums[start:stop, start:] += x[:, start:stop].T @ x[:, start:]
        self.tokens += x.shape[0]

    def _absorb(self, other: Gram) -> None:
        self._sums += other._sums

    @property
    def matrix(self) -> torch.Tensor:
        """(in, in) float64, exactly symmetric."""
        for start in range(0, self.in_features, _MIRRORED):
            part = slice(start, start + _MIRRORED)
            corner = self._sums[part, part]
            corner.copy_(corner.triu() + corner.triu(1).T)
            self._sums[start + _MIRRORED :, part] = self._sums[part, start + _MIRRORED :].T
        return self._sums


class Drift(Statistic):
    """D = sum over tokens of (x_dense - x) xᵀ, (in, in) float64: how the compressed model's inputs have moved."""

    needs: ClassVar[frozenset[str]] = frozenset({"x", "x_dense"})

    shared: ClassVar[Mapping[str, Literal["sum", "max", "rows"]]] = {"matrix": "sum"}

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        super().__init__(in_features, device)
        self.matrix = torch.zeros(in_features, in_features, dtype=torch.float64, device=self.device)

    @classmethod
    def nbytes(cls, in_features: int) -> int:
        return 8 * in_features**2

    def update(self, observation: Observation) -> None:
        if observation.x_dense is None:
            raise ValueError("Drift needs x_dense")
        x = observation.x.float()
        self.matrix += (observation.x_dense.float() - x).T @ x
        self.tokens += x.shape[0]

    def _absorb(self, other: Drift) -> None:
        self.matrix += other.matrix


class AbsMean(Statistic):
    """Mean of |x| of each input feature (AWQ's importance)."""

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        super().__init__(in_features, device)
        self.total = torch.zeros(in_features, dtype=torch.float64, device=self.device)

    def update(self, observation: Observation) -> None:
        self.total += observation.x.float().abs().sum(0, dtype=torch.float64)
        self.tokens += observation.x.shape[0]

    def _absorb(self, other: AbsMean) -> None:
        self.total += other.total

    @property
    def value(self) -> torch.Tensor:
        """(in,) float32; zeros before the first token."""
        return (self.total / max(self.tokens, 1)).float()


class Mean(Statistic):
    """Mean of x of each input feature."""

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        super().__init__(in_features, device)
        self.total = torch.zeros(in_features, dtype=torch.float64, device=self.device)

    def update(self, observation: Observation) -> None:
        self.total += observation.x.float().sum(0, dtype=torch.float64)
        self.tokens += observation.x.shape[0]

    def _absorb(self, other: Mean) -> None:
        self.total += other.total

    @property
    def value(self) -> torch.Tensor:
        """(in,) float32; zeros before the first token."""
        return (self.total / max(self.tokens, 1)).float()


class AbsMax(Statistic):
    """Largest |x| of each input feature (SmoothQuant's range)."""

    shared: ClassVar[Mapping[str, Literal["sum", "max", "rows"]]] = {"value": "max"}

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        super().__init__(in_features, device)
        self.value = torch.zeros(in_features, dtype=torch.float32, device=self.device)

    def update(self, observation: Observation) -> None:
        if observation.x.shape[0]:
            self.value = torch.maximum(self.value, observation.x.float().abs().amax(0))
            self.tokens += observation.x.shape[0]

    def _absorb(self, other: AbsMax) -> None:
        self.value = torch.maximum(self.value, other.value)


class Sample(Statistic):
    """Some tokens as they are, spread evenly over all: every 2**k-th, with the least k that leaves at most LIMIT."""

    LIMIT: ClassVar[int] = 512

    shared: ClassVar[Mapping[str, Literal["sum", "max", "rows"]]] = {"rows": "rows"}

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        super().__init__(in_features, device)
        self.rows = torch.empty(0, in_features, dtype=torch.float32, device=self.device)
        self._stride = 1

    @classmethod
    def nbytes(cls, in_features: int) -> int:
        return 4 * cls.LIMIT * in_features

    def update(self, observation: Observation) -> None:
        x, first = observation.x, -self.tokens % self._stride
        self.rows = torch.cat([self.rows, x[first :: self._stride].float()])
        self.tokens += x.shape[0]
        self._thin()

    def settle(self) -> None:
        self._thin()

    def _thin(self) -> None:
        while len(self.rows) > self.LIMIT:
            self.rows, self._stride = self.rows[::2].clone(), 2 * self._stride

    def _absorb(self, other: Sample) -> None:
        self.rows = torch.cat([self.rows, other.rows])
        self._stride = max(self._stride, other._stride)
        self._thin()
