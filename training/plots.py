"""Plots of training and evaluation, drawn with matplotlib where it is installed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from modeling_san.processing.files import replacing_file
from modeling_san.training.callbacks import read_metrics


def plot_curves(metrics: Path, image: Path) -> Path:
    """
    Draw how a run went: loss and its terms, validation mIoU, learning rate and gradient norm over the steps.

    Args:
        metrics: a run's `metrics.jsonl`.
        image: PNG to write, complete or not at all.

    Returns:
        `image`.

    Raises:
        ValueError: where `metrics` cannot be read, or holds no figures yet.
        ImportError: where matplotlib is missing.
    """
    lines = read_metrics(metrics)
    panels = [
        (title, series)
        for title, series in (
            ("loss", _series(lines, lambda name: name == "loss")),
            ("terms of the last output", _series(lines, lambda name: name in _TERMS)),
            ("validation", _series(lines, lambda name: name.startswith("validation_"))),
            ("learning rate", _series(lines, lambda name: name == "learning_rate")),
            ("gradient norm", _series(lines, lambda name: name == "grad_norm")),
            ("images per second", _series(lines, lambda name: name == "images_per_second")),
        )
        if series
    ]
    if not panels:
        raise ValueError(f"{metrics} holds no figures yet: wait for the first lines.")
    figure = _new_figure(figsize=(12, 3.2 * math.ceil(len(panels) / 3)))
    for position, (title, series) in enumerate(panels, start=1):
        axes = figure.add_subplot(math.ceil(len(panels) / 3), 3, position)
        for name, points in series.items():
            marker = "o" if len(points) < 30 else None
            axes.plot(*zip(*points, strict=True), label=_label(name), marker=marker, markersize=3, linewidth=1.5)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if title == "validation":
            axes.set_ylim(0, 1)
        if len(series) > 1:
            axes.legend(fontsize=8, frameon=False)
    with replacing_file(image) as beside:
        figure.savefig(beside, format="png", dpi=120)
    return image


def plot_class_iou(per_class_iou: Mapping[str, float | None], image: Path, *, title: str = "") -> Path:
    """
    Draw the IoU of each class as bars, best first.

    Up to 180 classes have a bar each, in columns; of more, the best and the worst have, beside a curve of all.

    Args:
        per_class_iou: by class name; None for a class that does not occur, which is counted and not drawn.
        image: PNG to write, complete or not at all.
        title: put above.

    Returns:
        `image`.

    Raises:
        ImportError: where matplotlib is missing.
    """
    bars = sorted(
        ((name, value) for name, value in per_class_iou.items() if value is not None),
        key=lambda bar: (-bar[1], bar[0]),
    )
    absent = len(per_class_iou) - len(bars)
    if len(bars) > _MOST_BARS:
        columns = {f"best {_EXTREMES}": bars[:_EXTREMES], f"worst {_EXTREMES}": bars[-_EXTREMES:]}
    else:
        count = max(1, math.ceil(len(bars) / _BARS_IN_COLUMN))
        rows = max(1, math.ceil(len(bars) / count))
        columns = {" " * place: bars[place * rows : (place + 1) * rows] for place in range(count)}
    with_curve = len(bars) > _MOST_BARS
    rows = max(1, *(len(column) for column in columns.values()))
    panels = len(columns) + with_curve
    figure = _new_figure(figsize=(max(7.0, 5.0 * panels), 1.6 + 0.19 * max(rows, 6)))
    for place, (name, column) in enumerate(columns.items(), start=1 + with_curve):
        axes = figure.add_subplot(1, panels, place)
        axes.barh(range(len(column)), [value for _, value in column], height=0.72, color="#0072b2")
        for row, (_, value) in enumerate(column):
            axes.text(value + 0.01, row, f"{value:.3f}", va="center", fontsize=7, color="#5f6368")
        axes.set_yticks(range(len(column)), [_shortened(label) for label, _ in column], fontsize=8)
        # As many rows in each column: bars are equally thick
        axes.set_ylim(rows - 0.4, -0.6)
        _style_iou_axes(axes, name.strip(), figure_axis=axes.xaxis)
        axes.set_xlim(0, 1.1)
    if with_curve:
        axes = figure.add_subplot(1, panels, 1)
        values = [value for _, value in bars]
        axes.fill_between(range(1, len(values) + 1), values, color="#0072b2", alpha=0.25)
        axes.plot(range(1, len(values) + 1), values, color="#0072b2", linewidth=1.5)
        axes.set_ylim(0, 1)
        axes.set_xlim(1, len(values))
        axes.set_xlabel("classes, best first", fontsize=8)
        _style_iou_axes(axes, f"all {len(values)} classes", figure_axis=axes.yaxis)
    note = f"{absent} classes that do not occur are left out" if absent > 1 else "1 class does not occur"
    figure.suptitle("\n".join(line for line in (_plain(title), note if absent else "") if line), fontsize=10)
    with replacing_file(image) as beside:
        figure.savefig(beside, format="png", dpi=120)
    return image


_MOST_BARS, _BARS_IN_COLUMN, _EXTREMES = 180, 60, 50


def _style_iou_axes(axes: Any, title: str, figure_axis: Any) -> None:
    axes.set_title(title, fontsize=9, loc="left")
    axes.tick_params(labelsize=8)
    figure_axis.set_major_locator(_every_fifth())
    axes.grid(alpha=0.25, axis=figure_axis.axis_name)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _every_fifth() -> Any:
    from matplotlib.ticker import FixedLocator

    return FixedLocator([0, 0.2, 0.4, 0.6, 0.8, 1])


def _shortened(label: str) -> str:
    """A class name of at most 30 letters."""
    return _plain(label if len(label) <= 30 else f"{label[:28]}...")


def _plain(text: str) -> str:
    """Text with nothing in it that matplotlib would typeset."""
    return text.replace("$", "\\$")


_TERMS = ("loss_cross_entropy", "loss_mask", "loss_dice")


def _series(lines: list[dict[str, Any]], wanted: Callable[[str], bool]) -> dict[str, list[tuple[int, float]]]:
    """Points `(step, value)` of each figure whose name is wanted."""
    series: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if wanted(name) and isinstance(value, (int, float)):
                series.setdefault(name, []).append((line["step"], float(value)))
    return series


def _label(name: str) -> str:
    return name.removeprefix("loss_").removeprefix("validation_").replace("_", " ").replace("iou", "IoU")


def _new_figure(figsize: tuple[float, float]) -> Any:
    """A figure that needs no screen."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('drawing plots needs matplotlib: pip install "modeling-san[train]".') from error
    figure = Figure(figsize=figsize, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


__all__ = ["plot_class_iou", "plot_curves"]
