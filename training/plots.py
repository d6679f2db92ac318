"""Plots of training and evaluation, drawn with matplotlib where it is installed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modeling_san.training.files import replacing_file
from modeling_san.training.tracking import read_metrics


def plot_curves(metrics: Path, picture: Path) -> Path:
    """
    Draw how a run went: loss and its terms, validation mIoU, learning rate and gradient norm over the steps.

    Args:
        metrics: a run's `metrics.jsonl`.
        picture: PNG to write, complete or not at all.

    Returns:
        `picture`.

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
        elif title == "gradient norm":
            axes.set_yscale("log")
        if len(series) > 1:
            axes.legend(fontsize=8, frameon=False)
    with replacing_file(picture) as beside:
        figure.savefig(beside, format="png", dpi=120)
    return picture


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
    return name.removeprefix("loss_").removeprefix("validation_").replace("_", " ")


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


__all__ = ["plot_curves"]
