"""Image files that a command reads, and the names of what it writes for each."""

from __future__ import annotations

import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING

from modeling_san.processing.wording_san import one_line

from .errors import CommandError

if TYPE_CHECKING:
    import numpy as np

STANDARD_INPUT = "-"
OVERLAY_ENDING, LABELS_ENDING, SUMMARY_ENDING = "_overlay.png", "_labels.png", ".json"
"""What is put behind an image's name for the files that are written."""


def list_images(arguments: Sequence[str]) -> list[Path]:
    """
    Paths on the command line, `-` replaced by the lines of standard input; a path given twice counts once.

    Raises:
        CommandError: there is none.
    """
    paths = list(dict.fromkeys(Path(text) for text in _with_standard_input(arguments)))
    if not paths:
        raise CommandError("standard input holds no paths: write one path of an image per line")
    return paths


def _with_standard_input(arguments: Sequence[str]) -> Iterator[str]:
    for argument in arguments:
        if argument != STANDARD_INPUT:
            yield argument
        else:
            yield from (line.rstrip("\r\n") for line in sys.stdin if line.strip())


def output_names(paths: Sequence[Path], folder: Path) -> list[str]:
    """
    A name for each image to write its results under: its own without the ending, and with a number behind where
    several have the same, or where a result would replace one of the images.

    Args:
        paths: of the images.
        folder: that results go to.
    """
    inputs = {_place(path) for path in paths}
    # Compared in lower case, as some file systems do not tell upper from lower
    stems = {path.stem.casefold() for path in paths}
    used: set[str] = set()

    def is_free(name: str, stem: str) -> bool:
        folded = name.casefold()
        belongs_to_another = name != stem and folded in stems
        return not belongs_to_another and folded not in used and inputs.isdisjoint(_places(folder, name))

    names = []
    numbers: dict[str, Iterator[int]] = defaultdict(lambda: count(2))
    for stem in (path.stem for path in paths):
        candidates = chain([stem], (f"{stem}-{number}" for number in numbers[stem.casefold()]))
        name = next(candidate for candidate in candidates if is_free(candidate, stem))
        used.add(name.casefold())
        names.append(name)
    return names


def _places(folder: Path, name: str) -> Iterable[str]:
    return (_place(folder / (name + ending)) for ending in (OVERLAY_ENDING, LABELS_ENDING, SUMMARY_ENDING))


def _place(path: Path) -> str:
    try:
        # Unlike `Path.resolve`, this takes a link that leads to itself
        return os.path.realpath(path).casefold()
    except ValueError:
        # Nothing can have such a name
        return str(path)


def load_image(path: Path) -> np.ndarray:
    """
    Read an image file.

    Returns:
        `(height, width, 3)` bytes, upright, red, green and blue.

    Raises:
        CommandError: says why the file is no image that can be read.
    """
    from PIL import Image

    from modeling_san.processing.images_san import open_image, read_byte_image

    _check_file(path)
    try:
        with warnings.catch_warnings():
            # Images of this size would take gigabytes; PIL itself refuses them from twice as many pixels only
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with open_image(path) as image:
                return read_byte_image(image, str(path))
    except Image.DecompressionBombWarning as error:
        raise CommandError(
            f"{path} has more than the {Image.MAX_IMAGE_PIXELS or 0:,} pixels that are read: shrink it before"
        ) from error
    except MemoryError as error:
        raise CommandError(f"{path} does not fit into memory: shrink it before") from error
    except ValueError as error:
        raise CommandError(str(error)) from error
    except Exception as error:
        # Decoders of damaged files raise what they please
        raise CommandError(f"{path} cannot be read: {one_line(error)}") from error


def _check_file(path: Path) -> None:
    try:
        size = path.stat().st_size
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise CommandError(f"{path} cannot be read ({reason}): check the path") from error
    if path.is_dir():
        raise CommandError(f"{path} is a folder: pass the images in it, for example {path}/*.jpg")
    if size == 0 and path.is_file():
        raise CommandError(f"{path} is empty (0 bytes): it may not have been copied completely")
