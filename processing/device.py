# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""Where to compute, and in which number format."""

from __future__ import annotations

import torch


def pick_device(name: str | torch.device | None = None) -> torch.device:
    """
    The device to compute on.

    Args:
        name: as PyTorch writes it; None takes a GPU if there is one, else the CPU.

    Raises:
        ValueError: there is no such device on this machine.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except Exception as error:
        # Each kind of device that is not there has its own kind of exception
        raise ValueError(f"device {name} cannot be used on this machine: leave it out, or pass cpu") from error
    return device


def pick_dtype(device: torch.device) -> torch.dtype:
    """The format for matrix products under autocast: bfloat16 where the hardware computes in it, else float32."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and _cpu_has_bfloat16()
    return torch.bfloat16 if fast else torch.float32


def pick_device_and_dtype(device: str | torch.device | None = None) -> tuple[torch.device, torch.dtype]:
    """`pick_device` and `pick_dtype` at once."""
    picked = pick_device(device)
    return picked, pick_dtype(picked)


def _cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 itself: without such instructions it is slower than float32."""
    # PyTorch has no public name for these checks; where one is missing, float32 is always right.
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)


__all__ = ["pick_device", "pick_device_and_dtype", "pick_dtype"]
