# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""Mean intersection over union as a metric of the `evaluate` library, in memory that does not grow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from modeling_san.training.metrics import ConfusionMatrix, count_pairs

_DESCRIPTION = """
Intersection over union (IoU) of a class: pixels that are the class both in prediction and reference, divided by the
pixels that are in either. Its mean over the classes is the usual measure of semantic segmentation. Images are
counted as they are added and not kept.
"""

_INPUTS = """
Args:
    predictions: label maps (height, width) of class indices, of any sizes: tensors, arrays, images or lists.
    references: label maps of the same sizes, with true class indices.
    num_labels (int): number of classes. Values outside 0 ... num_labels - 1 match nothing.
    ignore_index (int): true value to leave out, 255 by default; None leaves out nothing.
    nan_to_num (float, optional): what to put for classes that do not occur.
    label_map (dict, optional): true values to replace, old to new, all at once.
    reduce_labels (bool): take 1 off every true value, after `label_map`; 0 and 255 become 255.
    return_confusion_matrix (bool): whether to return the counts as well, which no `trainer_state.json` can hold.

Returns:
    dict of mean_iou, mean_accuracy, overall_accuracy and frequency_weighted_iou (floats), per_category_iou and
    per_category_accuracy (arrays, NaN for a class that does not occur), and on request confusion_matrix (num_labels x
    num_labels pixel counts, true classes down).

Examples:
    >>> import evaluate
    >>> from modeling_san.training.mean_iou import MEAN_IOU

    >>> metric = evaluate.load(MEAN_IOU)
    >>> results = metric.compute(predictions=[[[0, 1], [1, 1]]], references=[[[0, 1], [0, 255]]], num_labels=2)
    >>> round(float(results["mean_iou"]), 2)
    0.5
"""

_OPTIONS: dict[str, Any] = {
    "num_labels": None,
    "ignore_index": 255,
    "nan_to_num": None,
    "label_map": None,
    "reduce_labels": False,
    "return_confusion_matrix": False,
}


class MeanIoU(evaluate.Metric):
    """
    The metric; `evaluate.load(MEAN_IOU, ...)` makes it, too.

    Args:
        kwargs: `num_labels`, `ignore_index`, `nan_to_num`, `label_map`, `reduce_labels` and `return_confusion_matrix`
            here are the defaults of `compute`; the others are those of every metric. With `num_process` and
            `process_id`, `compute` adds up the counts of all processes and returns the result in the first: through
            torch.distributed where that is set up for as many processes, else as every metric does, through files in
            `cache_dir`, which all of them have to see; evaluations at the same time then need an `experiment_id` each.
    """

    def __init__(self, config_name: str | None = None, **kwargs: Any) -> None:
        self.options = {name: kwargs.pop(name, default) for name, default in _OPTIONS.items()}
        self._start_anew()
        self._rounds = 0
        super().__init__(config_name, **kwargs)

    def __len__(self) -> int:
        """Label maps, or stacks of them, counted since the last result."""
        return self._images

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """
        Count several pairs of label maps.

        Args:
            predictions: stacked, or a list of maps of any sizes.
            references: as many, of the same sizes.
            kwargs: none is known.

        Raises:
            ValueError: where the two do not fit together, or are no label maps; nothing is counted then of the pair
                that does not fit.
        """
        _refuse(kwargs, "add_batch takes predictions and references")
        if predictions is None or references is None:
            raise ValueError("add_batch needs both predictions and references.")
        if _is_stack(predictions) and _is_stack(references):
            # One pass over many images; a single map is as good
            self._count(predictions, references)
            return
        if isinstance(predictions, Image.Image) or isinstance(references, Image.Image):
            raise ValueError("add_batch takes lists of images: pass [image], or use add.")
        if len(predictions) != len(references):
            raise ValueError(f"there are {len(predictions)} predictions and {len(references)} references.")
        for index, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
            self._count(prediction, reference, f"image {index} of the batch:")

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """
        Count one pair of label maps of one size.

        Args:
            prediction: label map.
            reference: the true one.
            kwargs: `predictions` and `references` instead, which is what combined metrics pass.
        """
        prediction = kwargs.pop("predictions", prediction)
        reference = kwargs.pop("references", reference)
        _refuse(kwargs, "add takes prediction and reference")
        if prediction is None or reference is None:
            raise ValueError("add needs both prediction and reference.")
        self._count(prediction, reference)

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, Any] | None:
        """
        Return the result of all that was added, and start anew.

        Args:
            predictions: more label maps, counted first.
            references: as many.
            kwargs: options, see below.

        Returns:
            the figures; None in other processes than the first.

        Raises:
            ValueError: where options do not fit or nothing was added; what was counted is kept.
        """
        options = {**self.options, **{name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}}
        _refuse(kwargs, f"the options of compute are {', '.join(_OPTIONS)}")
        if not isinstance(options["num_labels"], (int, np.integer)):
            raise ValueError("num_labels is missing: pass the number of classes, for example num_labels=150.")
        if options["num_labels"] < 1:
            raise ValueError(f"num_labels is {options['num_labels']}: there has to be at least one class.")
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        if self.num_process == 1 and not self._images:
            raise ValueError("nothing was added: call add or add_batch, or pass predictions and references.")
        pairs = self._gather()
        self._start_anew()
        return None if self.process_id > 0 else _figures(pairs, **options)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on counting."""
        return {"pairs": [(*pair, count) for pair, count in self._pairs.items()], "images": self._images}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self._pairs = Counter({(true, predicted): count for true, predicted, count in state["pairs"]})
        self._images = state["images"]

    def _start_anew(self) -> None:
        self._pairs = Counter[tuple[int, int]]()
        self._images = 0

    def _count(self, prediction: Any, reference: Any, name: str = "") -> None:
        self._pairs.update(count_pairs(prediction, reference, name))
        self._images += 1

    def _gather(self) -> Mapping[tuple[int, int], int]:
        """The counts of all processes, in the first."""
        if self.num_process == 1:
            return self._pairs
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() == self.num_process:
            parts: list[Any] = [None] * self.num_process
            dist.all_gather_object(parts, self._pairs)
            return sum(parts, Counter())
        # The library's own files, with counts in them. Each round has its own, or a process that is ahead would
        # write into those that the first still waits to read.
        experiment, self._rounds = self.experiment_id, self._rounds + 1
        self._module_info.experiment_id = f"{experiment}-{self._rounds}"
        try:
            super().add_batch(predictions=[[*pair] for pair in self._pairs], references=list(self._pairs.values()))
            return super().compute() or {}
        finally:
            self._module_info.experiment_id = experiment

    def _compute(self, *, predictions: Any, references: Any) -> Counter[tuple[int, int]]:  # type: ignore[override]
        """Pairs and counts from the files of all processes."""
        pairs: Counter[tuple[int, int]] = Counter()
        for pair, count in zip(predictions, references, strict=True):
            pairs[tuple(pair)] += count
        return pairs

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(predictions=datasets.Image(), references=datasets.Image()),
        )

    def _infer_feature_from_batch(self, batch: Mapping[str, Any]) -> datasets.Features:
        """Of what is written for other processes."""
        value = datasets.Value("int64")
        return datasets.Features(predictions=datasets.List(value), references=value)

    def _build_data_dir(self) -> str:
        # Where there is one process nothing is written
        return super()._build_data_dir() if self.num_process > 1 else str(Path(self._data_dir_root))


def _figures(
    pairs: Mapping[tuple[int, int], int],
    num_labels: int,
    ignore_index: int | None,
    nan_to_num: float | None,
    label_map: Mapping[int, int] | None,
    reduce_labels: bool,
    return_confusion_matrix: bool,
) -> dict[str, Any]:
    """What `compute` returns, from the counts of (true, predicted) pairs and its options."""
    renamed = {int(old): int(new) for old, new in (label_map or {}).items()}
    kept: Counter[tuple[int, int]] = Counter()
    for (value, predicted), count in pairs.items():
        true = renamed.get(value, value)
        if reduce_labels:
            true = 255 if true in (0, 255) else true - 1
        if true != ignore_index:
            kept[true, predicted] += count
    confusion = ConfusionMatrix(num_labels)
    confusion.add(kept)
    figures: dict[str, Any] = {
        "mean_iou": np.float64(confusion.mean_iou()),
        "mean_accuracy": np.float64(confusion.mean_accuracy()),
        "overall_accuracy": np.float64(confusion.overall_accuracy()),
        "per_category_iou": confusion.iou().numpy(),
        "per_category_accuracy": confusion.accuracy().numpy(),
        "frequency_weighted_iou": np.float64(confusion.frequency_weighted_iou()),
    }
    if nan_to_num is not None:
        figures = {name: np.nan_to_num(figure, nan=nan_to_num) for name, figure in figures.items()}
    return {**figures, **({"confusion_matrix": confusion.counts.numpy().copy()} if return_confusion_matrix else {})}


def _is_stack(value: Any) -> bool:
    """Whether label maps come as one array, whose sizes agree."""
    return isinstance(value, (torch.Tensor, np.ndarray)) and value.dtype != object


def _refuse(unknown: Mapping[str, Any], expected: str) -> None:
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: unknown here, {expected}.")


__all__ = ["MeanIoU"]
