# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""What the values of a data set's label maps mean: names, the value for "no label", and ways to store them."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import hf_hub_download

from modeling_san.processing import load_vocabulary, vocabulary_names
from modeling_san.processing.images_san import open_image, read_image, read_map
from modeling_san.processing.label_files import FILE_FORMS, read_label_file
from modeling_san.processing.labels_san import normalize_labels
from modeling_san.processing.wording_san import listed
from modeling_san.training.sources import class_names_in

Color = tuple[int, int, int]

_IGNORE_INDEX, _WIDE_IGNORE_INDEX = 255, 65535
_NO_CLASS = 65535


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
        value_map: pairs of a stored value and the one that it stands for, before all else.
    """

    names: tuple[str, ...]
    ignore_index: int = _IGNORE_INDEX
    reduce_labels: bool = False
    colors: tuple[Color, ...] | None = None
    ignore_color: Color | None = None
    value_map: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        """Refuse values that contradict each other."""
        if not self.names:
            raise ValueError('there are no class names: name at least one, for example ["sky", "road"].')
        if not len(self.names) <= self.ignore_index <= _WIDE_IGNORE_INDEX:
            raise ValueError(
                f"ignore_index is {self.ignore_index}, but must lie behind the {len(self.names)} classes and be at "
                f"most {_WIDE_IGNORE_INDEX}: choose {_default_ignore_index(self.names)}; where 0 stands for no "
                "label, leave it out of the names and reduce the labels."
            )
        if self.value_map and self.colors is not None:
            raise ValueError("values cannot be mapped where colours name the classes: leave the map out.")
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
        image = open_image(image, what) if isinstance(image, (str, os.PathLike)) else image
        return self._read_indices(image, what) if self.colors is None else self._read_colors(image, what)

    def _read_indices(self, image: Any, what: str) -> np.ndarray:
        # A label is no measurement, even where the floats are whole numbers
        if getattr(image, "mode", "") == "F" or getattr(getattr(image, "dtype", None), "kind", "") == "f":
            raise ValueError(f"{what} holds floats: store one class index per pixel, as whole numbers.")
        stored = read_map(image, what, also=[old for old, _ in self.value_map])
        if self.value_map:
            # All at once: a value that one pair makes is not another's old one
            given, stored = stored, stored.copy()
            for old, new in self.value_map:
                stored[given == old] = new
        ignored = stored == self.ignore_index
        if self.reduce_labels:
            ignored |= stored == 0
        label_map = stored - self.reduce_labels
        outside = ((label_map >= len(self.names)) | (label_map < 0)) & ~ignored
        if outside.any():
            first, zero, hint = (
                (1, "0 and ", "") if self.reduce_labels else (0, "", ", or reduce the labels if 0 does")
            )
            raise ValueError(
                f"{what} holds {_most_frequent(stored[outside], str)}, but there are {len(self.names)} labels "
                f"({first} to {len(self.names) - 1 + first}, {zero}{self.ignore_index} = no label): give every class "
                f"a name, say which value stands for no label (ignore index), or map it to another one{hint}."
            )
        return np.where(ignored, np.int32(self.ignore_index), label_map)

    def _read_colors(self, image: Any, what: str) -> np.ndarray:
        assert self.colors is not None
        rgb = read_image(image, what).astype(np.int32)
        codes = (rgb[..., 0] << 16) | (rgb[..., 1] << 8) | rgb[..., 2]
        indices = _color_table(self.colors, self.ignore_color)[codes].astype(np.int32)
        unknown = indices == _NO_CLASS
        if unknown.any():
            colors = _most_frequent(codes[unknown], lambda code: f"({code >> 16}, {code >> 8 & 255}, {code & 255})")
            raise ValueError(
                f"{what} holds colours that no class has, {colors}: add the class with its colour to the label file, "
                "or give the colour of pixels without a label as `ignore_color`."
            )
        indices[indices == len(self.names)] = self.ignore_index
        return indices


def load_label_set(
    labels: str | os.PathLike | Iterable[str] | LabelSet | None,
    *,
    dataset: Any = None,
    source: str | os.PathLike | None = None,
    ignore_index: int | None = None,
    reduce_labels: bool = False,
    value_map: Mapping[int, int] | None = None,
) -> LabelSet:
    """
    Find the classes of a data set.

    Args:
        labels: name of a label set that ships with the package, a file (see `read_label_file`), a list of names, or a
            label set. None takes the names that the data set brings.
        dataset: what `load_images` returned; its `ClassLabel` features are looked at where `labels` is None.
        source: what `load_images` was given; an `id2label.json` beside the images is read where `labels` is None
            and the features name no classes.
        ignore_index: value of label maps that stands for "no label"; by default the label set's or file's own, else
            255, or 65535 where there are more than 255 classes.
        reduce_labels: whether label maps count classes from 1 and keep 0 for "no label"; a file may say so, too.
        value_map: stored values that mean other ones, see `parse_map`; a file may say so, too, as `map`.

    Raises:
        ValueError: there are no such labels, or they cannot be used.
    """
    if labels is None:
        labels = _names_in_features(dataset) or _names_file_beside(source)
        if labels is None:
            raise ValueError(
                f"the data set {'' if source is None else f'{source} '}names no classes: give a label set "
                f"({', '.join(vocabulary_names())}) or a file with {FILE_FORMS}."
            )
    facts: dict[str, Any] = {"ignore_index": None, "reduce_labels": False, **_facts(labels)}
    if ignore_index is not None:
        facts["ignore_index"] = ignore_index
    elif facts["ignore_index"] is None:
        facts["ignore_index"] = _default_ignore_index(facts["names"])
    facts["reduce_labels"] = facts["reduce_labels"] or reduce_labels
    mapped = dict(facts.get("value_map", ())) | dict(value_map or {})
    if facts["ignore_index"] < 0:
        # Images hold no negative numbers, which arrays may
        no_label = _default_ignore_index(facts["names"])
        mapped, facts["ignore_index"] = {facts["ignore_index"]: no_label} | mapped, no_label
    facts["value_map"] = tuple(sorted(mapped.items()))
    return LabelSet(**facts)


def parse_map(pairs: Iterable[str]) -> dict[int, int]:
    """
    Values of label maps and what they stand for.

    Args:
        pairs: texts such as "255=1".

    Raises:
        ValueError: one has another form, or a value is given twice.
    """
    mapped: dict[int, int] = {}
    for pair in pairs:
        found = re.fullmatch(r"\s*(-?\d{1,5})\s*[=:]\s*(\d{1,5})\s*", str(pair))
        if not found or int(found[1]) in mapped:
            raise ValueError(f"map is {pair!r}: write OLD=NEW with whole numbers, each OLD once, for example 255=1.")
        mapped[int(found[1])] = int(found[2])
    return mapped


def _facts(labels: str | os.PathLike | Iterable[str] | LabelSet) -> dict[str, Any]:
    """The fields of a label set, as far as what was given says them."""
    if isinstance(labels, LabelSet):
        return vars(labels)
    if not isinstance(labels, (str, os.PathLike)):
        return {"names": tuple(normalize_labels(labels))}
    # A file of a shipped set's name is reached by ./name
    if labels in vocabulary_names():
        shipped = load_vocabulary(os.fspath(labels))
        return {"names": shipped.classes, "ignore_index": shipped.ignore_index}
    if not Path(labels).exists():
        raise ValueError(
            f"{os.fspath(labels)!r} is neither a label set ({', '.join(vocabulary_names())}) nor a file: pass one of "
            f"those names, or a file with {FILE_FORMS}."
        )
    facts = read_label_file(os.fspath(labels))
    value_map = tuple(facts.pop("map", {}).items())
    return {"names": facts.pop("classes"), "value_map": value_map, **facts}


def _default_ignore_index(names: Sequence[str]) -> int:
    """What stands for "no label" where nothing else is said: 255, or 65535 where that is a class."""
    return _IGNORE_INDEX if len(names) <= _IGNORE_INDEX else _WIDE_IGNORE_INDEX


def _names_in_features(dataset: Any) -> list[str] | None:
    """Class names of the label maps' feature, or of a list of classes beside them."""
    features = getattr(dataset, "features", None) or {}
    found = (class_names_in(features[name]) for name in sorted(features, key=lambda name: name != "annotation"))
    return next((names for names in found if names is not None), None)


def _names_file_beside(source: str | os.PathLike | None) -> Path | None:
    """`id2label.json` in a data set's folder, beside its file, or in its repository on the Hub."""
    if source is None:
        return None
    path, name = Path(source), "id2label.json"
    if path.exists():
        folder = path if path.is_dir() else path.parent
        return next((file for file in (folder / name, folder.parent / name) if file.is_file()), None)
    if glob.has_magic(str(source)) or str(source).count("/") != 1:
        return None
    try:
        return Path(hf_hub_download(str(source), name, repo_type="dataset"))
    except Exception:
        # No such repository, no such file, no network: in each case the data set names no classes.
        return None


@lru_cache(maxsize=4)
def _color_table(colors: tuple[Color, ...], ignore_color: Color | None) -> np.ndarray:
    """Index of each of the 2 ** 24 colours, uint16: C for "no label", 65535 for one that stands for nothing."""
    table = np.full(1 << 24, _NO_CLASS, dtype=np.uint16)
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


__all__ = ["LabelSet", "load_label_set", "parse_map"]
