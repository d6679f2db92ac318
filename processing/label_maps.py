"""What the values of label maps mean: names, the value for "no label", and ways to store them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from .images_san import open_image, read_image, read_map
from .labels_san import normalize_labels
from .wording_san import listed

IGNORE_INDEX = 255
"""Stands for "no label" in maps of 8 bits."""

WIDE_IGNORE_INDEX = 65535
"""Stands for "no label" in maps of 16 bits, which more than 255 classes need."""

Color = tuple[int, int, int]

_UNKNOWN = 65535


@dataclass(frozen=True)
class LabelSet:
    """The classes of a data set, and how its label maps store them.

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
        if twice := next((color for color in coded if coded.count(color) > 1), None):
            raise ValueError(f"the colour {twice} stands for two classes: give each its own.")

    def __len__(self) -> int:
        """Number of classes."""
        return len(self.names)

    def read(self, image: Any, *, what: str = "the label map") -> np.ndarray:
        """Decode a label map and check its values.

        Args:
            image: PIL image of 1, 8, 16 or 32 bits or with a palette (its indices count), array of integers, or
                path. Where the classes have `colors`, an image in these colours.
            what: what an error calls it.

        Returns:
            `(height, width)` int32, values from 0 to C - 1 or `ignore_index`.

        Raises:
            ValueError: it cannot be read, or holds values or colours that stand for nothing; the sentence names them.
        """
        image = open_image(image, what) if isinstance(image, (str, os.PathLike)) else image
        if self.colors is not None:
            return self._read_colors(image, what)
        _refuse_other_than_indices(image, what)
        stored = read_map(image, what)
        ignored = stored == self.ignore_index
        if self.reduce_labels:
            ignored |= stored == 0
        label_map = stored - 1 if self.reduce_labels else stored
        outside = (label_map >= len(self.names)) & ~ignored
        if outside.any():
            first, zero, hint = (
                (1, "0 and ", "") if self.reduce_labels else (0, "", ", or reduce the labels if 0 does")
            )
            raise ValueError(
                f"{what} holds {_most_frequent(stored[outside], str)}, but there are {len(self.names)} labels "
                f"({first} to {len(self.names) - 1 + first}, {zero}{self.ignore_index} = no label): give every class "
                f"a name, or say which value stands for no label (ignore index){hint}."
            )
        return np.where(ignored, np.int32(self.ignore_index), label_map)

    def _read_colors(self, image: Any, what: str) -> np.ndarray:
        assert self.colors is not None
        rgb = read_image(image, what).astype(np.int32)
        codes = (rgb[..., 0] << 16) | (rgb[..., 1] << 8) | rgb[..., 2]
        indices = _color_table(self.colors, self.ignore_color)[codes].astype(np.int32)
        unknown = indices == _UNKNOWN
        if unknown.any():
            colors = _most_frequent(codes[unknown], lambda code: f"({code >> 16}, {code >> 8 & 255}, {code & 255})")
            raise ValueError(
                f"{what} holds colours that no class has, {colors}: add the class with its colour to the label file, "
                "or give the colour of pixels without a label as `ignore_color`."
            )
        indices[indices == len(self.names)] = self.ignore_index
        return indices


def default_ignore_index(num_labels: int) -> int:
    """What stands for "no label" where nothing else is said: 255, or 65535 where that is a class."""
    return IGNORE_INDEX if num_labels <= IGNORE_INDEX else WIDE_IGNORE_INDEX


def make_label_set(names: str | Iterable[str], *, ignore_index: int | None = None, **options: Any) -> LabelSet:
    """A label set of names as people write them; `ignore_index` is 255 or, of more classes, 65535 by default.

    Args:
        names: what `normalize_labels` takes.
        ignore_index: stands for "no label".
        options: further fields of the label set.

    Raises:
        ValueError: a name is refused, or the options contradict each other.
    """
    normalized = tuple(normalize_labels(names))
    ignore_index = default_ignore_index(len(normalized)) if ignore_index is None else ignore_index
    return LabelSet(normalized, ignore_index, **options)


def _refuse_other_than_indices(image: Any, what: str) -> None:
    """A label is no measurement, so floats are refused, and so are colours."""
    is_image = isinstance(image, Image.Image)
    if is_image and len(image.getbands()) > 1:
        raise ValueError(
            f"{what} is an image in colours (mode {image.mode}): name the classes' `colors` in the label file, or "
            "store one class index per pixel."
        )
    if (is_image and image.mode == "F") or getattr(getattr(image, "dtype", None), "kind", "") == "f":
        raise ValueError(f"{what} holds floats: store one class index per pixel, as whole numbers.")


@lru_cache(maxsize=4)
def _color_table(colors: tuple[Color, ...], ignore_color: Color | None) -> np.ndarray:
    """Index of each of the 2 ** 24 colours, uint16: C for "no label", 65535 for one that stands for nothing."""
    table = np.full(1 << 24, _UNKNOWN, dtype=np.uint16)
    coded = colors if ignore_color is None else (*colors, ignore_color)
    for index, (red, green, blue) in enumerate(coded):
        table[(red << 16) | (green << 8) | blue] = index
    return table


def _most_frequent(stored: np.ndarray, write: Callable[[int], str]) -> str:
    """Values with their numbers of pixels, the most frequent first."""
    values, counts = np.unique(stored, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return listed(
        f"{write(int(values[index]))} on {counts[index]} pixel{'' if counts[index] == 1 else 's'}" for index in order
    )


__all__ = ["IGNORE_INDEX", "WIDE_IGNORE_INDEX", "Color", "LabelSet", "default_ignore_index", "make_label_set"]
