"""Peak memory of a compression as the operating system counts it, beside what `trifold plan` said before.

A random model of TinyLlama's shape (2.2 GB in bfloat16) is written once; each recipe runs in a process of its own.

python benchmarks/memory.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
from common import ROOT, machine, markdown, save
from random_model import write

from trifold.compress.recipe import Recipe

LIMITS = {"w4a16-rtn": 1.0e9, "w4a16-gptq": 1.5e9}  # what each may take
_RUN = """
import json, resource, sys
import trifold, transformers, datasets
from pathlib import Path
pages = int(Path("/proc/self/statm").read_text().split()[1])
imports = pages * resource.getpagesize()
from trifold.compress.memory import leave_the_heap
leave_the_heap()  # as the command line does
model, recipe, calib, output, settings = json.loads(sys.argv[1])
report = trifold.compress(model, recipe, calib, output, verbosity=-1, **settings)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"imports": imports, "peak": peak - imports, "bytes": report["total_bytes"]}))
"""


def measure(model: Path, recipe: str, calib: Path, work: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Plan and run one recipe."""
    options = [word for name, value in settings.items() for word in _option(name, value)]
    plan = subprocess.run(
        [sys.executable, "-m", "trifold", "plan", model, "-r", recipe, "--json", "-", *options],
        capture_output=True,
        check=True,
    )
    promised = json.loads(plan.stdout)
    output, text = work / "out", None if Recipe.load(recipe).data_free else str(calib)
    for left in (output, output.with_name("out.partial")):
        shutil.rmtree(left, ignore_errors=True)
    arguments = json.dumps([str(model), recipe, text, str(output), settings])
    done = subprocess.run([sys.executable, "-c", _RUN, arguments], stdout=subprocess.PIPE, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    stage, peak = max(promised["memory"].items(), key=lambda item: item[1])
    written = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    shutil.rmtree(output)
    return found | {
        "recipe": recipe,
        "settings": settings,
        "planned": peak,
        "stage": stage,
        "off": peak / found["peak"] - 1,
        "planned_bytes": promised["total_bytes"],
        "written": written,
        "limit": LIMITS.get(recipe),
    }


def _option(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    return [flag] if value is True else [flag, str(value)]


@click.command()
@click.option("--layers", default=22, show_default=True, help="Blocks of the model.")
@click.option("--recipe", "recipes", multiple=True, default=tuple(LIMITS), show_default=True)
@click.option("--nsamples", default=8, show_default=True)
@click.option("--seqlen", default=512, show_default=True)
@click.option("--offload", is_flag=True, help="With hidden states in a file, and statistics in waves.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("/tmp/trifold-memory"), show_default=True)
@click.option("--record", is_flag=True, help="Write benchmarks/results/memory.{json,md}.")
def main(
    layers: int, recipes: tuple[str, ...], nsamples: int, seqlen: int, offload: bool, work: Path, record: bool
) -> None:
    """Measure every recipe; exit with 1 if one takes more than it may, or a plan was off by more than 15 %."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    model = work / f"llama-{layers}"
    if not (model / "model.safetensors.index.json").exists():
        shutil.rmtree(model, ignore_errors=True)
        write(model, layers)
        for file in (ROOT / "trifold" / "demo" / "model").glob("tokenizer*"):
            shutil.copy(file, model)
    calib = work / "calib.txt"
    calib.write_text((ROOT / "README.md").read_text() * 20)
    settings: dict[str, Any] = {"nsamples": nsamples, "seqlen": seqlen}
    if offload:
        settings |= {"offload_activations": True, "stats_memory": "300MB"}
    rows = [measure(model, recipe, calib, work, settings) for recipe in recipes]
    head = ("recipe", "peak above imports", "limit", "planned", "off", "written", "planned size")
    table = markdown(
        head,
        [
            (
                row["recipe"],
                f"{row['peak'] / 1e6:.0f} MB",
                f"{row['limit'] / 1e6:.0f} MB" if row["limit"] else "-",
                f"{row['planned'] / 1e6:.0f} MB ({row['stage']})",
                f"{100 * row['off']:+.1f} %",
                f"{row['written'] / 1e6:.2f} MB",
                f"{row['planned_bytes'] / 1e6:.2f} MB",
            )
            for row in rows
        ],
    )
    print(table)
    if record:
        sizes = f"{layers} blocks; {nsamples} windows of {seqlen} tokens where text is needed"
        text = f"A random Llama of TinyLlama's shape, {sizes}.\n\n{table}"
        save("memory", {"machine": machine(), "layers": layers, "rows": rows}, text)
    bad = [r for r in rows if abs(r["off"]) > 0.15 or abs(r["written"] / r["planned_bytes"] - 1) > 0.01]
    bad += [r for r in rows if r["limit"] and r["peak"] > r["limit"]]
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
