"""Trifold folds a language model three ways: fewer bits, fewer weights, lower rank.

    import trifold

    model = trifold.compress("path/to/model", recipe="w4a16-gptq", calibration="text.jsonl")

Importing it registers the checkpoint format with transformers, so that
`AutoModelForCausalLM.from_pretrained` reads what Trifold wrote.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import trifold.compress.integration.quantizer  # noqa: F401 - registers the format
from trifold.api import compress, evaluate, evaluate_tasks, export, load  # the function `compress` hides the subpackage
from trifold.core.version import VERSION

if TYPE_CHECKING:
    from trifold.compress.recipe import Recipe

__version__ = VERSION
__all__ = ["Recipe", "__version__", "compress", "evaluate", "evaluate_tasks", "export", "load"]


def __getattr__(name: str) -> Any:
    if name == "Recipe":  # needs pydantic, which running a checkpoint does not
        from trifold.compress.recipe import Recipe

        return Recipe
    raise AttributeError(f"module 'trifold' has no attribute {name!r}")
