"""MoDeGPT: one file per approximation, one for how much each block keeps, one for the method."""

from trifold.lowrank.modegpt.method import PUBLISHED, MoDeGPT

__all__ = ["PUBLISHED", "MoDeGPT"]
