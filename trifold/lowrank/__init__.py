"""Lower rank: one file per method."""

from trifold.lowrank.modegpt import MoDeGPT

__all__ = ["MoDeGPT"]
