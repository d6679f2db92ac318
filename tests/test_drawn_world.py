"""The drawn world, the tokenizer that knows its words, and the small CLIP that is trained on both."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Image
from transformers import AutoTokenizer, CLIPModel, CLIPTokenizer

from drawn_world import captions, pretrain_clip, world
from drawn_world.tokenizer import build_tokenizer, training_sentences
from drawn_world.world import CLASS_NAMES, COLOURS, COMBINATIONS, draw_scene, draw_texture


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene(3, index) for index in range(60)]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def clip(tokenizer):
    torch.manual_seed(0)
    return CLIPModel(pretrain_clip.demo_clip_config(tokenizer)).eval()


def area(scene, name):
    return scene.label_map == CLASS_NAMES.index(name)


def assert_same(first, second):
    np.testing.assert_array_equal(first.image, second.image)
    np.testing.assert_array_equal(first.label_map, second.label_map)
    assert first.names == second.names


# ---------------------------------------- images


def test_seed_and_index_say_which_image_is_drawn():
    first = draw_scene(5, 11)
    assert_same(first, draw_scene(5, 11))
    for seed, index in ((5, 12), (6, 11)):
        assert not np.array_equal(first.image, draw_scene(seed, index).image)


def test_held_out_combinations_cover_every_colour_and_pattern():
    colours, patterns = zip(*(name.split(" ") for name in world.NEVER_SEEN_COMBINATIONS), strict=True)
    assert sorted(colours) == sorted(COLOURS)
    assert sorted(patterns) == sorted(2 * world.PATTERNS)
    assert sorted(world.SEEN_COMBINATIONS + world.NEVER_SEEN_COMBINATIONS) == sorted(COMBINATIONS)
    assert len(COMBINATIONS) == 32


def test_scenes_hold_one_to_three_large_regions_and_label_maps_exactly_their_names(scenes):
    for scene in scenes:
        assert {CLASS_NAMES[label] for label in np.unique(scene.label_map)} == set(scene.names)
        assert all(area(scene, name).mean() >= world.MIN_REGION_SHARE for name in scene.regions)
    numbers = [len(scene.regions) for scene in scenes]
    assert set(numbers) == {1, 2, 3}
    assert numbers.count(1) >= len(scenes) // 3


def test_captions_mention_what_is_there_and_nothing_else(scenes):
    rng = np.random.default_rng(0)
    for scene in scenes:
        whole = captions.write_caption(rng, scene.regions, scene.background)
        assert whole.names == set(scene.names)
        for caption in (whole, captions.caption_scene(rng, scene.regions, scene.background)):
            assert {name for name in CLASS_NAMES if name in caption.text} == caption.names
            assert caption.names <= set(scene.names)
    with pytest.raises(ValueError, match="at least one"):
        captions.write_caption(rng, [], None)


@pytest.mark.parametrize("colour", COLOURS)
def test_regions_have_the_colour_of_their_name(colour):
    name = f"{colour} plain"
    scene = draw_scene(1, 4, combinations=[name], max_regions=1)
    mean = scene.image[area(scene, name)].mean(0) / 255
    assert min(COLOURS, key=lambda word: np.abs(mean - COLOURS[word]).sum()) == colour


def test_only_the_wanted_names_are_drawn():
    for index in range(20):
        scene = draw_scene(2, index, combinations=["red plain", "blue dotted"], backgrounds=["sand"])
        assert set(scene.regions) <= {"red plain", "blue dotted"}
        assert scene.background == "sand"
    for wrong, named in (({"combinations": ["red furry"]}, "red furry"), ({"min_regions": 4}, "min_regions=4")):
        with pytest.raises(ValueError, match=named):
            draw_scene(0, 0, **wrong)


def test_the_dataset_holds_the_drawn_images_in_any_size():
    for size, (height, width) in ((64, (64, 64)), ((96, 160), (96, 160))):
        dataset = world.world_dataset(2, seed=4, start=10, max_regions=2, size=size)
        assert isinstance(dataset.features["image"], Image)
        assert isinstance(dataset.features["annotation"], Image)
        for index, row in enumerate(dataset):
            scene = draw_scene(4, 10 + index, max_regions=2, size=size)
            assert (scene.image.shape, scene.label_map.shape) == ((height, width, 3), (height, width))
            assert scene.image.dtype == scene.label_map.dtype == np.uint8
            np.testing.assert_array_equal(np.asarray(row["image"]), scene.image)
            np.testing.assert_array_equal(np.asarray(row["annotation"]), scene.label_map)


def test_a_texture_fills_the_whole_image_and_each_background_has_one_of_its_own():
    assert draw_texture(0, 0, names=["red plain"]).names == ("red plain",)
    textures = [draw_texture(0, 0, names=[name]) for name in world.BACKGROUNDS]
    assert all(area(scene, name).all() for scene, name in zip(textures, world.BACKGROUNDS, strict=True))
    assert [scene.background for scene in textures] == list(world.BACKGROUNDS)
    means = np.stack([scene.image.mean((0, 1)) for scene in textures])
    distances = np.abs(means[:, None] - means).max(-1) + 255 * np.eye(len(world.BACKGROUNDS))
    assert distances.min() > 15


@pytest.mark.parametrize("name", COMBINATIONS)
def test_textures_survive_being_shrunk_by_half(name):
    # A pattern that the shrink washes out would leave its mean colour: the image would look plain.
    image = draw_texture(8, 0, names=[name]).image.astype(float)
    shrunk = image.reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert (shrunk.std((0, 1)).max() < 15) == name.endswith("plain")


# ---------------------------------------- the tokenizer


def test_sentences_are_words_between_clips_start_and_end_whatever_their_case(tokenizer):
    ids = tokenizer("a photo of red striped").input_ids
    words = ["a</w>", "photo</w>", "of</w>", "red</w>", "striped</w>"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|startoftext|>", *words, "<|endoftext|>"]
    assert tokenizer("A photo of Red STRIPED").input_ids == ids
    for name in CLASS_NAMES:
        assert len(tokenizer.tokenize(name)) == len(name.split(" "))
    assert tokenizer.pad_token == tokenizer.eos_token == tokenizer.unk_token == "<|endoftext|>"
    ids = tokenizer(["grass", "red plain on grass"], padding=True).input_ids
    assert ids[0] == [tokenizer.bos_token_id, ids[0][1], *[tokenizer.eos_token_id] * 4]
    # CLIPTextModel reads an end token of 2 as "take the largest id", for old configurations.
    assert tokenizer.eos_token_id == len(tokenizer) - 1 != 2


@pytest.mark.parametrize("text", ["xylophone", "zürich", "東京", "łódź", "emoji 🦊", "a b c d e f g", "#1, 2 & 3"])
def test_any_word_encodes_and_comes_back(tokenizer, text):
    ids = tokenizer(text).input_ids[1:-1]
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")


def test_every_class_of_the_standard_label_sets_fits_in_a_prompt(tokenizer):
    prompt = "a jpeg corrupted photo of a {}."
    assert max(len(tokenizer(prompt.format(text)).input_ids) for text in training_sentences()) <= 48


def test_the_tokenizer_reloads_from_a_small_folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").stat().st_size < 400_000
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(loaded, CLIPTokenizer)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded("A photo of a xylophone.").input_ids == tokenizer("A photo of a xylophone.").input_ids
    assert (loaded.pad_token_id, loaded.model_max_length) == (tokenizer.pad_token_id, 48)


@pytest.mark.slow
def test_the_tokenizer_is_the_same_in_every_process(tokenizer):
    program = "from drawn_world.tokenizer import *; print(build_tokenizer().backend_tokenizer.to_str(), end='')"
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, env=environment).stdout
    assert other.decode() == tokenizer.backend_tokenizer.to_str()


def test_the_vocabulary_has_the_size_asked_for():
    assert len(build_tokenizer(vocab_size=1000)) == 1000
    with pytest.raises(ValueError, match="vocab_size=100"):
        build_tokenizer(vocab_size=100)


# ---------------------------------------- the small CLIP


def test_the_tiny_clip_has_about_two_million_parameters(clip):
    assert 1.5e6 < sum(parameter.numel() for parameter in clip.parameters()) < 2.5e6


@torch.no_grad()
def test_a_region_that_is_the_whole_image_is_embedded_as_the_image(clip):
    pixel_values = torch.randn(2, 3, 64, 64)
    regions = pretrain_clip.embed_regions(clip, pixel_values, torch.ones(2, 3, 8, 8, dtype=torch.bool), first_layer=3)
    torch.testing.assert_close(regions, pretrain_clip.embed_images(clip, pixel_values)[:, None].expand(-1, 3, -1))


def test_patches_of_a_region_are_those_it_touches_or_those_it_fills():
    mask = torch.zeros(1, 2, 128, 128)
    mask[0, 0, :, :40] = 1
    mask[0, 1, :4, :4] = 1
    touched, filled = (
        pretrain_clip.patches_of_regions(mask, 8),
        pretrain_clip.patches_of_regions(mask, 8, min_coverage=0.9),
    )
    assert touched[0, 0].any(0).tolist() == [True] * 3 + [False] * 5
    assert filled[0, 0].any(0).tolist() == [True] * 2 + [False] * 6
    assert touched[0, 1].sum() == filled[0, 1].sum() == 1


def test_a_true_caption_of_another_image_is_not_held_against_the_model():
    # Both captions are true of both images: equal logits are perfect, up to the entropy of the target.
    loss = pretrain_clip.contrastive_loss(torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool))
    assert loss.item() == pytest.approx(torch.log(torch.tensor(2.0)).item())
    own = pretrain_clip.contrastive_loss(20 * torch.eye(2), torch.eye(2, dtype=torch.bool))
    assert own.item() < 1e-6


def test_the_pool_is_the_same_however_many_processes_draw_it():
    (alone, names), (shared, again) = (
        pretrain_clip.draw_pool(6, workers=workers, progress=False) for workers in (0, 2)
    )
    assert torch.equal(alone, shared)
    assert names == again
    assert alone.shape == (6, 3, 64, 64)


def test_pre_training_saves_a_model_and_its_tokenizer(tmp_path):
    options = {"steps": 2, "batch_size": 4, "num_images": 8, "workers": 0, "progress": False, "device": "cpu"}
    model = pretrain_clip.pretrain_clip(tmp_path, **options)
    loaded, tokenizer = CLIPModel.from_pretrained(tmp_path), CLIPTokenizer.from_pretrained(tmp_path)
    assert loaded.config.text_config.eos_token_id == tokenizer.eos_token_id
    torch.testing.assert_close(loaded.visual_projection.weight, model.visual_projection.weight)
    again = pretrain_clip.pretrain_clip(tmp_path, **options)
    torch.testing.assert_close(again.visual_projection.weight, model.visual_projection.weight)
    with pytest.raises(ValueError, match="num_images=4"):
        pretrain_clip.pretrain_clip(tmp_path, batch_size=8, num_images=4)
