"""Evaluation: perplexity, divergence from the dense model, lm-eval's tasks, decoding speed, memory, reports."""

from trifold.eval.bench import Speed, bench, plot_speeds
from trifold.eval.divergence import Divergence, WindowScores, divergence, evaluate_windows
from trifold.eval.harness import TaskReport, Tasks, evaluate_tasks, resolve_tasks
from trifold.eval.paired import jackknife_difference, paired_difference
from trifold.eval.perplexity import PerplexityResult, perplexity
from trifold.eval.report import EvalReport, evaluate
from trifold.eval.speed import decode_speed, peak_memory_bytes

__all__ = [
    "Divergence",
    "EvalReport",
    "PerplexityResult",
    "Speed",
    "TaskReport",
    "Tasks",
    "WindowScores",
    "bench",
    "decode_speed",
    "divergence",
    "evaluate",
    "evaluate_tasks",
    "evaluate_windows",
    "jackknife_difference",
    "paired_difference",
    "peak_memory_bytes",
    "perplexity",
    "plot_speeds",
    "resolve_tasks",
]
