# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""The six benchmark label sets that official archives can be turned into: `presets.yaml`, as objects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from modeling_san.processing.vocabulary_san import ClassList, load_vocabulary


@dataclass(frozen=True)
class Preset:
    """
    One of the label sets; `presets.yaml` says what its entries mean.

    Attributes:
        name: what `load_vocabulary` calls the label set.
        title: what its authors call it.
        homepage: where its archives are.
        expected: what the archives hold, in words.
        splits: official number of images of each split, and words for its paths.
        roots: folders in which paths begin.
        images: where images may be.
        labels: the releases of the label files.
        lists: where the lists of a split's images may be; none where folders are the splits.
    """

    name: str
    title: str
    homepage: str
    expected: str
    splits: Mapping[str, Mapping[str, Any]]
    roots: tuple[str, ...]
    images: tuple[str, ...]
    labels: tuple[Mapping[str, Any], ...]
    lists: tuple[str, ...] = ()

    @property
    def vocabulary(self) -> ClassList:
        """Class names and ignore label."""
        return load_vocabulary(self.name)


def load_preset(name: str) -> Preset:
    """
    The preset of a label set.

    Args:
        name: such as "ade20k_150".

    Raises:
        ValueError: there is none of that name; the message lists those there are.
    """
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}: choose one of {', '.join(sorted(PRESETS))}.")
    return PRESETS[name]


PRESETS = {
    name: Preset(name, **facts)
    for name, facts in yaml.safe_load(Path(__file__).with_name("presets.yaml").read_text(encoding="utf-8")).items()
}

__all__ = ["PRESETS", "Preset", "load_preset"]
