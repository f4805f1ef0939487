"""What fewer weights do to a model: pruners against each other, and sparse against few bits at like sizes.

    python benchmarks/sparsity.py [--model DIR --calib FILE --eval FILE] [--skip-recovery]

The first table prunes without rounding, at 50 % and 2:4: the mean relative output error of the layers on calibration
text, and the loss on held-out text. The second stores rounded weights, sparse or not, at several sizes, as compression
leaves them and after the same recovery for all: distillation, or with `--recovery published` GQSA's two stages, BQPO
and E2E-OQP. Every cell is a checkpoint written by
`trifold.compress`, loaded again and scored on the same windows, which calibration never saw. `±` is the standard error
of the paired difference over windows.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from common import RESULTS, add_text_arguments, machine, markdown, save
from quality import score_of

PRUNERS: dict[str, tuple[str, dict[str, Any]]] = {
    "magnitude": ("magnitude", {}),
    "Wanda": ("wanda", {"refit": False}),
    "SparseGPT": ("sparsegpt", {"refit": False}),
    "Wanda + refit": ("wanda", {}),
    "SparseGPT + refit": ("sparsegpt", {}),
    "ALPS + refit": ("alps", {}),
}
PATTERNS: dict[str, dict[str, Any]] = {"50 %": {"sparsity": 0.5}, "2:4": {"pattern": "2:4"}}


def rounded(method: str, bits: int, group: int, **options: Any) -> dict[str, Any]:
    """A step that rounds."""
    scheme: dict[str, Any] = {"bits": bits, "group_size": group, "symmetric": method == "gqsa"}  # as presets have it
    return {"method": method, "scheme": scheme, "options": options}


SIZES: dict[str, dict[str, Any]] = {
    "INT4 g128": rounded("gptq", 4, 128),
    "GQSA W4S30 g16": rounded("gqsa", 4, 16, sparsity=0.3),
    "INT3 g128": rounded("gptq", 3, 128),
    "W4 2:4 g128": rounded("alps", 4, 128, pattern="2:4"),
    "GQSA W4S50 g16": rounded("gqsa", 4, 16, sparsity=0.5),
    "GQSA W4S50 g32": rounded("gqsa", 4, 32, sparsity=0.5),
    "INT2 g64": rounded("gptq", 2, 64),
}
RECOVERIES: dict[str, list[dict[str, Any]]] = {
    "distill": [{"method": "distill"}],
    "published": [{"method": "bqpo"}, {"method": "e2e_oqp"}],
}


def cell(args: argparse.Namespace, name: str, steps: list[dict[str, Any]], dtype: str = "float32") -> dict[str, Any]:
    """Compress, load, score. dtype: of all that stays as it is."""
    import trifold

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        recipe = {"name": name, "steps": steps, "nsamples": args.nsamples, "seqlen": args.seqlen}
        report = trifold.compress(args.model, recipe, args.calib, out, dtype=dtype, verbosity=-1)
        score = score_of(out, args)
    kept = ("bits_per_weight", "model_bits_per_weight", "mean_error", "seconds")
    print(f"{name}: loss {score['loss']:.4f}, {report['seconds']:.1f} s", flush=True)
    return {"name": name, **score, **{k: report[k] for k in kept}}


def rise(found: dict[str, Any], base: dict[str, Any]) -> str:
    """The paired difference of two cells."""
    from trifold.eval import paired_difference

    difference, error = paired_difference(found["window_losses"], base["window_losses"])
    return f"{difference:+.4f} ± {error:.4f}"


def pruners_table(dense: dict[str, Any], cells: dict[str, dict[str, dict[str, Any]]]) -> str:
    """One row a pruner and pattern."""
    rows = []
    for pattern, found in cells.items():
        for name, entry in found.items():
            error, loss = f"{entry['mean_error']:.4f}", rise(entry, dense)
            against = "" if name == "magnitude" else rise(entry, found["magnitude"])
            rows.append([pattern, name, error, f"{entry['perplexity']:.3f}", loss, against])
    return markdown(["", "method", "mean error of layers", "perplexity", "rise in loss, nats", "vs magnitude"], rows)


def sizes_table(dense: dict[str, Any], cells: dict[str, dict[str, dict[str, Any]]]) -> str:
    """One row a recipe, the largest first."""
    rows = []
    done = {name: found for name, found in cells.items() if "plain" in found}
    for name, found in sorted(done.items(), key=lambda item: -item[1]["plain"]["bits_per_weight"]):
        plain, tuned = found["plain"], found.get("recovered")
        row = [name, f"{plain['bits_per_weight']:.3f}", f"{plain['perplexity']:.3f}", rise(plain, dense)]
        row += ["", "", ""] if tuned is None else [f"{tuned['perplexity']:.3f}", rise(tuned, dense), rise(tuned, plain)]
        rows.append(row)
    head = ["", "bits per weight", "perplexity", "rise in loss, nats"]
    return markdown([*head, "recovered: perplexity", "rise", "what recovery does"], rows)


def against(cells: dict[str, dict[str, dict[str, Any]]], base: str = "INT3 g128") -> str:
    """Every other cell beside one, each as compressed and after recovery, and who loses less than whom."""
    from trifold.eval import paired_difference

    found = cells.get(base, {})
    rows, better, worse = [], [], []
    for name, other in sorted(cells.items(), key=lambda item: -item[1].get("plain", {}).get("bits_per_weight", 0.0)):
        common = [place for place in ("plain", "recovered") if place in other and place in found]
        if name == base or not common:
            continue
        row = [name, f"{other['plain']['bits_per_weight'] - found['plain']['bits_per_weight']:+.3f}"]
        row += [rise(other[place], found[place]) if place in common else "" for place in ("plain", "recovered")]
        rows.append(row)
        losses = other[common[-1]]["window_losses"], found[common[-1]]["window_losses"]
        difference, error = paired_difference(*losses)
        if difference < -2 * error:
            better.append(name)
        elif difference > 2 * error:
            worse.append(name)
    words = f"Less loss than {base}, by two standard errors: {', '.join(better) or 'none'}; more: {', '.join(worse)}."
    return markdown([f"beside {base}", "bits", "as compressed, nats", "recovered, nats"], rows) + f"\n{words}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_arguments(parser)
    parser.add_argument("--max-windows", type=int, default=200)
    parser.add_argument("--recovery", choices=list(RECOVERIES), default="distill")
    parser.add_argument("--skip-recovery", action="store_true")
    parser.add_argument("--go-on", action="store_true", help="Keep the cells that the results already have.")
    parser.add_argument("--recover", help="Names of the cells to recover, by commas.  [default: all]")
    parser.add_argument("--name", default="sparsity", help="Name of the files in benchmarks/results.")
    args = parser.parse_args()
    before = json.loads((RESULTS / f"{args.name}.json").read_text()) if args.go_on else {}
    dense = before.get("dense") or score_of(args.model, args)
    print(f"dense: loss {dense['loss']:.4f}", flush=True)
    pruned: dict[str, dict[str, dict[str, Any]]] = before.get("pruned", {})
    sizes: dict[str, dict[str, dict[str, Any]]] = before.get("sizes", {})

    def write() -> None:
        protocol = f"{args.nsamples} x {args.seqlen} tokens of calibration, {args.max_windows} windows scored"
        if not args.skip_recovery:
            protocol += f", recovery {args.recovery}"
        where = ", ".join(f"{k} {v}" for k, v in machine().items())
        text = f"{Path(args.model).name}: {protocol}; dense perplexity {dense['perplexity']:.3f}.\n\n"
        text += f"Pruned, 16 bits:\n\n{pruners_table(dense, pruned)}\n"
        text += f"Rounded, sparse and not:\n\n{sizes_table(dense, sizes)}\n{against(sizes)}\n{where}\n"
        data = {"machine": machine(), "model": Path(args.model).name, "dense": dense, "pruned": pruned, "sizes": sizes}
        save(args.name, data, text)

    def fill(row: dict[str, dict[str, Any]], place: str, name: str, steps: list[dict[str, Any]]) -> None:
        if place not in row:
            row[place] = cell(args, name, steps)
            write()

    for pattern, options in PATTERNS.items():
        for name, (method, own) in PRUNERS.items():
            steps = [{"method": method, "options": {**options, **own}}]
            fill(pruned.setdefault(pattern, {}), name, f"{name} {pattern}", steps)
    for name, step in SIZES.items():
        fill(sizes.setdefault(name, {}), "plain", name, [step])
    chosen = args.recover.split(",") if args.recover else list(SIZES)
    for name in () if args.skip_recovery else chosen:
        fill(sizes[name], "recovered", f"{name} recovered", [SIZES[name], *RECOVERIES[args.recovery]])


if __name__ == "__main__":
    main()
