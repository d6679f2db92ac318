# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""The small model that ships with the package: its folder, its example images, and the words it was made with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

BUILTIN_MODEL = Path(__file__).parent / "builtin_model"
"""Folder of the small model that ships with the package; `from_pretrained(BUILTIN_MODEL)` loads it."""

_EXAMPLES = Path(__file__).parent / "drawn_examples"

GROUPS: dict[str, str] = {
    "seen": "combinations with masks in training",
    "never seen": "combinations without any mask",
    "backgrounds": "backgrounds",
}
"""The groups of the model's words, as its `results.json` names them, and what each holds."""


@dataclass(frozen=True)
class Example:
    """
    A drawn image.

    Attributes:
        image: RGB.
        labels: names of what is in it.
        label_map: of the image's size; its values are positions in `labels`.
    """

    image: Image
    labels: tuple[str, ...]
    label_map: Image


@lru_cache(maxsize=1)
def words() -> dict[str, tuple[str, ...]]:
    """The words that the built-in model knows, by their group in `GROUPS`."""
    return {group: tuple(names) for group, names in _read_facts()["words"].items()}


def is_drawn_world(labels: Iterable[str] | None) -> bool:
    """Whether a model's `training_labels` are the built-in model's words and no others."""
    return set(labels or ()) == {word for group in words().values() for word in group}


def load_examples(enlargement: int = 1) -> list[Example]:
    """
    The three images that ship with the package, 128 x 192 pixels.

    Args:
        enlargement: how often sides are to be that long, for the eye; the model's processor shrinks images again.
    """
    from PIL import Image

    examples = []
    for name, labels in _read_facts()["examples"].items():
        with Image.open(_EXAMPLES / f"{name}.png") as file:
            image = file.convert("RGB")
        with Image.open(_EXAMPLES / f"{name}_labels.png") as file:
            label_map = file.copy()
        size = image.width * enlargement, image.height * enlargement
        image = image.resize(size, Image.Resampling.LANCZOS)
        examples.append(Example(image, tuple(labels), label_map.resize(size, Image.Resampling.NEAREST)))
    return examples


def describe_groups() -> dict[str, str]:
    """A line about each group of words, such as "6 backgrounds"."""
    return {group: f"{len(words()[group])} {meaning}" for group, meaning in GROUPS.items()}


def format_results(figures: Mapping[str, Mapping[str, float]]) -> str:
    """
    The mean IoU of each group of words as a table.

    Args:
        figures: what the model's `results.json` holds: for `bias on` and `bias off`, a share for each group.
    """
    rows = [f"{'mean IoU on fresh images':<44}{'bias on':>9}{'bias off':>10}"]
    rows += [
        f"{description:<44}{figures['bias on'][group]:>9.3f}{figures['bias off'][group]:>10.3f}"
        for group, description in describe_groups().items()
    ]
    return "\n".join(rows)


def _read_facts() -> dict[str, Any]:
    return json.loads((_EXAMPLES / "examples.json").read_text(encoding="utf-8"))


__all__ = [
    "BUILTIN_MODEL",
    "GROUPS",
    "Example",
    "describe_groups",
    "format_results",
    "is_drawn_world",
    "load_examples",
    "words",
]
