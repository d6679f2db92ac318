"""Whether anything got slower or needs more memory than in an earlier run."""

from __future__ import annotations

from dataclasses import dataclass

from .measure import Measurement
from .report import Report, format_cost, format_memory, format_seconds, format_table

MEMORY_SLACK = 16_000_000
"""Bytes of growth that are never called a regression: allocators round, and threads have buffers."""


@dataclass(frozen=True)
class Comparison:
    """
    One stage in two runs.

    Attributes:
        name: of the stage.
        old: as it was.
        new: as it is, or None where it was not measured again.
        slower: whether it takes longer than the tolerance allows.
        larger: whether it needs more memory than the tolerance allows.
    """

    name: str
    old: Measurement
    new: Measurement | None
    slower: bool = False
    larger: bool = False


def compare_reports(old: Report, new: Report, tolerance: float) -> list[Comparison]:
    """
    Compare stage by stage. Times are compared as cost, so that the machines may differ; on a GPU, which has no cost,
    as seconds. Memory is what a stage adds to the process.

    Args:
        old: an earlier run.
        new: a later run.
        tolerance: growth that is not yet a regression, as a share.

    Raises:
        ValueError: the runs did not measure the same thing, or have no stage in common.
    """
    if names := old.settings.differences(new.settings):
        values = ", ".join(f"{name} {_value(old, name)} and {_value(new, name)}" for name in names)
        raise ValueError(f"the runs differ in {values}: measure again with the older run's settings")
    if not set(old.stages) & set(new.stages):
        raise ValueError(
            f"the runs have no stage in common: the older one has {', '.join(old.stages) or 'none'}, the newer one "
            f"{', '.join(new.stages) or 'none'}"
        )
    if old.machine.get("gpu") != new.machine.get("gpu"):
        raise ValueError(
            f"the runs were made on {old.machine.get('gpu') or 'a processor'} and {new.machine.get('gpu')}: seconds "
            "on a GPU compare with those on the same GPU only"
        )
    return [_compare(name, measured, new.stages.get(name), tolerance) for name, measured in old.stages.items()]


def has_regression(comparisons: list[Comparison]) -> bool:
    """Whether a stage got slower or larger."""
    return any(comparison.slower or comparison.larger for comparison in comparisons)


def format_comparisons(comparisons: list[Comparison], titles: dict[str, str]) -> str:
    """A table with old, new and change of time and memory."""
    on_gpu = all(comparison.old.cost is None for comparison in comparisons)
    unit = "seconds" if on_gpu else "cost"
    headers = ["", f"{unit} before", "after", "change", "added MB before", "after", "change", ""]
    rows = []
    for comparison in comparisons:
        old, new = comparison.old, comparison.new
        row = [titles.get(comparison.name, comparison.name), _time_text(old)]
        if new is None:
            rows.append([*row, "", "", format_memory(old.added_memory), "", "", "not measured"])
            continue
        verdict = [word for word, holds in (("SLOWER", comparison.slower), ("LARGER", comparison.larger)) if holds]
        row += [_time_text(new), _change(_time(old), _time(new))]
        row += [format_memory(old.added_memory), format_memory(new.added_memory)]
        rows.append([*row, _change(old.added_memory, new.added_memory), ", ".join(verdict) or "ok"])
    return format_table(headers, rows)


def _compare(name: str, old: Measurement, new: Measurement | None, tolerance: float) -> Comparison:
    if new is None:
        return Comparison(name, old, None)
    slower = _time(new) > (1 + tolerance) * _time(old)
    larger = (
        old.added_memory is not None
        and new.added_memory is not None
        and new.added_memory > (1 + tolerance) * old.added_memory + MEMORY_SLACK
    )
    return Comparison(name, old, new, slower, larger)


def _time(measured: Measurement) -> float:
    return measured.median if measured.cost is None else measured.cost


def _time_text(measured: Measurement) -> str:
    return format_seconds(measured.median) if measured.cost is None else format_cost(measured.cost)


def _change(old: float | None, new: float | None) -> str:
    return "" if not old or new is None else f"{new / old - 1:+.0%}"


def _value(report: Report, name: str) -> str:
    value = getattr(report.settings, name)
    return "not set" if value is None else str(value)
