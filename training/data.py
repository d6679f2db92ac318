"""Labelled pictures for training: reading, checking, augmenting, collating."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Value, load_dataset
from PIL import Image
from torch import Tensor

from modeling_san.processing import SANImageProcessor
from modeling_san.processing.image_arrays import read_byte_picture, read_map

IMAGE_COLUMNS = ("image", "pixel_values", "img")
LABEL_COLUMNS = ("annotation", "label", "labels", "semantic_segmentation", "segmentation_mask", "mask")
IGNORE_INDEX = 255


def load_pictures(source: str | os.PathLike, split: str = "train") -> Dataset:
    """
    Open a labelled data set.

    Args:
        source: a parquet file, a folder of a saved `datasets` data set or one that `load_dataset` reads, or a Hub id.
        split: which part of it; a parquet file has one part only.

    Returns:
        a data set with the columns `image` and `annotation`.

    Raises:
        ValueError: where the source cannot be read or holds no pictures with label maps.
    """
    path = Path(source)
    try:
        if path.suffix == ".parquet":
            dataset = load_dataset("parquet", data_files=str(path), split="train")
        elif (path / "state.json").is_file():
            dataset = Dataset.load_from_disk(str(path))
        elif (path / "dataset_dict.json").is_file():
            dataset = DatasetDict.load_from_disk(str(path))[split]
        else:
            dataset = load_dataset(str(source), split=split)
    except Exception as error:
        # The readers behind raise dozens of types; what a user can do about them is the same.
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(
            f"{source} cannot be read as a data set (split {split!r}): {first_line}. Pass a parquet file, a folder "
            "written by datasets, or a Hub id."
        ) from error
    if len(dataset) == 0:
        raise ValueError(f"{source} (split {split!r}) holds no pictures.")
    image, label = (
        _find_column(dataset, names, kind, source)
        for names, kind in ((IMAGE_COLUMNS, "pictures"), (LABEL_COLUMNS, "label maps"))
    )
    return dataset.select_columns([image, label]).rename_columns(
        {old: new for old, new in ((image, "image"), (label, "annotation")) if old != new}
    )


def _find_column(dataset: Dataset, known: Sequence[str], kind: str, source: object) -> str:
    for name in known:
        # One class for a whole picture, as image folders have it, is no label map.
        if name in dataset.column_names and not isinstance(dataset.features[name], (ClassLabel, Value)):
            return name
    raise ValueError(
        f"{source} has the columns {', '.join(dataset.column_names)}, none of which is known to hold {kind}: name it "
        f"{known[0]!r}."
    )


def to_arrays(example: dict[str, Any]) -> tuple[Image.Image, np.ndarray]:
    """
    Decode one example.

    Args:
        example: with `image` and `annotation`, pictures or encoded files.

    Returns:
        the picture in RGB, upright and with 8 bits a channel, and its label map, an integer array `(height, width)`.

    Raises:
        ValueError: where one of them cannot be read, the label map has several channels, or their sizes differ.
    """
    image = Image.fromarray(read_byte_picture(_as_picture(example["image"]), "the picture"))
    label_map = read_map(_as_picture(example["annotation"]), "the label map")
    if label_map.shape != image.size[::-1]:
        raise ValueError(
            f"a picture is {image.width} x {image.height} and its label map {label_map.shape[1]} x "
            f"{label_map.shape[0]} pixels: their sizes must agree."
        )
    return image, label_map


def _as_picture(value: Any) -> Image.Image | np.ndarray:
    """A column's entry: decoded, as an encoded file, or as nested lists of numbers."""
    if isinstance(value, dict):
        return Image.open(io.BytesIO(value["bytes"]) if value.get("bytes") else value["path"])
    return value if isinstance(value, Image.Image) else np.asarray(value)


class TrainingPictures(torch.utils.data.Dataset):
    """
    Augmented crops of labelled pictures: random scale, random place, random flip.

    Chance comes from torch's generator, which data loaders seed for each worker and epoch.

    Args:
        dataset: examples with `image` and `annotation`.
        image_processor: normalises pictures.
        crop_size: height and width of the crops in pixels, multiples of the model's size divisor.
        short_side: range of the picture's short side before cropping, in pixels.
    """

    def __init__(
        self,
        dataset: Dataset,
        image_processor: SANImageProcessor,
        *,
        crop_size: tuple[int, int],
        short_side: tuple[int, int],
    ) -> None:
        self.dataset = dataset
        self.image_processor = image_processor
        self.crop_size = crop_size
        self.short_side = short_side

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`pixel_values` `(3, height, width)` and `labels` `(height, width)` of a fresh crop of picture `index`."""
        image, label_map = to_arrays(self.dataset[int(index)])
        image, label_map = self._augment(image, label_map)
        height, width = self.crop_size
        frame = {"height": height, "width": width}
        inputs = self.image_processor(image, do_resize=False, pad_size=frame, return_tensors="pt")
        labels = torch.full((height, width), IGNORE_INDEX, dtype=torch.int64)
        labels[: image.height, : image.width] = torch.from_numpy(label_map.astype(np.int64))
        return {"pixel_values": inputs["pixel_values"][0], "labels": labels}

    def _augment(self, image: Image.Image, label_map: np.ndarray) -> tuple[Image.Image, np.ndarray]:
        rng = np.random.default_rng(int(torch.randint(2**31, ())))
        scale = rng.uniform(*self.short_side) / min(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        height, width = self.crop_size
        left = int(rng.integers(0, max(size[0] - width, 0) + 1))
        top = int(rng.integers(0, max(size[1] - height, 0) + 1))
        box = (left, top, min(left + width, size[0]), min(top + height, size[1]))
        image = image.resize(size, Image.Resampling.BILINEAR).crop(box)
        labels = Image.fromarray(label_map.astype(np.int32)).resize(size, Image.Resampling.NEAREST).crop(box)
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            labels = labels.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image, np.asarray(labels)


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


__all__ = ["IGNORE_INDEX", "Collator", "TrainingPictures", "load_pictures", "to_arrays"]
