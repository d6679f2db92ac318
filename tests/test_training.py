"""Reading labelled images, counting IoU, fine-tuning."""

import io

import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from drawn_world.make_model import SAN_OPTIONS, WorldImages, attention_bias_off, make_processor
from drawn_world.tokenizer import build_tokenizer
from drawn_world.world import BACKGROUNDS, CLASS_NAMES, SEEN_COMBINATIONS, draw_scene
from modeling_san.processing import SANProcessor
from modeling_san.training.data import Collator, load_images, to_arrays
from modeling_san.training.label_sets import LabelSet
from modeling_san.training.metrics import ConfusionMatrix

LABELS = ["dark", "light"]


@pytest.fixture(scope="module")
def processor() -> SANProcessor:
    return make_processor(build_tokenizer(600))


@pytest.fixture
def small_model(processor):
    from transformers import CLIPModel

    from drawn_world.pretrain_clip import demo_clip_config
    from modeling_san import SANForOpenVocabSegmentation

    torch.manual_seed(0)
    clip = CLIPModel(demo_clip_config(processor.tokenizer))
    return SANForOpenVocabSegmentation.from_clip(clip, **{**SAN_OPTIONS, "num_queries": 4, "train_num_points": 64})


def two_tone(seed: int, size: tuple[int, int] = (48, 64)) -> tuple[Image.Image, Image.Image]:
    """An image that is dark on the left and light on the right of a random column, with its label map."""
    split = int(np.random.default_rng(seed).integers(16, 48))
    labels = np.zeros(size, np.uint8)
    labels[:, split:] = 1
    image = np.where(labels[..., None] == 1, np.uint8(230), np.uint8(30)).repeat(3, axis=2)
    return Image.fromarray(image), Image.fromarray(labels)


def make_dataset(pairs, image: str = "image", label: str = "annotation") -> Dataset:
    columns = {image: [pair[0] for pair in pairs], label: [pair[1] for pair in pairs]}
    return Dataset.from_dict(columns, features=Features({image: ImageFeature(), label: ImageFeature()}))


@pytest.fixture
def parquet(tmp_path):
    path = tmp_path / "train.parquet"
    make_dataset([two_tone(seed) for seed in range(6)]).to_parquet(path)
    return path


# ---------------------------------------------------------------------------------------------------------------- IoU


def test_iou_is_what_counting_by_hand_gives():
    confusion = ConfusionMatrix(3)
    confusion.update(torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 1, 1, 255]]))
    # class 0: 1 hit of 2 predicted, 1 true -> 1 / 2; class 1: 1 hit, 1 more true -> 1 / 2; class 2 does not occur
    assert confusion.iou()[:2].tolist() == [0.5, 0.5]
    assert torch.isnan(confusion.iou()[2])
    assert confusion.mean_iou() == 0.5


def test_counting_in_parts_equals_counting_at_once():
    generator = torch.Generator().manual_seed(0)
    predicted, true = (torch.randint(0, 5, (4, 9, 7), generator=generator) for _ in range(2))
    whole, parts = ConfusionMatrix(5), ConfusionMatrix(5)
    whole.update(predicted, true)
    for one_predicted, one_true in zip(predicted, true, strict=True):
        parts.update(one_predicted, one_true)
    assert torch.equal(whole.counts, parts.counts)


@pytest.mark.parametrize(
    ("predicted", "true", "message"),
    [([[0, 1]], [[0]], "sizes must agree"), ([[0]], [[7]], "true labels"), ([[-1]], [[0]], "predicted labels")],
)
def test_labels_that_cannot_be_counted_are_named(predicted, true, message):
    with pytest.raises(ValueError, match=message):
        ConfusionMatrix(2).update(torch.tensor(predicted), torch.tensor(true))


# --------------------------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("columns", [("image", "annotation"), ("image", "label"), ("img", "semantic_segmentation")])
def test_usual_column_names_are_recognised(tmp_path, columns):
    make_dataset([two_tone(0)], *columns).to_parquet(tmp_path / "data.parquet")
    assert load_images(tmp_path / "data.parquet").column_names == ["image", "annotation"]


def test_unknown_columns_are_listed(tmp_path):
    make_dataset([two_tone(0)], "photo", "truth").to_parquet(tmp_path / "data.parquet")
    with pytest.raises(ValueError, match="photo, truth"):
        load_images(tmp_path / "data.parquet")


def test_a_folder_that_datasets_wrote_is_read(tmp_path):
    make_dataset([two_tone(0), two_tone(1)]).save_to_disk(tmp_path / "saved")
    assert len(load_images(tmp_path / "saved")) == 2


@pytest.mark.parametrize("content", [None, b"", b"no parquet"])
def test_what_is_no_data_set_is_refused_in_one_sentence(tmp_path, content):
    path = tmp_path / "data.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as a data set"):
        load_images(path)


def test_a_label_map_of_another_size_is_refused():
    image, _ = two_tone(0)
    _, labels = two_tone(0, (24, 64))
    with pytest.raises(ValueError, match="sizes must agree"):
        to_arrays({"image": image, "annotation": labels}, LabelSet(("dark", "light")))


def test_one_class_for_a_whole_image_is_no_label_map(tmp_path):
    for name in ("sky", "road"):
        (tmp_path / "images" / name).mkdir(parents=True)
        two_tone(0)[0].save(tmp_path / "images" / name / "0.png")
    with pytest.raises(ValueError, match="none of which is known to hold label maps"):
        load_images(tmp_path / "images")


def test_images_of_16_bits_are_scaled_not_clipped():
    grey = Image.fromarray(np.full((4, 6), 30000, np.uint16))
    image, _ = to_arrays({"image": grey, "annotation": np.zeros((4, 6), np.uint8)}, LabelSet(("dark",)))
    assert np.asarray(image).max() == round(30000 * 255 / 65535)


def test_encoded_images_are_turned_upright_like_their_label_maps():
    image, exif, file = Image.new("RGB", (8, 4)), Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    image.save(file, "jpeg", exif=exif)
    upright, label_map = to_arrays(
        {"image": {"bytes": file.getvalue(), "path": None}, "annotation": np.zeros((8, 4), np.uint8)},
        LabelSet(("dark",)),
    )
    assert upright.size == (4, 8)
    assert label_map.shape == (8, 4)


def test_prompts_ride_along_with_each_batch():
    batch = Collator({"input_ids": torch.ones(2, 1, 5)})([{"labels": torch.zeros(4, 4)}] * 3)
    assert batch["labels"].shape == (3, 4, 4)
    assert batch["input_ids"].shape == (2, 1, 5)


def test_the_world_is_relabelled_for_a_shorter_vocabulary(processor):
    names = [*SEEN_COMBINATIONS, *BACKGROUNDS]
    images = WorldImages(3, names, processor.image_processor, seed=5)
    for index in range(3):
        scene = draw_scene(5, index, combinations=SEEN_COMBINATIONS)
        labels = images[index]["labels"]
        expected = {CLASS_NAMES[value] for value in np.unique(scene.label_map)}
        assert {names[value] for value in labels.unique().tolist()} == expected


# ---------------------------------------- built-in model


def test_switching_the_bias_off_is_undone(small_model):
    scaling = small_model.side_adapter.mask_decoder.bias_scaling
    before = scaling.weight.clone()
    with attention_bias_off(small_model):
        assert scaling.weight.item() == 0
    assert torch.equal(scaling.weight, before)
