# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""From mask and class logits to a label per pixel, in tiles that need little memory.

SAN paper, section 3: the score of class c at a pixel is the sum over the queries of (probability that the query's
region is c) * (probability that the pixel belongs to the region). The mask logits reach the wanted size in two
bilinear steps, to the network's input size and, once the padding is cut off, to the output size. Both steps are
linear and treat rows and columns apart, so together they are one small matrix for the rows and one for the columns,
and any tile of the output can be computed alone. Neither the scores (classes, height, width) nor the masks
(queries, height, width) ever exist as a whole. On CPUs, classes that cannot win in a tile are left out as well, see
`contenders_san`; neither labels nor scores change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from .contenders_san import BLOCK_FLOATS, Block, contending_blocks

_DEVICE_FLOATS = 128 * 2**20
"""Numbers computed at once elsewhere, 512 MB: a few large kernels take less time than many small ones."""

_TILE_SIDES = (16, 32)
"""Least and most pixels along a tile's side; in between it is as long as a mask cell."""


@dataclass(frozen=True)
class MaskGeometry:
    """Where an image lies in its mask map and how large its segmentation is to be; all (height, width).

    Attributes:
        own: the part of the mask map, from its upper left corner, that belongs to the image and its own padding.
        padded: size in pixels that this part stands for.
        image: size of the image inside it, in pixels, without the padding.
        target: size of the segmentation, in pixels.
    """

    own: tuple[int, int]
    padded: tuple[int, int]
    image: tuple[int, int]
    target: tuple[int, int]


def as_masks(outputs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The masks of a model's outputs, and what they are.

    Args:
        outputs: with `masks_queries_logits` and `class_queries_logits`; or with `logits` (batch, classes, h, w) alone,
            of a model that has no masks: each class is one then, as probable as the softmax says.

    Returns:
        Mask logits (batch, masks, h, w), and class logits (batch, masks, classes + 1), None where masks are classes.
    """
    if (class_logits := getattr(outputs, "class_queries_logits", None)) is not None:
        return outputs.masks_queries_logits, class_logits
    return torch.logit(outputs.logits.float().softmax(dim=1), eps=1e-6), None


@torch.no_grad()
def segment(
    mask_logits: torch.Tensor, class_logits: torch.Tensor | None, geometry: MaskGeometry
) -> tuple[torch.Tensor, torch.Tensor]:
    """Best class of every pixel and its score.

    Args:
        mask_logits: (queries, h, w), any float type; computed in float32.
        class_logits: (queries, classes + 1), the last one being "no object"; None where each mask is a class.
        geometry: the image's place in the mask map, and the output size.

    Returns:
        The class indices (height, width) int64 and their scores (height, width) float32, at `geometry.target`.
    """
    device = mask_logits.device
    best = torch.empty(geometry.target, dtype=torch.int64, device=device)
    best_score = torch.empty(geometry.target, dtype=torch.float32, device=device)
    with torch.autocast(device.type, enabled=False):
        tiling = _Tiling(mask_logits, geometry)
        if class_logits is None:
            at_once = (BLOCK_FLOATS if device.type == "cpu" else _DEVICE_FLOATS) // (len(mask_logits) * tiling.pixels)
            for band in tiling.bands(at_once):
                score, label = band.mask_logits(slice(None)).max(dim=1)
                best[band.rows], best_score[band.rows] = band.join(label), band.join(score.sigmoid_())
            return best, best_score
        probabilities = _class_probabilities(class_logits)
        blocks: Callable[[torch.Tensor, torch.Tensor, int], Iterator[Block]]
        if device.type == "cpu":
            blocks, at_once = contending_blocks, BLOCK_FLOATS // (len(probabilities) + tiling.pixels)
        else:
            # To leave out classes the host would have to wait until the device knows which
            blocks, at_once = _whole_block, _DEVICE_FLOATS // (sum(probabilities.shape) * tiling.pixels)
        for band in tiling.bands(at_once):
            score = torch.empty(len(band.corners), tiling.pixels, device=device)
            label = torch.empty_like(score, dtype=torch.int64)
            for tiles, classes, weights in blocks(band.corners, probabilities, tiling.pixels):
                score[tiles], winner = torch.bmm(weights, band.masks(tiles)).max(dim=1)
                label[tiles] = classes.gather(1, winner)
            best[band.rows], best_score[band.rows] = band.join(label), band.join(score)
    return best, best_score


@torch.no_grad()
def score_map(mask_logits: torch.Tensor, class_logits: torch.Tensor | None, geometry: MaskGeometry) -> torch.Tensor:
    """Scores of every class at every pixel, (classes, height, width) float32: as large as it sounds.

    The arguments are those of `segment`.
    """
    classes = len(mask_logits) if class_logits is None else class_logits.shape[-1] - 1
    full = torch.empty((classes, *geometry.target), dtype=torch.float32, device=mask_logits.device)
    with torch.autocast(mask_logits.device.type, enabled=False):
        probabilities = None if class_logits is None else _class_probabilities(class_logits)
        for band in _Tiling(mask_logits, geometry).bands(1):
            masks = band.masks(slice(None))
            full[:, band.rows] = band.join(masks if probabilities is None else probabilities @ masks)
    return full


def resize_matrix(own: int, padded: int, image: int, target: int) -> torch.Tensor:
    """Matrix (target, own): interpolate `own` numbers to `padded`, keep the first `image`, interpolate to `target`.

    Interpolation is linear between pixel centres, PyTorch's `align_corners=False`.
    """
    kept = _interpolate_rows(torch.eye(own), padded)[:image]
    return _interpolate_rows(kept, target)


class _Axis(NamedTuple):
    """The rows of the output, or its columns, cut into tiles of one length.

    Attributes:
        cells: (tiles, corners), the mask cells that the pixels of a tile lie between.
        weights: (tiles, corners, side), what each cell counts in each pixel.
        before: how many pixels of the first tile lie before the output; some of the last may lie behind it.
        length: of the output.
    """

    cells: torch.Tensor
    weights: torch.Tensor
    before: int
    length: int


class _Band(NamedTuple):
    """Rows of tiles, as wide as the output.

    Attributes:
        rows: where it lies in the output.
        corners: (tiles, corners down, corners across, queries), mask logits.
        row_weights: (tiles, corners down, height), what each corner counts in each row of pixels.
        column_weights: (tiles, corners across, width), the same for columns.
        shape: rows of tiles, columns of tiles, height and width of a tile.
        inside: the rows and columns of pixels that lie in the output.
    """

    rows: slice
    corners: torch.Tensor
    row_weights: torch.Tensor
    column_weights: torch.Tensor
    shape: tuple[int, int, int, int]
    inside: tuple[slice, slice]

    def masks(self, tiles: torch.Tensor | slice) -> torch.Tensor:
        """Probabilities (tiles, queries, pixels) of some of the tiles."""
        return self.mask_logits(tiles).sigmoid_()

    def mask_logits(self, tiles: torch.Tensor | slice) -> torch.Tensor:
        """Mask logits (tiles, queries, pixels) of some of the tiles."""
        corners = self.corners[tiles]
        # Products of whole tiles: rows for (corners across * queries), then columns for (queries * height)
        rows = torch.bmm(corners.flatten(2).mT, self.row_weights[tiles])
        pixels = torch.bmm(rows.view(len(corners), corners.shape[2], -1).mT, self.column_weights[tiles])
        return pixels.view(len(corners), corners.shape[3], -1)

    def join(self, values: torch.Tensor) -> torch.Tensor:
        """Put the values of all tiles (tiles, n, pixels) where they lie in the output, (n, height, width)."""
        down, across, height, width = self.shape
        tiles = values.view(down, across, -1, height, width).permute(2, 0, 3, 1, 4)
        rows, columns = self.inside
        return tiles.reshape(-1, down * height, across * width)[:, rows, columns]


class _Tiling:
    """Cuts the output into tiles.

    Args:
        mask_logits: (queries, h, w).
        geometry: as for `segment`.
    """

    def __init__(self, mask_logits: torch.Tensor, geometry: MaskGeometry) -> None:
        self._rows, self._columns = (
            _split(*lengths, mask_logits.device)
            for lengths in zip(geometry.own, geometry.padded, geometry.image, geometry.target, strict=True)
        )
        own = mask_logits[:, : geometry.own[0], : geometry.own[1]].float()
        # Interpolation makes a NaN of infinity, as 0 times infinity; the bounds of the logits would not
        self._masks = own.where(own.isfinite(), torch.nan).permute(1, 2, 0).contiguous()
        self.sides = (self._rows.weights.shape[-1], self._columns.weights.shape[-1])
        self.pixels = math.prod(self.sides)

    def bands(self, tiles_at_once: int) -> Iterator[_Band]:
        """From top to bottom, each of so many tiles, and of one row at least."""
        rows, columns, height = self._rows, self._columns, self.sides[0]
        across = len(columns.cells)
        for some in _slices(len(rows.cells), max(1, tiles_at_once // across)):
            corners = self._masks[rows.cells[some, None, :, None], columns.cells[:, None]]
            top = some.start * height - rows.before
            first, end = max(top, 0), min(some.stop * height - rows.before, rows.length)
            yield _Band(
                rows=slice(first, end),
                corners=corners.flatten(0, 1),
                row_weights=rows.weights[some, None].expand(-1, across, -1, -1).flatten(0, 1),
                column_weights=columns.weights.expand(len(corners), -1, -1, -1).flatten(0, 1),
                shape=(len(corners), across, *self.sides),
                inside=(slice(first - top, end - top), slice(columns.before, columns.before + columns.length)),
            )


def _class_probabilities(class_logits: torch.Tensor) -> torch.Tensor:
    """Probabilities (classes, queries) without that of "no object"."""
    return class_logits.float().softmax(dim=-1)[:, :-1].T.contiguous()


def _whole_block(corners: torch.Tensor, probabilities: torch.Tensor, _: int) -> Iterator[Block]:
    """All tiles with all classes, as `contending_blocks` has them."""
    tiles, classes = len(corners), len(probabilities)
    numbers = torch.arange(classes, device=probabilities.device)
    yield slice(None), numbers.expand(tiles, -1), probabilities.expand(tiles, -1, -1)


@lru_cache(maxsize=64)
def _split(own: int, padded: int, image: int, target: int, device: torch.device) -> _Axis:
    """Cut one side of the output; the lengths are those of `MaskGeometry`. Images of one size share the result."""
    matrix = resize_matrix(own, padded, image, target)
    cell = padded / own * target / image
    least, most = _TILE_SIDES
    side = min(max(round(cell), least), most)
    # Tiles that begin at the centre of a cell lie between the fewest cells
    before = round(cell / 2) % side
    tiles = -(-(before + target) // side)
    pixels = (torch.arange(tiles * side) - before).clamp(0, target - 1)
    weights = matrix[pixels].view(tiles, side, own)
    used = weights.any(dim=1).byte()
    first, last = used.argmax(dim=1, keepdim=True), own - 1 - used.flip(1).argmax(dim=1, keepdim=True)
    cells = first + torch.arange(int((last - first).max()) + 1)
    # Where a tile needs fewer cells than others, its last one comes again and counts nothing
    repeated, cells = cells > last, cells.minimum(last)
    weights = weights.mT.gather(1, cells[:, :, None].expand(-1, -1, side)).masked_fill_(repeated[:, :, None], 0)
    return _Axis(cells.to(device), weights.to(device), before, target)


def _interpolate_rows(matrix: torch.Tensor, length: int) -> torch.Tensor:
    """Interpolate the rows (n, m) to (length, m)."""
    # In float32, as torch.nn.functional.interpolate has its coordinates: the same weights to the last bit or two
    scale = torch.tensor(matrix.shape[0] / length)
    position = ((torch.arange(length) + 0.5) * scale - 0.5).clamp(min=0)
    below = position.long().clamp(max=matrix.shape[0] - 1)
    above = (below + 1).clamp(max=matrix.shape[0] - 1)
    share = (position - below)[:, None]
    return (1 - share) * matrix[below] + share * matrix[above]


def _slices(length: int, step: int) -> Iterator[slice]:
    """0 ... length in steps."""
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


__all__ = ["MaskGeometry", "as_masks", "resize_matrix", "score_map", "segment"]
