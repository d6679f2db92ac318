# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""Contact sheets: augmented images beside the same with their labels painted over, for people to check."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from modeling_san.processing.drawing import label_colors, overlay
from modeling_san.processing.images_san import open_image
from modeling_san.processing.wording_san import listed
from modeling_san.training.augmentation import Augmentation
from modeling_san.training.data import ImageError, read_example
from modeling_san.training.label_sets import LabelSet
from modeling_san.training.sources import undecoded

MARK = PngInfo()
"""What says in a PNG file that it is a contact sheet."""
MARK.add_text("Software", "san contact-sheet")

_VIEW_SIDE = 512
_GAP = 16
_INK = (90, 94, 100)
_LISTED = 12


@dataclass(frozen=True)
class ContactSheet:
    """
    What a look at some images of a data set showed.

    Attributes:
        image: the sheet.
        images: how many images the data set holds; None where that is not known.
        sampled: how many of them were looked at, each counted once.
        pixels: `(C + 1,)`, labelled pixels of each class in whole images, behind them those without a label.
        without_labels: indices of the images without any label.
        names: of the classes.
        damaged: indices of the images that cannot be used, and were left out.
    """

    image: Image.Image
    images: int | None
    sampled: int
    pixels: np.ndarray
    without_labels: tuple[int, ...]
    names: tuple[str, ...]
    damaged: tuple[int, ...] = ()

    def lines(self) -> list[str]:
        """The findings, a few lines of text."""
        total = max(int(self.pixels.sum()), 1)
        order = [int(index) for index in np.argsort(-self.pixels[:-1], kind="stable") if self.pixels[index]]
        seen = [f"{self.names[index]} {_percent(self.pixels[index] / total)}" for index in order]
        missing = [name for name, number in zip(self.names, self.pixels, strict=False) if not number]
        known = "images, their number is not known" if self.images is None else f"{self.images} images"
        without = f"{len(self.without_labels)} (examples {listed(self.without_labels, _LISTED)})"
        return [
            f"{known}; looked at {self.sampled}",
            f"{len(seen)} of {len(self.names)} classes seen, with their share of the pixels: "
            f"{listed(seen, _LISTED) or 'none'}",
            *([f"{len(missing)} not seen: {listed(missing, _LISTED)}"] if missing else []),
            f"pixels without a label: {_percent(self.pixels[-1] / total)}",
            f"images without any label: {without if self.without_labels else 'none'}",
            *([f"images that cannot be used: examples {listed(self.damaged, _LISTED)}"] if self.damaged else []),
        ]


def draw_contact_sheet(
    dataset: Dataset | IterableDataset,
    label_set: LabelSet,
    augmentation: Augmentation,
    *,
    count: int = 16,
    seed: int = 0,
    progress: bool = True,
    skip_damaged: bool = False,
) -> ContactSheet:
    """
    Draw random views of a data set as training sees them.

    Args:
        dataset: examples with `image` and `annotation`; of a stream, the first ones are taken.
        label_set: what the values of label maps mean.
        augmentation: random scale, crop, colours and flip.
        count: number of views; where there are fewer images, some are shown several times.
        seed: of the choice of images and of the augmentation, as in training.
        progress: whether to show a progress bar.
        skip_damaged: leave out, and count, images that cannot be used, instead of ending at the first.

    Returns:
        the sheet, and what was found.

    Raises:
        ValueError: where an image cannot be used; its index is named.
    """
    if count < 1 or seed < 0:
        raise ValueError(f"count is {count} and seed {seed}: pass a count of at least 1 and a seed of at least 0.")
    pixels = np.zeros(len(label_set) + 1, dtype=np.int64)
    seen: dict[int, bool] = {}
    damaged: set[int] = set()
    cells = []
    colors = label_colors(label_set.names)
    chosen = _chosen(undecoded(dataset), count, seed)
    for epoch, index, example in tqdm(chosen, total=count, desc="drawing", unit="view", disable=not progress):
        try:
            image, label_map = read_example(example, label_set, f"example {index}")
        except ImageError:
            if not skip_damaged:
                raise
            damaged.add(index)
            continue
        if index not in seen:
            counts = np.bincount(np.minimum(label_map, len(label_set)).ravel(), minlength=len(pixels))
            pixels += counts
            seen[index] = bool(counts[:-1].any())
        rng = np.random.default_rng([seed, epoch, index])
        view, labels = augmentation(image, label_map, rng, label_set.ignore_index)
        view, labels = _enlarged(view, labels)
        painted = overlay(view, labels, label_set.names, colors=colors, max_entries=14)
        cells.append(side_by_side({f"example {index}": view, "": painted}))
    if not cells:
        raise ValueError("no image can be drawn: there is none that can be read.")
    return ContactSheet(
        image=arrange(cells, columns=1 if count < 3 else 2),
        images=len(dataset) if isinstance(dataset, Dataset) else None,
        sampled=len(seen),
        pixels=pixels,
        without_labels=tuple(index for index, labelled in seen.items() if not labelled),
        damaged=tuple(sorted(damaged)),
        names=label_set.names,
    )


def is_contact_sheet(path: Path) -> bool:
    """Whether a file was written as a contact sheet, and may be replaced by another one."""
    try:
        with open_image(path, "the sheet") as image:
            return image.info.get("Software") == "san contact-sheet"
    except ValueError:
        return False


def side_by_side(panels: Mapping[str, Image.Image], title_size: int = 15) -> Image.Image:
    """Images in a row on white, each under its title in letters of `title_size` pixels."""
    width = sum(panel.width + _GAP for panel in panels.values()) - _GAP
    row = Image.new("RGB", (width, 2 * title_size + max(panel.height for panel in panels.values())), "white")
    pen, left = ImageDraw.Draw(row), 0
    for title, panel in panels.items():
        pen.text((left, 0), title, fill=_INK, font=ImageFont.load_default(title_size))
        row.paste(panel, (left, 2 * title_size))
        left += panel.width + _GAP
    return row


def arrange(cells: Sequence[Image.Image], columns: int = 1) -> Image.Image:
    """Images in rows of `columns` on white, with a margin."""
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    widths = [max(cell.width for cell in cells[column::columns]) for column in range(min(columns, len(cells)))]
    heights = [max(cell.height for cell in row) for row in rows]
    size = sum(widths) + _GAP * (len(widths) + 1), sum(heights) + _GAP * (len(rows) + 1)
    sheet = Image.new("RGB", size, "white")
    for number, cell in enumerate(cells):
        row, column = divmod(number, columns)
        sheet.paste(cell, (sum(widths[:column]) + _GAP * (column + 1), sum(heights[:row]) + _GAP * (row + 1)))
    return sheet


def _chosen(dataset: Any, count: int, seed: int) -> Iterator[tuple[int, int, Any]]:
    """Epoch, index and example of each view."""
    if not isinstance(dataset, Dataset):
        yield from ((0, index, example) for index, example in enumerate(islice(dataset, count)))
        return
    order = np.random.default_rng([seed, 0, 0, 1]).permutation(len(dataset))
    for number in range(count):
        epoch, place = divmod(number, len(dataset))
        index = int(order[place])
        yield epoch, index, dataset[index]


def _enlarged(view: Image.Image, labels: np.ndarray) -> tuple[Image.Image, np.ndarray]:
    """A view and its labels, the long side of which becomes 512 pixels."""
    scale = _VIEW_SIDE / max(view.size)
    size = max(1, round(view.width * scale)), max(1, round(view.height * scale))
    enlarged = Image.fromarray(labels.astype(np.int32)).resize(size, Image.Resampling.NEAREST)
    return view.resize(size, Image.Resampling.LANCZOS), np.asarray(enlarged)


def _percent(share: float) -> str:
    return "< 0.1 %" if 0 < share < 0.001 else f"{100 * share:.1f} %"


__all__ = ["MARK", "ContactSheet", "arrange", "draw_contact_sheet", "is_contact_sheet", "side_by_side"]
