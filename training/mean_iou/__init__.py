# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""The metric `mean_iou` for the `evaluate` library: `evaluate.load(MEAN_IOU)` works without a network."""

from pathlib import Path

from .mean_iou import MeanIoU

MEAN_IOU = str(Path(__file__).resolve().parent)
"""Folder to load the metric from."""

__all__ = ["MEAN_IOU", "MeanIoU"]
