# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""Mean intersection over union, counted as images pass by: what is kept are counts of pairs, never an image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

RESULTS_FILE = "results.json"
"""What lies beside a trained model with the figures that it reached."""

_LOWEST, _HIGHEST = -(2**15), 2**16 - 1
"""Values that label maps may hold: all of 16 bits, and small negative numbers, which some use for "no label"."""

_DENSE = 1024
"""Range of values up to which a table has room for all of them."""

_MOST_VALUES = 4096
"""Different values of one pair of maps, whose table then takes 128 MB; real label sets have a quarter of that."""


class ConfusionMatrix:
    """
    Counts of (true class, predicted class) pairs over all pixels seen; memory does not grow with their number.

    Args:
        num_labels: C, the number of classes.
        ignore_index: value of true labels to leave out; None leaves out nothing.

    Attributes:
        table: the counts, `(C + 1, C + 1)` int64: true classes down, predicted ones across. The last row and column
            stand for labels outside the list, which `update` refuses and `add` counts as missed.
    """

    def __init__(self, num_labels: int, ignore_index: int | None = 255) -> None:
        if num_labels < 1:
            raise ValueError(f"num_labels is {num_labels}: there has to be at least one class.")
        self.num_labels = num_labels
        self.ignore_index = ignore_index
        self.table = torch.zeros(num_labels + 1, num_labels + 1, dtype=torch.int64)

    @property
    def counts(self) -> Tensor:
        """Counts of the pairs within the list, `(C, C)`."""
        return self.table[:-1, :-1]

    def update(self, predicted: Any, true: Any) -> None:
        """
        Count one image or a batch: see `count_pairs`.

        Raises:
            ValueError: for different shapes, or labels outside the list; predictions where the truth is ignored may
                be anything.
        """
        pairs = count_pairs(predicted, true)
        pairs = Counter({pair: count for pair, count in pairs.items() if pair[0] != self.ignore_index})
        for name, values in zip(("true", "predicted"), zip(*pairs, strict=True), strict=False):
            if not 0 <= min(values) <= max(values) < self.num_labels:
                raise ValueError(
                    f"{name} labels reach from {min(values)} to {max(values)}: expected 0 to {self.num_labels - 1}."
                )
        self.add(pairs)

    def add(self, pairs: Mapping[tuple[int, int], int]) -> None:
        """Add counts of (true, predicted) pairs, all of which count; values outside the list match nothing."""
        if pairs:
            places = torch.tensor(list(pairs))
            places[(places < 0) | (places >= self.num_labels)] = self.num_labels
            self.table.index_put_(tuple(places.T), torch.tensor(list(pairs.values())), accumulate=True)

    def merge(self, other: ConfusionMatrix) -> None:
        """Add what another one of the same classes has counted."""
        if other.num_labels != self.num_labels:
            raise ValueError(f"counts of {other.num_labels} classes cannot be added to those of {self.num_labels}.")
        self.table += other.table

    def iou(self) -> Tensor:
        """Intersection over union of each class, `(C,)`; NaN for a class neither present nor predicted."""
        hits = self.counts.diagonal().double()
        return hits / (self._true_pixels() + self.table[:, :-1].sum(0) - hits)

    def accuracy(self) -> Tensor:
        """Share of each class's pixels that were found, `(C,)`; NaN for a class that is not present."""
        return self.counts.diagonal().double() / self._true_pixels()

    def mean_iou(self, classes: Sequence[int] | None = None) -> float:
        """Mean of the IoU of some classes, by default of all, leaving out NaN."""
        return _mean(self.iou(), classes)

    def mean_accuracy(self, classes: Sequence[int] | None = None) -> float:
        """Mean of the accuracy of some classes, by default of all, leaving out NaN."""
        return _mean(self.accuracy(), classes)

    def overall_accuracy(self) -> float:
        """Share of all labelled pixels that were found; NaN where there are none."""
        return float(self.counts.diagonal().sum().double() / self._true_pixels().sum())

    def frequency_weighted_iou(self) -> float:
        """Mean of the classes' IoU weighted by their pixels; NaN where there are none."""
        pixels = self._true_pixels()
        return float((self.iou().nan_to_num(0) * pixels).sum() / pixels.sum())

    def _true_pixels(self) -> Tensor:
        return self.table[:-1].sum(1).double()


def count_pairs(predicted: Any, true: Any, name: str = "") -> Counter[tuple[int, int]]:
    """
    How often each (true, predicted) pair of values occurs.

    Args:
        predicted: label map or a stack of them: integer tensor, array, image of one channel or nested lists.
        true: of the same shape.
        name: what an error calls the two, for example "image 3".

    Raises:
        ValueError: for different shapes, and for anything but whole numbers from -32768 to 65535.
    """
    predicted, true = _as_label_map(predicted, f"{name} prediction"), _as_label_map(true, f"{name} reference")
    if predicted.shape != true.shape:
        raise ValueError(
            f"{name} prediction has shape {tuple(predicted.shape)} and its reference {tuple(true.shape)}: the sizes "
            "must agree, so resize the prediction to the reference.".strip()
        )
    if not predicted.numel():
        return Counter()
    true = true.to(predicted.device)
    lowest = min(int(true.min()), int(predicted.min()))
    values = torch.arange(lowest, max(int(true.max()), int(predicted.max())) + 1, device=true.device)
    if len(values) > _DENSE:
        # A table of the values that there are, not of all that there could be
        present: Any = (
            sum(torch.bincount(one.flatten() - lowest, minlength=len(values)) for one in (true, predicted)) > 0
        )
        places, values = present.cumsum(0) - 1, values[present]
        true, predicted, lowest = places[true - lowest], places[predicted - lowest], 0
    if len(values) > _MOST_VALUES:
        raise ValueError(f"the label maps hold {len(values)} different values: these are no maps of class indices.")
    codes = (true - lowest).mul_(len(values)).add_(predicted).sub_(lowest)
    table = torch.bincount(codes.flatten())
    found = table.nonzero().flatten()
    pairs = zip(values[found // len(values)].tolist(), values[found % len(values)].tolist(), strict=True)
    return Counter(dict(zip(pairs, table[found].tolist(), strict=True)))


def _as_label_map(value: Any, name: str) -> Tensor:
    """Whatever holds class indices as int64, of its own shape and device; `name` is what an error calls it."""
    name = name.strip()
    if isinstance(value, Image.Image) and len(value.getbands()) > 1:
        raise ValueError(f"{name} is an image of mode {value.mode}: label maps have one channel of class indices.")
    if not isinstance(value, Tensor):
        try:
            array = np.asarray(value)
        except ValueError as error:
            raise ValueError(f"{name} has rows of different lengths: pass one label map, height x width.") from error
        if array.dtype.kind not in "biu" and array.size:
            raise ValueError(f"{name} holds {array.dtype} values: expected whole numbers, such as argmax returns.")
        value = torch.from_numpy(array.astype(np.int64))
    if value.is_floating_point() or value.is_complex():
        raise ValueError(f"{name} holds {value.dtype} values: expected whole numbers, such as argmax returns.")
    value = value.detach().long()
    if value.numel() and not _LOWEST <= int(value.min()) <= int(value.max()) <= _HIGHEST:
        raise ValueError(
            f"{name} holds values from {int(value.min())} to {int(value.max())}: label maps have whole numbers from "
            f"{_LOWEST} to {_HIGHEST}."
        )
    return value


def _mean(values: Tensor, classes: Sequence[int] | None) -> float:
    return float((values if classes is None else values[list(classes)]).nanmean())


__all__ = ["RESULTS_FILE", "ConfusionMatrix", "count_pairs"]
