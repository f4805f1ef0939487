"""Preset names: `wN[aN][-grid][-method][-static][-eN]`, such as `w4a16-gptq` or `w4a16-nf4-gptq`.

N is the number of bits; 16 means left as it is. Without a grid: integers in groups of 128 with zero-points, and with
rounded activations one symmetric scale per row. `static`: the scale of activations is found in calibration, not for
each token at run time. `eN`: embeddings and head have N bits too.

With fewer weights: `[wN-]sNN[-method][-recovered[-published]]`, such as `s50-wanda`, `w4-s50-gqsa` or `w4-s24`; NN is
the percentage that goes, and 24 the pattern 2:4. Without `wN` what stays has 16 bits. `recovered`: then tuned by
gradient, the whole model towards the dense one; `published`: block by block, then scales of the whole, as GQSA does.

With lower rank: `rankNN[-method][-wN]`, such as `rank80`, `rank80-svdllm` or `rank80-w4`; NN is the percentage of bytes
that the layers keep, `wN` the bits of their factors. `wN-lrNN`, such as `w3-lr02`: N bits, and NN tenths of a bit more
for a low-rank residual.
With smaller dimensions: `rankNN-modegpt[-published]`; NN is the percentage of the blocks' weights that stays.
"""

from __future__ import annotations

import re
from typing import Any

from trifold.core.errors import RecipeError, unknown_name
from trifold.lowrank.modegpt import PUBLISHED

_FOLDS = r"-kv\d\d"  # percent kept
_NAME = re.compile(
    rf"w(?P<weight>\d+)(?:a(?P<input>\d+))?(?P<folds>(?:{_FOLDS})*)(?:-(?!static\b|e\d)(?P<method>[a-z][a-z0-9-]*?))?"
    r"(?P<static>-static)?(?:-e(?P<ends>\d+))?"
)

_SPARSE = re.compile(
    r"(?:w(?P<weight>\d+)(?:a16)?-)?s(?P<share>\d\d)(?:-(?P<method>magnitude|wanda|sparsegpt|alps|gqsa))?"
    r"(?P<tuned>-recovered(?P<published>-published)?)?"
)

_DIMENSIONS = re.compile(r"rank(?P<share>\d\d)-modegpt(?P<published>-published)?")

LOW_RANK: dict[str, dict[str, Any]] = {
    "": {"method": "reduced_rank", "shared": True},
    "svd": {"method": "svd"},
    "asvd": {"method": "asvd"},
    "svdllm": {"method": "svd_llm"},
}
"""Method part of a preset of lower rank -> method, and whether layers share a budget or keep as much each."""

_LOW_RANK = re.compile(rf"rank(?P<keep>\d\d)(?:-(?P<method>{'|'.join(filter(None, LOW_RANK))}))?(?:-w(?P<weight>\d))?")
_RESIDUAL = re.compile(r"w(?P<weight>\d)-lr(?P<tenths>\d\d)")

_SCALES = {"method": "awq", "options": {"clip": False}}  # the step that follows searches ranges itself

STEPS: dict[str, list[dict[str, Any]]] = {
    "rtn": [{"method": "rtn"}],
    "gptq": [{"method": "gptq"}],
    "gptaq": [{"method": "gptaq"}],
    "awq": [{"method": "awq"}, {"method": "rtn"}],
    "awq-gptq": [_SCALES, {"method": "gptq"}],
    "awq-gptaq": [_SCALES, {"method": "gptaq"}],
    "hqq": [{"method": "hqq", "scheme": {"group_size": 64, "zero_point": "real"}}],
}
"""Method part of a preset -> steps; the scheme goes to the last one."""

ROUNDED_STEPS: dict[str, list[dict[str, Any]]] = {
    "smoothquant": [{"method": "smoothquant"}, {"method": "rtn"}],
    "smoothquant-gptq": [{"method": "smoothquant"}, {"method": "gptq"}],
    "llmint8": [{"method": "llm_int8"}],
}
"""The same, of methods that are about rounded activations."""

GRIDS: dict[str, dict[str, Any]] = {
    "channel": {"group_size": "channel", "symmetric": True},
    "fp8": {"grid": "fp8_e4m3", "group_size": "channel"},
    "nf4": {"grid": "nf4", "group_size": 64},
    "fp4": {"grid": "fp4_e2m1", "group_size": 32},
}
"""Grid part of a preset -> scheme. Without a method it is rounded to nearest: NF4 as QLoRA does, by the largest
magnitude of each block."""

GQSA_GROUP = 16

_WEIGHT_ONLY: dict[str, Any] = {"group_size": 128}
_ROUNDED_INPUT: dict[str, Any] = {"group_size": "channel", "symmetric": True}


def preset(name: str) -> dict[str, Any]:
    """The recipe of a preset name, as plain data. Raises RecipeError naming the nearest known ones."""
    if sparse := _SPARSE.fullmatch(name):
        return {"name": name, "steps": _sparse_steps(name, sparse)}
    if cut := _DIMENSIONS.fullmatch(name):
        options = {"keep": int(cut["share"]) / 100, **(PUBLISHED if cut["published"] else {})}
        return {"name": name, "steps": [{"method": "modegpt", "options": options}]}
    if factors := _LOW_RANK.fullmatch(name):
        return {"name": name, "steps": [_low_rank_step(factors)]}
    if residual := _RESIDUAL.fullmatch(name):
        return {"name": name, "steps": [_residual_step(residual)]}
    match = _NAME.fullmatch(name)
    if match is None:
        raise RecipeError(unknown_name("recipe", name, preset_names()))
    if match["folds"]:
        missing = match["folds"].removeprefix("-")
        raise RecipeError(f"{name}: this version has no KV-cache folds ({missing}); leave it out")
    bits, inputs = int(match["weight"]), int(match["input"] or 16)
    grid, method = _parts(match["method"] or "", "rtn" if bits >= 8 else "gptq")
    if method not in STEPS | ROUNDED_STEPS:
        raise RecipeError(unknown_name("recipe", name, preset_names()))
    if inputs not in (8, 16):
        raise RecipeError(f"{name}: activations of {inputs} bits have no preset; a16 and a8 do")
    if inputs == 16 and (match["static"] or method in ROUNDED_STEPS):
        about = "static" if match["static"] else method
        raise RecipeError(f"{name}: {about} is about activations, which a16 leaves as they are; write w{bits}a8")
    if inputs == 8 and grid not in ("", "fp8"):
        raise RecipeError(f"{name}: rounded activations have no preset with {grid}; write w{bits}a16-{grid}")
    steps = [dict(step) for step in (STEPS | ROUNDED_STEPS)[method]]
    last = steps[-1]
    own = last.get("scheme", {}) if inputs == 16 else {}
    usual = {**(_WEIGHT_ONLY if inputs == 16 else _ROUNDED_INPUT), **own}
    last["scheme"] = {"bits": bits, **(GRIDS[grid] if grid else usual)}
    if grid == "nf4" and method == "rtn":
        last["options"] = {"ranges": "minmax"}
    if inputs == 8:
        last["input"] = {"bits": 8, "static": bool(match["static"]), **({"grid": "fp8_e4m3"} if grid else {})}
        last["options"] = {} if method == "hqq" else {"ranges": "minmax"}
    if match["ends"]:
        steps.append(_ends(int(match["ends"])))
    return {"name": name, "steps": steps}


def _low_rank_step(match: re.Match[str]) -> dict[str, Any]:
    chosen = LOW_RANK[match["method"] or ""]
    keep = "global_keep" if chosen.get("shared") else "keep"
    step: dict[str, Any] = {"method": chosen["method"], "options": {keep: int(match["keep"]) / 100}}
    return step | ({"scheme": {"bits": int(match["weight"]), **_WEIGHT_ONLY}} if match["weight"] else {})


def _residual_step(match: re.Match[str]) -> dict[str, Any]:
    bits = int(match["weight"])
    options = {"global_lr_bits": int(match["tenths"]) / 10, "factor_bits": 3 if bits < 3 else 4}
    return {"method": "residual", "options": options, "scheme": {"bits": bits, **_WEIGHT_ONLY}}


def _sparse_steps(name: str, match: re.Match[str]) -> list[dict[str, Any]]:
    share, method = match["share"], match["method"]
    if method is None:
        method = "gqsa" if match["weight"] and share != "24" else "alps"
    if method == "gqsa" and (not match["weight"] or share == "24"):
        why = "drops groups, not two of four" if share == "24" else "rounds what stays; write w4-" + name
        raise RecipeError(f"{name}: gqsa {why}; w4-s24 and s{share}-sparsegpt are presets, too")
    options: dict[str, Any] = {"pattern": "2:4"} if share == "24" else {"sparsity": int(share) / 100}
    step: dict[str, Any] = {"method": method, "options": options}
    if match["weight"]:
        step["scheme"] = {"bits": int(match["weight"]), "group_size": GQSA_GROUP if method == "gqsa" else 128}
    if method == "gqsa" and not match["published"]:
        step["scheme"]["symmetric"] = True  # zero-points of small groups cost more bits and time than they gain
    if not match["tuned"]:
        return [step]
    if not match["published"]:
        return [step, {"method": "distill"}]
    return [step, {"method": "bqpo"}, *([{"method": "e2e_oqp"}] if match["weight"] else [])]


def _ends(bits: int) -> dict[str, Any]:
    scheme = {"bits": bits, "group_size": "channel" if bits >= 8 else 64, "symmetric": bits >= 8}
    return {"name": "ends", "method": "rtn", "targets": ["embeddings", "head"], "scheme": scheme}


def _parts(text: str, usual: str) -> tuple[str, str]:
    """Grid, which may be empty, and method of what follows the bits."""
    first, _, rest = text.partition("-")
    return (first, rest or "rtn") if first in GRIDS else ("", text or usual)


def preset_names() -> list[str]:
    """The names that `trifold recipes` lists."""
    names = [f"w{bits}a16-{method}" for bits in (4, 3, 2) for method in STEPS]
    grids = ["w8a16-channel", "w8a16-fp8", *(f"w4a16-{grid}" for grid in ("channel", "nf4", "fp4"))]
    with_gptq = [f"{name}-gptq" for name in grids if name != "w8a16-channel"]
    rounded = ["", "-gptq", *(f"-{method}" for method in ROUNDED_STEPS), "-fp8", "-static", "-smoothquant-static"]
    ends = ["w4a16-gptq-e8", "w4a16-gptq-e4"]
    sparse = ["s50-wanda", "s50-sparsegpt", "s24-sparsegpt", "w4-s50-gqsa", "w4-s30-gqsa", "w4-s24"]
    sparse += [*(f"{name}-recovered" for name in sparse), "w4-s50-gqsa-recovered-published"]
    cut = ["rank80-modegpt", "rank60-modegpt", "rank80-modegpt-published"]
    low_rank = ["rank80", "rank60", "rank80-svdllm", "rank80-w4", "w4-lr02", "w3-lr02", "w2-lr04"]
    names += ["w8a16", "w8a16-gptq", *grids, *with_gptq, *(f"w8a8{name}" for name in rounded)]
    return [*names, *ends, *sparse, *low_rank, *cut]
