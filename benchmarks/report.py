"""What a run found: a file for programs, tables for people."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from modeling_san.processing.files import write_json

from .measure import Measurement
from .settings import Settings

_FORMAT = 1
_BUSY = 0.25
COLUMNS = ("seconds", "spread", "rounds", "cost", "peak MB", "added MB")
"""What `format_measurement` gives."""


@dataclass
class Report:
    """
    Everything that one run measured.

    Attributes:
        settings: what was measured.
        machine: see `machine.describe_machine`.
        rates: of the matrix products, in the order they were made, in 10^9 operations per second.
        stages: by the names of `stages.STAGES`.
        scaling: for each axis and value, measurements by stage.
        others: for each model and number of labels, its measurement.
        agreement: for each image, the share of pixels that have the same label in float32.
        load_average: of the system when the run ended.
    """

    settings: Settings
    machine: dict[str, Any]
    rates: list[float] = field(default_factory=list)
    stages: dict[str, Measurement] = field(default_factory=dict)
    scaling: dict[str, dict[str, dict[str, Measurement]]] = field(default_factory=dict)
    others: dict[str, dict[str, Measurement]] = field(default_factory=dict)
    agreement: dict[str, float] = field(default_factory=dict)
    load_average: float | None = None

    def save(self, path: Path) -> None:
        """Write JSON; what is there already stays whole until the new file is."""
        content = {"format": _FORMAT, "rate": statistics.median(self.rates) if self.rates else None}
        content |= {field.name: getattr(self, field.name) for field in fields(self)}
        write_json(path, _to_json(content))

    @classmethod
    def load(cls, path: Path) -> Report:
        """
        Read what `save` wrote.

        Raises:
            ValueError: the file is something else.
            OSError: it cannot be read.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != _FORMAT:
                raise ValueError(f"its format is {content['format']!r}, expected {_FORMAT}")
            return cls(
                settings=Settings.from_json(content["settings"]),
                machine=dict(content["machine"]),
                rates=[float(rate) for rate in content["rates"]],
                stages=_measurements(content["stages"]),
                scaling={
                    axis: {value: _measurements(stages) for value, stages in points.items()}
                    for axis, points in content["scaling"].items()
                },
                others={model: _measurements(labels) for model, labels in content["others"].items()},
                agreement=dict(content["agreement"]),
                load_average=content["load_average"],
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{path} is not a file that python -m benchmarks wrote: {reason}") from error


def format_machine(report: Report) -> str:
    """Machine, versions, commit and settings, a few lines."""
    machine, settings = report.machine, report.settings
    libraries = ", ".join(f"{name} {version}" for name, version in machine["libraries"].items())
    memory = "" if machine["memory"] is None else f", {machine['memory'] / 2**30:.0f} GiB"
    place = machine["gpu"] or f"{machine['processor']} ({machine['instructions']}), {settings.threads} threads"
    height, width = settings.target
    return (
        f"{place}, {machine['cores']} cores{memory}, {machine['system']}\n"
        f"Python {machine['python']}, {libraries}; commit {machine['commit']}; {machine['date']}\n"
        f"{settings.model}, {settings.size} x {settings.size} pixels, batch {settings.batch}, {settings.classes} "
        f"classes, label maps of {height} x {width}, {settings.dtype}, {settings.mode}"
    )


def format_rates(report: Report) -> str:
    """How fast the machine was, and whether it was busy with something else."""
    rates = report.rates
    if not rates:
        return "No cost on a GPU." if report.machine["gpu"] else "Nothing was timed."
    median, low, high = statistics.median(rates), min(rates), max(rates)
    loads = [report.machine["load_average"], report.load_average]
    load = "" if None in loads else f"; load average {loads[0]:.2f} at the start, {loads[1]:.2f} at the end"
    busy = " This machine was busy with other work: read the figures with care." * (high - low > _BUSY * median)
    return f"Matrix product: {median:.1f} GFLOP/s, {low:.1f} to {high:.1f} over {len(rates)} products{load}.{busy}"


def format_stages(stages: Mapping[str, Measurement], titles: Mapping[str, str]) -> str:
    """A table with one row per measurement; operations are in it where some were counted."""
    rows = [[titles.get(name, name), *format_measurement(measured)] for name, measured in stages.items()]
    if not any(measured.flops for measured in stages.values()):
        return format_table(["", *COLUMNS], rows)
    for row, measured in zip(rows, stages.values(), strict=True):
        giga = (measured.flops or 0) / 1e9
        row.extend([f"{giga:.1f}", f"{giga / measured.median:.0f}"] if giga else ["", ""])
    return format_table(["", *COLUMNS, "GFLOP", "GFLOP/s"], rows)


def format_measurement(measured: Measurement) -> list[str]:
    """Median seconds, spread, rounds, cost, peak and added memory: a cell for each of `COLUMNS`."""
    return [
        format_seconds(measured.median),
        f"{measured.spread:.0%}" if len(measured.seconds) > 1 else "",
        str(len(measured.seconds)) + ("" if measured.warmed_up else ", cold"),
        format_cost(measured.cost),
        format_memory(measured.peak_memory),
        format_memory(measured.added_memory),
    ]


def format_seconds(seconds: float) -> str:
    """Three digits or a few more."""
    return f"{seconds:.{1 if seconds >= 10 else 3 if seconds >= 0.1 else 5}f}"


def format_cost(cost: float | None) -> str:
    """A whole number, or with decimals where it is small."""
    return "" if cost is None else f"{cost:,.0f}" if cost >= 10 else f"{cost:.2f}"


def format_memory(memory: int | None) -> str:
    """Whole megabytes."""
    return "" if memory is None else f"{memory / 1e6:,.0f}"


def format_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown whose columns line up, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))]
        for cells in (headers, rule, *rows)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _to_json(tree: Any) -> Any:
    if isinstance(tree, Measurement):
        return tree.to_json()
    if isinstance(tree, Settings):
        return asdict(tree)
    return {key: _to_json(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def _measurements(saved: Mapping[str, Any]) -> dict[str, Measurement]:
    return {name: Measurement.from_json(measured) for name, measured in saved.items()}
