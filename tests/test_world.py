import numpy as np
import pytest
from datasets import Image

from drawn_world.captions import caption_scene, write_caption
from drawn_world.world import (
    BACKGROUNDS,
    CLASS_NAMES,
    COLOURS,
    COMBINATIONS,
    MIN_REGION_SHARE,
    NEVER_SEEN_COMBINATIONS,
    PATTERNS,
    SEEN_COMBINATIONS,
    draw_scene,
    draw_texture,
    world_dataset,
)


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene(3, index) for index in range(60)]


def test_the_same_seed_draws_the_same_image():
    first, again = draw_scene(5, 11), draw_scene(5, 11)
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.label_map, again.label_map)
    assert first.names == again.names


@pytest.mark.parametrize(("seed", "index"), [(5, 12), (6, 11)])
def test_another_seed_or_index_draws_another_image(seed, index):
    assert not np.array_equal(draw_scene(5, 11).image, draw_scene(seed, index).image)


def test_held_out_combinations_cover_every_colour_and_pattern():
    words = [name.split(" ") for name in NEVER_SEEN_COMBINATIONS]
    assert sorted(colour for colour, _ in words) == sorted(COLOURS)
    assert all([pattern for _, pattern in words].count(pattern) == 2 for pattern in PATTERNS)
    assert sorted(SEEN_COMBINATIONS + NEVER_SEEN_COMBINATIONS) == sorted(COMBINATIONS)
    assert len(COMBINATIONS) == 32


def test_label_maps_hold_exactly_the_names_of_the_scene_and_regions_are_large(scenes):
    for scene in scenes:
        assert {CLASS_NAMES[label] for label in np.unique(scene.label_map)} == set(scene.names)
        for name in scene.regions:
            assert (scene.label_map == CLASS_NAMES.index(name)).mean() >= MIN_REGION_SHARE


def test_images_hold_one_to_three_regions_and_often_one(scenes):
    numbers = [len(scene.regions) for scene in scenes]
    assert set(numbers) == {1, 2, 3}
    assert numbers.count(1) >= len(scenes) // 3


def test_captions_mention_what_is_there_and_nothing_else(scenes):
    rng = np.random.default_rng(0)
    for scene in scenes:
        whole = write_caption(rng, scene.regions, scene.background)
        assert whole.names == set(scene.names)
        for caption in (whole, caption_scene(rng, scene.regions, scene.background)):
            assert {name for name in CLASS_NAMES if name in caption.text} == caption.names
            assert caption.names <= set(scene.names)
    with pytest.raises(ValueError, match="at least one"):
        write_caption(rng, [], None)


def test_regions_have_the_colour_of_their_name():
    for name in COMBINATIONS:
        colour, pattern = name.split(" ")
        if pattern == "plain":
            scene = draw_scene(1, 4, combinations=[name], max_regions=1)
            mean = scene.image[scene.label_map == CLASS_NAMES.index(name)].mean(0) / 255
            nearest = min(COLOURS, key=lambda word: np.abs(mean - COLOURS[word]).sum())
            assert nearest == colour


def test_only_the_wanted_names_are_drawn():
    for index in range(20):
        scene = draw_scene(2, index, combinations=["red plain", "blue dotted"], backgrounds=["sand"])
        assert set(scene.regions) <= {"red plain", "blue dotted"}
        assert scene.background == "sand"


def test_a_texture_fills_the_whole_image():
    scene = draw_texture(0, 0, names=["grass"])
    assert (scene.label_map == CLASS_NAMES.index("grass")).all()
    assert scene.background == "grass"
    assert draw_texture(0, 0, names=["red plain"]).names == ("red plain",)


@pytest.mark.parametrize("size", [64, (96, 160)])
def test_images_come_in_any_size(size):
    height, width = (size, size) if isinstance(size, int) else size
    scene = draw_scene(1, 1, size=size)
    assert scene.image.shape == (height, width, 3)
    assert scene.label_map.shape == (height, width)
    assert scene.image.dtype == scene.label_map.dtype == np.uint8


def test_an_unknown_name_is_an_error():
    with pytest.raises(ValueError, match="red furry"):
        draw_scene(0, 0, combinations=["red furry"])
    with pytest.raises(ValueError, match="min_regions"):
        draw_scene(0, 0, min_regions=2, max_regions=1)


def test_the_dataset_holds_the_drawn_images():
    dataset = world_dataset(3, seed=4, start=10, max_regions=2)
    assert isinstance(dataset.features["image"], Image)
    assert isinstance(dataset.features["annotation"], Image)
    for index, row in enumerate(dataset):
        scene = draw_scene(4, 10 + index, max_regions=2)
        np.testing.assert_array_equal(np.asarray(row["image"]), scene.image)
        np.testing.assert_array_equal(np.asarray(row["annotation"]), scene.label_map)


def test_textures_survive_being_shrunk_by_half():
    # A pattern that the shrink washes out would leave its mean colour: the image would look plain.
    for name in COMBINATIONS:
        image = draw_texture(8, 0, names=[name]).image.astype(float)
        shrunk = image.reshape(64, 2, 64, 2, 3).mean((1, 3))
        is_plain = name.endswith("plain")
        assert (shrunk.std((0, 1)).max() < 15) == is_plain, name


def test_every_background_has_a_texture_of_its_own():
    means = np.stack([draw_texture(0, 0, names=[name]).image.mean((0, 1)) for name in BACKGROUNDS])
    distances = np.abs(means[:, None] - means).max(-1) + 255 * np.eye(len(BACKGROUNDS))
    assert distances.min() > 15
