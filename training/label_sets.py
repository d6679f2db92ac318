"""What the values of label maps mean: names, the value for "no label", and ways to store them."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import hf_hub_download
from PIL import Image

from modeling_san.processing import load_vocabulary, normalize_labels, vocabulary_names
from modeling_san.processing.images_san import read_image, read_map
from modeling_san.processing.label_files import FILE_FORMS, Color, LabelFile, read_label_file
from modeling_san.training.sources import class_names_in

IGNORE_INDEX = 255
"""Stands for "no label" in maps of 8 bits."""

WIDE_IGNORE_INDEX = 65535
"""Stands for "no label" in maps of 16 bits, which more than 255 classes need."""

ID2LABEL_FILE = "id2label.json"
"""Where data sets on the Hub keep their class names."""

_UNKNOWN = 65535
_LISTED = 5


@dataclass(frozen=True)
class LabelSet:
    """
    The classes of a data set, and how its label maps store them.

    Attributes:
        names: class names in the order of indices.
        ignore_index: stands for "no label" in stored label maps and in what `read` returns.
        reduce_labels: whether stored maps count classes from 1 and keep 0 for "no label".
        colors: colour of each class where label maps are coded in colours, red, green and blue.
        ignore_color: colour of "no label" in such maps, if they have one.
    """

    names: tuple[str, ...]
    ignore_index: int = IGNORE_INDEX
    reduce_labels: bool = False
    colors: tuple[Color, ...] | None = None
    ignore_color: Color | None = None

    def __post_init__(self) -> None:
        """Refuse values that contradict each other."""
        if not self.names:
            raise ValueError('there are no class names: name at least one, for example ["sky", "road"].')
        if not len(self.names) <= self.ignore_index <= WIDE_IGNORE_INDEX:
            raise ValueError(
                f"ignore_index is {self.ignore_index}, but must lie behind the {len(self.names)} classes and be at "
                f"most {WIDE_IGNORE_INDEX}: choose {default_ignore_index(len(self.names))}; where 0 stands for no "
                "label, leave it out of the names and reduce the labels."
            )
        if self.colors is None:
            if self.ignore_color is not None:
                raise ValueError("ignore_color is of no use without colors: give a colour for each class.")
            return
        if len(self.colors) != len(self.names):
            raise ValueError(f"there are {len(self.colors)} colours for {len(self.names)} classes: give one for each.")
        if self.reduce_labels:
            raise ValueError("colours name classes directly: do not reduce labels that are coded in colours.")
        coded = [*self.colors, *([] if self.ignore_color is None else [self.ignore_color])]
        twice = next((color for color in coded if coded.count(color) > 1), None)
        if twice is not None:
            raise ValueError(f"the colour {twice} stands for two classes: give each its own.")

    def __len__(self) -> int:
        """Number of classes."""
        return len(self.names)

    def read(self, image: Any, *, what: str = "the label map") -> np.ndarray:
        """
        Decode a label map and check its values.

        Args:
            image: PIL image of 1, 8, 16 or 32 bits or with a palette (its indices count), array of integers, or
                path. Where the classes have `colors`, an image in these colours.
            what: what an error calls it.

        Returns:
            `(height, width)` int32, values from 0 to C - 1 or `ignore_index`.

        Raises:
            ValueError: it cannot be read, or holds values or colours that stand for nothing; the sentence names them.
        """
        if self.colors is not None:
            return self._read_colors(image, what)
        stored = _read_indices(image, what)
        ignored = stored == self.ignore_index
        if self.reduce_labels:
            ignored |= stored == 0
            label_map = stored - 1
        else:
            label_map = stored
        outside = (label_map >= len(self.names)) & ~ignored
        if outside.any():
            raise ValueError(self._describe_outside(stored[outside], what))
        return np.where(ignored, np.int32(self.ignore_index), label_map)

    def _read_colors(self, image: Any, what: str) -> np.ndarray:
        assert self.colors is not None
        rgb = read_image(image, what).astype(np.int32)
        codes = (rgb[..., 0] << 16) | (rgb[..., 1] << 8) | rgb[..., 2]
        indices = _color_table(self.colors, self.ignore_color)[codes].astype(np.int32)
        unknown = indices == _UNKNOWN
        if unknown.any():
            values, counts = np.unique(codes[unknown], return_counts=True)
            listed = ", ".join(
                f"({code >> 16}, {code >> 8 & 255}, {code & 255}) on {_pixels(number)}"
                for code, number in _most_frequent(values, counts)
            )
            more = f" and {len(values) - _LISTED} more" if len(values) > _LISTED else ""
            raise ValueError(
                f"{what} holds colours that no class has, {listed}{more}: add the class with its colour to the label "
                "file, or give the colour of pixels without a label as `ignore_color`."
            )
        indices[indices == len(self.names)] = self.ignore_index
        return indices

    def _describe_outside(self, stored: np.ndarray, what: str) -> str:
        values, counts = np.unique(stored, return_counts=True)
        listed = [value for value, _ in _most_frequent(values, counts)]
        more = f" and {len(values) - len(listed)} more values" if len(values) > len(listed) else ""
        first, zero, hint = 0, "", ", or reduce the labels if 0 stands for no label"
        if self.reduce_labels:
            first, zero, hint = 1, "0 and ", ""
        last = len(self.names) - 1 + first
        return (
            f"{what} holds {listed}{more} on {_pixels(len(stored))}, but there are {len(self.names)} labels "
            f"({first} to {last}, {zero}{self.ignore_index} = no label): give every class a name, say which value "
            f"stands for no label (ignore index){hint}."
        )


def default_ignore_index(num_labels: int) -> int:
    """What stands for "no label" where nothing else is said: 255, or 65535 where that is a class."""
    return IGNORE_INDEX if num_labels <= IGNORE_INDEX else WIDE_IGNORE_INDEX


def load_label_set(
    labels: str | os.PathLike | Sequence[str] | LabelSet | None,
    *,
    dataset: Any = None,
    source: str | os.PathLike | None = None,
    ignore_index: int | None = None,
    reduce_labels: bool = False,
) -> LabelSet:
    """
    Find the classes of a data set.

    Args:
        labels: name of a label set that ships with the package, a file (JSON list, object with `classes`, index to
            name as in `id2label.json`, or one name per line), a list of names, or a label set. None takes the names
            that the data set brings.
        dataset: what `load_images` returned; its `ClassLabel` features are looked at where `labels` is None.
        source: what `load_images` was given; an `id2label.json` beside the images is read where `labels` is None
            and the features name no classes.
        ignore_index: value of label maps that stands for "no label"; by default the label set's or file's own, else
            255, or 65535 where there are more than 255 classes.
        reduce_labels: whether label maps count classes from 1 and keep 0 for "no label"; a file may say so, too.

    Returns:
        the label set.

    Raises:
        ValueError: there are no such labels, or they cannot be used.
    """
    if isinstance(labels, LabelSet):
        return replace(
            labels,
            ignore_index=labels.ignore_index if ignore_index is None else ignore_index,
            reduce_labels=labels.reduce_labels or reduce_labels,
        )
    if labels is None:
        labels = _names_in_features(dataset) or _names_file_beside(source)
        if labels is None:
            raise ValueError(
                f"the data set {'' if source is None else f'{source} '}names no classes: give a label set "
                f"({', '.join(vocabulary_names())}) or a file with {FILE_FORMS}."
            )
    found = (
        _from_preset_or_file(labels)
        if isinstance(labels, (str, os.PathLike))
        else LabelFile(tuple(normalize_labels(labels)))
    )
    if ignore_index is None:
        ignore_index = found.ignore_index
    return LabelSet(
        names=found.names,
        ignore_index=default_ignore_index(len(found.names)) if ignore_index is None else ignore_index,
        reduce_labels=found.reduce_labels or reduce_labels,
        colors=found.colors,
        ignore_color=found.ignore_color,
    )


def _from_preset_or_file(labels: str | os.PathLike) -> LabelFile:
    """A label set of the package, else a file; a file of a label set's name is reached by ./name."""
    if labels in vocabulary_names():
        vocabulary = load_vocabulary(str(labels))
        return LabelFile(vocabulary.classes, vocabulary.ignore_index)
    if not Path(labels).exists():
        raise ValueError(
            f"{os.fspath(labels)!r} is neither a label set ({', '.join(vocabulary_names())}) nor a file: pass one of "
            f"those names, or a file with {FILE_FORMS}."
        )
    return read_label_file(Path(labels))


def _names_in_features(dataset: Any) -> list[str] | None:
    """Class names of the label maps' feature, or of a list of classes beside them."""
    features = getattr(dataset, "features", None) or {}
    for name in sorted(features, key=lambda name: name != "annotation"):
        names = class_names_in(features[name])
        if names is not None:
            return names
    return None


def _names_file_beside(source: str | os.PathLike | None) -> Path | None:
    """`id2label.json` in a data set's folder, beside its file, or in its repository on the Hub."""
    if source is None:
        return None
    path = Path(source)
    folder = path if path.is_dir() else path.parent
    for place in (folder, folder.parent):
        if path.exists() and (place / ID2LABEL_FILE).is_file():
            return place / ID2LABEL_FILE
    if path.exists() or glob.has_magic(str(source)) or str(source).count("/") != 1:
        return None
    try:
        return Path(hf_hub_download(str(source), ID2LABEL_FILE, repo_type="dataset"))
    except Exception:
        # No such repository, no such file, no network: in each case the data set names no classes.
        return None


def _read_indices(image: Any, what: str) -> np.ndarray:
    """Stored values `(height, width)` int32; a label is no measurement, so floats are refused, and so are colours."""
    if isinstance(image, (str, os.PathLike)):
        try:
            with Image.open(image) as opened:
                return _read_indices(opened, what)
        except (OSError, Image.DecompressionBombError) as error:
            raise ValueError(f"{what} {os.fspath(image)!r} cannot be read ({error}): pass an image file.") from error
    is_image = isinstance(image, Image.Image)
    if is_image and len(image.getbands()) > 1:
        raise ValueError(
            f"{what} is an image in colours (mode {image.mode}): name the classes' `colors` in the label file, or "
            "store one class index per pixel."
        )
    if (is_image and image.mode == "F") or getattr(getattr(image, "dtype", None), "kind", "") == "f":
        raise ValueError(f"{what} holds floats: store one class index per pixel, as whole numbers.")
    return read_map(image, what)


@lru_cache(maxsize=4)
def _color_table(colors: tuple[Color, ...], ignore_color: Color | None) -> np.ndarray:
    """Index of each of the 2 ** 24 colours, uint16: C for "no label", 65535 for one that stands for nothing."""
    table = np.full(1 << 24, _UNKNOWN, dtype=np.uint16)
    coded = colors if ignore_color is None else (*colors, ignore_color)
    for index, (red, green, blue) in enumerate(coded):
        table[(red << 16) | (green << 8) | blue] = index
    return table


def _most_frequent(values: np.ndarray, counts: np.ndarray) -> list[tuple[int, int]]:
    order = np.argsort(-counts, kind="stable")[:_LISTED]
    return [(int(values[index]), int(counts[index])) for index in order]


def _pixels(number: int) -> str:
    return "1 pixel" if number == 1 else f"{number} pixels"


__all__ = ["ID2LABEL_FILE", "IGNORE_INDEX", "WIDE_IGNORE_INDEX", "LabelSet", "default_ignore_index", "load_label_set"]
