"""What the processes of a run tell one another."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def gather_objects(value: Any) -> list[Any]:
    """One entry from each process, in all of them; a list of `value` alone where there is one process."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


__all__ = ["gather_objects"]
