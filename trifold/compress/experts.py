"""How many tokens the router sends to each expert, and what is done for those that see too few."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from trifold.kernels import PackedExperts


class ExpertTokens:
    """The experts of one block.

    floor: an expert that calibration sends fewer tokens is shown all tokens of its layer instead, so that its
    statistics are those of all experts together; its output is still used only where the router wants it.
    """

    def __init__(self, block: nn.Module, floor: int) -> None:
        self.floor = floor
        self.mixtures = {path: m for path, m in block.named_modules() if isinstance(m, PackedExperts)}
        self.tokens: dict[str, dict[int, int]] = {path: {} for path in self.mixtures}

    def _expert(self, name: str) -> tuple[str, int] | None:
        for path in self.mixtures:
            if name.startswith(path + "."):
                return path, int(name[len(path) + 1 :].split(".")[0])
        return None

    def starving(self, tokens: Mapping[str, int]) -> list[str]:
        """Those of these linears whose expert saw too little. From now on it is shown every token."""
        starving: set[tuple[str, int]] = set()
        places = {name: place for name in tokens if (place := self._expert(name)) is not None}
        for name, (path, expert) in places.items():
            count = self.tokens[path].setdefault(expert, tokens[name])
            if count < self.floor and expert not in self.mixtures[path].shown:
                self.mixtures[path].shown |= {expert}
                starving.add((path, expert))
        return [name for name, place in places.items() if place in starving]

    def event(self, name: str) -> dict[str, Any]:
        """For the report: the tokens that reached the linear's expert, and whether it was shown all."""
        place = self._expert(name)
        if place is None or place[1] not in self.tokens[place[0]]:
            return {}
        path, expert = place
        event: dict[str, Any] = {"tokens": self.tokens[path][expert]}
        return event | {"shown_all_tokens": True} if expert in self.mixtures[path].shown else event

    def notices(self, prefix: str) -> list[str]:
        """One line for each mixture with experts that saw too little. prefix: the block's name with a dot."""
        lines = []
        for path, mixture in self.mixtures.items():
            starved = ", ".join(f"{e} ({self.tokens[path][e]})" for e in sorted(mixture.shown))
            if starved:
                lines.append(
                    f"{prefix}{path}: fewer than {self.floor} tokens reached expert {starved}; solved with all tokens "
                    "of the layer"
                )
        return lines

    def release(self) -> None:
        """Show nobody anything any more."""
        for mixture in self.mixtures.values():
            mixture.shown = frozenset()


def tokens_of_experts(report: Mapping[str, Mapping[str, Any]]) -> dict[str, list[int]]:
    """Path of each mixture -> the tokens that calibration sent to its experts, in their order."""
    found: dict[str, dict[int, int]] = {}
    for name, entry in report.items():
        path, _, expert = name.rpartition(".")[0].rpartition(".")
        if "tokens" in entry and expert.isdigit():
            found.setdefault(path, {})[int(expert)] = entry["tokens"]
    return {path: [tokens[e] for e in sorted(tokens)] for path, tokens in found.items()}
