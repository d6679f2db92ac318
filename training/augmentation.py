# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""Random views of labelled images for training (paper, section 4.1: scale, crop, colours, flip)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

_PADDING = 128
"""Grey of what lies beside an image that is smaller than the crop."""

_BRIGHTNESS = 32.0
_CONTRAST = _SATURATION = (0.5, 1.5)
_HUE = 18 * 6 / 180
"""Greatest shift of the hue in sextants of the colour circle."""

_STRIPE = 32
"""Rows whose colours are worked on at once: what fits into the CPU's cache is several times faster."""


@dataclass(frozen=True)
class Augmentation:
    """
    Random scale, crop, colours and flip, all from one generator. The defaults are the paper's.

    Attributes:
        short_sides: lengths in pixels of which one is drawn for the image's short side.
        max_long_side: the image is made smaller where its long side would pass this.
        crop_size: height and width of the result.
        photometric: whether to distort brightness, contrast, saturation and hue, each with probability 1 / 2.
        flip: probability to mirror left and right.
    """

    short_sides: tuple[int, ...] = tuple(range(320, 961, 64))
    max_long_side: int = 2560
    crop_size: tuple[int, int] = (640, 640)
    photometric: bool = True
    flip: float = 0.5

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant."""
        if not self.short_sides or min(self.short_sides) < 1:
            raise ValueError(f"short_sides is {self.short_sides}: pass at least one length, each at least 1 pixel.")
        if len(self.crop_size) != 2 or min(self.crop_size) < 1:
            raise ValueError(f"crop_size is {self.crop_size}: pass height and width, both at least 1 pixel.")
        if self.max_long_side < max(self.short_sides):
            raise ValueError(
                f"max_long_side is {self.max_long_side}, less than the short side {max(self.short_sides)}: raise it."
            )
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip is {self.flip}: pass a probability from 0 to 1.")

    @classmethod
    def for_size(cls, short_side: int, crop_size: tuple[int, int]) -> Augmentation:
        """For images that a model will see with the short side `short_side`: from 0.75 to 1.5 of it."""
        short_sides = tuple(range(max(1, round(0.75 * short_side)), round(1.5 * short_side) + 1))
        return cls(short_sides, max_long_side=4 * short_sides[-1], crop_size=crop_size)

    def __call__(
        self, image: Image.Image, label_map: np.ndarray, rng: np.random.Generator, ignore_index: int
    ) -> tuple[Image.Image, np.ndarray]:
        """
        Draw one view.

        Args:
            image: the image in RGB.
            label_map: `(height, width)` integers, of the image's size.
            rng: source of all chance.
            ignore_index: what the label map holds beside an image smaller than the crop.

        Returns:
            image and label map of exactly `crop_size`; what lies beside the image, at its right and below, is grey
            and not labelled.
        """
        size = self.resized_size(image.size, int(rng.choice(self.short_sides)))
        height, width = self.crop_size
        left = int(rng.integers(0, max(size[0] - width, 0) + 1))
        top = int(rng.integers(0, max(size[1] - height, 0) + 1))
        window = (left, top, min(left + width, size[0]), min(top + height, size[1]))
        pixels, labels = _resized_window(image, label_map, size, window)
        if self.photometric:
            pixels = distort_colors(pixels, rng)
        if rng.random() < self.flip:
            pixels, labels = pixels[:, ::-1], labels[:, ::-1]
        if pixels.shape[:2] == (height, width):
            return Image.fromarray(np.ascontiguousarray(pixels)), np.ascontiguousarray(labels)
        canvas = np.full((height, width, 3), _PADDING, dtype=np.uint8)
        label_canvas = np.full((height, width), ignore_index, dtype=label_map.dtype)
        canvas[: pixels.shape[0], : pixels.shape[1]] = pixels
        label_canvas[: labels.shape[0], : labels.shape[1]] = labels
        return Image.fromarray(canvas), label_canvas

    def resized_size(self, size: tuple[int, int], short_side: int) -> tuple[int, int]:
        """Width and height of an image of width and height `size` whose short side becomes `short_side`."""
        scale = min(short_side / min(size), self.max_long_side / max(size))
        return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


def distort_colors(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """
    Brightness, then contrast, saturation and hue; or, as a coin decides, contrast last. Each with probability 1 / 2.

    Args:
        pixels: `(height, width, 3)` uint8; they are left as they are.
        rng: source of all chance.
    """
    brightness = rng.uniform(-_BRIGHTNESS, _BRIGHTNESS) if rng.random() < 0.5 else 0.0
    contrast = rng.uniform(*_CONTRAST) if rng.random() < 0.5 else 1.0
    saturation = rng.uniform(*_SATURATION) if rng.random() < 0.5 else 1.0
    hue = rng.uniform(-_HUE, _HUE) if rng.random() < 0.5 else 0.0
    contrast_first = rng.random() < 0.5
    pixels = _scale_and_shift(pixels, contrast if contrast_first else 1.0, brightness)
    pixels = shift_colors(pixels, saturation, hue)
    return pixels if contrast_first else _scale_and_shift(pixels, contrast, 0.0)


def _scale_and_shift(pixels: np.ndarray, scale: float, shift: float) -> np.ndarray:
    """Shift, round to bytes, then scale: values from 0 to 255 by a table."""
    if scale == 1 and shift == 0:
        return pixels
    shifted = np.clip(np.arange(256) + shift, 0, 255)
    table = np.rint(np.clip(shifted * scale, 0, 255)).astype(np.uint8)
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).point(table.tolist() * 3))


def shift_colors(pixels: np.ndarray, saturation: float, hue: float) -> np.ndarray:
    """
    Scale the saturation and turn the hue of an image in the HSV model, without rounding in between.

    Args:
        pixels: `(height, width, 3)` uint8.
        saturation: factor; a saturation beyond full is full.
        hue: angle in sextants, 6 being the whole circle.
    """
    if saturation == 1 and hue == 0:
        return pixels
    result = np.empty(pixels.shape, dtype=np.uint8)
    for top in range(0, len(pixels), _STRIPE):
        _shift_stripe(pixels[top : top + _STRIPE], saturation, hue, result[top : top + _STRIPE])
    return result


def _shift_stripe(pixels: np.ndarray, saturation: float, hue: float, result: np.ndarray) -> None:
    red, green, blue = (pixels[..., channel].astype(np.float32) for channel in range(3))
    value = np.maximum(np.maximum(red, green), blue)
    chroma = value - np.minimum(np.minimum(red, green), blue)
    new_chroma = np.minimum(chroma * np.float32(saturation), value)
    if hue == 0:
        # Each channel's distance from the greatest grows alike: the angle is not needed.
        ratio = new_chroma / np.maximum(chroma, 1)
        for channel, old in enumerate((red, green, blue)):
            result[..., channel] = value - (value - old) * ratio + np.float32(0.5)
        return
    inverse = np.float32(1) / np.maximum(chroma, 1)
    angle = np.where(
        value == red,
        (green - blue) * inverse,
        np.where(value == green, (blue - red) * inverse + np.float32(2), (red - green) * inverse + np.float32(4)),
    )
    angle += np.float32(hue)
    for channel, place in enumerate((0, 2, 4)):
        # A channel is full within one sextant of its own place on the circle, empty beyond two, linear between.
        turn = angle - np.float32(place)
        distance = np.abs(turn - np.float32(6) * np.rint(turn * np.float32(1 / 6)))
        empty = np.clip(distance - np.float32(1), 0, 1)
        result[..., channel] = value - new_chroma * empty + np.float32(0.5)


def _resized_window(
    image: Image.Image, label_map: np.ndarray, size: tuple[int, int], window: tuple[int, int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """
    A window (left, top, right, bottom) of image and label map resized to `size` (width, height), computed alone.

    PIL's filter reads beyond the box that it is given, so that a window has the values it would have as a cut from the
    whole resized image, but for single steps of rounding. Labels are those of the nearest pixel.
    """
    left, top, right, bottom = window
    across, down = image.width / size[0], image.height / size[1]
    box = (left * across, top * down, min(right * across, image.width), min(bottom * down, image.height))
    pixels = image.resize((right - left, bottom - top), Image.Resampling.BILINEAR, box=box)
    columns = ((np.arange(left, right) + 0.5) * across).astype(np.intp)
    rows = ((np.arange(top, bottom) + 0.5) * down).astype(np.intp)
    return np.asarray(pixels), label_map[rows][:, columns]


__all__ = ["Augmentation", "distort_colors", "shift_colors"]
