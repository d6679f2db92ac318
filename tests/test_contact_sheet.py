"""`san contact-sheet`: what a person sees of a data set before training on it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from modeling_san.commands.main import main
from modeling_san.processing import SANImageProcessor, label_colors
from modeling_san.training import contact_sheet
from modeling_san.training.augmentation import Augmentation
from modeling_san.training.build import load_setting, make_augmentation
from modeling_san.training.contact_sheet import draw_contact_sheet
from modeling_san.training.data import TrainingImages, load_images
from modeling_san.training.label_sets import LabelSet
from modeling_san.training.recipe import Recipe

NAMES = ("sky", "road", "tree")


@pytest.fixture
def dataset(tmp_path):
    """Three images: sky over road, road alone, and one without any label."""
    maps = np.zeros((3, 40, 60), np.uint8)
    maps[0, 20:], maps[1], maps[2] = 1, 1, 255
    rows = {
        "image": [Image.new("RGB", (60, 40), (90 + index,) * 3) for index in range(3)],
        "annotation": [Image.fromarray(label_map) for label_map in maps],
    }
    path = tmp_path / "data.parquet"
    Dataset.from_dict(rows).to_parquet(path)
    (tmp_path / "classes.json").write_text(json.dumps(NAMES))
    return path


@pytest.fixture
def san(dataset, tmp_path, capsys):
    def run(*arguments, labels="classes.json"):
        capsys.readouterr()
        given = ["--labels", tmp_path / labels] if labels else []
        arguments = ["contact-sheet", "--dataset", dataset, *given, "--output", tmp_path / "sheet.png", *arguments]
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err.strip().splitlines()[-1:]

    return run


@pytest.mark.parametrize("streaming", [(), ("--streaming",)])
def test_the_sheet_is_written_and_the_findings_are_said(san, tmp_path, streaming):
    code, out, _ = san("--count", 3, "--crop-size", 64, "--short-sides", "64,96", *streaming)
    assert code == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert min(sheet.size) > 1000
    assert out[0] == ("images, their number is not known; looked at 3" if streaming else "3 images; looked at 3")
    # Of 3 images, road is on one and a half, sky on a half, and one has no label
    assert out[1] == "2 of 3 classes seen, with their share of the pixels: road 50.0 %, sky 16.7 %"
    assert out[2] == "1 not seen: tree"
    assert out[3] == "pixels without a label: 33.3 %"
    assert out[4] == "images without any label: 1 (examples 2)"


def test_an_image_shown_twice_counts_once(dataset):
    sheet = draw_contact_sheet(
        load_images(dataset), LabelSet(NAMES), Augmentation(crop_size=(64, 64)), count=7, progress=False
    )
    assert sheet.sampled == 3
    assert sheet.pixels.tolist() == [1200, 3600, 0, 2400]


def test_the_sheet_shows_what_training_sees(dataset):
    """The view at the left is the one that `TrainingImages` makes of the same image with the same seed."""
    augmentation, label_set, images = Augmentation((64, 96), 256, (64, 64)), LabelSet(NAMES), load_images(dataset)
    for seed in range(3):
        sheet = draw_contact_sheet(images, label_set, augmentation, count=1, seed=seed, progress=False).image
        pixels = np.asarray(sheet).astype(int)
        processor = SANImageProcessor()
        views = []
        shift, factor = (np.array(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
        for example in map(TrainingImages(images, label_set, processor, augmentation, seed).__getitem__, range(3)):
            views.append(np.rint((example["pixel_values"].numpy() * factor + shift) * 255).transpose(1, 2, 0))
        # The sheet enlarges 64 pixels to 512, behind 16 of margin and 30 of title; the middles of pixels keep them
        shown = pixels[16 + 30 : 16 + 30 + 512, 16 : 16 + 512][4::8, 4::8]
        assert min(np.abs(shown - view).mean() for view in views) < 1


def test_the_sizes_are_those_of_the_training_it_stands_for(san, dataset, tmp_path, monkeypatch):
    augmentations = []
    views = Augmentation(crop_size=(64, 64))
    sheet = draw_contact_sheet(load_images(dataset), LabelSet(NAMES), views, count=1, progress=False)
    monkeypatch.setattr(
        contact_sheet, "draw_contact_sheet", lambda *given, **_: augmentations.append(given[2]) or sheet
    )
    (tmp_path / "recipe.yaml").write_text("short_side: 96\n")
    for arguments in ((), ("--config", tmp_path / "recipe.yaml"), ("--crop-size", 64)):
        assert san(*arguments)[0] == 0
    usual, of_recipe, of_option = augmentations
    recipe = Recipe(short_side=96)
    config, processor = load_setting(recipe)
    assert of_recipe == make_augmentation(recipe, load_images(dataset), LabelSet(NAMES), config, processor)
    # 60 x 40 pixels, in whole patches
    assert of_recipe.crop_size == (96, 144)
    assert usual.crop_size != of_recipe.crop_size
    assert of_option == replace(usual, crop_size=(64, 64))


def test_damaged_images_are_left_out_where_that_is_meant(san, dataset, tmp_path):
    rows = Dataset.from_parquet(str(dataset)).cast_column("image", ImageFeature(decode=False)).to_list()
    rows[1]["image"]["bytes"] = rows[1]["image"]["bytes"][:60]
    Dataset.from_list(rows).to_parquet(dataset)
    code, _, error = san("--count", 3)
    assert code == 2
    assert "data.parquet, example 1" in error[0]
    code, out, _ = san("--count", 3, "--skip-damaged")
    assert code == 0
    assert "images that cannot be used: examples 1" in out


def test_labels_are_painted_in_their_colours_beside_the_view(dataset):
    only_road = load_images(dataset).select([1])
    augmentation = Augmentation((64,), 256, (64, 64), photometric=False)
    sheet = draw_contact_sheet(only_road, LabelSet(NAMES), augmentation, count=1, progress=False).image
    left, right = sheet.getpixel((16 + 200, 300)), sheet.getpixel((16 + 512 + 16 + 200, 300))
    assert left == (91, 91, 91)
    expected = (np.array([91] * 3) + label_colors(NAMES)[1]) / 2
    assert np.abs(np.array(right) - expected).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--short-sides", "64,wide"), ("64,wide",)),
        (("--short-sides", "0"), ("'0'",)),
        (("--model", "nowhere"), ("nowhere",)),
        (("--config", "nowhere.yaml"), ("nowhere.yaml",)),
        (("--count", "0"), ("--count",)),
        (("--count", "100000"), ("--count", "100000", "256")),
        (("--crop-size", "100000"), ("--crop-size", "100000", "4096")),
        (("--seed", "-1"), ("--seed", "-1")),
        (("--output", "sheet.jpg"), (".png",)),
        (("--label-column", "truth"), ("no column 'truth'", "image, annotation")),
        (("--labels", "one.json"), ("data.parquet, example", "holds 1 on")),
        ((), ("names no classes",)),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(san, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    Path("one.json").write_text('["sky"]')
    code, out, err = san(*arguments, labels="classes.json" if arguments else None)
    assert (code, out) == (2, [])
    assert err[0].startswith("san: error: ")
    assert all(word in err[0] for word in words)
    assert not (tmp_path / "sheet.png").exists()
