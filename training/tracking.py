"""What a training run tells: lines of `metrics.jsonl`, Accelerate's trackers, curves as an image."""

from __future__ import annotations

import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from modeling_san.processing.files import write_text

METRICS_FILE = "metrics.jsonl"

_logger = logging.getLogger(__name__)


class MetricsLog:
    """
    Figures of a run, one JSON object with its `step` a line; used by the main process only.

    Args:
        folder: where `metrics.jsonl` lies.
        accelerator: passes the figures on to its trackers.
        step: where the run begins; lines of later steps, which a cut run left, are dropped.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, step: int = 0) -> None:
        self.path = folder / METRICS_FILE
        self.accelerator = accelerator
        self._failed = False
        kept = [line for line in read_metrics(self.path) if line["step"] <= step] if self.path.exists() else []
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """Add a line; a full disk costs the line and is said once, but not the run."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **figures}) + "\n")
        except OSError as error:
            if not self._failed:
                _logger.warning("%s cannot be written (%s): its lines are lost.", self.path, error.strerror)
            self._failed = True
        numbers = {name: value for name, value in figures.items() if isinstance(value, (int, float))}
        self.accelerator.log(numbers, step=step)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """
    Lines of a `metrics.jsonl`.

    Args:
        path: the file.

    Returns:
        the lines that are whole; a run that was killed may leave half a line.

    Raises:
        ValueError: where there is no such file.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror or error}): pass the output folder of a training run."
        ) from error
    lines = []
    for line in text.splitlines():
        try:
            figures = json.loads(line)
        except ValueError:
            continue
        if isinstance(figures, dict) and isinstance(figures.get("step"), int):
            lines.append(figures)
    return lines


def peak_memory(device: torch.device) -> float:
    """Largest memory in use so far in GB: of the GPU's allocator, or of this process where it computes on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows has no such count
        return math.nan
    # Kilobytes on Linux, bytes on macOS
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def significant(figures: dict[str, float]) -> dict[str, float | None]:
    """Figures with six significant digits; what is not finite, which JSON cannot hold, as None."""
    return {name: float(f"{value:.6g}") if math.isfinite(value) else None for name, value in figures.items()}


__all__ = ["METRICS_FILE", "MetricsLog", "peak_memory", "read_metrics", "significant"]
