"""The metric `mean_iou` for the `evaluate` library: `evaluate.load(MEAN_IOU)` works without a network."""

from pathlib import Path

from .mean_iou import MeanIoU

MEAN_IOU = str(Path(__file__).resolve().parent)
"""Folder to load the metric from."""

__all__ = ["MEAN_IOU", "MeanIoU"]
