"""Time, memory and the machine's own speed, measured together."""

from __future__ import annotations

import ctypes
import gc
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

PRODUCT_SIDE = 2048
"""Rows and columns of the matrices whose product says how fast the machine is."""

_PRODUCTS_AROUND = 3


@dataclass(frozen=True)
class Measurement:
    """
    What was measured of one stage.

    Attributes:
        seconds: of each round.
        gflops: rate of the float32 matrix product on the CPU before, between and after the rounds, in 10^9
            operations per second; None on a GPU.
        peak_memory: largest memory of the process, or of tensors on the GPU, during the first round, in bytes; None
            where the system does not tell.
        added_memory: the same less what was held before that round.
        warmed_up: whether a run that is not counted came before.
        flops: floating-point operations of one round, where they were counted.
    """

    seconds: tuple[float, ...]
    gflops: float | None = None
    peak_memory: int | None = None
    added_memory: int | None = None
    warmed_up: bool = True
    flops: int | None = None

    @property
    def median(self) -> float:
        """Seconds of the median round."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Slowest less fastest round, as a share of the median."""
        return (max(self.seconds) - min(self.seconds)) / self.median

    @property
    def cost(self) -> float | None:
        """Median seconds times the matrix product's rate: about the same on a faster or slower CPU."""
        return None if self.gflops is None else self.median * self.gflops

    def to_json(self) -> dict[str, Any]:
        """As a dictionary; median, spread and cost are in it for readers."""
        return {**asdict(self), "median": self.median, "spread": self.spread, "cost": self.cost}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Measurement:
        """
        A measurement from the dictionary that `to_json` made.

        Raises:
            ValueError: it is not of that form.
        """
        values = {field.name: saved.get(field.name) for field in fields(cls)}
        seconds = values.pop("seconds")
        are_times = isinstance(seconds, list) and all(isinstance(one, float) and one > 0 for one in seconds)
        if not (seconds and are_times and all(isinstance(value, int | float | None) for value in values.values())):
            raise ValueError(f"a measurement holds {dict(saved)}: expected a list of seconds, rate and memory")
        return cls(tuple(seconds), **values)


class PeakMemory:
    """The high-water mark of memory since `start`: of the process on Linux, of tensors on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before: int | None = None

    def start(self) -> None:
        """Give back what can be given back, and forget earlier peaks."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
            return
        if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
            # Freed memory that the C library keeps and uses again would not show as a peak
            trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self._before = _status_bytes("VmRSS")
        except OSError:
            # Other systems, and some containers, keep no mark that can be reset
            self._before = None

    def read(self) -> tuple[int | None, int | None]:
        """Bytes at the peak, and how many more these are than at the start; None where the system does not tell."""
        if self._before is None:
            return None, None
        on_gpu = self._device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self._device) if on_gpu else _status_bytes("VmHWM")
        return peak, max(0, peak - self._before)


@dataclass
class Meter:
    """
    Measures stages, with products of matrices in between that tell how fast the machine is at the time.

    Attributes:
        device: where the stages compute.
        rounds: runs that count.
        budget: seconds after which no further round of a stage begins. A warm-up that takes longer counts as the only
            round.
        warmups: runs before the rounds.
        rates: of all products so far, in 10^9 operations per second; none on a GPU.
    """

    device: torch.device
    rounds: int = 5
    budget: float = 60.0
    warmups: int = 1
    rates: list[float] = field(default_factory=list)

    def measure(self, run: Callable[[], Any], *, in_process: bool = True) -> Measurement:
        """
        Run a stage several times.

        Args:
            run: the stage.
            in_process: False where it computes in another process, whose memory is not measured.
        """
        memory = PeakMemory(self.device)
        rates = self._measure_rates(_PRODUCTS_AROUND)
        memory.start()
        seconds, warmed_up = [self._time(run)], False
        if seconds[0] <= self.budget or self.warmups > 1:
            for _ in range(self.warmups - 1):
                self._time(run)
            memory.start()
            seconds, warmed_up = [self._time(run)], True
        # Before the next product, whose matrices would count
        peak, added = memory.read() if in_process else (None, None)
        while warmed_up and len(seconds) < self.rounds and sum(seconds) < self.budget:
            # Other work on the machine comes and goes: what slows the rounds has to slow the products as well
            rates += self._measure_rates(1)
            seconds.append(self._time(run))
        rates += self._measure_rates(_PRODUCTS_AROUND)
        self.rates += rates
        return Measurement(tuple(seconds), statistics.median(rates) if rates else None, peak, added, warmed_up)

    def _time(self, run: Callable[[], Any]) -> float:
        self._synchronize()
        start = time.perf_counter()
        run()
        self._synchronize()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _measure_rates(self, count: int) -> list[float]:
        return product_rates(count) if self.device.type == "cpu" else []


def product_rates(count: int, side: int = PRODUCT_SIDE) -> list[float]:
    """How fast the CPU multiplies float32 matrices: 10^9 operations per second, of `count` products each by itself."""
    left, right = torch.rand(2, side, side)
    out = left @ right
    rates = []
    for _ in range(count):
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        rates.append(2e-9 * side**3 / (time.perf_counter() - start))
    return rates


def _status_bytes(name: str) -> int:
    """A size in the process's status."""
    status = Path("/proc/self/status").read_text()
    if (found := re.search(rf"^{name}:\s*(\d+) kB$", status, re.MULTILINE)) is None:
        raise OSError(f"the process's status has no {name}")
    return int(found[1]) * 1024
