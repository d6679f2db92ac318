# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""Segmentations for people to look at: overlays with names and a legend, and indexed label images."""

import colorsys
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont

from .images_san import read_byte_image, read_map, resize_map
from .vocabulary_san import OTHER_LABEL

_PALETTE = np.frombuffer(
    bytes.fromhex(
        """
        e69f00 56b4e9 009e73 cc79a7 0072b2 f0e442 d55e00 961e50 5afaf0 326414 966efa 32d282 fab4b4 781eaa fa8cfa
        be3caa 96646e 5afa96 b43214 5a5078 28b428 1e96be 1446c8 c8c8fa fa8278 788214 5ad2d2 147864 dc325a 96aa82
        a0d214 8250d2 dcc878 dc64dc d2e6be d2a0c8 aa8264 1e82e6 785a3c fa5082 aa1482 8c8cdc 14b4b4 aa9614 826ea0
        46e6b4 7850a0 fa6e1e 14a0fa 148c8c c8508c 1464dc a0b450 a064c8 be1e64 b4be96 3250a0 b4aafa a06432 fabe14
        64825a fa82aa 32b46e fa64be a0141e 3c7832 14a03c 46e66e aadcdc 1ec8aa faa06e 466e8c a096be 146464 be82fa
        c8965a f05a50 3ce6fa faaadc c8e682 6ec8fa 965082 c89696 dc50b4 8cb4c8 d28cdc 96465a 5ac832 6464f0 6478c8
        a032b4 a0788c fac8dc 8c82b4 a0fa64 14a0a0 d26e78 fac8a0 82326e c8461e 6e3c8c 505abe 829650 3282aa 96dc8c
        78fac8 b478c8 be6450 288c3c 5a32be aa7832 c8be46 aae628 46aa8c 8ca0fa 784646 f0a0a0 b4d2b4 146496 aa5050
        786e14 14aad2 b4143c 3c6446 b464aa 824614 961496 96c86e e6aafa fa8cd2 fad26e 648ca0 8c5ab4 c8283c e63c3c
        d2783c be5adc aabee6 6ed2a0 78aa46 fa8c46 be288c e6788c 6446aa d2826e 789678 d2d250 82be82 789614 508cfa
        2896dc d2aa5a 5a6e50 faaa46 64a0b4 c85a6e 965ae6 1ebed2 963c96 aa46c8 96501e be466e 5a46d2 f078f0 d2a082
        f050a0 50be5a 148c6e a078e6 b4e6fa a0648c 8ca0dc 6eb4a0 8cbeb4 fab48c dcb4c8 e63c78 aaaadc 64641e 6e5a78
        aaf0aa 82b41e dc8c28 14e6dc 466ed2 824682 96d2f0 966e5a fa64a0 fa6e5a d28cb4 aa1464 b4828c a0be1e 6e96c8
        5a64aa 6e78f0 c8dca0 8232be aa966e a0f0dc fac8fa d2a0e6 f04664 a050a0 a0dc64 7864c8 467878 963c32 28be8c
        78648c 784664 82dcc8 82783c 78f06e 14e696 1e6e78 be6efa 8c6edc dc78c8 6e96f0 50f0d2 148214 b48214 6e8c46
        96e6be fa96be 64d25a d28cfa 6e82dc 5a7896 d2648c 963c6e d26e5a fab4fa 648c78 14fab4 8c82fa 5a5a28 14dcbe
        aa6e6e c8be78 be82dc b4b478 46a05a 46508c bea014 145ab4 1482c8 6eaac8 be50be dcbea0 3cc8e6 fac8be 148250
        f0dc96
        """
    ),
    dtype=np.uint8,
).reshape(-1, 3)
"""The first seven are Okabe and Ito's (2008), told apart with every kind of colour vision. Each next one is, of all
moderately bright colours, that which differs most from those before, to normal eyes and to those that cannot tell red
from green."""

_OTHER_COLOR = (128, 128, 128)


class _Hue(NamedTuple):
    """What bears the name of a colour: hue in degrees, saturation, least and most lightness, both 0 ... 1."""

    hue: float
    saturation: float
    least: float
    most: float


_NAMED_COLORS = {
    "red": _Hue(0, 0.85, 0.30, 0.70),
    "brown": _Hue(22, 0.60, 0.22, 0.46),
    "orange": _Hue(30, 1.00, 0.42, 0.66),
    "beige": _Hue(42, 0.50, 0.72, 0.86),
    "yellow": _Hue(54, 0.95, 0.38, 0.72),
    "green": _Hue(125, 0.65, 0.22, 0.66),
    "cyan": _Hue(182, 0.90, 0.32, 0.72),
    "turquoise": _Hue(172, 0.70, 0.36, 0.68),
    "blue": _Hue(222, 0.85, 0.34, 0.74),
    "purple": _Hue(275, 0.65, 0.32, 0.74),
    "violet": _Hue(275, 0.65, 0.32, 0.74),
    "magenta": _Hue(305, 0.90, 0.32, 0.66),
    "pink": _Hue(338, 0.90, 0.70, 0.88),
    "black": _Hue(0, 0.00, 0.04, 0.18),
    "grey": _Hue(210, 0.08, 0.58, 0.78),
    "gray": _Hue(210, 0.08, 0.58, 0.78),
    "white": _Hue(0, 0.00, 0.86, 1.00),
}
"""Grey is lighter than that of "other"."""

_TOO_CLOSE = 60
"""Colours of the palette that are nearer to a named colour in use are left out: a distance in RGB."""

_SMALLEST_SIDE = 512
"""Images whose long side has fewer pixels are drawn enlarged: outlines and letters need some pixels."""

_LONGEST_NAME = 48
"""Letters of a label that are drawn; more would be cut anyway, and take time to measure."""

_PAPER, _INK, _FAINT = (255, 255, 255), (32, 33, 36), (110, 114, 120)
_FALLBACK_FONTS = ("NotoSans-Regular.ttf", "DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf")


# Colours


def palette(n: int) -> np.ndarray:
    """Colours for `n` labels.

    They depend on the index alone: `palette(3)` begins `palette(100)`. The first 256 differ much from each other,
    those beyond only somehow.

    Args:
        n: how many, at most 2 ** 23.

    Returns:
        (n, 3) uint8, red, green and blue.

    Raises:
        ValueError: `n` is negative or too large.
    """
    if not 0 <= n <= 2**23:
        raise ValueError(f"a palette of {n} colours cannot be made: ask for 0 ... {2**23}")
    if n <= len(_PALETTE):
        return _PALETTE[:n].copy()
    # An odd factor visits every one of the 2 ** 24 colours once; this one leaps about
    order = np.arange(1, n + 1, dtype=np.int64) * 0x9E3779B1 % 2**24
    free = order[~np.isin(order, _PALETTE.astype(np.int64) @ [1 << 16, 1 << 8, 1])][: n - len(_PALETTE)]
    return np.concatenate([_PALETTE, np.stack([free >> 16, free >> 8 & 255, free & 255], axis=-1).astype(np.uint8)])


def label_colors(labels: Sequence[str]) -> np.ndarray:
    """Colours for labels by their index, (len(labels), 3) uint8.

    A label that names a colour, such as "red car", has that colour, and those of one colour have different shades of
    it; "other" is grey. All others have the colours of `palette` in turn, without those that look like a named one.
    """
    colors = np.zeros((len(labels), 3), dtype=np.uint8)
    of_color: dict[_Hue, list[int]] = {}
    unnamed = []
    for index, label in enumerate(labels):
        names = [word for word in re.findall(r"[a-z]+", label.lower()) if word in _NAMED_COLORS]
        if label == OTHER_LABEL:
            colors[index] = _OTHER_COLOR
        elif names:
            of_color.setdefault(_NAMED_COLORS[names[0]], []).append(index)
        else:
            unnamed.append(index)
    for hue, indices in of_color.items():
        colors[indices] = _shades(hue, len(indices))
    taken = np.unique(colors[[index for indices in of_color.values() for index in indices]], axis=0)
    free = palette(len(_PALETTE) + len(unnamed))
    distances = np.linalg.norm(_PALETTE[:, None] - taken[None].astype(float), axis=-1)
    clashing = np.flatnonzero(distances.min(axis=1, initial=np.inf) < _TOO_CLOSE)
    colors[unnamed] = np.delete(free, clashing, axis=0)[: len(unnamed)]
    return colors


def _shades(hue: _Hue, count: int) -> np.ndarray:
    """Shades of a colour that lie as far from each other as they can, (count, 3) uint8."""
    lightness = np.linspace(hue.least, hue.most, count) if count > 1 else [(hue.least + hue.most) / 2]
    # Where there are many, neighbours in lightness differ a little in hue, too
    turns = (0, 9, -9) if count > 4 else (0,)
    shades = [
        colorsys.hls_to_rgb((hue.hue + turns[step % len(turns)]) % 360 / 360, light, hue.saturation)
        for step, light in enumerate(lightness)
    ]
    return np.rint(np.array(shades) * 255).astype(np.uint8)


# Images


def overlay(
    image: Any,
    segmentation: Any,
    labels: Sequence[str],
    opacity: float = 0.5,
    *,
    legend: bool = True,
    outlines: bool = True,
    names: bool = True,
    colors: np.ndarray | None = None,
    max_entries: int = 24,
) -> Image.Image:
    """Paint a segmentation over its image, with names in large regions and a legend of colours, names and areas.

    Args:
        image: PIL image, path, array or tensor; turned upright by EXIF data if it has any.
        segmentation: (height, width) of the upright image, indices into `labels`. Indices beyond (255 for "ignored",
            for example) are left unpainted and do not appear in the legend.
        labels: names by index.
        opacity: of the colours, 0 (the image alone) ... 1 (colours alone).
        legend: add the legend, at the right of upright and square images and below wide ones.
        outlines: draw thin lines where labels meet.
        names: write each label into a region of it that has room for the name.
        colors: (at least len(labels), 3) uint8; None takes `label_colors(labels)`.
        max_entries: lines of the legend, largest area first; what is left out is summed up in one more line.

    Returns:
        An RGB image. Its painted part has the size of `image`, or a whole multiple of it if that is very small.

    Raises:
        ValueError: image and segmentation differ in size, or an argument is out of range.
    """
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity is {opacity}: pass a number from 0 (image alone) to 1 (colours alone)")
    if max_entries < 1:
        raise ValueError(f"max_entries is {max_entries}: pass at least 1, or legend=False")
    pixels, indices = read_byte_image(image, "image"), read_map(segmentation, "segmentation")
    if indices.shape != pixels.shape[:2]:
        raise ValueError(
            f"the segmentation has {indices.shape[0]} x {indices.shape[1]} pixels (height x width) and the image, "
            f"upright, {pixels.shape[0]} x {pixels.shape[1]}: ask for it with target_sizes=[(height, width)]"
        )
    colors = label_colors(labels) if colors is None else np.asarray(colors, dtype=np.uint8)
    if len(colors) < len(labels):
        raise ValueError(f"there are {len(colors)} colours for {len(labels)} labels: pass one for each")
    counts = np.bincount(indices.ravel(), minlength=len(labels))[: len(labels)]
    order = [int(index) for index in np.argsort(-counts, kind="stable") if counts[index]]
    # Summing up a single label would take the line that could name it
    shown = order if len(order) <= max_entries + 1 else order[:max_entries]
    entries = [
        _Entry(_short_name(labels[index]), counts[index] / indices.size, tuple(colors[index].tolist()))
        for index in shown
    ]
    pixels, indices = _enlarge(pixels, indices)
    painted = _paint(pixels, indices, colors[: len(labels)], opacity, outlines)
    if names and opacity > 0:
        # Places for names are sought among squares of pixels that have one label
        side = max(1, min(max(indices.shape) // 256, *indices.shape))
        rows, columns = (length // side for length in indices.shape)
        squares = indices[: rows * side, : columns * side].reshape(rows, side, columns, side)
        least, most = squares.min(axis=(1, 3)), squares.max(axis=(1, 3))
        for index, entry in zip(shown, entries, strict=True):
            _write_name(painted, (least == index) & (most == index), side, entry)
    if rest := order[len(shown) :]:
        entries.append(_Entry(f"{len(rest)} more", counts[rest].sum() / indices.size, None))
    return _with_legend(painted, entries) if legend and entries else painted


def label_png(segmentation: Any, colors: np.ndarray | None = None) -> Image.Image:
    """A segmentation as an indexed image: every value is a label's index, and its colour is for looking at.

    Args:
        segmentation: (height, width) indices, 0 ... 65535.
        colors: (n, 3) uint8 for the first n indices, n <= 256; None takes `palette`.

    Returns:
        An image of mode "P" if all indices are below 256; 255, by custom "ignored", is black unless `colors` reach
        it. Otherwise one of mode "I;16", which has no palette.

    Raises:
        ValueError: it is no map of indices.
    """
    indices = read_map(segmentation, "segmentation")
    if indices.max() > 255:
        return Image.fromarray(indices.astype(np.uint16))
    table = np.zeros((256, 3), dtype=np.uint8)
    table[:255] = palette(255)
    if colors is not None:
        table[: len(colors)] = colors
    image = Image.fromarray(indices.astype(np.uint8))
    image.putpalette(table.tobytes())
    return image


def _enlarge(image: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Enlarge a small image and its segmentation by a whole number."""
    height, width = indices.shape
    factor = -(-_SMALLEST_SIDE // max(height, width))
    if factor == 1:
        return image, indices
    size = (height * factor, width * factor)
    smooth = Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC)
    return np.asarray(smooth), resize_map(indices, size)


def _paint(image: np.ndarray, indices: np.ndarray, colors: np.ndarray, opacity: float, outlines: bool) -> Image.Image:
    """Blend the labels' colours over the image and trace where they meet."""
    base = Image.fromarray(np.ascontiguousarray(image))
    rows = np.minimum(indices, len(colors))
    table = np.concatenate([colors, np.zeros((1, 3), np.uint8)])
    # The image loses its own colour as the labels' comes in: a red car under blue stays blue
    muted = ImageEnhance.Color(base).enhance(1 - opacity)
    painted = Image.blend(muted, Image.fromarray(table[rows]), opacity)
    painted.paste(base, mask=Image.fromarray(rows == len(colors)))
    if outlines and opacity > 0:
        painted.paste(_PAPER, mask=_outline_mask(rows))
    return painted


def _outline_mask(rows: np.ndarray) -> Image.Image:
    """Mask ("L") of lines along the borders of regions, about 1 / 600 of the long side thick."""
    borders = np.zeros(rows.shape, dtype=bool)
    borders[:, 1:] = rows[:, 1:] != rows[:, :-1]
    borders[1:] |= rows[1:] != rows[:-1]
    thickness = max(1, round(max(rows.shape) / 600))
    for axis in (0, 1):
        line = np.moveaxis(borders.copy(), axis, 0)
        target = np.moveaxis(borders, axis, 0)
        for step in range(1, thickness // 2 + 1):
            target[step:] |= line[:-step]
        for step in range(1, (thickness - 1) // 2 + 1):
            target[:-step] |= line[step:]
    # Nearly opaque: over a white wall, a line still shows against the colours
    return Image.fromarray(borders * np.uint8(210))


# Names in regions


def _write_name(painted: Image.Image, region: np.ndarray, side: int, entry: "_Entry") -> None:
    """Write a name where a region, given by squares of `side` pixels, is widest, if there is room for it."""
    size = max(13, round(0.022 * max(painted.size)))
    font = _font(size, entry.name)
    half_width, half_height = round(font.getlength(entry.name) / 2 + 0.5 * size), round(0.8 * size)
    center = _roomiest(region, -(-half_height // side), -(-half_width // side))
    if center is None or entry.color is None:
        return
    y, x = (position * side + side // 2 for position in center)
    pen = ImageDraw.Draw(painted)
    box = (x - half_width, y - half_height, x + half_width, y + half_height)
    pen.rounded_rectangle(box, radius=size // 3, fill=entry.color, outline=_PAPER, width=max(1, size // 14))
    brightness = float(np.dot(entry.color, (0.299, 0.587, 0.114)))
    pen.text((x, y), entry.name, fill=_INK if brightness > 140 else _PAPER, font=font, anchor="mm")


def _roomiest(region: np.ndarray, half_height: int, half_width: int) -> tuple[int, int] | None:
    """The pixel (row, column) farthest from the region's end of all on which a box lies inside it, or None."""
    sums = np.pad(region, ((1, 0), (1, 0))).cumsum(axis=0, dtype=np.int32).cumsum(axis=1, dtype=np.int32)
    height, width = 2 * half_height + 1, 2 * half_width + 1
    if height >= len(sums) or width >= sums.shape[1]:
        return None
    inside = sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]
    fits = inside == height * width
    if not fits.any():
        return None
    # Steps to the nearest pixel outside, across and down: first along rows, then from row to row
    distance = np.pad(region, 1).astype(np.int32) * sum(region.shape)
    for axis in (1, 0):
        position = np.arange(distance.shape[axis], dtype=np.int32).reshape((1, -1) if axis else (-1, 1))
        before = np.minimum.accumulate(distance - position, axis) + position
        behind = np.flip(np.minimum.accumulate(np.flip(distance + position, axis), axis), axis) - position
        distance = np.minimum(before, behind)
    room = distance[1:-1, 1:-1][half_height : half_height + fits.shape[0], half_width : half_width + fits.shape[1]]
    row, column = np.unravel_index(np.where(fits, room, -1).argmax(), fits.shape)
    return int(row) + half_height, int(column) + half_width


# The legend


class _Entry(NamedTuple):
    """One line of the legend: name, share of the area, and colour; None for the line that sums up the rest."""

    name: str
    area: float
    color: tuple[int, ...] | None

    @property
    def share(self) -> str:
        """The share of the area, never rounded to nothing."""
        if self.area < 0.001:
            return "< 0.1 %"
        return f"{100 * self.area:.1f} %" if self.area < 0.995 else f"{100 * self.area:.0f} %"


def _with_legend(painted: Image.Image, entries: list[_Entry]) -> Image.Image:
    """Put the legend, lines of swatch, name and share in columns, at the right of the image, or below a wide one."""
    below = painted.width > 1.2 * painted.height
    size = max(14, round(0.026 * max(painted.size)))
    row, margin, gap, between = round(1.65 * size), round(0.9 * size), round(0.5 * size), round(1.6 * size)
    # Below, many entries share the width; at the right, no name may dwarf the image
    widest = painted.width if below and len(entries) <= 4 else max(painted.width // 2, 16 * size)
    share_width = max(_width(size, entry.share) for entry in entries)
    room = max(widest - 2 * margin - size - share_width - 3 * gap, 4 * size)
    texts = [_shorten(entry.name, size, room) for entry in entries]
    cell = size + max(_width(size, text) for text in texts) + share_width + 3 * gap
    if below:
        columns = min(max(1, (painted.width - 2 * margin + between) // (cell + between)), len(entries))
    else:
        columns = -(-len(entries) // max(1, (painted.height - 2 * margin) // row))
    rows = -(-len(entries) // columns)
    width, height = columns * (cell + between) - between + 2 * margin, rows * row + 2 * margin
    left, top = (0, painted.height) if below else (painted.width, 0)
    canvas = Image.new("RGB", (max(painted.width, left + width), max(painted.height, top + height)), _PAPER)
    canvas.paste(painted)
    pen = ImageDraw.Draw(canvas)
    for position, (entry, text) in enumerate(zip(entries, texts, strict=True)):
        x = left + margin + position // rows * (cell + between)
        y = top + margin + position % rows * row + row // 2
        half = size // 2
        if entry.color is not None:
            pen.rounded_rectangle((x, y - half, x + 2 * half, y + half), radius=max(2, size // 5), fill=entry.color)
        ink = _FAINT if entry.color is None else _INK
        pen.text((x + size + gap, y), text, fill=ink, font=_font(size, text), anchor="lm")
        pen.text((x + cell, y), entry.share, fill=_FAINT, font=_font(size, entry.share), anchor="rm")
    return canvas


# Letters


def _short_name(label: str) -> str:
    """A label on one line, cut where it is very long."""
    name = " ".join(label.split())
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 3].rstrip() + "..."


def _width(size: int, text: str) -> int:
    """Width of a line of text in pixels."""
    return round(_font(size, text).getlength(text))


def _shorten(text: str, size: int, room: int) -> str:
    """Cut a text that is wider than `room` pixels and end it with dots."""
    kept = text
    while kept and _width(size, kept if kept == text else kept + "...") > room:
        kept = kept[:-1]
    return text if kept == text else kept.rstrip() + "..."


@lru_cache(maxsize=256)
def _font(size: int, text: str) -> ImageFont.FreeTypeFont:
    """Pillow's own font, or for letters that it lacks the first font of the system that has them."""
    default = ImageFont.load_default(size)
    assert isinstance(default, ImageFont.FreeTypeFont)
    if text.isascii() or _has_letters(default, text):
        return default
    for name in _FALLBACK_FONTS:
        try:
            font = ImageFont.truetype(name, size)
        except OSError:
            continue
        if _has_letters(font, text):
            return font
    return default


def _has_letters(font: ImageFont.FreeTypeFont, text: str) -> bool:
    """Whether no letter of the text is drawn as the font's sign for a missing one."""
    missing = bytes(font.getmask("\U0010ffff"))
    return all(letter.isspace() or bytes(font.getmask(letter)) != missing for letter in set(text))


__all__ = ["label_colors", "label_png", "overlay", "palette"]
