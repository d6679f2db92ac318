# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""Maps on other grids: adaptive pooling of attention biases, and linear resizing whose sizes a tracer can follow."""

import functools
from collections.abc import Iterator
from fractions import Fraction

import torch
from torch import Tensor, nn

LARGEST_SIDE = 2**14
"""Of the images that a program for images of any size is made for, in pixels."""


def pool_attention_bias(
    attention_bias: Tensor, size: tuple[int, int], method: str = "max", window: int | None = None
) -> Tensor:
    """
    Bring attention biases from the side adapter's grid to CLIP's patch grid.

    Args:
        attention_bias: `(batch, heads, queries, height, width)`.
        size: height and width of CLIP's patch grid.
        method: `"max"` or `"avg"`, adaptive pooling as PyTorch's; `"nearest"`, `"bilinear"` or `"bicubic"`.
        window: the most cells of the side adapter's grid that one of CLIP's spans in a row or column; needed only
            where sizes are symbols, see `longest_window`.

    Returns:
        `(batch, heads, queries, size[0] * size[1])`, patches in row order.

    Raises:
        NotImplementedError: for an unknown method.
    """
    if method in ("max", "avg"):
        for dim, cells in ((-2, size[0]), (-1, size[1])):
            windows = _window_cells(attention_bias, dim, cells, window)
            if method == "max":
                attention_bias = functools.reduce(torch.maximum, (cell for cell, _ in windows))
            else:
                attention_bias = functools.reduce(torch.add, (cell * share for cell, share in windows))
        return attention_bias.flatten(-2)
    align_corners = None if method == "nearest" else False
    # The batch stays a dimension of its own, as its length may be a symbol
    pooled = nn.functional.interpolate(attention_bias.flatten(1, 2), size, mode=method, align_corners=align_corners)
    return pooled.unflatten(1, attention_bias.shape[1:3]).flatten(-2)


def _window_cells(bias: Tensor, dim: int, cells: int, window: int | None) -> Iterator[tuple[Tensor, Tensor | float]]:
    """
    The first cell of all windows of adaptive pooling along `dim`, with its share of the window, then the second, ...

    PyTorch's own pooling looks up every window for itself and notes where it found the maximum: 20 times slower.
    """
    length = bias.shape[dim]
    if window is None and length % cells == 0:
        windows = bias.unflatten(dim, (cells, -1))
        yield from ((windows.select(dim, offset), cells / length) for offset in range(length // cells))
        return
    if window is None:
        window = max(-(-(index + 1) * length // cells) - index * length // cells for index in range(cells))
    index = torch.arange(cells, device=bias.device)
    starts, ends = index * length // cells, ((index + 1) * length + cells - 1) // cells
    for offset in range(window):
        # A window that is shorter than the longest one repeats its last cell
        picked = bias.index_select(dim, torch.minimum(starts + offset, ends - 1))
        share = ((starts + offset < ends) / (ends - starts)).to(bias.dtype)
        yield picked, share[:, None] if dim == -2 else share


@functools.cache
def longest_window(scale: Fraction, clip_patch_size: int, side_patch_size: int, size_divisor: int) -> int:
    """Cells that the longest window of adaptive pooling has, at most, in an image of any size."""
    longest = 1
    for side in range(size_divisor, LARGEST_SIDE, size_divisor):
        length, cells = side // side_patch_size, int(side * scale) // clip_patch_size
        # An image that is too small for a patch of CLIP cannot be run anyway
        if cells:
            longest = max(longest, length // cells if length % cells == 0 else -(-length // cells) + 1)
    return longest


def whole_scale(scale: float) -> Fraction:
    """
    A fraction that gives the sizes which `interpolate` gives with the factor `scale`.

    With one exception: where `0.7 * side` is a whole number, floating point may fall short of it (1440 gives 1007, the
    next are 2720 and 2880), and `interpolate` then makes the image a pixel smaller than the fraction does.

    Raises:
        ValueError: there is none.
    """
    fraction = Fraction(scale).limit_denominator(1000)
    if LARGEST_SIDE * abs(Fraction(scale) - fraction) > 1e-6:
        raise ValueError(
            f"clip_input_scale is {scale}, for which sizes cannot be computed in whole numbers: a model with up to "
            "three decimals, such as 0.5 or 0.7, can be exported."
        )
    return fraction


def scale_linearly(maps: Tensor, scale: float, target: int, dim: int) -> Tensor:
    """The first `target` values along `dim` (-1 or -2) of `maps` resized by `scale` as `interpolate` does."""
    length = maps.shape[dim]
    position = ((torch.arange(target, device=maps.device) + 0.5) / scale - 0.5).clamp(min=0)
    below = position.long().clamp(max=length - 1)
    above = (below + 1).clamp(max=length - 1)
    share = (position - below).to(maps.dtype)
    share = share[:, None] if dim == -2 else share
    return torch.lerp(maps.index_select(dim, below), maps.index_select(dim, above), share)


__all__ = ["LARGEST_SIDE", "longest_window", "pool_attention_bias", "scale_linearly", "whole_scale"]
