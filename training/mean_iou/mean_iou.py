"""Mean intersection over union as a metric of the `evaluate` library, in memory that does not grow."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from modeling_san.processing.files import replacing_file
from modeling_san.training.metrics import ConfusionMatrix, PairCounts

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

Returns:
    dict of mean_iou, mean_accuracy, overall_accuracy and frequency_weighted_iou (floats), per_category_iou and
    per_category_accuracy (arrays, NaN for a class that does not occur), and confusion_matrix (num_labels x num_labels
    pixel counts, true classes down).

Examples:
    >>> metric = evaluate.load(MEAN_IOU)
    >>> metric.compute(predictions=[[[0, 1], [1, 1]]], references=[[[0, 1], [0, 255]]], num_labels=2)["mean_iou"]
    0.5
"""

_OPTIONS: dict[str, Any] = {
    "num_labels": None,
    "ignore_index": 255,
    "nan_to_num": None,
    "label_map": None,
    "reduce_labels": False,
}
_POLL_SECONDS = 0.05


class MeanIoU(evaluate.Metric):
    """
    The metric; `evaluate.load(MEAN_IOU, ...)` makes it, too.

    Args:
        kwargs: `num_labels`, `ignore_index`, `nan_to_num`, `label_map` and `reduce_labels` here are the defaults of
            `compute`; the others are those of every metric. With `num_process` and `process_id`, `compute` adds up
            the counts of all processes and returns the result in the first: through torch.distributed where that is
            set up for as many processes, else through files in `cache_dir`, which all of them have to see;
            evaluations at the same time then need an `experiment_id` each.
    """

    def __init__(self, config_name: str | None = None, **kwargs: Any) -> None:
        self.options = {name: kwargs.pop(name, default) for name, default in _OPTIONS.items()}
        self._pairs = PairCounts()
        self._round = 0
        super().__init__(config_name, **kwargs)
        self._started = time.time()
        if self.num_process > 1:
            # What a run that was killed has left would pass for this one's
            for path in self._data_folder().glob(f"{self._prefix(self.process_id)}-*.npz"):
                path.unlink(missing_ok=True)

    def __len__(self) -> int:
        """Label maps, or stacks of them, counted since the last result."""
        return self._pairs.images

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
            self._pairs.add(predictions, references)
            return
        if isinstance(predictions, Image.Image) or isinstance(references, Image.Image):
            raise ValueError("add_batch takes lists of images: pass [image], or use add.")
        if len(predictions) != len(references):
            raise ValueError(f"there are {len(predictions)} predictions and {len(references)} references.")
        for index, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
            self._pairs.add(prediction, reference, f"image {index} of the batch:")

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """
        Count one pair of label maps.

        Args:
            prediction: label map.
            reference: label map of the same size.
            kwargs: `predictions` and `references` instead, which is what combined metrics pass.
        """
        prediction = kwargs.pop("predictions", prediction)
        reference = kwargs.pop("references", reference)
        _refuse(kwargs, "add takes prediction and reference")
        if prediction is None or reference is None:
            raise ValueError("add needs both prediction and reference.")
        self._pairs.add(prediction, reference)

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
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        if self.num_process == 1 and not self._pairs.images:
            raise ValueError("nothing was added: call add or add_batch, or pass predictions and references.")
        if options["num_labels"] < 1:
            raise ValueError(f"num_labels is {options['num_labels']}: there has to be at least one class.")
        self._gather()
        nan_to_num = options.pop("nan_to_num")
        results = None if self.process_id > 0 else _figures(self._pairs.fold(**options), nan_to_num)
        self._pairs = PairCounts()
        return results

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on counting."""
        pairs = self._pairs
        counts = None if pairs.counts is None else pairs.counts.cpu().clone()
        return {"values": list(pairs.values), "counts": counts, "images": pairs.images}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self._pairs = PairCounts()
        if state["counts"] is not None:
            self._pairs.merge(state["values"], state["counts"])
        self._pairs.images = state["images"]

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(predictions=datasets.Image(), references=datasets.Image()),
        )

    def _build_data_dir(self) -> str:
        # Nothing is written where there is one process: the folder is made when it is needed
        return str(Path(self._data_dir_root) / self.name / self.config_name)

    def _compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Figures of complete lists; `compute` does not need it."""
        return MeanIoU(**self.options).compute(predictions=predictions, references=references, **kwargs) or {}

    # Several processes

    def _gather(self) -> None:
        """Bring the counts of all processes to the first."""
        if self.num_process == 1:
            return
        self._round += 1
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() == self.num_process:
            self._pairs.all_reduce()
        elif self.process_id > 0:
            self._write_counts()
        else:
            for process_id in range(1, self.num_process):
                self._read_counts(process_id)

    def _write_counts(self) -> None:
        pairs = self._pairs
        counts = torch.zeros(0, 0, dtype=torch.int64) if pairs.counts is None else pairs.counts.cpu()
        with replacing_file(self._counts_file(self.process_id)) as path, path.open("wb") as file:
            values = pairs.values[: len(counts)]
            np.savez(file, values=np.array(values, dtype=np.int64), counts=counts.numpy(), images=pairs.images)

    def _read_counts(self, process_id: int) -> None:
        path = self._counts_file(process_id)
        end = time.monotonic() + self.timeout
        # A file from long before this process began is another run's
        while not path.is_file() or path.stat().st_mtime < self._started - self.timeout:
            if time.monotonic() > end:
                raise ValueError(
                    f"process {process_id} of {self.num_process} has written no counts to {path} within "
                    f"{self.timeout} seconds: call compute in every process, with the same experiment_id and "
                    "cache_dir."
                )
            time.sleep(_POLL_SECONDS)
        with np.load(path, allow_pickle=False) as saved:
            if len(saved["values"]):
                self._pairs.merge(saved["values"].tolist(), torch.from_numpy(saved["counts"]))
            self._pairs.images += int(saved["images"])
        path.unlink()

    def _counts_file(self, process_id: int) -> Path:
        return self._data_folder() / f"{self._prefix(process_id)}-{self._round}.npz"

    def _prefix(self, process_id: int) -> str:
        return f"{self.experiment_id}-{self.num_process}-{process_id}"

    def _data_folder(self) -> Path:
        return Path(self.data_dir)


def _figures(confusion: ConfusionMatrix, nan_to_num: float | None) -> dict[str, Any]:
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
    return {**figures, "confusion_matrix": confusion.counts.numpy().copy()}


def _is_stack(value: Any) -> bool:
    """Whether label maps come as one array, whose sizes agree."""
    return isinstance(value, (torch.Tensor, np.ndarray)) and value.dtype != object


def _refuse(unknown: Mapping[str, Any], expected: str) -> None:
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: unknown here, {expected}.")


__all__ = ["MeanIoU"]
