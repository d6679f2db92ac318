"""Labelled pictures for training: decoding, checking, augmenting, ordering, collating."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from datasets import Image as ImageFeature
from PIL import Image
from torch import Tensor
from torch.utils.data import get_worker_info

from modeling_san.processing import SANImageProcessor
from modeling_san.processing.image_arrays import read_byte_picture
from modeling_san.training.augmentation import Augmentation
from modeling_san.training.label_sets import LabelSet
from modeling_san.training.sources import load_pictures

_ORDER, _SHARDS, _BUFFER = 1, 2, 3
"""Kinds of chance beside the augmentation's; no two may share their random numbers."""

_MAX_WORKERS = 256

_logger = logging.getLogger(__name__)


class PictureError(ValueError):
    """
    A training picture cannot be used; the message says which, and why.

    Data loaders raise a worker's error anew with its traceback as the message; what it said is the last line.
    """

    def __init__(self, message: str) -> None:
        last = message.strip().rpartition("\n")[2]
        super().__init__(last.removeprefix(f"{type(self).__module__}.{type(self).__qualname__}: "))


def to_arrays(example: Mapping[str, Any], label_set: LabelSet) -> tuple[Image.Image, np.ndarray]:
    """
    Decode one example.

    Args:
        example: with `image` and `annotation`, pictures or encoded files.
        label_set: what the values of the label map mean.

    Returns:
        the picture in RGB, upright and with 8 bits a channel, and its label map `(height, width)` int32 with values
        from 0 to C - 1 or the label set's ignore index.

    Raises:
        ValueError: where one of them cannot be read, their sizes differ, or the label map holds other values.
    """
    image = Image.fromarray(read_byte_picture(_as_picture(example["image"], "the picture"), "the picture"))
    label_map = label_set.read(_as_picture(example["annotation"], "the label map"))
    if label_map.shape != image.size[::-1]:
        raise ValueError(
            f"a picture is {image.width} x {image.height} and its label map {label_map.shape[1]} x "
            f"{label_map.shape[0]} pixels: their sizes must agree."
        )
    return image, label_map


def check_first_pictures(
    dataset: Dataset | IterableDataset, label_set: LabelSet, source: object, *, count: int = 8
) -> None:
    """
    Meet unreadable pictures and wrong label lists before training, not in the middle of it.

    Args:
        dataset: examples with `image` and `annotation`.
        label_set: what the values of label maps mean.
        source: what an error calls the data set.
        count: how many pictures to look at.

    Raises:
        ValueError: the first picture that cannot be used, and why.
    """
    for index, example in enumerate(islice(_undecoded(dataset), count)):
        try:
            to_arrays(example, label_set)
        except (OSError, ValueError) as error:
            raise ValueError(f"{source}, example {index}: {error}") from error


def _as_picture(value: Any, what: str) -> Image.Image | np.ndarray:
    """A column's entry: decoded, as an encoded file, or as nested lists of numbers."""
    if value is None:
        raise ValueError(f"{what} is missing: remove the example, or add it.")
    if isinstance(value, (Image.Image, np.ndarray)):
        return value
    try:
        if isinstance(value, (bytes, bytearray)):
            return Image.open(io.BytesIO(value))
        if isinstance(value, (str, os.PathLike)):
            return Image.open(value)
        if isinstance(value, Mapping):
            if value.get("bytes"):
                return Image.open(io.BytesIO(value["bytes"]))
            # Paths into archives and on the Hub are opened as datasets does
            return ImageFeature().decode_example(value)
        return np.asarray(value)
    except (Image.DecompressionBombError, OSError, SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"{what} cannot be read ({error}): the file may be missing or damaged.") from error


def _undecoded(dataset: Any) -> Any:
    """A data set that leaves its pictures encoded, so that what is passed over costs nothing."""
    for name, feature in (getattr(dataset, "features", None) or {}).items():
        if isinstance(feature, ImageFeature) and feature.decode:
            dataset = dataset.cast_column(name, ImageFeature(decode=False))
    return dataset


# Reporting


class DataReport:
    """
    Counts what is odd in a data set but does no harm, and says each kind once.

    The counts lie in memory that data loader workers share.
    """

    KINDS = ("without_labels",)
    _SENTENCES = {
        "without_labels": "{example}: no pixel of its label map has a label; such pictures are kept and do no harm. "
        "Further ones are counted, not named."
    }

    def __init__(self) -> None:
        # A row for each worker: none has to wait for another
        self._counts = torch.zeros(_MAX_WORKERS, len(self.KINDS), dtype=torch.int64).share_memory_()

    def add(self, kind: str, example: str) -> None:
        """
        Count one oddity, and say so if it is the first of its kind.

        Args:
            kind: one of `KINDS`.
            example: which one it is, for the sentence.
        """
        worker = get_worker_info()
        first = self.count(kind) == 0
        self._counts[0 if worker is None else 1 + worker.id % (_MAX_WORKERS - 1), self.KINDS.index(kind)] += 1
        if first:
            _logger.warning(self._SENTENCES[kind].format(example=example))

    def count(self, kind: str) -> int:
        """How often a kind was met, by all workers; a picture counts each time that it is used."""
        return int(self._counts[:, self.KINDS.index(kind)].sum())


# Augmented examples


class _Views:
    """Turns decoded pictures into augmented tensors; what `TrainingPictures` and `StreamedPictures` share."""

    def __init__(
        self,
        label_set: LabelSet,
        image_processor: SANImageProcessor,
        augmentation: Augmentation,
        seed: int,
        report: DataReport,
    ) -> None:
        if seed < 0:
            raise ValueError(f"seed is {seed}: pass a whole number from 0 on.")
        self.label_set = label_set
        self.augmentation = augmentation
        self.seed = seed
        self.report = report
        # Normalising takes each byte to one float a channel: the processor is asked once, for all bytes
        every_byte = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
        outputs = image_processor(every_byte, do_resize=False, do_pad=False, return_tensors="np")
        self.table = np.ascontiguousarray(outputs["pixel_values"][0, :, 0], dtype=np.float32)

    def make(self, example: Mapping[str, Any], epoch: int, index: int, name: str) -> dict[str, Tensor]:
        """
        One augmented example; chance comes from `(seed, epoch, index)` alone.

        Raises:
            PictureError: it cannot be used; `name` says which it is.
        """
        try:
            image, label_map = to_arrays(example, self.label_set)
        except (OSError, ValueError) as error:
            raise PictureError(f"{name}: {error}") from error
        ignore_index = self.label_set.ignore_index
        if (label_map == ignore_index).all():
            self.report.add("without_labels", name)
        rng = np.random.default_rng([self.seed, epoch, index])
        image, label_map = self.augmentation(image, label_map, rng, ignore_index)
        pixels = np.asarray(image)
        pixel_values = np.empty((3, *pixels.shape[:2]), dtype=np.float32)
        for channel in range(3):
            np.take(self.table[channel], pixels[..., channel], out=pixel_values[channel], mode="clip")
        return {
            "pixel_values": torch.from_numpy(pixel_values),
            "labels": torch.from_numpy(label_map.astype(np.int64)),
            "index": torch.tensor(index),
        }


class TrainingPictures(torch.utils.data.Dataset):
    """
    Augmented views of labelled pictures, a fresh one of each in every epoch.

    Sample numbers go on over epochs: number `epoch * len + index` is the view of picture `index` in that epoch,
    whichever worker or process makes it. Samplers that begin anew with 0 call `set_epoch` instead.

    Args:
        dataset: examples with `image` and `annotation`.
        label_set: what the values of label maps mean.
        image_processor: normalises pictures.
        augmentation: random scale, crop, colours and flip.
        seed: of the augmentation.
    """

    def __init__(
        self,
        dataset: Dataset,
        label_set: LabelSet,
        image_processor: SANImageProcessor,
        augmentation: Augmentation,
        seed: int = 0,
    ) -> None:
        self.dataset = _undecoded(dataset)
        self.report = DataReport()
        self._views = _Views(label_set, image_processor, augmentation, seed, self.report)
        # Shared: workers that outlive an epoch hear of the next one
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.dataset)

    @property
    def epoch(self) -> int:
        """Added to the epoch that a sample's number tells."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the numbers from 0 belong to."""
        self._epoch.fill_(epoch)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """
        `pixel_values` `(3, height, width)`, `labels` `(height, width)` and `index` `()` of sample `number`.

        Raises:
            PictureError: the picture cannot be used; its index is named.
        """
        if number < 0:
            raise IndexError(f"samples are numbered from 0, {number} is none.")
        epoch, index = divmod(int(number), len(self))
        try:
            example = self.dataset[index]
        except (OSError, ValueError) as error:
            raise PictureError(f"example {index}: {error}") from error
        return self._views.make(example, self.epoch + epoch, index, f"example {index}")


class EndlessOrder(torch.utils.data.Sampler[int]):
    """
    Shuffled sample numbers without end: `epoch * length + index`, each epoch in an order of its own.

    `world_size * batch_size` consecutive positions make one step: process r takes the r-th block of `batch_size`. So
    two processes with batches of 4 see together what one with batches of 8 sees.

    Args:
        length: number of pictures.
        seed: of the orders.
        start: position, counted over all processes, at which to begin.
        rank: of this process.
        world_size: number of processes.
        batch_size: of each process.
    """

    def __init__(
        self, length: int, seed: int, start: int = 0, rank: int = 0, world_size: int = 1, batch_size: int = 1
    ) -> None:
        if length < 1:
            raise ValueError("there are no pictures to put into an order.")
        if start < 0 or seed < 0 or batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"start {start} and seed {seed} must be at least 0, batch_size {batch_size} at least 1, and rank "
                f"{rank} below world_size {world_size}."
            )
        self.length = length
        self.seed = seed
        self.start = start
        self.rank = rank
        self.world_size = world_size
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[int]:
        """Sample numbers of this process."""
        step = self.world_size * self.batch_size
        known, order = -1, np.empty(0, dtype=np.int64)
        for first in count(self.start + self.rank * self.batch_size, step):
            for position in range(first, first + self.batch_size):
                epoch, place = divmod(position, self.length)
                if epoch != known:
                    known = epoch
                    order = np.random.default_rng([self.seed, epoch, 0, _ORDER]).permutation(self.length)
                yield epoch * self.length + int(order[place])


@dataclass(frozen=True)
class Collator:
    """
    Stacks examples of one size into a batch.

    Attributes:
        prompts: entries that every batch carries as they are: `input_ids` and `attention_mask` of the labels, where
            the text encoder trains.
    """

    prompts: Mapping[str, Tensor] = field(default_factory=dict)

    def __call__(self, examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Stack the tensors of each name along a new first dimension."""
        batch = {name: torch.stack([example[name] for example in examples]) for name in examples[0]}
        return {**batch, **self.prompts}


__all__ = [
    "Collator",
    "DataReport",
    "EndlessOrder",
    "PictureError",
    "TrainingPictures",
    "check_first_pictures",
    "load_pictures",
    "to_arrays",
]
