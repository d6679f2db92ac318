"""What a segmentation says, as data: the content of the JSON files that accompany it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .drawing import label_colors, summarize
from .labels_san import split_synonyms


def list_segments(label_map: np.ndarray, scores: np.ndarray | None, labels: Sequence[str]) -> list[dict[str, Any]]:
    """
    The labels that are present, largest first, with their indices and colours.

    Args:
        label_map: `(height, width)` indices into `labels`.
        scores: `(height, width)` scores that the labels won with, or None.
        labels: names by index.

    Returns:
        what `summarize` returns, each entry with `index`, and `color` as "#rrggbb".

    Raises:
        ValueError: scores and segmentation differ in size.
    """
    colors = label_colors(labels)
    segments = summarize(label_map, scores, labels)
    for segment in segments:
        segment["index"] = labels.index(segment["label"])
        segment["color"] = color_code(colors[segment["index"]])
    return segments


def make_summary(
    segments: Sequence[dict[str, Any]],
    labels: Sequence[str],
    *,
    image: str,
    size: tuple[int, int],
    model: str,
    extended_by: str,
    overlay: str,
    label_map: str,
) -> dict[str, Any]:
    """
    What is to be known of one segmented image, ready for JSON.

    Args:
        segments: what `list_segments` returned.
        labels: names by index.
        image: where the image came from.
        size: its height and width.
        model: that segmented it.
        extended_by: how the labels were extended, see `extend_labels`.
        overlay: name of the file with the painted image.
        label_map: name of the file with the indices.
    """
    return {
        "image": image,
        "width": size[1],
        "height": size[0],
        "model": model,
        "labels": list(labels),
        "extended_by": extended_by,
        "segments": list(segments),
        "overlay": overlay,
        "label_map": label_map,
    }


def unknown_words(labels: Iterable[str], known: Iterable[str]) -> list[str]:
    """
    Words among labels and their synonyms that are not among those known.

    Args:
        labels: normalised labels.
        known: labels too; each of their synonyms counts as known.
    """
    names = {name for label in known for name in split_synonyms(label)}
    return [name for label in labels for name in split_synonyms(label) if name not in names]


def color_code(color: Sequence[int] | np.ndarray) -> str:
    """Red, green and blue bytes as "#rrggbb"."""
    return "#{:02x}{:02x}{:02x}".format(*color)
