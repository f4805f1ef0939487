"""Preset names: `wN[aN][-method][-static]`, such as `w4a16-gptq`. N is the number of bits; 16 means left as it is.

`static`: the scale of activations is found in calibration, not for each token at run time.
"""

from __future__ import annotations

import re
from typing import Any

from trifold.core.errors import RecipeError, unknown_name

_FOLDS = r"-(?:s24|s\d\d|rank\d\d|lr\d+|kv\d\d)"  # percent removed for s, kept for rank and kv
_NAME = re.compile(
    rf"(?:w(?P<weight>\d+)(?:a(?P<input>\d+))?)(?P<folds>(?:{_FOLDS})*)(?:-(?P<method>[a-z][a-z0-9-]*))?"
)

_SCALES = {"method": "awq", "options": {"clip": False}}  # the step that follows searches ranges itself

STEPS: dict[str, list[dict[str, Any]]] = {
    "rtn": [{"method": "rtn"}],
    "gptq": [{"method": "gptq"}],
    "gptaq": [{"method": "gptaq"}],
    "awq": [{"method": "awq"}, {"method": "rtn"}],
    "awq-gptq": [_SCALES, {"method": "gptq"}],
    "awq-gptaq": [_SCALES, {"method": "gptaq"}],
}
"""Method part of a preset -> steps; the scheme goes to the last one."""

_FP8 = {"grid": "fp8_e4m3"}
ROUNDED_STEPS: dict[str, list[dict[str, Any]]] = {
    "smoothquant": [{"method": "smoothquant"}, {"method": "rtn"}],
    "smoothquant-gptq": [{"method": "smoothquant"}, {"method": "gptq"}],
    "llmint8": [{"method": "llm_int8"}],
    "fp8": [{"method": "rtn", "scheme": _FP8, "input": _FP8}],
}
"""The same, of methods that are about rounded activations."""

_WEIGHT_ONLY: dict[str, Any] = {"scheme": {"group_size": 128}}
_WITH_INPUT: dict[str, Any] = {"scheme": {"group_size": "channel", "symmetric": True}, "options": {"ranges": "minmax"}}


def preset(name: str) -> dict[str, Any]:
    """The recipe of a preset name, as plain data. Raises RecipeError naming the nearest known ones."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise RecipeError(unknown_name("recipe", name, preset_names()))
    if match["folds"]:
        missing = match["folds"].removeprefix("-")
        raise RecipeError(f"{name}: this version has no sparsity, low rank or KV-cache folds ({missing}); leave it out")
    bits, inputs = int(match["weight"]), int(match["input"] or 16)
    words = (match["method"] or "").split("-")
    static = words[-1] == "static"
    method = "-".join(words[:-1] if static else words) or ("rtn" if bits >= 8 else "gptq")
    if method not in STEPS and method not in ROUNDED_STEPS:
        raise RecipeError(unknown_name("recipe", name, preset_names()))
    if inputs != 16 and inputs != 8:
        raise RecipeError(f"{name}: activations of {inputs} bits have no preset; a16 and a8 do")
    if inputs == 16 and (static or method not in STEPS):
        raise RecipeError(f"{name}: {words[-1]} is about activations, which a16 leaves as they are; write w{bits}a8")
    steps = [dict(step) for step in (STEPS | ROUNDED_STEPS)[method]]
    last, base = steps[-1], _WEIGHT_ONLY if inputs == 16 else _WITH_INPUT
    last["scheme"] = {"bits": bits, **base["scheme"], **last.get("scheme", {})}
    if inputs != 16:
        last["input"] = {"bits": inputs, "static": static, **last.get("input", {})}
        last["options"] = base["options"]
    return {"name": name, "steps": steps}


def preset_names() -> list[str]:
    """The names that `trifold recipes` lists."""
    names = [f"w{bits}a16-{method}" for bits in (4, 3, 2) for method in STEPS]
    static = ["w8a8-static", "w8a8-smoothquant-static"]
    return [*names, "w8a16", "w8a16-gptq", "w8a8", "w8a8-gptq", *(f"w8a8-{m}" for m in ROUNDED_STEPS), *static]
