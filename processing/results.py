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
        files = {one: f"{name}{RESULT_ENDINGS[one]}" for one in ("overlay", "label_map")}
        # A file's name need not be text: its bytes may be anything
        names = {one: os.fsencode(file).decode("utf-8", "replace") for one, file in {"image": source, **files}.items()}
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


__all__ = ["RESULT_ENDINGS", "encode_result", "write_results"]
