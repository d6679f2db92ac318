# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""Image files that a command reads, and the names of what it writes for each."""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import CommandError

if TYPE_CHECKING:
    import numpy as np

STANDARD_INPUT = "-"


def list_images(arguments: Sequence[str]) -> list[Path]:
    """
    Paths on the command line, `-` replaced by the lines of standard input; a path given twice counts once.

    Raises:
        CommandError: there is none.
    """
    lines = (line.rstrip("\r\n") for line in sys.stdin)
    given = ([argument] if argument != STANDARD_INPUT else filter(str.strip, lines) for argument in arguments)
    paths = list(dict.fromkeys(map(Path, chain.from_iterable(given))))
    if not paths:
        raise CommandError("standard input holds no paths: write one path of an image per line")
    return paths


def output_names(paths: Sequence[Path], folder: Path) -> list[str]:
    """
    A name for each image to write its results under: its own without the ending, and with a number behind where
    several have the same, or where a result in the folder would replace one of the images or a file that is no result.
    """
    from modeling_san.processing.results import RESULT_ENDINGS, replaces_results_only

    endings = RESULT_ENDINGS.values()
    images = {_place(path) for path in paths}
    # Compared in lower case, as some file systems do not tell upper from lower
    stems = {path.stem.casefold() for path in paths}
    used: set[str] = set()
    numbers: dict[str, Iterator[int]] = defaultdict(lambda: count(2))

    def is_free(name: str) -> bool:
        places = {_place(folder / (name + ending)) for ending in endings}
        return name.casefold() not in used and images.isdisjoint(places) and replaces_results_only(folder, name)

    names = []
    for stem in (path.stem for path in paths):
        numbered = (f"{stem}-{number}" for number in numbers[stem.casefold()])
        # A numbered name that is another image's own is left to that one
        names.append(next(filter(is_free, chain([stem], (name for name in numbered if name.casefold() not in stems)))))
        used.add(names[-1].casefold())
    return names


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
    from modeling_san.processing.images_san import open_image, read_byte_image

    try:
        with open_image(path) as image:
            return read_byte_image(image, repr(str(path)))
    except MemoryError as error:
        raise CommandError(f"{path} does not fit into memory: shrink it before") from error
    except ValueError as error:
        raise CommandError(str(error)) from error
