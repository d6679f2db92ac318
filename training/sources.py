# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""Opening data sets of labelled images, in whatever form they are kept."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, IterableDataset, Value, get_dataset_split_names, load_dataset, load_from_disk
from datasets import Image as ImageFeature

from modeling_san.processing.images_san import image_endings
from modeling_san.processing.wording_san import one_line

IMAGE_COLUMNS = ("image", "pixel_values", "img", "picture")
LABEL_COLUMNS = (
    "annotation",
    "label",
    "labels",
    "semantic_segmentation",
    "segmentation_mask",
    "mask",
    "segmentation",
    "label_map",
    "annotations",
)
IMAGE_FOLDERS = ("images", "image", "imgs", "img", "JPEGImages")
LABEL_FOLDERS = ("annotations", "annotation", "labels", "label", "masks", "mask", "SegmentationClass")

_SPLIT_FOLDERS = {"train": ("train", "training"), "validation": ("validation", "val", "valid")}
_FILE_FORMATS = {".parquet": "parquet", ".arrow": "arrow"}
_STREAM_SHARDS = 64
"""Parts that a data set on disk is streamed in, so that processes and workers can share it."""

_logger = logging.getLogger(__name__)


def load_images(
    source: str | os.PathLike,
    split: str = "train",
    *,
    streaming: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
    labelled: bool = True,
    keep_columns: Sequence[str] = (),
) -> Dataset | IterableDataset:
    """
    Open a data set of images with label maps.

    Args:
        source: a parquet or arrow file, a pattern such as `data/train-*.parquet`, a folder (of such files, written by
            `save_to_disk`, an image folder with a metadata file, or two folders such as `images` and `annotations`
            that hold files of the same names; of those the images alone where it is not labelled), or a Hub id.
        split: which part of it; where there is only one, as in a file, that one is taken whatever it is called.
        streaming: read the data set as it is used instead of copying it into a cache; its length stays unknown.
        image_column: where the images are; recognised by its name by default.
        label_column: where the label maps are; recognised by its name by default.
        labelled: whether label maps are needed; images to segment have none.
        keep_columns: others that stay.

    Returns:
        a data set with the columns `image` and, where it is labelled, `annotation`; lists of classes with names stay.

    Raises:
        ValueError: where the source cannot be read or holds no images with label maps.
    """
    try:
        dataset = _open(os.fspath(source), split, streaming, labelled)
        columns = _first_columns(dataset)
        features = dict(dataset.features or dict.fromkeys(columns))
    except Exception as error:
        # The readers behind raise dozens of types; what a user can do about them is the same.
        reason = one_line(error)
        if "corresponds to no data" in reason:
            raise ValueError(f"{source} (split {split!r}) holds no images.") from error
        raise ValueError(
            f"{source} cannot be read as a data set (split {split!r}): {reason}. Pass a parquet or arrow file, a "
            "folder of images and label maps, a folder written by datasets, or a Hub id."
        ) from error
    if not columns:
        raise ValueError(f"{source} (split {split!r}) holds no images.")
    image = _find_column(features, image_column, IMAGE_COLUMNS, "images", source)
    wanted = {image: "image"}
    if labelled or label_column is not None:
        label = _find_column(features, label_column, LABEL_COLUMNS, "label maps", source)
        if label == image:
            raise ValueError(f"{source}: column {image!r} cannot hold both the images and the label maps.")
        wanted[label] = "annotation"
    for name in wanted:
        if isinstance(features[name], Value):
            # Only a column chosen by name comes here: paths, or encoded files
            dataset = dataset.cast_column(name, ImageFeature())
    if missing := [name for name in keep_columns if name not in features or name in wanted]:
        raise ValueError(
            f"{source} has no column {missing[0]!r} to keep beside the images, but {', '.join(features)}."
        )
    naming = [name for name in features if name not in wanted and class_names_in(features[name]) is not None]
    dataset = dataset.select_columns(list(dict.fromkeys([*wanted, *keep_columns, *naming])))
    # A column of class names may sit on a name that is needed
    for names in ({name: f"{name}_classes" for name in naming if name in wanted.values()}, wanted):
        if renamed := {old: new for old, new in names.items() if old != new}:
            dataset = dataset.rename_columns(renamed)
    return dataset


def class_names_in(feature: Any) -> list[str] | None:
    """Class names of a list of classes, nested at will; None for all else, one class for a whole image too."""
    while feature is not None:
        # `datasets` has written lists in two ways
        feature = next(iter(feature), None) if isinstance(feature, list) else getattr(feature, "feature", None)
        if isinstance(feature, ClassLabel) and feature.names:
            return list(feature.names)
    return None


def undecoded(dataset: Any) -> Any:
    """
    A data set that leaves its images encoded: what is passed over costs nothing, and `open_image` opens the rest.

    Args:
        dataset: of `datasets`; anything else is returned as it is.
    """
    for name, feature in (getattr(dataset, "features", None) or {}).items():
        if isinstance(feature, ImageFeature) and feature.decode:
            dataset = dataset.cast_column(name, ImageFeature(decode=False))
    return dataset


def _open(source: str, split: str, streaming: bool, labelled: bool) -> Any:
    """A data set with all its columns; what the readers of `datasets` raise where it cannot be opened."""
    path = Path(source)
    # Its overloads know no plain truth value for streaming
    load: Any = load_dataset
    if path.suffix in _FILE_FORMATS:
        # A file may have a name that could be a pattern
        files = glob.escape(source) if path.is_file() else source
        return load(_FILE_FORMATS[path.suffix], data_files=files, split="train", streaming=streaming)
    if glob.has_magic(source) and not path.exists():
        raise ValueError(f"a pattern has to end in {' or '.join(_FILE_FORMATS)}")
    dataset: Any = None
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        dataset = load_from_disk(source)
        if not isinstance(dataset, Dataset):
            dataset = dataset[_find_split(source, split, list(map(str, dataset)))]
    elif path.is_dir() and (labelled or not any(path.glob("metadata.*"))):
        dataset = _open_two_folders(path, split, labelled)
    if dataset is not None:
        parts = min(_STREAM_SHARDS, len(dataset))
        return dataset.to_iterable_dataset(num_shards=parts) if streaming and parts else dataset
    try:
        return load(source, split=split, streaming=streaming)
    except ValueError:
        names = []
        with suppress(Exception):
            names = get_dataset_split_names(source)
        if not names or split in names:
            raise
    return load(source, split=_find_split(source, split, names), streaming=streaming)


def _find_split(source: str, wanted: str, names: Sequence[str]) -> str:
    """A split by its name; where there is only one, that one, whatever it is called."""
    if wanted in names:
        return wanted
    if len(names) != 1:
        raise ValueError(f"it has the splits {', '.join(names)}")
    _logger.warning("%s has no split %r: its only one, %r, is taken.", source, wanted, names[0])
    return names[0]


def _open_two_folders(folder: Path, split: str, labelled: bool) -> Dataset | None:
    """Images and, if wanted, label maps of the same names, from a folder of each; None where there are no such two."""
    splits = _SPLIT_FOLDERS.get(split, (split,))

    def first(place: str, kinds: Sequence[str]) -> Path | None:
        places = (folder / place.format(kind=kind, split=name) for kind in kinds for name in splits)
        return next(filter(Path.is_dir, places), None)

    for place in ("{split}/{kind}", "{kind}/{split}", "{kind}"):
        images, labels = first(place, IMAGE_FOLDERS), first(place, LABEL_FOLDERS)
        if images is None or labels is None:
            continue
        if place == "{kind}" and any(entry.is_dir() for kind in (images, labels) for entry in kind.iterdir()):
            raise ValueError(f"{images} and {labels} hold folders, but none called {' or '.join(splits)}")
        if not labelled:
            files = {"image": list(map(str, _image_files(images)))}
            return Dataset.from_dict(files).cast_column("image", ImageFeature())
        return _pair(_files_by_stem(images), _files_by_stem(labels))
    return None


def _image_files(folder: Path) -> list[Path]:
    """Images in a folder and those below."""
    endings = image_endings()
    paths = sorted(folder.rglob("*"))
    return [path for path in paths if path.suffix.lower() in endings and not path.name.startswith(".")]


def _files_by_stem(folder: Path) -> dict[str, str]:
    """Images in a folder and those below, by their path without ending."""
    files: dict[str, str] = {}
    for path in _image_files(folder):
        stem = path.relative_to(folder).with_suffix("").as_posix()
        if stem in files:
            raise ValueError(f"{files[stem]} and {path} share the name {stem!r}: keep one of them")
        files[stem] = str(path)
    return files


def _pair(images: dict[str, str], labels: dict[str, str]) -> Dataset:
    stems = [stem for stem in images if stem in labels]
    if not stems:
        raise ValueError(f"{len(images)} images and {len(labels)} label maps lie there, but no two of the same name")
    if len(images) > len(stems) or len(labels) > len(stems):
        _logger.warning(
            "%d images without a label map of the same name and %d label maps without an image are left out.",
            len(images) - len(stems),
            len(labels) - len(stems),
        )
    columns = {"image": [images[stem] for stem in stems], "annotation": [labels[stem] for stem in stems]}
    return Dataset.from_dict(columns).cast_column("image", ImageFeature()).cast_column("annotation", ImageFeature())


def _first_columns(dataset: Any) -> tuple[str, ...]:
    """Columns of the first example; none of an empty data set."""
    if isinstance(dataset, Dataset):
        return tuple(dataset.column_names) if len(dataset) else ()
    return tuple(next(iter(undecoded(dataset)), ()))


def _find_column(features: dict[str, Any], chosen: str | None, known: Sequence[str], kind: str, source: object) -> str:
    """Name of the column of images or label maps: the user's, or the first of the known ones that there is."""
    if chosen is not None:
        if chosen not in features:
            raise ValueError(f"{source} has no column {chosen!r}, but {', '.join(features)}.")
        if isinstance(features[chosen], ClassLabel):
            raise ValueError(f"{source}: column {chosen!r} holds one class for each whole image, and no {kind}.")
        return chosen
    for name in known:
        # One class for a whole image, as image folders have it, is no label map.
        if name in features and not isinstance(features[name], (ClassLabel, Value)):
            return name
    raise ValueError(
        f"{source} has the columns {', '.join(features)}, none of which is known to hold {kind}: name it "
        f"{known[0]!r}, or say which column it is."
    )


__all__ = ["class_names_in", "load_images", "undecoded"]
