# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""Several views of one image, their scores averaged: other sizes, mirror images, overlapping windows.

Test-time augmentation (SAN paper, section 4.1) sees the whole image six times, each with its mirror image; windows see
a large image part by part. Views come from top to bottom, one after the other, and rows of pixels are done as soon as
all views of them are there: neither all views nor the scores of all classes at all pixels ever exist at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from .post_processing_san import as_masks, resize_matrix

VIEW_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
"""Sizes of the views, in proportion to the processor's own."""

MIN_WINDOW = 64
"""Pixels that a window has at least in each direction."""

_BLOCK_FLOATS = 8 * 2**20
"""Numbers in one block of scores and masks, 32 MB."""


@dataclass(frozen=True)
class Span:
    """
    A part of one side of an image, and how much it counts there.

    Attributes:
        start: its first pixel.
        weights: for each of its pixels; over all parts they sum to 1, `(length,)`.
    """

    start: int
    weights: torch.Tensor

    @property
    def stop(self) -> int:
        """The pixel behind its last."""
        return self.start + len(self.weights)

    @property
    def pixels(self) -> slice:
        """Where it is."""
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class View:
    """
    What a model makes of one view of an image, or of a part of it.

    Attributes:
        masks: mask logits, `(queries, h, w)`.
        probabilities: of the classes, `(classes, queries)`; None where each mask is a class.
        rows: of the image that it shows.
        columns: of the image that it shows.
        down: brings the masks' rows to the image's, `(rows, h)`.
        across: brings the masks' columns to the image's, `(w, columns)`, mirrored where the view is.
    """

    masks: torch.Tensor
    probabilities: torch.Tensor | None
    rows: Span
    columns: Span
    down: torch.Tensor
    across: torch.Tensor

    @property
    def num_classes(self) -> int:
        """How many classes the view has scores of."""
        return len(self.masks if self.probabilities is None else self.probabilities)


def view_sizes(size: Mapping[str, int]) -> list[dict[str, int]]:
    """The `size` options of test-time augmentation, in proportion to the processor's own."""
    return [{name: max(1, round(length * scale)) for name, length in size.items() if length} for scale in VIEW_SCALES]


def cut_windows(length: int, window: int | None) -> list[Span]:
    """
    Parts of one side of an image, as few as overlap by a third of a window, evenly spread.

    Where parts overlap, the weight of each falls towards its end, so that no seam is left.

    Args:
        length: of the side, in pixels.
        window: pixels of each part; None is the whole side, as is a window that is longer.
    """
    if window is None or window >= length:
        return [Span(0, torch.ones(length))]
    overlap = window // 3
    count = -(-(length - overlap) // (window - overlap))
    starts = [round(index * (length - window) / (count - 1)) for index in range(count)]
    # As a tent with a flat roof
    from_end = torch.arange(window) + 0.5
    heights = from_end.minimum(from_end.flip(0)).clamp(max=overlap)
    total = torch.zeros(length)
    for start in starts:
        total[start : start + window] += heights
    return [Span(start, heights / total[start : start + window]) for start in starts]


def make_views(
    outputs: Any,
    padded_size: Sequence[int],
    parts: Sequence[tuple[Span, Span]],
    *,
    mirrored: bool = False,
    share: float = 1.0,
) -> list[View]:
    """
    Views from the outputs of a batch of images of one size.

    Args:
        outputs: what `as_masks` takes, with `image_sizes`.
        padded_size: height and width of the network's input.
        parts: rows and columns of the image that each shows.
        mirrored: whether they are mirror images.
        share: how much each counts among the views of its part.
    """
    masks, classes = as_masks(outputs)
    probabilities = None if classes is None else classes.float().softmax(-1)[..., :-1].mT
    device, grid = masks.device, masks.shape[-2:]
    height, width = outputs.image_sizes[0].tolist()
    views = []
    for index, (rows, columns) in enumerate(parts):
        down = resize_matrix(grid[0], padded_size[0], height, len(rows.weights)).to(device)
        across = resize_matrix(grid[1], padded_size[1], width, len(columns.weights)).to(device)
        views.append(
            View(
                masks=masks[index].float(),
                probabilities=None if probabilities is None else probabilities[index],
                rows=Span(rows.start, rows.weights * share),
                columns=columns,
                down=down,
                across=(across.flip(0) if mirrored else across).T,
            )
        )
    return views


@torch.no_grad()
def segment_views(views: Iterable[View], target_size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The class of every pixel with the best mean score.

    Args:
        views: of one image, from top to bottom; they may be made as they are asked for.
        target_size: height and width of the image.

    Returns:
        class indices `(height, width)` int64 and their mean scores `(height, width)` float32, on the CPU.
    """
    best = torch.empty(target_size, dtype=torch.int64)
    best_score = torch.empty(target_size, dtype=torch.float32)
    present: list[View] = []
    done = 0
    for view in chain(views, [None]):
        until = target_size[0] if view is None else view.rows.start
        # Between two edges of views, each of them shows all rows or none
        for stop in sorted({until, *(each.rows.stop for each in present if each.rows.stop < until)} - {done}):
            for block in _blocks(present, slice(done, stop), target_size[1]):
                score, label = _mean_scores(present, block, target_size[1]).max(0)
                best_score[block], best[block] = score.cpu(), label.cpu()
            done, present = stop, [each for each in present if each.rows.stop > stop]
        if view is not None:
            present.append(view)
    return best, best_score


def _blocks(views: Sequence[View], rows: slice, width: int) -> Iterator[slice]:
    """Rows whose scores and masks take little memory together."""
    step = max(1, _BLOCK_FLOATS // ((views[0].num_classes + len(views[0].masks)) * width))
    for start in range(rows.start, rows.stop, step):
        yield slice(start, min(start + step, rows.stop))


def _mean_scores(views: Sequence[View], block: slice, width: int) -> torch.Tensor:
    """Scores of all classes at some rows, `(classes, rows, width)`, of the views that show all of these."""
    device = views[0].masks.device
    scores = torch.zeros(views[0].num_classes, block.stop - block.start, width, device=device)
    with torch.autocast(device.type, enabled=False):
        for view in views:
            own = slice(block.start - view.rows.start, block.stop - view.rows.start)
            down = view.down[own]
            used = down.any(0).nonzero()
            cells = slice(int(used[0]), int(used[-1]) + 1)
            masks = (down[:, cells] @ (view.masks[:, cells] @ view.across)).sigmoid_()
            if len(view.columns.weights) < width:
                masks *= view.columns.weights.to(device)
            masks *= view.rows.weights[own, None].to(device)
            part = scores[..., view.columns.pixels]
            part += masks if view.probabilities is None else (view.probabilities @ masks.flatten(1)).view(part.shape)
    return scores


__all__ = ["MIN_WINDOW", "VIEW_SCALES", "Span", "View", "cut_windows", "make_views", "segment_views", "view_sizes"]
