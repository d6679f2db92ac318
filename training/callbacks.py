# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""What goes on beside the steps of a training run: figures, drawings, signals."""

from __future__ import annotations

import json
import logging
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import GeneralTracker, on_main_process
from tqdm import tqdm

from modeling_san.processing.files import write_text
from modeling_san.processing.wording_san import escaped

METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "curves.png"

_logger = logging.getLogger(__name__)


def say(message: str) -> None:
    """A line on stderr that does not tear the progress bar."""
    tqdm.write(f"san: {escaped(message)}", file=sys.stderr)


def warn(message: str) -> None:
    """A line about what the user may want to change."""
    say(f"warning: {message}")


class JsonLinesTracker(GeneralTracker):
    """
    One of Accelerate's trackers: figures of a run in `metrics.jsonl`, one JSON object with its `step` a line.

    A run that begins at `step` drops the lines of later steps, which a cut run left in `folder`.
    """

    name = "json_lines"
    requires_logging_directory = False

    def __init__(self, folder: Path, step: int) -> None:
        super().__init__()
        self.path = folder / METRICS_FILE
        self.step = step
        self._failed = False

    @property
    def tracker(self) -> Path:
        """The file."""
        return self.path

    @on_main_process
    def start(self) -> None:
        """Keep the lines up to the first step, if there are any."""
        kept = [line for line in read_metrics(self.path) if line["step"] <= self.step] if self.path.exists() else []
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    @on_main_process
    def log(self, values: dict[str, float], step: int | None = None, **kwargs: Any) -> None:
        """Add a line; a full disk costs the line and is said once, but not the run."""
        # Six significant digits are enough; JSON cannot hold what is not finite
        rounded = {name: float(f"{value:.6g}") if math.isfinite(value) else None for name, value in values.items()}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **rounded}) + "\n")
        except OSError as error:
            if not self._failed:
                _logger.warning("%s cannot be written (%s): its lines are lost.", self.path, error.strerror)
            self._failed = True


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """
    Lines of a `metrics.jsonl`, as far as they are whole: a run that was killed may leave half a line.

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


class Interval:
    """Means over the steps since the last line of figures, and the memory of a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._restart()

    def _restart(self) -> None:
        self.sums: dict[str, float] = {}
        self.steps = self.images = 0
        self.began = time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that does not count."""
        began = time.monotonic()
        yield
        self.began += time.monotonic() - began

    def add(self, terms: Mapping[str, float], images: int) -> None:
        """Count a step: its loss terms and gradient norm, and how many images it had."""
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in terms.items()}
        self.steps += 1
        self.images += images

    def figures(self) -> dict[str, float]:
        """Mean of each term, images a second, and the largest memory in use so far in GB; the next interval begins."""
        means = {name: total / self.steps for name, total in self.sums.items()}
        seconds = max(time.monotonic() - self.began, 1e-9)
        speed = self.images / seconds
        self._restart()
        return {**means, "images_per_second": speed, "peak_memory_gb": _peak_memory(self.device)}


def _peak_memory(device: torch.device) -> float:
    """In GB, of the GPU's allocator, or of this process where it computes on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows has no such count
        return math.nan
    # Kilobytes on Linux, bytes on macOS
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM or a first Ctrl-C sets; a second Ctrl-C ends the run at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask_to_stop(number: int, frame: object) -> None:
        if number == signal.SIGINT and stop.is_set():
            raise KeyboardInterrupt
        warn("stopping after this step; a checkpoint is saved.")
        stop.set()

    before = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_stop_signals(worker: int = 0) -> None:
    """
    Leave SIGTERM and Ctrl-C to the main process; the `worker_init_fn` of data loaders.

    Schedulers and terminals signal a whole group: workers that die of it would take the step with them that the main
    process wants to finish.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


__all__ = [
    "CURVES_FILE",
    "METRICS_FILE",
    "Interval",
    "JsonLinesTracker",
    "ignore_stop_signals",
    "read_metrics",
    "say",
    "stop_signals",
    "warn",
]
