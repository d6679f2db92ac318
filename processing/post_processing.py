"""From mask and class logits to a label per pixel, in blocks that need little memory.

SAN paper, section 3: the score of class c at a pixel is the sum over the queries of (probability that the query's
region is c) * (probability that the pixel belongs to the region). The mask logits reach the wanted size in two
bilinear steps, to the network's input size and, once the padding is cut off, to the output size. Both steps are
linear and treat rows and columns apart, so together they are one small matrix for the rows and one for the columns,
and any block of the output can be computed alone. Neither the scores (classes, height, width) nor the masks
(queries, height, width) ever exist as a whole.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

_BLOCK_FLOATS = 8 * 2**20
"""Numbers in one block's masks and scores together, 32 MB; larger blocks are hardly faster."""

_BLOCK_COLUMNS = 1024

_MANY_CLASSES = 64
"""From here on a pixel's scores lie side by side in memory: the product of few classes is three times slower that way,
and finding the best of many five times faster."""


@dataclass(frozen=True)
class MaskGeometry:
    """Where a picture lies in its mask map and how large its segmentation is to be; all (height, width).

    Attributes:
        own: the part of the mask map, from its upper left corner, that belongs to the picture and its own padding.
        padded: size in pixels that this part stands for.
        picture: size of the picture inside it, in pixels, without the padding.
        target: size of the segmentation, in pixels.
    """

    own: tuple[int, int]
    padded: tuple[int, int]
    picture: tuple[int, int]
    target: tuple[int, int]


@torch.no_grad()
def segment(
    mask_logits: torch.Tensor, class_logits: torch.Tensor, geometry: MaskGeometry
) -> tuple[torch.Tensor, torch.Tensor]:
    """Best class of every pixel and its score.

    Args:
        mask_logits: (queries, h, w), any float type; computed in float32.
        class_logits: (queries, classes + 1), the last one being "no object".
        geometry: the picture's place in the mask map, and the output size.

    Returns:
        The class indices (height, width) int64 and their scores (height, width) float32, at `geometry.target`.
    """
    best = torch.empty(geometry.target, dtype=torch.int64, device=mask_logits.device)
    best_score = torch.empty(geometry.target, dtype=torch.float32, device=mask_logits.device)
    with torch.autocast(mask_logits.device.type, enabled=False):
        for rows, columns, scores in _score_blocks(mask_logits, class_logits, geometry):
            best_score[rows, columns], best[rows, columns] = scores.max(dim=-1)
    return best, best_score


@torch.no_grad()
def score_map(mask_logits: torch.Tensor, class_logits: torch.Tensor, geometry: MaskGeometry) -> torch.Tensor:
    """Scores of every class at every pixel, (classes, height, width) float32: as large as it sounds.

    The arguments are those of `segment`.
    """
    classes = class_logits.shape[-1] - 1
    full = torch.empty((classes, *geometry.target), dtype=torch.float32, device=mask_logits.device)
    with torch.autocast(mask_logits.device.type, enabled=False):
        for rows, columns, scores in _score_blocks(mask_logits, class_logits, geometry):
            full[:, rows, columns] = scores.movedim(-1, 0)
    return full


def resize_matrix(own: int, padded: int, picture: int, target: int) -> torch.Tensor:
    """Matrix (target, own): interpolate `own` numbers to `padded`, keep the first `picture`, interpolate to `target`.

    Interpolation is linear between pixel centres, PyTorch's `align_corners=False`.
    """
    kept = _interpolate_rows(torch.eye(own), padded)[:picture]
    return _interpolate_rows(kept, target)


def _score_blocks(
    mask_logits: torch.Tensor, class_logits: torch.Tensor, geometry: MaskGeometry
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Rows, columns and scores (rows, columns, classes) of block after block; each is overwritten by the next."""
    device = mask_logits.device
    masks = mask_logits[:, : geometry.own[0], : geometry.own[1]].float()
    probabilities = class_logits.float().softmax(dim=-1)[:, :-1].contiguous()
    queries, classes = probabilities.shape
    row_matrix, column_matrix = (
        resize_matrix(*lengths)
        for lengths in zip(geometry.own, geometry.padded, geometry.picture, geometry.target, strict=True)
    )
    height, width = geometry.target
    columns_at_once = min(width, _BLOCK_COLUMNS)
    rows_at_once = min(height, max(1, _BLOCK_FLOATS // ((classes + queries) * columns_at_once)))
    # One buffer for all blocks: fresh memory for each would cost more time than the product that fills it
    buffer = torch.empty(classes * rows_at_once * columns_at_once, device=device)
    for columns in _slices(width, columns_at_once):
        weights, used = _support(column_matrix[columns])
        wide = masks[:, :, used] @ weights.T.to(device)
        for rows in _slices(height, rows_at_once):
            weights, used = _support(row_matrix[rows])
            block = (weights.to(device) @ wide[:, used]).sigmoid_()
            out = buffer[: classes * block[0].numel()]
            scores = _weighted_sum(block.view(queries, -1), probabilities, out)
            yield rows, columns, scores.unflatten(0, block.shape[1:])


def _weighted_sum(masks: torch.Tensor, probabilities: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Sum masks (queries, pixels) with weights (queries, classes), into `out`: (pixels, classes)."""
    pixels, classes = masks.shape[1], probabilities.shape[1]
    if classes < _MANY_CLASSES:
        return torch.mm(probabilities.T, masks, out=out.view(classes, pixels)).T
    return torch.mm(masks.T, probabilities, out=out.view(pixels, classes))


def _interpolate_rows(matrix: torch.Tensor, length: int) -> torch.Tensor:
    """Interpolate the rows (n, m) to (length, m)."""
    # In float32, as torch.nn.functional.interpolate has its coordinates: the same weights to the last bit or two
    scale = torch.tensor(matrix.shape[0] / length)
    position = ((torch.arange(length) + 0.5) * scale - 0.5).clamp(min=0)
    below = position.long().clamp(max=matrix.shape[0] - 1)
    above = (below + 1).clamp(max=matrix.shape[0] - 1)
    share = (position - below)[:, None]
    return (1 - share) * matrix[below] + share * matrix[above]


def _support(weights: torch.Tensor) -> tuple[torch.Tensor, slice]:
    """The columns of `weights` between the first and the last that are not all zero, and where they are."""
    used = weights.any(dim=0).nonzero()
    first, last = int(used[0]), int(used[-1])
    return weights[:, first : last + 1], slice(first, last + 1)


def _slices(length: int, step: int) -> Iterator[slice]:
    """0 ... length in steps."""
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
