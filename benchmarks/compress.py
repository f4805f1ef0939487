"""How long compression takes and how much memory, beside llm-compressor in the same run.

    python benchmarks/compress.py [--peer PEER_VENV/bin/python] [--methods gptq,awq] [--bits 4] [--repeat 2]

Each side runs in a process of its own on a model already in memory: `trifold.compress(model, ...)` against
llm-compressor's `oneshot(model=...)`, imports and loading excluded; the least of `--repeat` times and the median of
the rises in memory are kept. The losses on held-out text come with it, so that speed is never bought with quality
unseen.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ROOT, add_text_arguments, machine, markdown, save


def measure(model: str, calib: str, evaluation: str, args: argparse.Namespace) -> dict[str, Any]:
    """Our side, in this process."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(args.threads)
    import trifold.compress.pipeline  # imports are not part of the time
    from trifold.compress.calibration import text_windows
    from trifold.eval import perplexity

    tokenizer = AutoTokenizer.from_pretrained(model)
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    config = dense.config
    windows = text_windows(evaluation, tokenizer, config, args.eval_windows, args.seqlen)
    ids = list(text_windows(calib, tokenizer, config, args.nsamples, args.seqlen).ids)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from the current size
    rss = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    started = time.perf_counter()
    trifold.compress(
        dense,
        f"w{args.bits}a16-{args.method}",
        ids,
        seqlen=args.seqlen,
        nsamples=args.nsamples,
        settings=[f"group_size={args.group_size}"],
        verbosity=-1,
    )
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    after = perplexity(dense, windows, batch_size=20)
    before = perplexity(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), windows, batch_size=20)
    return {
        "seconds": seconds,
        "peak_rss_bytes": peak,
        "rss_rise_bytes": peak - rss,
        "rise": after.loss - before.loss,
        "window_losses": list(after.window_losses),
    }


def run(python: str, script: Path, extra: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """One side in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        options = {
            "--model": args.model,
            "--calib": args.calib,
            "--eval": args.eval,
            "--nsamples": args.nsamples,
            "--seqlen": args.seqlen,
            "--json": out,
        }
        command = [python, str(script), *extra, *(str(part) for pair in options.items() for part in pair)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return json.loads(out.read_text())


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The fastest run, with the median of all runs' memory."""
    fastest = min(results, key=lambda result: result["seconds"])
    rises = [result["rss_rise_bytes"] for result in results]
    return {**fastest, "rss_rise_bytes": statistics.median(rises), "all_rss_rise_bytes": rises}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_arguments(parser)
    parser.add_argument("--eval-windows", type=int, default=200)
    parser.add_argument("--methods", default="gptq,awq")
    parser.add_argument("--bits", default="4")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--peer", help="Python of a virtual environment with llmcompressor.")
    parser.add_argument("--method", help=argparse.SUPPRESS)  # a worker: one method, in this process
    parser.add_argument("--json", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.method:
        Path(args.json).write_text(json.dumps(measure(args.model, args.calib, args.eval, args)))
        return
    if not Path(args.model).exists():
        parser.error(f"{args.model} does not exist; give --model, --calib and --eval")
    rows, data = [], []
    for method in args.methods.split(","):
        for bits in args.bits.split(","):
            settings = ["--method", method, "--bits", bits, "--group-size", str(args.group_size)]
            sides = {"trifold": (sys.executable, Path(__file__), ["--threads", str(args.threads)])}
            if args.peer:
                sides["llm-compressor"] = (args.peer, ROOT / "benchmarks/peers/llmcompressor.py", [])
            runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
            for _ in range(args.repeat):  # sides take turns, so that both see the same machine
                for side, (python, script, extra) in sides.items():
                    runs[side].append(run(python, script, [*settings, *extra], args))
            best = {side: summary(results) for side, results in runs.items()}
            for side, result in best.items():
                ratio = result["seconds"] / best["llm-compressor"]["seconds"] if args.peer else float("nan")
                rows.append(
                    [
                        f"W{bits} g{args.group_size} {method}",
                        side,
                        f"{result['seconds']:.2f}",
                        f"{ratio:.2f}",
                        f"{result['rss_rise_bytes'] / 1e6:.0f}",
                        f"{result['rise']:.4f}",
                    ]
                )
                data.append({"method": method, "bits": int(bits), "side": side, **result})
                print(*rows[-1], sep="  ", flush=True)
    head = ["", "side", "seconds", "ratio", "memory rise, MB", "rise in loss, nats"]
    table = markdown(head, rows)
    where = ", ".join(f"{k} {v}" for k, v in machine().items())
    print(table)
    save("compress", {"machine": machine(), "results": data}, f"{table}\n{where}\n")


if __name__ == "__main__":
    main()
