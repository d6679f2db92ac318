"""Where the time goes within a stage, and how many operations it takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode


def count_flops(run: Callable[[], Any]) -> int:
    """Floating-point operations of the products and convolutions of a stage in eager mode; a multiply-add is two."""
    # The fused attention of CPUs is unknown to the counter; the plain one is made of products it counts
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return int(counter.get_total_flops())


def profile_stage(run: Callable[[], Any], trace: Path, device: torch.device) -> str:
    """
    Profile one run, after another to warm up.

    Args:
        run: a stage.
        trace: file to write, for chrome://tracing or https://ui.perfetto.dev.
        device: where it computes.

    Returns:
        a table of the operators that take longest.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    run()
    with profile(activities=activities, profile_memory=True) as profiler:
        run()
    profiler.export_chrome_trace(str(trace))
    order = f"self_{device.type}_time_total"
    return profiler.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=50)
