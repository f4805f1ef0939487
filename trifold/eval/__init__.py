"""Evaluation: perplexity, divergence from the dense model, decoding speed, memory, one report."""

from trifold.eval.divergence import Divergence, WindowScores, divergence, evaluate_windows
from trifold.eval.perplexity import PerplexityResult, perplexity
from trifold.eval.report import EvalReport, evaluate, paired_difference
from trifold.eval.speed import decode_speed, peak_memory_bytes

__all__ = [
    "Divergence",
    "EvalReport",
    "PerplexityResult",
    "WindowScores",
    "decode_speed",
    "divergence",
    "evaluate",
    "evaluate_windows",
    "paired_difference",
    "peak_memory_bytes",
    "perplexity",
]
