"""Whether anything got slower or needs more memory than in an earlier run."""

from __future__ import annotations

from collections.abc import Mapping

from .measure import Measurement
from .report import Report, format_cost, format_memory, format_seconds, format_table

MEMORY_SLACK = 16_000_000
"""Bytes of growth that are never called a regression: allocators round, and threads have buffers."""


def check_comparable(old: Report, new: Report) -> None:
    """
    Refuse runs that did not measure the same thing.

    Raises:
        ValueError: they have other settings or another GPU, or no stage in common.
    """
    if names := old.settings.differences(new.settings):
        values = [f"{name} {getattr(old.settings, name)} and {getattr(new.settings, name)}" for name in names]
        raise ValueError(f"the runs differ in {', '.join(values)}: measure again with the older run's settings")
    if not set(old.stages) & set(new.stages):
        before, after = (", ".join(report.stages) or "none" for report in (old, new))
        raise ValueError(f"the runs have no stage in common: the older one has {before}, the newer one {after}")
    if old.machine.get("gpu") != new.machine.get("gpu"):
        before, after = (report.machine.get("gpu") or "a CPU" for report in (old, new))
        raise ValueError(f"the runs were made on {before} and {after}: seconds compare on the same GPU only")


def judge(old: Measurement, new: Measurement | None, tolerance: float) -> str:
    """
    What became of a stage: "ok", "SLOWER", "LARGER", both, or "not measured".

    Times are compared as cost, so that the machines may differ; on a GPU, which has no cost, as seconds. Memory is
    what the stage adds to the process. `tolerance` is the growth that is not yet a regression, as a share.
    """
    if new is None:
        return "not measured"
    words = ["SLOWER"] if _time(new) > (1 + tolerance) * _time(old) else []
    if old.added_memory is not None and new.added_memory is not None:
        words += ["LARGER"] if new.added_memory > (1 + tolerance) * old.added_memory + MEMORY_SLACK else []
    return ", ".join(words) or "ok"


def is_regression(verdict: str) -> bool:
    """Whether `judge` found a stage slower or larger."""
    return verdict not in ("ok", "not measured")


def format_comparison(old: Report, new: Report, verdicts: Mapping[str, str], titles: Mapping[str, str]) -> str:
    """A table with old, new and change of time and memory of each stage that has a verdict."""
    unit = "seconds" if all(measured.cost is None for measured in old.stages.values()) else "cost"
    headers = ["", f"{unit} before", "after", "change", "added MB before", "after", "change", ""]
    rows = []
    for name, verdict in verdicts.items():
        before, after = old.stages[name], new.stages.get(name)
        times = [_time_text(before), "", ""]
        memory = [format_memory(before.added_memory), "", ""]
        if after is not None:
            times[1:] = _time_text(after), _change(_time(before), _time(after))
            memory[1:] = format_memory(after.added_memory), _change(before.added_memory, after.added_memory)
        rows.append([titles.get(name, name), *times, *memory, verdict])
    return format_table(headers, rows)


def _time(measured: Measurement) -> float:
    return measured.median if measured.cost is None else measured.cost


def _time_text(measured: Measurement) -> str:
    return format_seconds(measured.median) if measured.cost is None else format_cost(measured.cost)


def _change(old: float | None, new: float | None) -> str:
    return "" if not old or new is None else f"{new / old - 1:+.0%}"
