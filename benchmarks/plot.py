"""Charts as PNG files, where matplotlib is installed."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.report import Chart, Result


def draw(results: Iterable[Result], folder: Path) -> list[Path]:
    """One picture per measurement that has charts; none without matplotlib."""
    try:
        importlib.import_module("matplotlib").use("Agg")
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ImportError:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for result in results:
        if result.charts:
            drawn.append(folder / f"{result.name}.png")
            _picture(pyplot, result.charts, drawn[-1])
    return drawn


def _picture(pyplot: Any, charts: list[Chart], path: Path) -> None:
    figure, axes = pyplot.subplots(1, len(charts), figsize=(6 * len(charts), 4), squeeze=False)
    for chart, axis in zip(charts, axes[0], strict=True):
        axis.set(title=chart.title, xlabel=chart.x, ylabel=chart.y, yscale="log" if chart.log_y else "linear")
        {"line": _lines, "spread": _spread, "bar": _bars, "trace": _traces}[chart.kind](axis, chart)
        axis.grid(visible=True, axis="y", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _lines(axis: Any, chart: Chart) -> None:
    for name, points in chart.series.items():
        axis.plot(*zip(*points, strict=True), marker="o", label=name)
    if not chart.log_y:
        axis.set_ylim(bottom=0)
    axis.legend()


def _traces(axis: Any, chart: Chart) -> None:
    """Values that hold until the next one; single events, all at 0, as marks on the ground."""
    for name, points in chart.series.items():
        times, values = zip(*points, strict=True) if points else ((), ())
        if any(values):
            axis.step(times, values, where="post", linewidth=1, label=name)
        else:
            axis.plot(times, values, "r|", markersize=12, label=f"{name} ({len(points)})")
    axis.set_ylim(bottom=-2)
    axis.legend()


def _spread(axis: Any, chart: Chart) -> None:
    """Which share of the values is at most x, up to the 99th of a hundred."""
    for name, values in chart.series.items():
        shown = sorted(values)[: max(1, len(values) * 99 // 100)]
        axis.plot(shown, [(number + 1) / len(values) for number in range(len(shown))], label=name)
    axis.set_xlim(left=0)
    axis.legend()


def _bars(axis: Any, chart: Chart) -> None:
    middles = [median(values) for values in chart.series.values()]
    below = [middle - min(values) for middle, values in zip(middles, chart.series.values(), strict=True)]
    above = [max(values) - middle for middle, values in zip(middles, chart.series.values(), strict=True)]
    axis.bar(list(chart.series), middles, yerr=[below, above], capsize=4, width=0.5)
