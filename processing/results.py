# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""The files that a segmentation is kept in: an overlay to look at, an indexed label image, and a summary."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

from .files import replacing_file
from .segmenter import Segmentation

RESULT_ENDINGS = {"overlay": "_overlay.png", "label_map": "_labels.png", "summary": ".json"}
"""What follows an image's name in that of each file."""


def encode_result(
    kind: str, segmentation: Segmentation, image: Any, name: str, *, source: str, model: str, opacity: float = 0.5
) -> bytes:
    """
    The content of one of the files.

    Args:
        kind: one of `RESULT_ENDINGS`.
        segmentation: of the image.
        image: `(height, width, 3)` bytes, or a PIL image.
        name: that the files' names begin with.
        source: where the image came from, for the summary, as is the model's name.
        opacity: of the overlay's colours, 0 ... 1.
    """
    if kind == "summary":
        names = {"image": _as_text(source)}
        names |= {one: _as_text(name + RESULT_ENDINGS[one]) for one in ("overlay", "label_map")}
        return (json.dumps(segmentation.summary(**names, model=model), indent=2, ensure_ascii=False) + "\n").encode()
    drawn = segmentation.overlay(image, opacity) if kind == "overlay" else segmentation.label_image()
    drawn.save(buffer := io.BytesIO(), format="PNG")
    return buffer.getvalue()


def write_results(
    segmentation: Segmentation, image: Any, folder: Path, name: str, *, source: str, model: str, opacity: float = 0.5
) -> Path:
    """
    Write all files of one image, each complete or not at all; arguments as of `encode_result`.

    Returns:
        path of the overlay.

    Raises:
        OSError: a file cannot be written.
    """
    # The summary last, so that where there is one the images are complete
    for kind, ending in RESULT_ENDINGS.items():
        content = encode_result(kind, segmentation, image, name, source=source, model=model, opacity=opacity)
        with replacing_file(folder / (name + ending)) as beside:
            beside.write_bytes(content)
    return folder / (name + RESULT_ENDINGS["overlay"])


def replaces_results_only(folder: Path, name: str, *others: str) -> bool:
    """
    Whether writing results under a name loses nothing of somebody's own.

    Args:
        folder: to write to; it need not exist.
        name: that the files' names would begin with.
        others: names of further files to be written.

    Returns:
        true where none of the files is there, or the summary among them says that it belongs to such results.
    """
    files = [name + ending for ending in RESULT_ENDINGS.values()]
    if not any(os.path.lexists(folder / file) for file in (*files, *others)):
        return True
    try:
        summary = json.loads((folder / (name + RESULT_ENDINGS["summary"])).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    names = {one: _as_text(name + RESULT_ENDINGS[one]) for one in ("overlay", "label_map")}
    return isinstance(summary, dict) and "segments" in summary and summary == {**summary, **names}


def _as_text(name: str) -> str:
    """A file's name need not be text: its bytes may be anything."""
    return os.fsencode(name).decode("utf-8", "replace")


__all__ = ["RESULT_ENDINGS", "encode_result", "replaces_results_only", "write_results"]
