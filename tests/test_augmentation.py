"""Augmentation: the paper's ranges, labels that stay on their pixels, chance from one generator."""

import colorsys
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from modeling_san.training.augmentation import Augmentation, distort_colors, shift_colors

PLAIN = {"photometric": False, "flip": 0.0}


def dice(coins, share):
    """A generator whose coins fall as a test says, and that draws the same share of every range."""
    return Mock(
        random=Mock(side_effect=[0.0 if coin else 0.9 for coin in coins]),
        uniform=Mock(side_effect=lambda low, high: low + share * (high - low)),
    )


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def smooth(height: int, width: int) -> Image.Image:
    return Image.fromarray(noise(6, 8)).resize((width, height), Image.Resampling.BICUBIC)


def test_the_defaults_are_the_papers_and_for_size_spans_three_quarters_to_one_and_a_half():
    augmentation = Augmentation()
    assert augmentation.short_sides == (320, 384, 448, 512, 576, 640, 704, 768, 832, 896, 960)
    assert (augmentation.max_long_side, augmentation.crop_size) == (2560, (640, 640))
    assert (augmentation.photometric, augmentation.flip) == (True, 0.5)
    smaller = Augmentation.for_size(192, (192, 256))
    assert (min(smaller.short_sides), max(smaller.short_sides), smaller.crop_size) == (144, 288, (192, 256))
    assert smaller.resized_size((256, 192), 288) == (384, 288)


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [((640, 480), 320, (427, 320)), ((480, 640), 960, (960, 1280)), ((3000, 500), 960, (2560, 427))],
)
def test_the_short_side_is_reached_unless_the_long_one_gets_too_long(size, short_side, expected):
    assert Augmentation().resized_size(size, short_side) == expected


def drawn(augmentation, image, labels, seed, ignore_index=255):
    return augmentation(image, labels, np.random.default_rng(seed), ignore_index)


def test_every_short_side_is_drawn():
    augmentation = Augmentation(short_sides=(32, 40, 48), crop_size=(64, 64), **PLAIN)
    image, labels = Image.new("RGB", (10, 10)), np.zeros((10, 10), np.int32)
    views = [drawn(augmentation, image, labels, seed)[1] for seed in range(40)]
    assert {int((view[0] == 0).sum()) for view in views} == {32, 40, 48}


def test_a_view_has_the_crop_size_and_is_padded_at_the_right_and_below():
    augmentation = Augmentation(short_sides=(20,), crop_size=(32, 48), **PLAIN)
    given = Image.new("RGB", (60, 40), (1, 2, 3)), np.ones((40, 60), np.int32)
    image, labels = drawn(augmentation, *given, seed=0, ignore_index=65535)
    assert image.size == (48, 32)
    pixels, padding = np.asarray(image), np.ones((32, 48), bool)
    padding[:20, :30] = False
    assert (labels == np.where(padding, 65535, 1)).all()
    assert (pixels[padding] == 128).all()
    assert (pixels[~padding] == (1, 2, 3)).all()


@pytest.mark.parametrize("short_side", [37, 90, 150])
def test_a_view_is_a_window_of_the_whole_resized_image(short_side):
    image, labels = smooth(90, 120), np.random.default_rng(0).integers(0, 200, (90, 120)).astype(np.int32)
    augmentation = Augmentation(short_sides=(short_side,), crop_size=(32, 40), **PLAIN)
    size = augmentation.resized_size(image.size, short_side)
    whole = np.asarray(image.resize(size, Image.Resampling.BILINEAR)).astype(int)
    whole_labels = np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))
    for seed in range(5):
        view, view_labels = drawn(augmentation, image, labels, seed)
        places = [
            (top, left)
            for top in range(size[1] - 31)
            for left in range(size[0] - 39)
            # Where a place lies exactly between two pixels, rounding decides
            if (whole_labels[top : top + 32, left : left + 40] == view_labels).mean() > 0.9
        ]
        assert len(places) == 1
        [(top, left)] = places
        assert np.abs(whole[top : top + 32, left : left + 40] - np.asarray(view)).max() <= 1


def test_crops_reach_every_edge():
    augmentation = Augmentation(short_sides=(12,), crop_size=(8, 8), **PLAIN)
    image, labels = Image.new("RGB", (12, 12)), np.arange(144, dtype=np.int32).reshape(12, 12)
    corners = {divmod(int(drawn(augmentation, image, labels, seed)[1][0, 0]), 12) for seed in range(300)}
    assert corners == {(top, left) for top in range(5) for left in range(5)}


def test_flips_mirror_image_and_labels_alike_half_of_the_time():
    augmentation = Augmentation(short_sides=(4,), crop_size=(4, 6), photometric=False)
    labels = np.arange(24, dtype=np.int32).reshape(4, 6)
    image = Image.fromarray((labels[..., None] * 10).astype(np.uint8).repeat(3, 2))
    flipped = 0
    for seed in range(200):
        view, view_labels = drawn(augmentation, image, labels, seed)
        assert np.array_equal(np.asarray(view)[..., 0], view_labels * 10)
        flipped += view_labels[0, 0] == 5
    # 200 throws of a fair coin: five standard deviations around 100
    assert 65 < flipped < 135


def test_colours_are_drawn_from_the_papers_ranges():
    rng = dice([True] * 5, 0.5)
    distort_colors(noise(2, 2), rng)
    # Brightness in bytes, contrast, saturation, and hue in sextants: 18 of 180 is a tenth of half the circle
    assert [call.args for call in rng.uniform.call_args_list] == [(-32, 32), (0.5, 1.5), (0.5, 1.5), (-0.6, 0.6)]


@pytest.mark.parametrize(
    ("falls", "share", "shift"), [(False, 1.0, 0), (True, 0.0, -32), (True, 1.0, 32)], ids=["not", "down", "up"]
)
def test_brightness_is_added_where_its_coin_falls(falls, share, shift):
    pixels = noise(5, 7)
    expected = np.clip(pixels.astype(int) + shift, 0, 255)
    assert np.array_equal(distort_colors(pixels, dice([falls, False, False, False, falls], share)), expected)


def test_contrast_comes_before_saturation_or_after_it_as_the_coin_says():
    pixels = np.array([[[100, 100, 200]]], np.uint8)

    # Contrast by 1.5 cuts blue off at 255; halfway between greatest and least is something else before than after
    def result(contrast_first):
        return distort_colors(pixels, dice([False, True, True, False, contrast_first], 1.0)).tolist()

    # 150, 150, 255, then 255 - 105 * 1.5
    assert result(True) == [[[98, 98, 255]]]
    # 200 - 100 * 1.5, then by 1.5
    assert result(False) == [[[75, 75, 255]]]


@pytest.mark.parametrize(
    ("saturation", "hue"), [(0.5, 0.0), (1.5, 0.0), (1.0, 0.6), (1.0, -0.6), (1.3, 0.41), (0.7, -0.2)]
)
def test_saturation_and_hue_are_those_of_the_hsv_model(saturation, hue):
    pixels = noise(40, 9)
    # Grey, pure and black pixels are where angles are undefined or jump
    pixels[0] = [[0, 0, 0], [255] * 3, [7] * 3, [255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 0], [0, 9, 9], [9, 0, 9]]
    expected = np.empty(pixels.shape)
    for place in np.ndindex(pixels.shape[:2]):
        angle, share, value = colorsys.rgb_to_hsv(*(pixels[place] / 255))
        expected[place] = colorsys.hsv_to_rgb((angle + hue / 6) % 1, min(share * saturation, 1), value)
    assert np.abs(shift_colors(pixels, saturation, hue) - expected * 255).max() <= 0.501


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"short_sides": ()}, "short_sides"),
        ({"short_sides": (0,)}, "short_sides"),
        ({"crop_size": (0, 8)}, "crop_size"),
        ({"max_long_side": 100}, "max_long_side"),
        ({"flip": 1.5}, "flip"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**options)
