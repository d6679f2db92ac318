"""How time and memory grow with the image, the vocabulary, the queries and the batch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from .measure import Measurement, Meter
from .report import format_measurement, format_table
from .settings import Settings
from .stages import STAGES, Run
from .workload import Workload

MOST_ENCODED_LABELS = 1000
"""Vocabularies up to this size are encoded too, with one prompt for each label; beyond it takes very long."""

AXES: dict[str, tuple[tuple[int, ...], str]] = {
    "size": (
        (320, 480, 640, 960, 1280, 2048),
        "Patches grow with the square of the side, and with them the products in the layers; attention among patches "
        "grows with the fourth power of the side and rules on large images. Label maps are as large as the image "
        "here, so post-processing grows with the square.",
    ),
    "classes": (
        (10, 100, 1000, 10_000),
        "The network meets the classes in its last product only. Post-processing multiplies those that may win in a "
        "tile, which are about as many whatever the vocabulary; finding them grows linearly, and is small. Memory "
        "does not grow, as it works in blocks. Text grows linearly with the prompts, once for a vocabulary.",
    ),
    "queries": (
        (50, 100, 200, 400),
        "Queries are further tokens: linear in the layers of the side adapter and of recognition, and linear in "
        "post-processing. Attention grows with the square of all tokens, of which patches are most.",
    ),
    "batch": (
        (1, 2, 4, 8),
        "Everything is linear: a CPU takes large batches a few images at a time. Memory is that of two "
        "images, and the masks and biases of all.",
    ),
}
"""By the setting that is varied: its values, and what grows how, and why."""

_TITLES = {"network": "network", "post_processing": "post-processing", "text": "text, a prompt a label"}


def measure_scaling(
    settings: Settings, axes: Mapping[str, Sequence[int]], folder: Path, meter: Meter
) -> Iterator[tuple[str, int, dict[str, Measurement]]]:
    """
    Measure the network and post-processing at each value of each axis, while the other settings stay.

    Yields:
        axis, value and measurements by stage.
    """
    if not axes:
        return
    model = Workload(settings, folder).model
    for axis, values in axes.items():
        for value in values:
            changes = {axis: value, "target": (value, value)} if axis == "size" else {axis: value}
            work = Workload(replace(settings, **changes), folder, model=None if axis == "queries" else model)
            prepare: dict[str, Callable[[Workload], Run]] = {
                name: STAGES[name].prepare for name in ("network", "post_processing")
            }
            if axis == "classes" and value <= MOST_ENCODED_LABELS:
                prepare["text"] = _one_prompt_a_label
            yield axis, value, {name: meter.measure(make(work)) for name, make in prepare.items()}


def format_scaling(axis: str, points: Mapping[str, Mapping[str, Measurement]]) -> str:
    """
    A table of one axis, with the power of growth from each row to the next, and the line that explains it.

    Args:
        axis: what was varied.
        points: measurements by stage, by value.
    """
    stages = list(dict.fromkeys(name for point in points.values() for name in point))
    headers = [axis]
    for name in stages:
        headers += [f"{_TITLES[name]}: s", "cost", "power", "peak MB", "added MB"]
    rows = []
    for (before, earlier), (value, point) in itertools.pairwise([("", {}), *points.items()]):
        row = [value]
        for name in stages:
            if (measured := point.get(name)) is None:
                row += [""] * 5
                continue
            seconds, _, _, cost, *memory = format_measurement(measured)
            power = ""
            if name in earlier and value != before:
                growth = math.log(measured.median / earlier[name].median)
                power = f"{growth / math.log(int(value) / int(before)):.1f}"
            row += [seconds, cost, power, *memory]
        rows.append(row)
    return f"{format_table(headers, rows)}\n\n{AXES[axis][1]}"


def _one_prompt_a_label(work: Workload) -> Run:
    prompts, encode = work.prompts(templates=1), work.compiled(work.model.get_class_embeds)
    return lambda: encode(**prompts)
