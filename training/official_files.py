# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""Where the official archives of the benchmarks keep things, and what their stored values mean, by `presets.yaml`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from modeling_san.processing.vocabulary_san import load_vocabulary
from modeling_san.processing.wording_san import listed, one_line
from modeling_san.training.presets import Preset

_LISTED = 12
_UNKNOWN = -1


class MissingFolderError(ValueError):
    """A folder or list that a split needs is not where the official archive has it."""


class UnreadableFileError(ValueError):
    """An image or label map is damaged, or the two do not belong together."""


@dataclass(frozen=True)
class Pair:
    """One image and the file of its labels."""

    image: Path
    label_map: Path


@dataclass(frozen=True)
class LabelReader:
    """
    Reads one release's label files as class indices.

    Attributes:
        table: class index, or the ignore label, of each stored value; -1 where the data set defines none. `(values,)`
        ignore_index: stands for "no class".
    """

    table: np.ndarray
    ignore_index: int

    def read(self, path: Path) -> np.ndarray:
        """
        Read one label file.

        Returns:
            class indices `(height, width)`, uint8 where the ignore label is 255, else uint16.

        Raises:
            UnreadableFileError: it cannot be decoded.
            ValueError: it holds a value that is not in the table.
        """
        values = _read_stored_values(path)
        labels = np.take(self.table, values, mode="clip")
        strange = (values < 0) | (values >= len(self.table)) | (labels == _UNKNOWN)
        if strange.any():
            raise ValueError(
                f"{path} holds values to which this data set gives no meaning, "
                f"{listed(np.unique(values[strange]), _LISTED)}: use the official label files, not converted ones."
            )
        return labels.astype(np.uint8 if self.ignore_index == 255 else np.uint16)


@dataclass(frozen=True)
class FoundSplit:
    """
    The files of one split.

    Attributes:
        pairs: images with their label maps, in a fixed order.
        without_label_map: names of images that have none.
        without_image: names of label maps, or of entries in the official list, that have no image.
        reader: reads the label maps.
        layout: which of the known layouts was found, for the data set's card.
    """

    pairs: tuple[Pair, ...]
    without_label_map: tuple[str, ...]
    without_image: tuple[str, ...]
    reader: LabelReader
    layout: str


def find_files(preset: Preset, source: Path, split: str) -> FoundSplit:
    """
    The files of a split in the folder into which official archives were unpacked.

    Args:
        preset: the label set.
        source: the folder, or the one that holds it.
        split: one of the preset's.

    Raises:
        MissingFolderError: a folder or list is not there; the message says where it was looked for.
        ValueError: `source` is no folder, or a list in it cannot be read.
    """
    if not source.is_dir():
        what = "is a file" if source.is_file() else "does not exist"
        raise ValueError(f"{source} {what}: pass the folder into which the official archives were unpacked.")
    words = {"split": split, **preset.splits[split]}

    def first(paths: Sequence[str]) -> tuple[str, dict[str, Path]]:
        """The first of the paths that names files, and these by their names without ending."""
        for root in preset.roots:
            for path in paths:
                if files := _files(source / root, path.format(**words)):
                    return path, files
        raise MissingFolderError(
            f"{source} has no {' or '.join(paths).format(**words)}; looked there and in "
            f"{', '.join(preset.roots[1:])}; {_what_is_in(source)}."
        )

    _, images = first(preset.images)
    path, maps = first([path for release in preset.labels for path in release["files"]])
    release = next(release for release in preset.labels if path in release["files"])
    passed_over = tuple(release.get("passed_over", ()))
    maps = {name: file for name, file in maps.items() if not file.name.endswith(passed_over)}
    names, layout = sorted(images.keys() | maps.keys()), release["layout"].format(**words)
    if preset.lists:
        path, files = first(preset.lists)
        names, layout = _read_list(*files.values()), f"{layout}; split by {path.format(**words)}"
    return FoundSplit(
        pairs=tuple(Pair(images[name], maps[name]) for name in names if name in images and name in maps),
        without_label_map=tuple(name for name in names if name in images and name not in maps),
        without_image=tuple(name for name in names if name not in images),
        reader=make_reader(preset, release),
        layout=layout,
    )


def make_reader(preset: Preset, release: Mapping[str, Any]) -> LabelReader:
    """Reads the label files of one of the preset's releases."""
    classes, numbers = preset.vocabulary, release["numbers"]
    if numbers == "ids":
        stored = [number + release.get("shift", 0) for number in classes.source_ids or ()]
    else:
        names = load_vocabulary(numbers).classes if isinstance(numbers, str) else numbers
        synonyms = release.get("synonyms", {})
        stored = [names.index(synonyms.get(name, name)) + 1 for name in classes.classes]
    last = release.get("last", 0)
    table = np.full(max(*stored, *release["no_label"], last) + 1, _UNKNOWN, dtype=np.int32)
    table[[*release["no_label"], *range(1, last + 1)]] = classes.ignore_index
    table[stored] = np.arange(len(classes))
    return LabelReader(table, classes.ignore_index)


def _read_stored_values(path: Path) -> np.ndarray:
    """Integers `(height, width)`: what the kind of file stores for each pixel."""
    try:
        if path.suffix == ".mat":
            from scipy.io import loadmat

            values = loadmat(path, variable_names=["LabelMap"]).get("LabelMap")
            if values is None:
                raise ValueError("it holds no matrix LabelMap")
        else:
            with Image.open(path, formats=("PNG",)) as image:
                # ADE20K codes the ids of its full list as colours; all else is grey, or the indices of a palette
                bands = 3 if path.name.endswith("_seg.png") else 1
                if len(image.getbands()) != bands:
                    raise ValueError(f"it has mode {image.mode}, expected {bands} channel{'s' if bands > 1 else ''}")
                values = np.asarray(image).astype(np.int32)
            if bands == 3:
                values = values[..., 0] // 10 * 256 + values[..., 1]
        if values.ndim != 2 or values.dtype.kind not in "ui" or values.size == 0:
            raise ValueError(f"it holds {values.dtype} {values.shape}, expected integers (height, width)")
    except Exception as error:
        # The readers raise whatever a damaged file makes them stumble over
        raise UnreadableFileError(f"{path} cannot be read as a label map: {one_line(error)}.") from error
    return values.astype(np.int32)


def _files(root: Path, path: str) -> dict[str, Path]:
    """The files of a path, hidden ones left out, by what stands for its `*`."""
    folder, ending = root / path.partition("*")[0], path.rpartition("*")[2]
    files = ((file.relative_to(folder).as_posix(), file) for file in root.glob(path))
    return {name[: -len(ending)]: file for name, file in files if file == folder or "/." not in f"/{name}"}


def _what_is_in(source: Path) -> str:
    names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in source.iterdir())
    return f"it holds {listed(names, _LISTED)}" if names else "it is empty"


def _read_list(path: Path) -> list[str]:
    """Image names of an official list: the first word of each line, without folder and suffix."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text file in UTF-8.") from error
    names = list(dict.fromkeys(PurePosixPath(line.split()[0]).stem for line in lines if line.strip()))
    if not names:
        raise ValueError(f"{path} is empty: expected the name of one image a line.")
    return names


__all__ = [
    "FoundSplit",
    "LabelReader",
    "MissingFolderError",
    "Pair",
    "UnreadableFileError",
    "find_files",
    "make_reader",
]
