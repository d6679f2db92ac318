"""Mean intersection over union, counted as pictures pass by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RESULTS_FILE = "results.json"
"""What lies beside a trained model with the figures that it reached."""


class ConfusionMatrix:
    """
    Counts of (true class, predicted class) pairs over all pixels seen; memory does not grow with their number.

    Args:
        num_labels: C, the number of classes.
        ignore_index: value of true labels to leave out.
    """

    def __init__(self, num_labels: int, ignore_index: int = 255) -> None:
        self.num_labels = num_labels
        self.ignore_index = ignore_index
        self.counts = torch.zeros(num_labels, num_labels, dtype=torch.int64)

    def update(self, predicted: Tensor, true: Tensor) -> None:
        """
        Count one picture or a batch.

        Args:
            predicted: integer label map, any shape, values from 0 to C - 1.
            true: label map of the same shape; `ignore_index` is left out.

        Raises:
            ValueError: for different shapes, or labels outside the list.
        """
        if predicted.shape != true.shape:
            raise ValueError(f"predicted is {tuple(predicted.shape)} and true {tuple(true.shape)}: sizes must agree.")
        kept = true != self.ignore_index
        true, predicted = true[kept].long(), predicted[kept].long()
        for name, values in (("true", true), ("predicted", predicted)):
            if len(values) and not 0 <= int(values.min()) <= int(values.max()) < self.num_labels:
                raise ValueError(
                    f"{name} labels reach from {values.min()} to {values.max()}: expected 0 to {self.num_labels - 1}."
                )
        pairs = torch.bincount(true * self.num_labels + predicted, minlength=self.num_labels**2)
        self.counts += pairs.view(self.num_labels, self.num_labels).to(self.counts.device)

    def iou(self) -> Tensor:
        """Intersection over union of each class, `(C,)`; NaN for a class neither present nor predicted."""
        hits = self.counts.diagonal().double()
        return hits / (self.counts.sum(0) + self.counts.sum(1) - hits)

    def mean_iou(self, classes: Sequence[int] | None = None) -> float:
        """
        Mean of the classes' IoU, leaving out NaN.

        Args:
            classes: which classes to average; all by default.
        """
        iou = self.iou()
        return float(iou.nanmean() if classes is None else iou[list(classes)].nanmean())


__all__ = ["RESULTS_FILE", "ConfusionMatrix"]
