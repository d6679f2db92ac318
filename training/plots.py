# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""Plots of training and evaluation, drawn with matplotlib where it is installed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from modeling_san.processing.files import replacing_file
from modeling_san.training.callbacks import read_metrics

_PANELS = {
    "loss": re.compile("loss"),
    "terms of the last output": re.compile("loss_(cross_entropy|mask|dice)"),
    "validation": re.compile("validation_.*"),
    "learning rate": re.compile("learning_rate"),
    "gradient norm": re.compile("grad_norm"),
    "images per second": re.compile("images_per_second"),
}
"""What is drawn together: names of figures by the title of their panel."""

_MOST_BARS, _BARS_IN_COLUMN, _EXTREMES = 180, 60, 50
_BLUE = "#0072b2"


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
    series: dict[str, list[tuple[int, float]]] = {}
    for line in read_metrics(metrics):
        for name, value in line.items():
            if isinstance(value, (int, float)):
                series.setdefault(name, []).append((line["step"], float(value)))
    named = {title: [name for name in series if wanted.fullmatch(name)] for title, wanted in _PANELS.items()}
    panels = {title: names for title, names in named.items() if names}
    if not panels:
        raise ValueError(f"{metrics} holds no figures yet: wait for the first lines.")
    rows = math.ceil(len(panels) / 3)
    figure = _new_figure(figsize=(12, 3.2 * rows))
    for position, (title, names) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, 3, position)
        for name in names:
            label = name.removeprefix("loss_").removeprefix("validation_").replace("_", " ").replace("iou", "IoU")
            marker = "o" if len(series[name]) < 30 else None
            axes.plot(*zip(*series[name], strict=True), label=label, marker=marker, markersize=3, linewidth=1.5)
        _style(axes, title)
        axes.set_xlabel("step", fontsize=8)
        if title == "validation":
            axes.set_ylim(0, 1)
        if len(names) > 1:
            axes.legend(fontsize=8, frameon=False)
    return _save(figure, image)


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
    known = [(name, value) for name, value in per_class_iou.items() if value is not None]
    bars = sorted(known, key=lambda bar: (-bar[1], bar[0]))
    absent = len(per_class_iou) - len(bars)
    with_curve = len(bars) > _MOST_BARS
    if with_curve:
        columns = [(f"best {_EXTREMES}", bars[:_EXTREMES]), (f"worst {_EXTREMES}", bars[-_EXTREMES:])]
    else:
        height = max(1, math.ceil(len(bars) / max(1, math.ceil(len(bars) / _BARS_IN_COLUMN))))
        columns = [("", bars[start : start + height]) for start in range(0, max(1, len(bars)), height)]
    rows = max(1, *(len(column) for _, column in columns))
    panels = len(columns) + with_curve
    figure = _new_figure(figsize=(max(7.0, 5.0 * panels), 1.6 + 0.19 * max(rows, 6)))
    if with_curve:
        axes = figure.add_subplot(1, panels, 1)
        places, values = range(1, len(bars) + 1), [value for _, value in bars]
        axes.fill_between(places, values, color=_BLUE, alpha=0.25)
        axes.plot(places, values, color=_BLUE, linewidth=1.5)
        _style(axes, f"all {len(bars)} classes", iou="y")
        axes.set_ylim(0, 1)
        axes.set_xlim(1, len(bars))
        axes.set_xlabel("classes, best first", fontsize=8)
    for place, (name, column) in enumerate(columns, start=1 + with_curve):
        axes = figure.add_subplot(1, panels, place)
        axes.barh(range(len(column)), [value for _, value in column], height=0.72, color=_BLUE)
        for row, (_, value) in enumerate(column):
            axes.text(value + 0.01, row, f"{value:.3f}", va="center", fontsize=7, color="#5f6368")
        _style(axes, name, iou="x")
        labels = [_plain(label if len(label) <= 30 else f"{label[:28]}...") for label, _ in column]
        axes.set_yticks(range(len(column)), labels, fontsize=8)
        # As many rows in each column: bars are equally thick
        axes.set_ylim(rows - 0.4, -0.6)
        axes.set_xlim(0, 1.1)
    note = f"{absent} classes that do not occur are left out" if absent > 1 else "1 class does not occur"
    figure.suptitle("\n".join(line for line in (_plain(title), note if absent else "") if line), fontsize=10)
    return _save(figure, image)


def _style(axes: Any, title: str, iou: Literal["x", "y"] | None = None) -> None:
    """A light grid; along an axis of IoU it goes in steps of a fifth."""
    axes.set_title(title, fontsize=9, loc="left")
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, axis=iou or "both")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if iou:
        axes.set(**{f"{iou}ticks": [0, 0.2, 0.4, 0.6, 0.8, 1]})


def _plain(text: str) -> str:
    """Text with nothing in it that matplotlib would typeset."""
    return text.replace("$", "\\$")


def _save(figure: Any, image: Path) -> Path:
    with replacing_file(image) as beside:
        figure.savefig(beside, format="png", dpi=120)
    return image


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
