"""Overlays and label images: what people look at says what the segmentation says."""

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from modeling_san.processing import label_colors, label_png, overlay, palette

LABELS = ["sky", "road", "tree"]


def grey_image(height, width, value=120):
    return np.full((height, width, 3), value, dtype=np.uint8)


def halves(height, width):
    """Label 0 in the left half, label 1 in the right one."""
    segmentation = np.zeros((height, width), dtype=np.int64)
    segmentation[:, width // 2 :] = 1
    return segmentation


# Colours


def test_colors_depend_on_the_index_alone():
    longest = palette(3000)
    for n in (0, 1, 7, 20, 256, 257):
        assert np.array_equal(palette(n), longest[:n])


def test_colors_are_all_different():
    assert len(np.unique(palette(20_000), axis=0)) == 20_000


def test_first_colors_differ_clearly_with_and_without_red_green_vision():
    # Viénot, Brettel and Mollon 1999, in linear RGB: a model of seeing that the palette is not made with
    no_green = np.array([[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]])
    linear = (palette(20) / 255.0) ** 2.2
    for seen in (linear, linear @ no_green.T):
        shown = np.clip(seen, 0, 1) ** (1 / 2.2)
        distances = np.linalg.norm(shown[:, None] - shown[None], axis=-1)
        assert distances[~np.eye(20, dtype=bool)].min() > 0.05


def test_changing_a_palette_does_not_change_the_next_one():
    palette(5)[:] = 0
    assert palette(5).any()


def test_other_is_grey_and_no_grey_wall_looks_like_it():
    sky, other, wall = label_colors(["sky", "other", "grey wall"]).astype(int)
    assert np.ptp(other) == 0
    assert np.ptp(wall) < 20
    assert np.abs(wall - other).min() > 30
    assert np.array_equal(sky, palette(1)[0])


@pytest.mark.parametrize(
    ("label", "lowest", "highest"),
    [
        ("red dotted", 0, 20),
        ("Car|orange car", 20, 45),
        ("yellow", 45, 65),
        ("GREEN plain", 90, 150),
        ("cyan|blue", 170, 190),
        ("dark blue sky", 200, 250),
        ("purple and white", 260, 290),
        ("pink striped", 325, 345),
    ],
)
def test_a_label_that_names_a_color_has_that_color(label, lowest, highest):
    for color in label_colors(["sky", label, f"another {label}", "road"])[1:3]:
        hue, _, saturation = colorsys.rgb_to_hls(*(color / 255))
        assert lowest <= 360 * hue <= highest
        assert saturation > 0.4


def test_black_and_white_and_pink_are_as_dark_as_they_are_called():
    black, pink, white = label_colors(["black car", "pink car", "white car"]).mean(axis=1)
    assert black < 60
    assert 170 < pink < 225 < white


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_labels_of_one_color_have_clearly_different_shades(count):
    colors = label_colors([f"red {number}" for number in range(count)]).astype(float)
    distances = np.linalg.norm(colors[:, None] - colors[None], axis=-1)
    assert distances[~np.eye(count, dtype=bool)].min() > 180 / count


def test_other_labels_keep_away_from_named_colors():
    labels = ["orange car", "green van", *(f"label {number}" for number in range(300))]
    colors = label_colors(labels).astype(float)
    distances = np.linalg.norm(colors[2:200, None] - colors[None, :2], axis=-1)
    assert distances.min() >= 60
    assert len(np.unique(colors, axis=0)) == len(labels)


def test_parts_of_words_are_no_colors():
    labels = ["hundred", "evergreen", "redwood", "blueberry"]
    assert np.array_equal(label_colors(labels), palette(4))


# Overlays


@pytest.mark.parametrize(("height", "width"), [(600, 600), (800, 500), (480, 900)])
def test_overlay_keeps_the_image_and_adds_the_legend(height, width):
    drawn = overlay(grey_image(height, width), halves(height, width), LABELS, outlines=False, names=False)
    assert drawn.mode == "RGB"
    assert (drawn.width == width) != (drawn.height == height)
    pixel = np.array(drawn.getpixel((width // 4, height // 2)), dtype=float)
    assert np.abs(pixel - (palette(1)[0] + 120.0) / 2).max() <= 1


def test_legend_shows_the_colors_of_the_labels_present_and_no_others():
    image = np.asarray(overlay(grey_image(600, 600), halves(600, 600), LABELS))[:, 600:]
    shown = {tuple(color) for color in image.reshape(-1, 3)}
    assert tuple(palette(3)[0]) in shown
    assert tuple(palette(3)[1]) in shown
    assert tuple(palette(3)[2]) not in shown


def test_without_opacity_and_legend_the_image_is_untouched():
    image = np.random.default_rng(0).integers(0, 256, (600, 520, 3), dtype=np.uint8)
    drawn = overlay(image, halves(600, 520), LABELS, opacity=0, legend=False)
    assert np.array_equal(np.asarray(drawn), image)


def test_full_opacity_paints_plain_colors_and_lines_where_labels_meet():
    drawn = np.asarray(overlay(grey_image(600, 600), halves(600, 600), LABELS, opacity=1, legend=False, names=False))
    assert (drawn[:, :290] == palette(1)[0]).all()
    assert (drawn[:, 310:] == palette(2)[1]).all()
    assert (drawn[:, 298:302].max(axis=1) > 200).all()


def test_ignored_pixels_stay_unpainted_and_out_of_the_legend():
    segmentation = np.full((600, 600), 255)
    drawn = overlay(grey_image(600, 600), segmentation, LABELS)
    assert drawn.size == (600, 600)
    assert np.array_equal(np.asarray(drawn), grey_image(600, 600))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (8, 8), (3, 700), (700, 3), (2500, 2000)])
def test_very_small_and_very_large_images_get_a_legible_legend(height, width):
    drawn = overlay(grey_image(height, width), halves(height, width), LABELS)
    assert max(drawn.size) >= 512
    letters = np.asarray(drawn.convert("L")) < 60
    assert letters.sum() > 50


def test_long_label_lists_are_summed_up_in_one_line():
    labels = [f"label number {i}" for i in range(60)]
    segmentation = np.arange(600 * 600).reshape(600, 600) % 60
    few = overlay(grey_image(600, 600), segmentation, labels, max_entries=3)
    many = overlay(grey_image(600, 600), segmentation, labels, max_entries=60)
    assert few.width < many.width
    shown = {tuple(color) for color in np.asarray(few)[:, 600:].reshape(-1, 3)}
    assert sum(tuple(color) in shown for color in palette(60)) == 3


@pytest.mark.parametrize("label", ["дерево", "道路", "شجرة", "🚗", "a\nb\tc", "", "x" * 400])
def test_labels_of_any_script_and_length_can_be_drawn(label):
    drawn = overlay(grey_image(64, 64), halves(64, 64), [label, "road"])
    assert drawn.width < 3 * 512


def test_labels_of_any_length_are_measured_by_their_beginning_alone(monkeypatch):
    measured = []
    getlength = ImageFont.FreeTypeFont.getlength
    monkeypatch.setattr(
        ImageFont.FreeTypeFont, "getlength", lambda font, text: measured.append(text) or getlength(font, text)
    )
    overlay(grey_image(600, 600), halves(600, 600), ["x" * 4000, "road " * 1000])
    assert max(map(len, measured)) < 60


# Names in regions


def written(segmentation, labels=LABELS, **options):
    """Where drawing names changes an image, as (top, bottom, left, right); None if nowhere."""
    image = grey_image(*segmentation.shape)
    with_names, without = (
        np.asarray(overlay(image, segmentation, labels, legend=False, outlines=False, names=names, **options))
        for names in (True, False)
    )
    rows, columns = (with_names != without).any(axis=-1).nonzero()
    return (rows.min(), rows.max(), columns.min(), columns.max()) if len(rows) else None


def test_a_name_is_written_inside_its_region_where_it_is_widest():
    region = np.full((600, 800), 255)
    region[300:, 400:] = 1
    region[100:140, 40:700] = 1
    top, bottom, left, right = written(region)
    assert top >= 300
    assert left >= 400
    assert abs((top + bottom) / 2 - 450) < 60
    assert abs((left + right) / 2 - 600) < 100


@pytest.mark.parametrize("shape", ["dots", "thin line", "nothing"])
def test_regions_without_room_stay_without_a_name(shape):
    region = np.full((600, 600), 255)
    if shape == "dots":
        region[::2, ::2] = 0
    elif shape == "thin line":
        region[300:305] = 0
    assert written(region) is None


def test_names_longer_than_their_region_are_left_to_the_legend():
    region = np.full((600, 600), 255)
    region[200:400, 250:350] = 0
    assert written(region, ["sky"]) is not None
    assert written(region, ["a very long name of the sky"]) is None
    assert written(region, ["sky"], opacity=0) is None


@pytest.mark.parametrize("name", ["black", "white", "yellow", "blue"])
def test_names_can_be_read_on_every_color(name):
    drawn = np.asarray(overlay(grey_image(600, 600), np.zeros((600, 600), int), [name], legend=False).convert("L"))
    box = drawn[280:320, 270:330].astype(int)
    assert np.ptp(box) > 100


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"segmentation": np.zeros((5, 4), int)}, "5 x 4 .* 4 x 4"),
        ({"opacity": 1.5}, "1.5"),
        ({"max_entries": 0}, "max_entries"),
        ({"colors": palette(1)}, "3 labels"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options, sentence):
    arguments = {"image": grey_image(4, 4), "segmentation": halves(4, 4), "labels": LABELS, **options}
    with pytest.raises(ValueError, match=sentence):
        overlay(**arguments)


def test_tensors_are_drawn_like_arrays():
    image, segmentation = grey_image(520, 520), halves(520, 520)
    from_tensors = overlay(torch.from_numpy(image), torch.from_numpy(segmentation), LABELS)
    assert np.array_equal(np.asarray(from_tensors), np.asarray(overlay(image, segmentation, LABELS)))


# Label images


def test_label_images_hold_the_indices_and_the_colors(tmp_path):
    segmentation = torch.arange(256).reshape(16, 16)
    label_png(segmentation).save(tmp_path / "labels.png")
    read = Image.open(tmp_path / "labels.png")
    assert read.mode == "P"
    assert np.array_equal(np.asarray(read), segmentation.numpy())
    colors = np.asarray(read.convert("RGB")).reshape(-1, 3)
    assert np.array_equal(colors[:255], palette(255))
    assert not colors[255].any()


def test_more_labels_than_a_palette_holds_are_stored_in_sixteen_bits(tmp_path):
    segmentation = np.arange(900).reshape(30, 30)
    label_png(segmentation).save(tmp_path / "labels.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "labels.png")), segmentation)


def test_negative_indices_are_refused():
    with pytest.raises(ValueError, match="indices from -1"):
        label_png(np.full((2, 2), -1))
