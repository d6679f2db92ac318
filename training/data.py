# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""Labelled images for training: decoding, checking, augmenting, ordering, collating."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice, takewhile
from typing import Any

import fsspec
import numpy as np
import torch
from datasets import Dataset, IterableDataset
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate, get_worker_info

from modeling_san.processing import SANImageProcessor
from modeling_san.processing.images_san import open_image, read_byte_image
from modeling_san.processing.wording_san import listed, one_line
from modeling_san.training.augmentation import Augmentation
from modeling_san.training.label_sets import LabelSet
from modeling_san.training.sources import load_images, undecoded

_ORDER, _SHARDS, _BUFFER = 1, 2, 3
"""Kinds of chance beside the augmentation's; no two may share their random numbers."""

_logger = logging.getLogger(__name__)


class ImageError(ValueError):
    """
    A training image cannot be used; the message says which, and why.

    Data loaders raise a worker's error anew with its traceback as the message; what it said is the last line.
    """

    def __init__(self, message: str) -> None:
        last = message.strip().rpartition("\n")[2]
        super().__init__(last.removeprefix(f"{type(self).__module__}.{type(self).__qualname__}: "))


def to_arrays(example: Mapping[str, Any], label_set: LabelSet) -> tuple[Image.Image, np.ndarray]:
    """
    Decode one example.

    Args:
        example: with `image` and `annotation`, images or encoded files.
        label_set: what the values of the label map mean.

    Returns:
        the image in RGB, upright and with 8 bits a channel, and its label map `(height, width)` int32 with values
        from 0 to C - 1 or the label set's ignore index.

    Raises:
        ValueError: where one of them cannot be read, their sizes differ, or the label map holds other values.
    """
    image = Image.fromarray(read_byte_image(_as_image(example["image"], "the image"), "the image"))
    label_map = label_set.read(_as_image(example["annotation"], "the label map"))
    if label_map.shape != image.size[::-1]:
        raise ValueError(
            f"an image is {image.width} x {image.height} and its label map {label_map.shape[1]} x "
            f"{label_map.shape[0]} pixels: their sizes must agree."
        )
    return image, label_map


def read_example(example: Mapping[str, Any], label_set: LabelSet, name: str) -> tuple[Image.Image, np.ndarray]:
    """
    `to_arrays`, with the example's name in its errors.

    Raises:
        ImageError: it cannot be used; `name` says which it is.
    """
    try:
        return to_arrays(example, label_set)
    except (OSError, ValueError) as error:
        raise ImageError(f"{name}: {error}") from error


def read_examples(
    images: Any,
    label_set: LabelSet,
    indices: Sequence[int] = range(sys.maxsize),
    *,
    source: str = "",
    on_damage: Callable[[int, ImageError], object] | None = None,
) -> Iterator[tuple[int, Image.Image, np.ndarray]]:
    """
    Examples of some indices, decoded one after the other; no others are decoded.

    Args:
        images: a data set, streamed or not, or a list.
        label_set: what the values of label maps mean.
        indices: which, in ascending order; those behind the last example are left out.
        source: what errors put before the example's index.
        on_damage: told of an example that cannot be used, which is passed over then.

    Yields:
        index, image and label map.

    Raises:
        ImageError: an example cannot be used and there is no `on_damage`; its index is named.
    """
    images = undecoded(images)
    examples: Iterator[tuple[int, Any]]
    if hasattr(images, "__len__"):
        examples = ((index, images[index]) for index in takewhile(len(images).__gt__, indices))
    else:
        passing = islice(enumerate(images), indices[-1] + 1 if indices else 0)
        examples = (pair for pair in passing if pair[0] in indices)
    for index, example in examples:
        try:
            image, label_map = read_example(example, label_set, f"{source}example {index}")
        except ImageError as error:
            if on_damage is None:
                raise
            on_damage(index, error)
        else:
            yield index, image, label_map


def check_first_images(
    dataset: Dataset | IterableDataset,
    label_set: LabelSet,
    source: object,
    *,
    count: int = 8,
    skip_damaged: bool = False,
) -> np.ndarray:
    """
    Meet unreadable images and wrong label lists before training, not in the middle of it.

    Args:
        dataset: examples with `image` and `annotation`.
        label_set: what the values of label maps mean.
        source: what errors call the data set.
        count: how many images to look at.
        skip_damaged: whether one that can be read is enough.

    Returns:
        `(C,)`, how many pixels each class has in these images.

    Raises:
        ImageError: the first of them that cannot be used, and why.
    """
    damage: list[ImageError] = []
    on_damage = (lambda index, error: damage.append(error)) if skip_damaged else None
    counts = np.zeros(len(label_set), dtype=np.int64)
    readable = 0
    for _, _, label_map in read_examples(dataset, label_set, range(count), source=f"{source}, ", on_damage=on_damage):
        readable += 1
        labelled = label_map[label_map != label_set.ignore_index]
        counts += np.bincount(labelled, minlength=len(counts))
    if damage and not readable:
        raise damage[0]
    return counts


def describe_missing_classes(counts: Sequence[int] | np.ndarray, names: Sequence[str], where: str) -> str | None:
    """
    A sentence about the classes that no pixel has; None where all have some.

    Args:
        counts: pixels of each class.
        names: of the classes.
        where: the images that were looked at.
    """
    missing = [name for name, number in zip(names, counts, strict=True) if not number]
    if not missing:
        return None
    hint = " (label maps of 0 and 255 need --map 255=1)" if len(names) == 2 else ""
    return f"{len(missing)} of {len(names)} classes are in no label map of {where}: {listed(missing, 10)}{hint}"


def _as_image(value: Any, what: str) -> Image.Image | np.ndarray:
    """A column's entry: decoded, as an encoded file, or as nested lists of numbers."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if value is None:
        raise ValueError(f"{what} is missing: remove the example, or add it.")
    if isinstance(value, (Image.Image, np.ndarray)):
        return value
    if isinstance(value, str) and "://" in value:
        # Inside an archive, or on the Hub; each file system has errors of its own
        try:
            with fsspec.open(value, "rb") as file:
                value = file.read()
        except Exception as error:
            raise ValueError(f"{what} {value!r} cannot be read ({one_line(error)}).") from error
    if isinstance(value, (str, os.PathLike, bytes)):
        return open_image(value, what)
    try:
        return np.asarray(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} is no image file and no array: {one_line(error)}.") from error


class _Views:
    """Turns decoded images into augmented tensors; what `TrainingImages` and `StreamedImages` share."""

    def __init__(
        self, label_set: LabelSet, image_processor: SANImageProcessor, augmentation: Augmentation, seed: int
    ) -> None:
        self.label_set = label_set
        self.augmentation = augmentation
        self.seed = seed
        # Shared: of all workers one says it
        self._has_warned, self._has_met_damage = torch.zeros(2, dtype=torch.bool).share_memory_()
        # What the processor does to bytes is a factor and a shift for each channel: black and white show them
        ends = np.repeat(np.array([0, 255], dtype=np.uint8)[None, :, None], 3, axis=2)
        outputs = image_processor(ends, do_resize=False, do_pad=False, return_tensors="np")
        black, white = outputs["pixel_values"][0, :, 0].astype(np.float64).T[..., None, None]
        self._factor, self._shift = ((white - black) / 255).astype(np.float32), black.astype(np.float32)

    def warn_of_damage(self, error: ImageError) -> None:
        """Say once that images are left out, and which was the first."""
        if not self._has_met_damage:
            self._has_met_damage.fill_(True)
            _logger.warning("left out: %s Others like it are not named.", error)

    def make(self, example: Mapping[str, Any], epoch: int, index: int) -> dict[str, Tensor]:
        """
        One augmented example; chance comes from `(seed, epoch, index)` alone.

        Raises:
            ImageError: it cannot be used; its index is named.
        """
        image, label_map = read_example(example, self.label_set, f"example {index}")
        ignore_index = self.label_set.ignore_index
        if not self._has_warned and (label_map == ignore_index).all():
            self._has_warned.fill_(True)
            _logger.warning(
                "example %d: no pixel of its label map has a label; such images are kept and do no harm. Others like "
                "it are not named.",
                index,
            )
        rng = np.random.default_rng([self.seed, epoch, index])
        image, label_map = self.augmentation(image, label_map, rng, ignore_index)
        pixel_values = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)).astype(np.float32)
        pixel_values *= self._factor
        pixel_values += self._shift
        return {
            "pixel_values": torch.from_numpy(pixel_values),
            "labels": torch.from_numpy(label_map.astype(np.int64)),
            "index": torch.tensor(index),
        }


class TrainingImages(torch.utils.data.Dataset):
    """
    Augmented views of labelled images, a fresh one of each in every epoch.

    Sample numbers go on over epochs: number `epoch * len + index` is the view of image `index` in that epoch,
    whichever worker or process makes it. Samplers that begin anew with 0 call `set_epoch` instead.

    Args:
        dataset: examples with `image` and `annotation`.
        label_set: what the values of label maps mean.
        image_processor: normalises images.
        augmentation: random scale, crop, colours and flip.
        seed: of the augmentation.
        skip_damaged: put the next image in the place of one that cannot be used.
    """

    def __init__(
        self,
        dataset: Dataset,
        label_set: LabelSet,
        image_processor: SANImageProcessor,
        augmentation: Augmentation,
        seed: int = 0,
        *,
        skip_damaged: bool = False,
    ) -> None:
        self.dataset = undecoded(dataset)
        self.skip_damaged = skip_damaged
        self._views = _Views(label_set, image_processor, augmentation, seed)
        # Shared: workers that outlive an epoch hear of the next one
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        """Number of images."""
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the numbers from 0 belong to."""
        self._epoch.fill_(epoch)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """
        `pixel_values` `(3, height, width)`, `labels` `(height, width)` and `index` `()` of sample `number`.

        Raises:
            ImageError: the image cannot be used; its index is named.
        """
        epoch, first = divmod(int(number), len(self))
        for index in [*range(first, len(self)), *range(first)]:
            try:
                return self._views.make(self.dataset[index], int(self._epoch) + epoch, index)
            except ImageError as error:
                if not self.skip_damaged:
                    raise
                self._views.warn_of_damage(error)
        raise ImageError("no image of the data set can be used.")


class CachedViews(torch.utils.data.Dataset):
    """
    A few views of each image, seen in turn, with what a frozen backbone says of them instead of their pixels: it is
    computed when a view is met for the first time, and kept in half precision.

    Args:
        images: to take views of.
        model: with `encode_images`, none of whose backbone trains.
        views: of each image.

    Raises:
        ValueError: the model has no such backbone.
    """

    def __init__(self, images: TrainingImages, model: Any, views: int) -> None:
        if not hasattr(model, "encode_images"):
            raise ValueError(f"cached_views need a backbone, which a model of type {model.config.model_type} lacks.")
        if any(parameter.requires_grad for parameter in model.vision_model.parameters()):
            raise ValueError("cached_views keep the features of a frozen backbone, and this one trains: set it to 0.")
        self.images = images
        self.model = model
        self.views = views
        self._kept: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        """How many images there are."""
        return len(self.images)

    @torch.no_grad()
    def __getitem__(self, number: int) -> dict[str, Any]:
        """`feature_maps`, `labels` and `index` of a sample number as of `TrainingImages`."""
        view = number % (self.views * len(self.images))
        if view not in self._kept:
            item: dict[str, Any] = self.images[view]
            pixels = item.pop("pixel_values")[None].to(self.model.device)
            maps = tuple(features[0].half().cpu() for features in self.model.encode_images(pixels))
            self._kept[view] = {**item, "feature_maps": maps, "labels": item["labels"].int()}
        kept = self._kept[view]
        return {**kept, "labels": kept["labels"].long()}


class StreamedImages(torch.utils.data.IterableDataset):
    """
    Augmented views of labelled images that are read one after the other, without end and without a known length.

    Processes and workers share every epoch without overlap or loss. Each takes whole shards; those that are left over
    when shards do not divide evenly, all of them where there are fewer shards than readers, are shared out image by
    image, so that any number of workers is right. Every epoch has the shards in another order, and each reader draws
    from a buffer. A reader that is through with its share goes on with that of the next epoch, alone.

    The order follows from the seed and from the number of processes and workers.

    Args:
        dataset, label_set, image_processor, augmentation, seed: as of `TrainingImages`, but the data set is streamed,
            in shards, and the seed is that of the order, too.
        batch_size: of the data loader; needed to find the place where `skip` ends.
        rank: of this process.
        world_size: number of processes.
        skip: batches of this process that were used already. The stream goes on behind them as it would have without
            the pause, if processes, workers and batch size are the same; what is skipped is read but not decoded.
        buffer_size: encoded images that each reader holds to draw from.
        epochs: how often to go through the images; None never ends.
        skip_damaged: pass over images that cannot be used. After a pause the stream begins so many images earlier.
    """

    def __init__(
        self,
        dataset: IterableDataset,
        label_set: LabelSet,
        image_processor: SANImageProcessor,
        augmentation: Augmentation,
        seed: int = 0,
        *,
        batch_size: int = 1,
        rank: int = 0,
        world_size: int = 1,
        skip: int = 0,
        buffer_size: int = 256,
        epochs: int | None = None,
        skip_damaged: bool = False,
    ) -> None:
        self.dataset = undecoded(dataset)
        self.skip_damaged = skip_damaged
        self._views = _Views(label_set, image_processor, augmentation, seed)
        self.seed = seed
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.skip = skip
        self.buffer_size = buffer_size
        self.epochs = epochs

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """
        Items as those of `TrainingImages`; `index` is position in the shard * number of shards + shard.

        Raises:
            ImageError: an image cannot be used; its index is named.
            ValueError: there are too few images for so many readers.
        """
        worker = get_worker_info()
        workers = 1 if worker is None else worker.num_workers
        if worker is not None:
            # File systems of the network must not use the event loop of the process that this one was forked from
            fsspec.asyn.reset_lock()
        # A loader asks its workers in turn, beginning with the first: that one takes the role of the worker whose turn
        # it was when the stream was left.
        role = (self.skip + (0 if worker is None else worker.id)) % workers
        used = len(range(role, self.skip, workers)) * self.batch_size
        examples = self._shuffled(self.rank * workers + role, self.world_size * workers)
        for epoch, index, example in islice(examples, used, None):
            try:
                yield self._views.make(example, epoch, index)
            except ImageError as error:
                if not self.skip_damaged:
                    raise
                self._views.warn_of_damage(error)

    def _shuffled(self, reader: int, readers: int) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """Epoch, index and encoded example of all that one reader takes, in its order."""
        idle = 0
        for epoch in count() if self.epochs is None else range(self.epochs):
            rng = np.random.default_rng([self.seed, epoch, reader, _BUFFER])
            idle += 1
            for index, example in _drawn(self._share(epoch, reader, readers), self.buffer_size, rng):
                idle = 0
                yield epoch, index, example
            if idle > readers:
                raise ValueError(f"there are too few images for {readers} processes and workers: take fewer.")

    def _share(self, epoch: int, reader: int, readers: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Index and encoded example of what one reader takes from an epoch, unshuffled within shards."""
        shards = self.dataset.num_shards
        order = np.random.default_rng([self.seed, epoch, 0, _SHARDS]).permutation(shards)
        even = shards - shards % readers
        for shard in order[reader:even:readers]:
            yield from self._read(int(shard), 0, 1)
        left = order[even:]
        if len(left):
            place = reader % len(left)
            companions = range(place, readers, len(left))
            # Turning with the epochs: where images are fewer than readers, each has some in its turn
            turn = (companions.index(reader) + epoch) % len(companions)
            yield from self._read(int(left[place]), turn, len(companions))

    def _read(self, shard: int, first: int, step: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Index and encoded example of every `step`-th image of a shard."""
        shards = self.dataset.num_shards
        # `iter` reads what it is asked for; plain iteration would share the shard out to workers once more.
        rows = self.dataset.shard(num_shards=shards, index=shard).iter(batch_size=1)
        for position, row in islice(enumerate(rows), first, None, step):
            yield position * shards + shard, {name: values[0] for name, values in row.items()}


def _drawn(items: Iterator[Any], size: int, rng: np.random.Generator) -> Iterator[Any]:
    """Items in the order in which they are drawn from a buffer that is refilled as long as there are any."""
    buffer = list(islice(items, size))
    for item in items:
        place = int(rng.integers(len(buffer)))
        drawn, buffer[place] = buffer[place], item
        yield drawn
    for place in rng.permutation(len(buffer)):
        yield buffer[place]


class EndlessOrder(torch.utils.data.Sampler[int]):
    """
    Shuffled sample numbers without end: `epoch * length + index`, each epoch in an order of its own.

    `world_size * batch_size` consecutive positions make one step: process r takes the r-th block of `batch_size`. So
    two processes with batches of 4 see together what one with batches of 8 sees.

    Args:
        length: number of images.
        seed: of the orders.
        start: position, counted over all processes, at which to begin.
        rank: of this process.
        world_size: number of processes.
        batch_size: of each process.
    """

    def __init__(
        self, length: int, seed: int, start: int = 0, rank: int = 0, world_size: int = 1, batch_size: int = 1
    ) -> None:
        self.length = length
        self.seed = seed
        self.first = start + rank * batch_size
        self.step = world_size * batch_size
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[int]:
        """Sample numbers of this process."""
        known, order = -1, np.empty(0, dtype=np.int64)
        for first in count(self.first, self.step):
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
        return {**default_collate(list(examples)), **self.prompts}


__all__ = [
    "CachedViews",
    "Collator",
    "EndlessOrder",
    "ImageError",
    "StreamedImages",
    "TrainingImages",
    "check_first_images",
    "describe_missing_classes",
    "load_images",
    "read_example",
    "read_examples",
    "to_arrays",
]
