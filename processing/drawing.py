"""Segmentations for people to look at: overlays with a legend, indexed label images, and tables of areas."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageFont

from .images_san import read_image, read_map, resize_map, to_byte_scale
from .vocabulary_san import OTHER_LABEL

_FIRST_COLORS = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (204, 121, 167),
    (0, 114, 178),
    (240, 228, 66),
    (213, 94, 0),
)
"""Okabe and Ito's colours (2008), told apart with every kind of colour vision; their black reads as "nothing" here."""

_OTHER_COLOR = (128, 128, 128)
_SEARCHED_COLORS = 256

# Linear RGB as seen without long-wave and without middle-wave cones (Machado, Oliveira and Fernandes 2009, severity 1)
_PROTANOPIA = np.array(
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
)
_DEUTERANOPIA = np.array(
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
)

# Linear RGB to cone responses and those, cube roots taken, to lightness and two colour axes (Ottosson 2020, Oklab)
_OKLAB_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_OKLAB_AXES = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)

_SMALLEST_SIDE = 512
"""Images whose long side has fewer pixels are drawn enlarged: outlines and letters need some pixels."""

_PAPER, _INK, _FAINT = (255, 255, 255), (32, 33, 36), (110, 114, 120)
_FALLBACK_FONTS = ("NotoSans-Regular.ttf", "DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf")


def palette(n: int) -> np.ndarray:
    """Colours for `n` labels.

    They depend on the index alone: `palette(3)` begins `palette(100)`. The first seven are Okabe and Ito's; up to 256,
    each next one is, of all moderately bright colours, that which differs most from those before, both to normal eyes
    and to those that cannot tell red from green. Beyond, colours are only different from each other.

    Args:
        n: how many, at most 2 ** 23.

    Returns:
        (n, 3) uint8, red, green and blue.

    Raises:
        ValueError: `n` is negative or too large.
    """
    if not 0 <= n <= 2**23:
        raise ValueError(f"a palette of {n} colours cannot be made: ask for 0 ... {2**23}")
    searched = _searched_colors()
    if n <= len(searched):
        return searched[:n].copy()
    return np.concatenate([searched, _scattered_colors(n - len(searched), searched)])


def label_colors(labels: Sequence[str]) -> np.ndarray:
    """Colours for labels by their index, (len(labels), 3) uint8; a label "other" is grey."""
    colors = palette(len(labels))
    for index, label in enumerate(labels):
        if label == OTHER_LABEL:
            colors[index] = _OTHER_COLOR
    return colors


def overlay(
    image: Any,
    segmentation: Any,
    labels: Sequence[str],
    opacity: float = 0.5,
    *,
    legend: bool = True,
    outlines: bool = True,
    colors: np.ndarray | None = None,
    max_entries: int = 24,
) -> Image.Image:
    """Paint a segmentation over its image, with a legend of colours, names and shares of the area.

    Args:
        image: PIL image, path, array or tensor; turned upright by EXIF data if it has any.
        segmentation: (height, width) of the upright image, indices into `labels`. Indices beyond (255 for "ignored",
            for example) are left unpainted and do not appear in the legend.
        labels: names by index.
        opacity: of the colours, 0 (the image alone) ... 1 (colours alone).
        legend: add the legend, at the right of upright and square images and below wide ones.
        outlines: draw thin lines where labels meet.
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
    image = to_byte_scale(read_image(image, "image"), "image")
    image = image if image.dtype == np.uint8 else np.rint(image).astype(np.uint8)
    indices = _indices(segmentation)
    if indices.shape != image.shape[:2]:
        raise ValueError(
            f"the segmentation has {indices.shape[0]} x {indices.shape[1]} pixels (height x width) and the image, "
            f"upright, {image.shape[0]} x {image.shape[1]}: ask for it with target_sizes=[(height, width)]"
        )
    colors = label_colors(labels) if colors is None else np.asarray(colors, dtype=np.uint8)
    if len(colors) < len(labels):
        raise ValueError(f"there are {len(colors)} colours for {len(labels)} labels: pass one for each")
    entries = _legend_entries(indices, labels, colors, max_entries) if legend else []
    painted = _paint(*_enlarge(image, indices), colors[: len(labels)], opacity, outlines)
    return _with_legend(painted, entries) if entries else painted


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
    indices = _indices(segmentation)
    if indices.max() > 255:
        return Image.fromarray(indices.astype(np.uint16))
    table = np.zeros((256, 3), dtype=np.uint8)
    table[:255] = palette(255)
    if colors is not None:
        table[: len(colors)] = colors
    image = Image.fromarray(indices.astype(np.uint8))
    image.putpalette(table.tobytes())
    return image


def summarize(segmentation: Any, scores: Any, labels: Sequence[str]) -> list[dict[str, Any]]:
    """What an image consists of.

    Args:
        segmentation: (height, width) indices into `labels`; others count towards the area of the image alone.
        scores: (height, width) scores of the labels that won, or None.
        labels: names by index.

    Returns:
        One entry for each label present, largest first: `label`, `area` (share of the image, 0 ... 1), `pixels` and
        `mean_score` (over the label's pixels; None without scores).

    Raises:
        ValueError: scores and segmentation differ in size.
    """
    indices = _indices(segmentation)
    pixels = np.bincount(indices.ravel(), minlength=len(labels))
    totals = None
    if scores is not None:
        values = scores.detach().float().cpu().numpy() if isinstance(scores, torch.Tensor) else np.asarray(scores)
        if values.shape != indices.shape:
            raise ValueError(
                f"scores have shape {values.shape} and the segmentation {indices.shape}: pass one score per pixel"
            )
        totals = np.bincount(indices.ravel(), weights=values.ravel(), minlength=len(labels))
    present = [index for index in np.argsort(-pixels[: len(labels)], kind="stable") if pixels[index]]
    return [
        {
            "label": labels[index],
            "area": float(pixels[index] / indices.size),
            "pixels": int(pixels[index]),
            "mean_score": None if totals is None else float(totals[index] / pixels[index]),
        }
        for index in present
    ]


# Colours


@lru_cache(maxsize=1)
def _searched_colors() -> np.ndarray:
    """The first colours of the palette, (256, 3) uint8, each far from all before it."""
    levels = np.arange(20, 256, 10)
    candidates = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    lightness, chroma = _lightness_and_chroma(candidates)
    # Neither so dark or bright that the image beneath disappears, nor grey, nor glaring
    pleasant = (lightness > 0.45) & (lightness < 0.9) & (chroma > 0.05) & (chroma < 0.21)
    candidates = candidates[pleasant]
    views = _views(candidates)
    chosen = [np.array(color) for color in _FIRST_COLORS]
    nearest = np.full(len(candidates), np.inf)
    for view in _views(np.array(chosen)).swapaxes(0, 1):
        nearest = np.minimum(nearest, _difference(views, view))
    while len(chosen) < _SEARCHED_COLORS:
        best = int(nearest.argmax())
        chosen.append(candidates[best])
        nearest = np.minimum(nearest, _difference(views, views[:, best]))
    return np.array(chosen, dtype=np.uint8)


def _scattered_colors(count: int, taken: np.ndarray) -> np.ndarray:
    """`count` more colours, all different from each other and from those taken."""
    codes = np.array([1 << 16, 1 << 8, 1])
    # An odd factor visits every one of the 2 ** 24 colours once; this one leaps about
    order = np.arange(1, count + len(taken) + 1, dtype=np.int64) * 0x9E3779B1 % 2**24
    free = order[~np.isin(order, taken.astype(np.int64) @ codes)][:count]
    return np.stack([free >> 16, free >> 8 & 255, free & 255], axis=-1).astype(np.uint8)


def _linear(colors: np.ndarray) -> np.ndarray:
    """sRGB bytes as linear light, 0 ... 1."""
    values = np.asarray(colors) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def _oklab(linear: np.ndarray) -> np.ndarray:
    """Linear RGB (..., 3) in Oklab, where distance is about difference to the eye."""
    return np.cbrt(linear @ _OKLAB_CONES.T) @ _OKLAB_AXES.T


def _views(colors: np.ndarray) -> np.ndarray:
    """Colours (n, 3) in Oklab as three kinds of eyes see them, (3, n, 3)."""
    linear = _linear(colors)
    seen = [linear, *(np.clip(linear @ matrix.T, 0, 1) for matrix in (_PROTANOPIA, _DEUTERANOPIA))]
    return np.stack([_oklab(view) for view in seen])


def _difference(views: np.ndarray, color: np.ndarray) -> np.ndarray:
    """How far colours (3, n, 3) are from one (3, 3): (n,), normal vision counting like the two others together."""
    normal, first, second = np.linalg.norm(views - color[:, None], axis=-1)
    return normal + np.minimum(first, second)


def _lightness_and_chroma(colors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Oklab lightness 0 ... 1 and chroma of colours (n, 3)."""
    lab = _oklab(_linear(colors))
    return lab[:, 0], np.hypot(lab[:, 1], lab[:, 2])


# Painting


def _indices(segmentation: Any) -> np.ndarray:
    """A segmentation as (height, width) int32."""
    return read_map(segmentation, "segmentation")


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
    table = np.zeros((len(colors) + 1, 3), dtype=np.uint8)
    table[:-1] = colors
    rows = np.minimum(indices, len(colors))
    # The image loses its own colour as the labels' comes in: a red car under blue stays blue
    muted = ImageEnhance.Color(base).enhance(1 - opacity)
    painted = Image.blend(muted, Image.fromarray(table[rows]), opacity)
    unpainted = rows == len(colors)
    if unpainted.any():
        painted.paste(base, mask=Image.fromarray(unpainted))
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
        borders = _thicken(borders, thickness, axis)
    # Nearly opaque: over a white wall, a line still shows against the colours
    return Image.fromarray(borders * np.uint8(210))


def _thicken(mask: np.ndarray, thickness: int, axis: int) -> np.ndarray:
    """Spread a mask of booleans along an axis until its lines are `thickness` pixels wide."""
    spread = mask.copy()
    target, source = np.moveaxis(spread, axis, 0), np.moveaxis(mask, axis, 0)
    for step in range(1, thickness // 2 + 1):
        target[step:] |= source[:-step]
    for step in range(1, (thickness - 1) // 2 + 1):
        target[:-step] |= source[step:]
    return spread


# The legend


@dataclass(frozen=True)
class _Entry:
    """One line of the legend; a colour of None stands for the line that sums up the rest."""

    name: str
    share: str
    color: tuple[int, ...] | None


def _legend_entries(indices: np.ndarray, labels: Sequence[str], colors: np.ndarray, max_entries: int) -> list[_Entry]:
    """Lines of the legend, largest area first."""
    counts = np.bincount(indices.ravel(), minlength=len(labels))[: len(labels)]
    order = [int(index) for index in np.argsort(-counts, kind="stable") if counts[index]]
    # Summing up a single label would take the line that could name it
    shown = order if len(order) <= max_entries + 1 else order[:max_entries]
    entries = [
        _Entry(" ".join(labels[index].split()), _percent(counts[index] / indices.size), tuple(colors[index].tolist()))
        for index in shown
    ]
    rest = order[len(shown) :]
    if rest:
        entries.append(_Entry(f"{len(rest)} more", _percent(counts[rest].sum() / indices.size), None))
    return entries


def _percent(share: float) -> str:
    """A share of the area, never rounded to nothing."""
    if share < 0.001:
        return "< 0.1 %"
    return f"{100 * share:.1f} %" if share < 0.995 else f"{100 * share:.0f} %"


def _with_legend(painted: Image.Image, entries: list[_Entry]) -> Image.Image:
    """Put the legend at the right of the image, or below it if it is wide."""
    below = painted.width > 1.2 * painted.height
    size = max(14, round(0.026 * max(painted.size)))
    # Below, many entries share the width; at the right, no name may dwarf the image
    widest = painted.width if below and len(entries) <= 4 else max(painted.width // 2, 16 * size)
    sheet = _LegendSheet(entries, size, widest)
    columns = sheet.columns_within(painted.width) if below else sheet.columns_of_height(painted.height)
    panel_width, panel_height = sheet.extent(columns)
    if below:
        canvas = Image.new("RGB", (max(painted.width, panel_width), painted.height + panel_height), _PAPER)
        corner = (0, painted.height)
    else:
        canvas = Image.new("RGB", (painted.width + panel_width, max(painted.height, panel_height)), _PAPER)
        corner = (painted.width, 0)
    canvas.paste(painted, (0, 0))
    sheet.draw(canvas, corner, columns)
    return canvas


class _LegendSheet:
    """A grid of legend lines: swatch, name, share. Lengths in pixels follow from the font size."""

    def __init__(self, entries: list[_Entry], size: int, widest: int) -> None:
        """Measure the entries; no cell gets wider than `widest`, longer names are cut."""
        self.size = size
        self.row = round(1.65 * size)
        self.margin = round(0.9 * size)
        self.gap = round(0.5 * size)
        self.between = round(1.6 * size)
        self.share_width = max(_text_width(_font(size, entry.share), entry.share) for entry in entries)
        room = widest - 2 * self.margin - size - self.share_width - 3 * self.gap
        self.entries = [
            _Entry(_shorten(entry.name, size, max(room, 4 * size)), entry.share, entry.color) for entry in entries
        ]
        self.name_width = max(_text_width(_font(size, entry.name), entry.name) for entry in self.entries)
        self.cell = size + self.name_width + self.share_width + 3 * self.gap

    def columns_within(self, width: int) -> int:
        """How many columns fit into a width."""
        fitting = (width - 2 * self.margin + self.between) // (self.cell + self.between)
        return min(max(1, fitting), len(self.entries))

    def columns_of_height(self, height: int) -> int:
        """How many columns it takes to stay within a height."""
        rows = max(1, (height - 2 * self.margin) // self.row)
        return -(-len(self.entries) // rows)

    def extent(self, columns: int) -> tuple[int, int]:
        """Width and height of the sheet."""
        width = columns * self.cell + (columns - 1) * self.between + 2 * self.margin
        return width, self.rows(columns) * self.row + 2 * self.margin

    def rows(self, columns: int) -> int:
        """Lines of the longest column."""
        return -(-len(self.entries) // columns)

    def draw(self, canvas: Image.Image, corner: tuple[int, int], columns: int) -> None:
        """Draw all entries, column by column, below and right of `corner`."""
        pen = ImageDraw.Draw(canvas)
        rows = self.rows(columns)
        for position, entry in enumerate(self.entries):
            column, row = divmod(position, rows)
            left = corner[0] + self.margin + column * (self.cell + self.between)
            middle = corner[1] + self.margin + row * self.row + self.row // 2
            self._draw_entry(pen, entry, left, middle)

    def _draw_entry(self, pen: ImageDraw.ImageDraw, entry: _Entry, left: int, middle: int) -> None:
        """Draw one line whose swatch begins at `left` and whose height is centred on `middle`."""
        half = self.size // 2
        if entry.color is not None:
            box = (left, middle - half, left + 2 * half, middle + half)
            pen.rounded_rectangle(box, radius=max(2, self.size // 5), fill=entry.color)
        ink = _INK if entry.color is not None else _FAINT
        _write(pen, (left + self.size + self.gap, middle), entry.name, self.size, ink)
        right = left + self.cell
        share_left = right - _text_width(_font(self.size, entry.share), entry.share)
        _write(pen, (share_left, middle), entry.share, self.size, _FAINT)


# Letters


def _write(pen: ImageDraw.ImageDraw, at: tuple[int, int], text: str, size: int, ink: tuple[int, int, int]) -> None:
    """Write a line of text from `at` (left, middle of its height), by the font's own measures so that lines agree."""
    font = _font(size, text)
    text = _writable(font, text)
    top, bottom = font.getbbox("Hx")[1], font.getbbox("Hx")[3]
    pen.text((at[0], at[1] - (top + bottom) / 2), text, fill=ink, font=font)


def _text_width(font: Any, text: str) -> int:
    """Width of a line of text in pixels."""
    return round(font.getlength(_writable(font, text)))


def _shorten(text: str, size: int, room: int) -> str:
    """Cut a text that is wider than `room` pixels and end it with dots."""
    font = _font(size, text)
    if _text_width(font, text) <= room:
        return text
    while text and _text_width(font, text + "...") > room:
        text = text[:-1]
    return text.rstrip() + "..."


def _writable(font: Any, text: str) -> str:
    """The text itself, or with question marks where a bitmap font has no such letters."""
    return text if isinstance(font, ImageFont.FreeTypeFont) else text.encode("latin-1", "replace").decode("latin-1")


def _font(size: int, text: str) -> Any:
    """Pillow's own font, or for letters that it lacks the first font of the system that has them."""
    default = _default_font(size)
    if text.isascii() or not isinstance(default, ImageFont.FreeTypeFont) or _has_letters(default, text):
        return default
    for name in _FALLBACK_FONTS:
        font = _system_font(name, size)
        if font is not None and _has_letters(font, text):
            return font
    return default


@lru_cache(maxsize=32)
def _default_font(size: int) -> Any:
    """Pillow's font at a size; before Pillow 10.1, or without FreeType, a small bitmap font."""
    try:
        return ImageFont.load_default(size)
    except TypeError:
        return ImageFont.load_default()


@lru_cache(maxsize=32)
def _system_font(name: str, size: int) -> Any:
    """A font of the system, or None if it is not there."""
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None


def _has_letters(font: Any, text: str) -> bool:
    """Whether no letter of the text is drawn as the font's sign for a missing one."""
    missing = bytes(font.getmask("\U0010ffff"))
    return all(letter.isspace() or bytes(font.getmask(letter)) != missing for letter in set(text))
