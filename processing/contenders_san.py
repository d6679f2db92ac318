# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""Which classes may win in a part of an image: bounds that spare most of the products, and change no result.

A tile lies between the centres of a few mask cells, its corners, and interpolation stays between their lowest and
highest logit. So no class can score more in the tile than with the highest logit of every mask, and the winner scores
at least what the best class would with the lowest. Classes that cannot reach that are left out: of hundreds of
classes a handful is left.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

BLOCK_FLOATS = 2**20
"""Numbers computed at once on a CPU, 4 MB: they stay in its caches."""

Block = tuple[torch.Tensor | slice, torch.Tensor, torch.Tensor]
"""Tiles (n), for each of them the classes (n, k) that may win there, and their probabilities (n, k, queries)."""

_FEWEST_CLASSES = 4
"""Products with fewer rows round otherwise: best scores and scores of all classes would differ in the last bit."""

_ROUNDING = 1e-3
"""More than the share of a score that float32 can miss it by: with 100 queries that is 1e-4 at worst."""


def contending_blocks(corners: torch.Tensor, probabilities: torch.Tensor, pixels: int) -> Iterator[Block]:
    """
    Tiles that have about as many contenders, together.

    Args:
        corners: (tiles, corners down, corners across, queries), mask logits.
        probabilities: (classes, queries).
        pixels: of a tile.
    """
    contends = contenders(corners, probabilities)
    counts = contends.sum(dim=1)
    fewest = min(_FEWEST_CLASSES, len(probabilities))
    most = max(fewest, int(counts.max()))
    # Lists are filled up with class 0, which is in them already or cannot win. Where a logit is no number no class
    # contends, and the first of all that have no score is reported
    classes = counts.new_zeros(len(counts), most)
    classes[torch.arange(most) < counts[:, None]] = contends.nonzero()[:, 1]
    left = counts.argsort(descending=True)
    while len(left):
        most = max(fewest, int(counts[left[0]]))
        at_once = max(1, BLOCK_FLOATS // ((most + probabilities.shape[1]) * pixels))
        tiles, left = left[:at_once], left[at_once:]
        numbers = classes[tiles, :most]
        yield tiles, numbers, probabilities[numbers]


def contenders(corners: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """
    Which classes may win somewhere in a tile.

    Args:
        corners: (tiles, corners down, corners across, queries), mask logits.
        probabilities: (classes, queries).

    Returns:
        (tiles, classes) bool.
    """
    lowest, highest = (bound.sigmoid() for bound in corners.flatten(1, 2).aminmax(dim=1))
    certain = (lowest @ probabilities.T).amax(dim=1, keepdim=True)
    possible = highest @ probabilities.T
    return possible >= (1 - _ROUNDING) * certain


__all__ = ["BLOCK_FLOATS", "Block", "contenders", "contending_blocks"]
