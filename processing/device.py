"""Where to compute, and in which number format."""

from __future__ import annotations

import torch


def pick_device_and_dtype(device: str | torch.device | None = None) -> tuple[torch.device, torch.dtype]:
    """The device to train on and the format for matrix products under autocast.

    Args:
        device: a device to use; a GPU if there is one, else the processor, by default.

    Returns:
        The device, and `torch.bfloat16` where the hardware computes in it, else `torch.float32`.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and _processor_has_bfloat16()
    return device, torch.bfloat16 if fast else torch.float32


def _processor_has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself: without such instructions it is slower than float32."""
    # PyTorch has no public name for these checks; where one is missing, float32 is always right.
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)
