"""What the processes of a run tell one another, and what they are told from outside."""

from __future__ import annotations

import signal
from typing import Any

import torch.distributed as dist


def gather_objects(value: Any) -> list[Any]:
    """One entry from each process, in all of them; a list of `value` alone where there is one process."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def ignore_stop_signals(worker: int = 0) -> None:
    """
    Leave SIGTERM and Ctrl-C to the main process; the `worker_init_fn` of data loaders.

    Schedulers and terminals signal a whole group of processes: workers that die of it would take the step with them
    that the main process wants to finish.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


__all__ = ["gather_objects", "ignore_stop_signals"]
