"""Mean intersection over union, counted as images pass by: what is kept are counts of pairs, never an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

RESULTS_FILE = "results.json"
"""What lies beside a trained model with the figures that it reached."""

_LOWEST, _HIGHEST = -(2**15), 2**16 - 1
"""Values that label maps may hold: all of 16 bits, and small negative numbers, which some use for "no label"."""

_BYTES = 256
_MOST_VALUES = 8192
"""Different values that may be told apart, 512 MB of counts; real label sets have a tenth of that."""


class ConfusionMatrix:
    """
    Counts of (true class, predicted class) pairs over all pixels seen; memory does not grow with their number.

    Args:
        num_labels: C, the number of classes.
        ignore_index: value of true labels to leave out; None leaves out nothing.
        device: where the counts are kept.

    Attributes:
        table: the counts, `(C + 1, C + 1)` int64: true classes down, predicted ones across. The last row and column
            stand for labels outside the list, which `update` refuses and the `mean_iou` metric counts as missed.
    """

    def __init__(
        self, num_labels: int, ignore_index: int | None = 255, device: torch.device | str | None = None
    ) -> None:
        if num_labels < 1:
            raise ValueError(f"num_labels is {num_labels}: there has to be at least one class.")
        self.num_labels = num_labels
        self.ignore_index = ignore_index
        self.table = torch.zeros(num_labels + 1, num_labels + 1, dtype=torch.int64, device=device)

    @property
    def counts(self) -> Tensor:
        """Counts of the pairs within the list, `(C, C)`."""
        return self.table[:-1, :-1]

    def update(self, predicted: Tensor, true: Tensor) -> None:
        """
        Count one image or a batch.

        Args:
            predicted: integer label map, any shape, values from 0 to C - 1.
            true: label map of the same shape; `ignore_index` is left out.

        Raises:
            ValueError: for different shapes, or labels outside the list.
        """
        if predicted.shape != true.shape:
            raise ValueError(f"predicted is {tuple(predicted.shape)} and true {tuple(true.shape)}: sizes must agree.")
        true, predicted = true.to(predicted.device).long(), predicted.long()
        ignored = torch.zeros_like(true, dtype=torch.bool) if self.ignore_index is None else true == self.ignore_index
        true, predicted = true.masked_fill(ignored, 0), predicted.masked_fill(ignored, 0)
        for name, values in (("true", true), ("predicted", predicted)):
            if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < self.num_labels:
                raise ValueError(
                    f"{name} labels reach from {values.min()} to {values.max()}: expected 0 to {self.num_labels - 1}."
                )
        # The row of those left out is counted behind the others and cut off
        true = true.masked_fill(ignored, self.num_labels)
        counts = torch.zeros(self.num_labels + 1, self.num_labels, dtype=torch.int64, device=true.device)
        _count_into(counts, true * self.num_labels + predicted)
        self.table[:-1, :-1] += counts[:-1].to(self.table.device)

    def merge(self, other: ConfusionMatrix) -> None:
        """Add what another one of the same classes has counted."""
        if other.num_labels != self.num_labels:
            raise ValueError(f"counts of {other.num_labels} classes cannot be added to those of {self.num_labels}.")
        self.table += other.table.to(self.table.device)

    def iou(self) -> Tensor:
        """Intersection over union of each class, `(C,)`; NaN for a class neither present nor predicted."""
        hits = self.counts.diagonal().double()
        return hits / (self._true_pixels() + self._predicted_pixels() - hits)

    def accuracy(self) -> Tensor:
        """Share of each class's pixels that were found, `(C,)`; NaN for a class that is not present."""
        return self.counts.diagonal().double() / self._true_pixels()

    def mean_iou(self, classes: Sequence[int] | None = None) -> float:
        """
        Mean of the classes' IoU, leaving out NaN.

        Args:
            classes: which classes to average; all by default.
        """
        return _mean(self.iou(), classes)

    def mean_accuracy(self, classes: Sequence[int] | None = None) -> float:
        """Mean of the classes' accuracy, leaving out NaN; the argument is that of `mean_iou`."""
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

    def _predicted_pixels(self) -> Tensor:
        return self.table[:, :-1].sum(0).double()


class PairCounts:
    """
    Counts of (true value, predicted value) pairs before it is known which values are classes.

    Values are told apart as they come: those of 8 bits have a row and a column from the start, others get theirs when
    they first appear. Which of them are ignored, renamed or out of range is decided by `fold`, once.

    Attributes:
        values: the value of each row and column.
        counts: true values down, predicted ones across, on the device of the first label map; larger than `values` is
            long, so that it seldom has to grow.
        images: how many pairs of label maps were counted.
    """

    def __init__(self) -> None:
        self.values = list(range(_BYTES))
        self.images = 0
        self.counts: Tensor | None = None
        self._places: dict[torch.device, Tensor] = {}

    def add(self, predicted: Any, true: Any, name: str = "") -> None:
        """
        Count the pixels of one pair of label maps, or of two stacks of them.

        Args:
            predicted: integer tensor, array, image of one channel or nested lists.
            true: of the same shape.
            name: what an error calls the pair, for example "image 3".

        Raises:
            ValueError: for different shapes, and for anything but whole numbers from -32768 to 65535.
        """
        predicted, true = _as_label_map(predicted, f"{name} prediction"), _as_label_map(true, f"{name} reference")
        if predicted.shape != true.shape:
            raise ValueError(
                f"{name} prediction has shape {tuple(predicted.shape)} and its reference {tuple(true.shape)}: the "
                "sizes must agree, so resize the prediction to the reference.".strip()
            )
        self._add_flat(predicted.flatten(), true.to(predicted.device).flatten(), name)
        self.images += 1

    def _add_flat(self, predicted: Tensor, true: Tensor, name: str) -> None:
        if self.counts is None:
            self.counts = torch.zeros(_BYTES, _BYTES, dtype=torch.int64, device=predicted.device)
        rows, columns = self._find(true, f"{name} reference"), self._find(predicted, f"{name} prediction")
        # At most 8192 ** 2 pairs: 32 bits are enough, and faster
        pairs = rows.to(torch.int32, copy=True).mul_(len(self.counts)).add_(columns)
        _count_into(self.counts, pairs.to(self.counts.device))

    def merge(self, values: Sequence[int], counts: Tensor) -> None:
        """Add `counts` (true, predicted) of other `values`, one for each row and column."""
        known = set(self.values)
        self._learn([value for value in values if value not in known])
        if self.counts is None:
            self.counts = torch.zeros(_BYTES, _BYTES, dtype=torch.int64, device=counts.device)
        self._grow()
        place = {value: index for index, value in enumerate(self.values)}
        index = torch.tensor([place[value] for value in values], device=self.counts.device)
        self.counts[index[:, None], index] += counts[: len(values), : len(values)].to(self.counts.device)

    def all_reduce(self) -> None:
        """Add up the counts of all processes, in each of them."""
        counts = None if self.counts is None else self.counts[: len(self.values), : len(self.values)].cpu()
        everybody: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, (self.values, counts, self.images))
        total = PairCounts()
        for values, counts, images in everybody:
            if counts is not None:
                total.merge(values, counts)
            total.images += images
        self.values, self.counts, self.images, self._places = total.values, total.counts, total.images, {}

    def fold(
        self,
        num_labels: int,
        ignore_index: int | None = 255,
        label_map: Mapping[int, int] | None = None,
        reduce_labels: bool = False,
    ) -> ConfusionMatrix:
        """
        Turn values into classes.

        Args:
            num_labels: C, the number of classes.
            ignore_index: true value to leave out, as it is after the next two steps.
            label_map: true values to replace, all at once.
            reduce_labels: take 1 off every true value, after `label_map`; 0 and 255 become 255.

        Returns:
            the counts of classes; values outside the list are in the last row and column.
        """
        folded = ConfusionMatrix(num_labels, ignore_index)
        if self.counts is None:
            return folded
        renamed = {int(old): int(new) for old, new in (label_map or {}).items()}
        true = torch.tensor([renamed.get(value, value) for value in self.values])
        if reduce_labels:
            true = torch.where(true == 0, 255, true) - 1
            true = torch.where(true == 254, 255, true)
        kept = torch.ones_like(true, dtype=torch.bool) if ignore_index is None else true != ignore_index
        counts = self.counts[: len(true), : len(true)].cpu()[kept]
        rows = torch.zeros(num_labels + 1, len(self.values), dtype=torch.int64)
        rows.index_add_(0, _place_in_list(true[kept], num_labels), counts)
        folded.table.index_add_(1, _place_in_list(torch.tensor(self.values), num_labels), rows)
        return folded

    def _find(self, values: Tensor, name: str) -> Tensor:
        """Row of every value."""
        if values.dtype == torch.uint8 or not len(values):
            return values
        if values.dtype in (torch.uint16, torch.uint32, torch.uint64):
            values = values.to(torch.int32 if values.dtype == torch.uint16 else torch.int64)
        low, high = (int(end) for end in torch.aminmax(values))
        if 0 <= low <= high < _BYTES:
            return values
        if low < _LOWEST or high > _HIGHEST:
            raise ValueError(
                f"{name} holds values from {low} to {high}: label maps have whole numbers from {_LOWEST} to "
                f"{_HIGHEST}.".strip()
            )
        index = values.to(torch.int32) - _LOWEST
        places = self._places_on(values.device).index_select(0, index)
        if int(places.min()) < 0:
            self._learn(values[places < 0].unique().tolist())
            self._grow()
            places = self._places_on(values.device).index_select(0, index)
        return places

    def _learn(self, new: Sequence[int]) -> None:
        """Give new values a row and a column."""
        if len(self.values) + len(new) > _MOST_VALUES:
            raise ValueError(
                f"the label maps hold more than {_MOST_VALUES} different values: these are no maps of class indices."
            )
        self.values += new
        self._places.clear()

    def _grow(self) -> None:
        """Make room for all values."""
        assert self.counts is not None
        if (missing := len(self.values) - len(self.counts)) > 0:
            more = -(-missing // _BYTES) * _BYTES
            self.counts = torch.nn.functional.pad(self.counts, (0, more, 0, more))

    def _places_on(self, device: torch.device) -> Tensor:
        """Row of every value from the lowest to the highest, -1 where it has none yet."""
        if device not in self._places:
            places = torch.full((_HIGHEST - _LOWEST + 1,), -1, dtype=torch.int32)
            places[torch.tensor(self.values) - _LOWEST] = torch.arange(len(self.values), dtype=torch.int32)
            self._places[device] = places.to(device)
        return self._places[device]


def _as_label_map(value: Any, name: str) -> Tensor:
    """
    Whatever holds class indices as a tensor of its own shape, type and device.

    Args:
        value: integer tensor or array, image of one channel, or nested lists of numbers.
        name: what an error calls it.

    Raises:
        ValueError: where it holds anything but whole numbers.
    """
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
        array = array.astype(np.uint8 if array.dtype.kind == "b" else array.dtype.newbyteorder("="), copy=False)
        # Images lend their pixels for reading only, which tensors do not know
        value = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    value = value.detach()
    if value.is_floating_point() or value.is_complex():
        raise ValueError(f"{name} holds {value.dtype} values: expected whole numbers, such as argmax returns.")
    return value.to(torch.uint8) if value.dtype == torch.bool else value


def _count_into(counts: Tensor, places: Tensor) -> None:
    """Add 1 for each of the places, counted row by row in `counts`, which has to be contiguous."""
    # Where there are many classes this is several times faster than bincount, which makes and adds a whole table
    one = torch.ones((), dtype=counts.dtype, device=counts.device)
    counts.view(-1).index_add_(0, places.flatten(), one.expand(places.numel()))


def _place_in_list(values: Tensor, num_labels: int) -> Tensor:
    """The values themselves, or `num_labels` for those outside 0 ... num_labels - 1."""
    return torch.where((values >= 0) & (values < num_labels), values, num_labels)


def _mean(values: Tensor, classes: Sequence[int] | None) -> float:
    return float((values if classes is None else values[list(classes)]).nanmean())


__all__ = ["RESULTS_FILE", "ConfusionMatrix", "PairCounts"]
