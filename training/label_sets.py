"""Finding out what the values of a data set's label maps mean."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from modeling_san.processing import load_vocabulary, vocabulary_names
from modeling_san.processing.label_files import FILE_FORMS, read_label_file
from modeling_san.processing.label_maps import IGNORE_INDEX, LabelSet, make_label_set
from modeling_san.training.sources import class_names_in

ID2LABEL_FILE = "id2label.json"
"""Where data sets on the Hub keep their class names."""


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
        labels: name of a label set that ships with the package, a file (see `read_label_file`), a list of names, or a
            label set. None takes the names that the data set brings.
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
    if labels is None:
        labels = _names_in_features(dataset) or _names_file_beside(source)
        if labels is None:
            raise ValueError(
                f"the data set {'' if source is None else f'{source} '}names no classes: give a label set "
                f"({', '.join(vocabulary_names())}) or a file with {FILE_FORMS}."
            )
    if isinstance(labels, (str, os.PathLike)) and labels not in vocabulary_names():
        # A file of a shipped set's name is reached by ./name
        if not Path(labels).exists():
            raise ValueError(
                f"{os.fspath(labels)!r} is neither a label set ({', '.join(vocabulary_names())}) nor a file: pass one "
                f"of those names, or a file with {FILE_FORMS}."
            )
        return read_label_file(labels, ignore_index=ignore_index, reduce_labels=reduce_labels)
    if isinstance(labels, str):
        shipped = load_vocabulary(labels)
        labels = LabelSet(shipped.classes, shipped.ignore_index)
    if isinstance(labels, LabelSet):
        return replace(
            labels,
            ignore_index=labels.ignore_index if ignore_index is None else ignore_index,
            reduce_labels=labels.reduce_labels or reduce_labels,
        )
    return make_label_set(labels, ignore_index=ignore_index, reduce_labels=reduce_labels)


def _names_in_features(dataset: Any) -> list[str] | None:
    """Class names of the label maps' feature, or of a list of classes beside them."""
    features = getattr(dataset, "features", None) or {}
    found = (class_names_in(features[name]) for name in sorted(features, key=lambda name: name != "annotation"))
    return next((names for names in found if names is not None), None)


def _names_file_beside(source: str | os.PathLike | None) -> Path | None:
    """`id2label.json` in a data set's folder, beside its file, or in its repository on the Hub."""
    if source is None:
        return None
    path = Path(source)
    if path.exists():
        folder = path if path.is_dir() else path.parent
        return next(
            (place / ID2LABEL_FILE for place in (folder, folder.parent) if (place / ID2LABEL_FILE).is_file()), None
        )
    if glob.has_magic(str(source)) or str(source).count("/") != 1:
        return None
    try:
        return Path(hf_hub_download(str(source), ID2LABEL_FILE, repo_type="dataset"))
    except Exception:
        # No such repository, no such file, no network: in each case the data set names no classes.
        return None


__all__ = ["ID2LABEL_FILE", "IGNORE_INDEX", "LabelSet", "load_label_set"]
