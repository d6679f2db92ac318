"""What a run measures; two runs can be compared where these agree."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

SIZE_DIVISOR = 32
"""Sides of images are multiples of this, so that none is padded."""

DTYPES = ("float32", "bfloat16")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")


@dataclasses.dataclass(frozen=True)
class Settings:
    """
    Everything that changes how much there is to compute.

    Attributes:
        model: `"vit_b_16"`, `"vit_l_14"` or a folder that save_pretrained wrote.
        size: side of the square image that the network sees, in pixels.
        batch: images at once.
        classes: labels of the vocabulary.
        target: height and width of the label maps, in pixels.
        queries: mask proposals per image; None leaves them to the model.
        dtype: of the network's weights and activations.
        compile: mode of `torch.compile`, or None for eager.
        threads: of the CPU.
        device: as PyTorch writes it.
    """

    model: str = "vit_b_16"
    size: int = 640
    batch: int = 1
    classes: int = 171
    target: tuple[int, int] = (480, 640)
    queries: int | None = None
    dtype: str = "float32"
    compile: str | None = None
    threads: int = 1
    device: str = "cpu"

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Settings:
        """Settings from a dictionary; KeyError, TypeError or ValueError where it holds something else."""
        height, width = saved["target"]
        return cls(**{**saved, "target": (height, width)})

    @property
    def mode(self) -> str:
        """How the network runs, in words."""
        return "eager" if self.compile is None else f"compiled ({self.compile})"

    def differences(self, other: Settings) -> list[str]:
        """Names of the settings that have another value in `other`."""
        names = [field.name for field in dataclasses.fields(self)]
        return [name for name in names if getattr(self, name) != getattr(other, name)]
