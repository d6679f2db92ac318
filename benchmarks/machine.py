"""What was measured on: the machine, the libraries and the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[1]


def describe_machine(device: torch.device) -> dict[str, Any]:
    """
    What a reader of the numbers has to know, as names and values for JSON; None where the system does not tell.

    `commit` ends in "+" where files were changed since, and `memory` is in bytes.
    """
    commit = memory = None
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--abbrev=10", "--dirty=+", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        commit = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    with suppress(AttributeError, ValueError, OSError):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "processor": _cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "memory": memory,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in ("torch", "transformers", "numpy", "pillow")},
        "load_average": load_average(),
    }


def load_average() -> float | None:
    """Processes that ran or waited for a CPU in the last minute, on average; None on systems without."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
