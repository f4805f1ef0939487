"""Quality against bits, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PALETTE = ("#d1495b", "#00798c", "#edae49", "#30638e", "#6a994e", "#7b2d8b")
INK, FAINT = "#333333", "#dddddd"


def draw(result: dict[str, Any], path: Path) -> None:
    """Write a PNG of what `demo` returned: KL (logarithmic) and task accuracy against bits per weight.

    One line for each method. Rows without a finite, positive KL are left out of the left panel.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    dense, *rows = result["rows"]
    figure = Figure(figsize=(10.5, 4.4), dpi=160, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _lines(left, rows, "kl", 1)
    _lines(right, rows, "accuracy", 100)
    left.set_yscale("log")
    left.set_title("distance from the dense model", loc="left", color=INK)
    left.set_ylabel("KL divergence, nats per token (log)", color=INK)
    right.set_title("task accuracy", loc="left", color=INK)
    right.set_ylabel("% right, mean of four tasks", color=INK)
    for name, value in (("dense model", dense["accuracy"]), ("guessing", result["chance"])):
        right.axhline(100 * value, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        place = (0.99, 100 * value)
        right.annotate(name, place, (0, 3), color=INK, ha="right", fontsize=8.5, **_WITHIN)
    bottom = min([result["chance"], *(row["accuracy"] for row in rows)])
    right.set_ylim(100 * bottom - 4, 104)
    left.legend(frameon=False, labelcolor=INK)
    figure.savefig(path, metadata={"Software": None})


_WITHIN: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}


def _lines(axes: Any, rows: list[dict[str, Any]], key: str, factor: float) -> None:
    """One labelled line per method."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for number, method in enumerate(methods):
        points = [row for row in rows if row["method"] == method and (key != "kl" or (row["kl"] or 0) > 0)]
        points.sort(key=lambda row: row["bits_per_weight"])
        x, y = [row["bits_per_weight"] for row in points], [factor * row[key] for row in points]
        colour = PALETTE[number % len(PALETTE)]
        axes.plot(x, y, marker="o", markersize=6, linewidth=2, color=colour, label=method.upper())
        for row, at in zip(points, zip(x, y, strict=True), strict=True):
            bits = row["recipe"].partition("a")[0]
            axes.annotate(bits, at, (6, 5), textcoords="offset points", color=colour, fontsize=8.5)
    axes.set_xlabel("bits per weight, scales included", color=INK)
    axes.grid(color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, length=0)
