"""Test-time augmentation: one image seen at several sizes and mirrored, its scores averaged (paper, section 4.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .post_processing_san import resize_matrix

VIEW_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
"""Sizes of the views, in proportion to the processor's own size."""

_BLOCK_FLOATS = 8 * 2**20
"""Numbers in one block of scores and masks, 32 MB."""


@dataclass(frozen=True)
class View:
    """
    What a model makes of one view of an image.

    Attributes:
        masks: mask logits, `(queries, h, w)`.
        probabilities: of the classes, `(classes, queries)`.
        down: brings the masks' rows to the image's, `(height, h)`.
        across: brings the masks' columns to the image's, `(w, width)`, mirrored where the view is.
    """

    masks: torch.Tensor
    probabilities: torch.Tensor
    down: torch.Tensor
    across: torch.Tensor


def view_sizes(size: Mapping[str, int]) -> list[dict[str, int]]:
    """The `size` options of the views, in proportion to the processor's own."""
    return [{name: max(1, round(length * scale)) for name, length in size.items() if length} for scale in VIEW_SCALES]


def make_views(outputs: Any, padded_size: Sequence[int], target_size: tuple[int, int]) -> list[View]:
    """
    Views from the outputs of a batch of two: an image, and its mirror image.

    Args:
        outputs: with `masks_queries_logits`, `class_queries_logits` and `image_sizes`.
        padded_size: height and width of the network's input.
        target_size: height and width of the image.
    """
    device = outputs.masks_queries_logits.device
    height, width = outputs.image_sizes[0].tolist()
    rows, columns = outputs.masks_queries_logits.shape[-2:]
    down = resize_matrix(rows, padded_size[0], height, target_size[0]).to(device)
    across = resize_matrix(columns, padded_size[1], width, target_size[1]).to(device)
    return [
        View(
            masks=outputs.masks_queries_logits[index].float(),
            probabilities=outputs.class_queries_logits[index].float().softmax(-1)[:, :-1].T.contiguous(),
            down=down,
            across=(across.flip(0) if index == 1 else across).T,
        )
        for index in range(2)
    ]


@torch.no_grad()
def segment_views(views: Sequence[View], target_size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The class of every pixel with the best mean score.

    The scores of all classes at all pixels never exist at once: rows of pixels are done a block at a time.

    Args:
        views: of one image.
        target_size: height and width of the segmentation.

    Returns:
        class indices `(height, width)` int64 and their mean scores `(height, width)` float32.
    """
    height, width = target_size
    classes, queries = views[0].probabilities.shape
    device = views[0].masks.device
    best = torch.empty(target_size, dtype=torch.int64, device=device)
    best_score = torch.empty(target_size, dtype=torch.float32, device=device)
    step = max(1, _BLOCK_FLOATS // ((classes + queries) * width))
    with torch.autocast(device.type, enabled=False):
        for start in range(0, height, step):
            block = slice(start, min(start + step, height))
            scores = torch.zeros(classes, (block.stop - start) * width, device=device)
            for view in views:
                down = view.down[block]
                used = down.any(0).nonzero()
                rows = slice(int(used[0]), int(used[-1]) + 1)
                masks = (down[:, rows] @ (view.masks[:, rows] @ view.across)).sigmoid_()
                scores.addmm_(view.probabilities, masks.flatten(1), alpha=1 / len(views))
            score, label = scores.max(0)
            best_score[block], best[block] = score.view(-1, width), label.view(-1, width)
    return best, best_score


__all__ = ["VIEW_SCALES", "View", "make_views", "segment_views", "view_sizes"]
