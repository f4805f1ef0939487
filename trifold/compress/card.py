"""The model card: README.md of a checkpoint, with what was done to it and how it is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from trifold.core.errors import InputError
from trifold.core.version import VERSION

NAME = "README.md"
_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")  # of the card of the dense model
_LOAD = {
    "trifold": """import trifold

model = trifold.load("{name}")
tokenizer = trifold.load_tokenizer("{name}")""",
    "transformers": """# pip install {packages}
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("{name}")""",
    "transformers, zero-points": """# pip install {packages}
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

config = AutoConfig.from_pretrained("{name}")
config.quantization_config["dequantize"] = True  # packed zero-points load only so
model = AutoModelForCausalLM.from_pretrained("{name}", config=config, device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("{name}")""",
    "gptqmodel": """from gptqmodel import GPTQModel

model = GPTQModel.load("{name}")""",
    "vllm": "vllm serve {name}",
    "sglang": "python -m sglang.launch_server --model-path {name}",
    "llama.cpp": "llama-cli -m model.gguf",
}
_HERE = "PATH/OF/THIS/FOLDER"
_SHELL = ("vllm", "sglang", "llama.cpp")
_PACKAGES = {"gptq": "transformers optimum gptqmodel", "awq": "transformers gptqmodel", "dense": "transformers"}


@dataclass(frozen=True)
class Card:
    """name: under which the hub has the checkpoint, None if it does not. base: the dense model. layout: `trifold`, or
    the format of an export. engines: that load it. facts: rows of the first table. recipe: as YAML has it, None if it
    is not known. front: what the dense model's own card says at its head. evaluation: what `trifold eval --json`
    wrote."""

    name: str | None
    base: str
    layout: str
    engines: tuple[str, ...]
    facts: Mapping[str, str]
    recipe: Mapping[str, Any] | None = None
    front: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] | None = None
    zero_points: bool = False

    def text(self) -> str:
        """Markdown; the same for the same checkpoint."""
        head = {key: self.front[key] for key in _KEPT if key in self.front}
        base = self.base.partition("@")[0]
        if re.fullmatch(r"[\w.-]+/[\w.-]+", base):  # a name of the hub
            head |= {"base_model": base, "base_model_relation": "quantized"}
        head |= {"library_name": "transformers", "tags": list(dict.fromkeys(("trifold", "compressed", self.layout)))}
        parts = [
            f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n",
            f"# {self.name or self.base}\n\n{self.base}, compressed with Trifold {VERSION}, stored as {self.layout}.\n",
            _table(("", ""), self.facts.items()),
        ]
        if self.evaluation is not None:
            parts.append(f"## Evaluation\n\n{_evaluation(self.evaluation)}")
        if self.recipe is not None:
            recipe = yaml.safe_dump(dict(self.recipe), sort_keys=False, default_flow_style=None)
            parts.append(f"## Recipe\n\n```yaml\n{recipe}```\n")
        parts.append("## How to load it\n\n" + "\n".join(map(self._loading, ("trifold", *self.engines))))
        return "\n".join(parts)

    def _loading(self, engine: str) -> str:
        if engine == "trifold" and self.layout == "gguf":
            return ""
        packages = _PACKAGES.get(self.layout.removesuffix("_v2"), "transformers compressed-tensors")
        template = _LOAD["transformers, zero-points" if self._packed_zero_points(engine) else engine]
        code = template.format(name=self.name or _HERE, packages=packages)
        return f"{engine}:\n\n```{'bash' if engine in _SHELL else 'python'}\n{code}\n```\n"

    def _packed_zero_points(self, engine: str) -> bool:
        return engine == "transformers" and self.zero_points and self.layout in ("compressed-tensors", "pack-quantized")


def front_of(folder: Path) -> dict[str, Any]:
    """What the head of a folder's model card says; nothing if there is none that can be read."""
    try:
        found = re.match(r"---\n(.*?)\n---\n", (folder / NAME).read_text(encoding="utf-8"), re.DOTALL)
        head = yaml.safe_load(found[1]) if found else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return head if isinstance(head, dict) else {}


def read_evaluation(path: Path) -> dict[str, Any]:
    """What `trifold eval --json` wrote. Raises InputError if the file is something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"--evaluation {path}: cannot be read ({error}); give what `trifold eval --json` wrote"
        ) from error
    if not isinstance(found, dict) or not {"perplexity", "results"} & found.keys():
        raise InputError(f"--evaluation {path}: no evaluation; give what `trifold eval --json` wrote")
    return found


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _evaluation(found: Mapping[str, Any]) -> str:
    own = found.get("trifold", {})
    text, tables = found if "perplexity" in found else own.get("text"), []
    if text:
        baseline = text.get("baseline") or {}
        rows = [("perplexity", _number(text["perplexity"]), _number(baseline.get("perplexity")))]
        if text.get("kl") is not None:
            rows.append(("KL to the dense model, nats per token", f"{text['kl']:.5f}", ""))
            rows.append(("top-1 agreement", f"{text['top1_agreement']:.2%}", ""))
        where = f"{text['source']}, {text['tokens']} tokens in windows of {text['seqlen']}"
        tables.append(f"{where}:\n\n{_table(('', 'this model', 'dense'), rows)}")
    if found.get("results"):
        dense = own.get("baseline", {}).get("lm_eval", {}).get("results", {})
        scores = list[tuple[str, ...]]()
        for task, metrics in found["results"].items():
            for key, value in metrics.items():
                metric, _, chosen = key.partition(",")
                if not chosen or metric.endswith("_stderr") or not isinstance(value, int | float):
                    continue
                error = f"{metric}_stderr,{chosen}"
                other = dense.get(task, {})
                cells = (_with_error(value, metrics.get(error)), _with_error(other.get(key), other.get(error)))
                scores.append((task, metric, *cells))
        tables.append(_table(("task", "metric", "this model", "dense"), scores))
    return "\n".join(tables)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _with_error(value: float | None, error: Any) -> str:
    return _number(value) + (f" ± {error:.4f}" if isinstance(error, int | float) else "")
