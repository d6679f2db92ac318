"""Pipelines: images of every kind and any words in; what comes out is what the model and the processor say."""

import base64
import copy
import http.server
import io
import json
import pickle
import re
import threading
from functools import partial

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset
from transformers.utils import logging

from drawn_world.world import CLASS_NAMES, draw_scene
from modeling_san import BUILTIN_MODEL, SANForOpenVocabSegmentation, SANForSemanticSegmentation, SANProcessor
from modeling_san.processing import (
    OpenVocabularySegmentationPipeline,
    SANImageProcessor,
    Segmenter,
    load_vocabulary,
    vocabulary_san,
)

TASK = "open-vocabulary-segmentation"
LABELS = ["sky", "road", "car|truck", "tree"]


def random_image(width=50, height=40, seed=2):
    """An image of patches, so that its regions differ."""
    patches = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize((width, height), Image.Resampling.NEAREST)


def as_map(segments, labels):
    """The masks of one image as a map of positions in `labels`; -1 where there is none."""
    width, height = segments[0]["mask"].size
    label_map = np.full((height, width), -1)
    for segment in segments:
        label_map[np.array(segment["mask"]) == 255] = labels.index(segment["label"])
    return label_map


def assert_same(segments, others):
    assert [segment["label"] for segment in segments] == [other["label"] for other in others]
    for segment, other in zip(segments, others, strict=True):
        assert np.array_equal(np.array(segment["mask"]), np.array(other["mask"]))
        assert segment["score"] == pytest.approx(other["score"], abs=1e-5)


def assert_partition(segments):
    """Masks of 0 and 255 that share no pixel, cover the image, and hold a pixel each."""
    masks = np.stack([np.array(segment["mask"]) for segment in segments])
    assert set(np.unique(masks)) <= {0, 255}
    assert ((masks == 255).sum(axis=0) == 1).all()
    assert (masks == 255).any(axis=(1, 2)).all()


@pytest.fixture(scope="session")
def processor(tokenizer):
    image_processor = SANImageProcessor(size={"shortest_edge": 64, "longest_edge": 256})
    return SANProcessor(image_processor, tokenizer, templates=["a photo of a {}.", "{}"])


@pytest.fixture
def model(make_model):
    """One that finds several labels in an image of patches."""
    return make_model(seed=3, logit_scale_init_value=1.0)


@pytest.fixture
def pipe(model, processor):
    return pipeline(TASK, model=model, processor=processor, device="cpu")


@pytest.fixture
def text_calls(model):
    """One entry for each time that the text encoder runs."""
    calls = []
    model.text_projection.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.fixture
def model_calls(model):
    """How many images ran together, each time the model was called."""
    calls = []

    def count(_module, _args, kwargs):
        calls.append(len(kwargs["pixel_values"]))

    model.register_forward_pre_hook(count, with_kwargs=True)
    return calls


@pytest.fixture
def directly(model, processor):
    """Segments an image without the pipeline."""

    def segment(image, labels, **options):
        segmenter = Segmenter(model, processor)
        [segmentation] = segmenter(image, segmenter.vocabulary(labels), **options)
        return segmentation

    return segment


@pytest.fixture(scope="module")
def builtin():
    return pipeline(TASK, model=str(BUILTIN_MODEL), device="cpu")


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves the files of `tmp_path`; the address without the file's name."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


# What comes out


def test_masks_and_scores_are_those_of_the_segmenter(pipe, directly):
    segmentations = (directly(random_image(seed=seed), LABELS) for seed in range(50))
    seed, found = next((seed, each) for seed, each in enumerate(segmentations) if len(each.segments()) > 1)
    segments = pipe(random_image(seed=seed), LABELS)
    assert np.array_equal(as_map(segments, LABELS), found.label_map)
    expected = {segment.label: segment.score for segment in found.segments()}
    assert {segment["label"]: segment["score"] for segment in segments} == pytest.approx(expected)


def test_masks_are_grey_images_of_the_images_size_that_share_no_pixel_and_cover_it(pipe):
    segments = pipe(random_image(61, 37), LABELS)
    assert {(segment["mask"].mode, segment["mask"].size) for segment in segments} == {("L", (61, 37))}
    assert_partition(segments)


def test_labels_come_back_as_they_were_given_and_in_their_order(pipe):
    given = ["  Sky ", "ROAD", "Car|Truck", "tree"]
    segments = pipe(random_image(), given)
    found = [segment["label"] for segment in segments]
    assert found == [label for label in given if label in found]
    assert_same(
        [{**segment, "label": segment["label"].strip().lower()} for segment in segments],
        pipe(random_image(), LABELS),
    )


def test_templates_of_a_call_are_used_for_the_labels(pipe):
    image = random_image()
    templated = pipe(image, ["sky", "road"], templates=["a red {}"])
    written_out = pipe(image, ["a red sky", "a red road"], templates=["{}"])
    assert_same([{**segment, "label": f"a red {segment['label']}"} for segment in templated], written_out)


def test_images_are_turned_upright(pipe, tmp_path):
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    random_image(60, 30).save(path, exif=exif, quality=100, subsampling=0)
    segments = pipe(str(path), LABELS)
    assert segments[0]["mask"].size == (30, 60)
    assert_same(segments, pipe(np.array(Image.open(path).rotate(-90, expand=True)), LABELS))


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (90, 1)])
def test_smallest_and_thinnest_images_work(pipe, size):
    segments = pipe(random_image(*size), LABELS)
    assert segments[0]["mask"].size == size
    assert_partition(segments)


# What goes in


def test_every_kind_of_image_gives_the_same(pipe, tmp_path, server):
    image = random_image()
    image.save(tmp_path / "a.png")
    pixels = np.array(image)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    kinds = {
        "path": str(tmp_path / "a.png"),
        "path object": tmp_path / "a.png",
        "address": f"{server}/a.png",
        "data": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode(),
        "array": pixels,
        "tensor": torch.from_numpy(pixels).permute(2, 0, 1),
        "palette": image.convert("RGBA"),
    }
    expected = pipe(image, LABELS)
    for kind, image in kinds.items():
        segments = pipe(image, LABELS)
        assert np.array_equal(as_map(segments, LABELS), as_map(expected, LABELS)), kind
    # Resized without rounding to bytes in between
    floats = pipe(pixels.astype(np.float32) / 255, LABELS)
    assert (as_map(floats, LABELS) == as_map(expected, LABELS)).mean() > 0.95


def test_lists_tuples_and_batches_of_arrays_give_a_list_for_each_image(pipe):
    images = [random_image(seed=seed) for seed in range(3)]
    expected = [pipe(image, LABELS) for image in images]
    arrays = np.stack([np.array(image) for image in images])
    for given in (images, tuple(images), arrays, torch.from_numpy(arrays), images[:1]):
        results = pipe(given, LABELS)
        assert isinstance(results, list)
        for result, other in zip(results, expected[: len(given)], strict=True):
            assert_same(result, other)


def test_a_generator_gives_a_generator_that_reads_as_it_goes(pipe):
    read = []

    def images():
        for seed in range(50):
            read.append(seed)
            yield random_image(seed=seed)

    results = pipe(images(), LABELS)
    assert_same(next(results), pipe(random_image(seed=0), LABELS))
    assert_same(next(results), pipe(random_image(seed=1), LABELS))
    assert len(read) <= 3
    assert list(pipe(iter([]), LABELS)) == []
    assert len(list(pipe(map(np.array, [random_image()] * 3), LABELS, batch_size=2))) == 3


def test_columns_of_data_sets_give_what_their_images_give(pipe, tmp_path):
    images = [random_image(40 + 30 * seed, seed=seed) for seed in range(3)]
    expected = [pipe(image, LABELS) for image in images]
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index}.png")
    rows = {"image": [str(tmp_path / f"{index}.png") for index in range(3)]}
    data = datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image()}))
    for column in (data["image"], KeyDataset(data, "image"), data.to_iterable_dataset()["image"]):
        for result, other in zip(pipe(column, LABELS, batch_size=2), expected, strict=True):
            assert_same(result, other)


def test_images_of_many_sizes_give_in_a_batch_what_they_give_alone(pipe, model_calls):
    sizes = [(50, 40), (50, 40), (40, 90), (33, 33), (50, 40), (200, 30), (50, 40)]
    images = [random_image(*size, seed=seed) for seed, size in enumerate(sizes)]
    alone = [pipe(image, LABELS) for image in images]
    for batch_size in (2, 4, 16):
        model_calls.clear()
        for result, other in zip(pipe(images, LABELS, batch_size=batch_size), alone, strict=True):
            assert_same(result, other)
    # Those that are padded to one size run together
    assert sorted(model_calls) == [1, 1, 1, 4]


def test_worker_processes_change_nothing(pipe):
    images = [random_image(40 + 10 * seed, seed=seed) for seed in range(3)]
    results = pipe(images, LABELS, num_workers=1, batch_size=2)
    for result, image in zip(results, images, strict=True):
        assert_same(result, pipe(image, LABELS))


def test_half_precision_gives_nearly_the_same(pipe, processor):
    halved = pipeline(TASK, model=copy.deepcopy(pipe.model).to(torch.bfloat16), processor=processor, device="cpu")
    assert halved.dtype == torch.bfloat16
    image = random_image()
    same = as_map(pipe(image, LABELS), LABELS) == as_map(halved(image, LABELS), LABELS)
    assert same.mean() > 0.8


# Threshold and other label


def test_pixels_below_the_threshold_become_other(pipe, directly):
    image = random_image()
    threshold = float(directly(image, LABELS).scores.median())
    segments = pipe(image, LABELS, threshold=threshold)
    expected = directly(image, LABELS, threshold=threshold)
    assert np.array_equal(as_map(segments, [*LABELS, "other"]), expected.label_map)
    assert segments[-1]["label"] == "other"
    assert_partition(segments)
    assert "other" not in [segment["label"] for segment in pipe(image, LABELS)]


def test_the_other_label_can_be_called_anything(pipe):
    [segment] = pipe(random_image(), LABELS, threshold=1, other_label="nothing I know")
    assert segment["label"] == "nothing I know"


def test_pixels_that_a_common_name_wins_become_other(builtin):
    scene = draw_scene(424_243, 3, backgrounds=["grass"])
    coco = load_vocabulary("coco_stuff_171")
    # "grass" is a name of COCO-Stuff itself, and competes as the label that it is
    labels, template = ["purple checkered", "grass"], ["a photo of {}"]
    added = [name for name, thing in zip(coco.classes, coco.is_thing, strict=True) if not thing and name != "grass"]
    with torch.no_grad():
        outputs = builtin.model(**builtin.processor(images=scene.image, text=labels + added, templates=template))
    [label_map] = builtin.processor.post_process_semantic_segmentation(outputs, target_sizes=[scene.label_map.shape])
    assert 0 < (label_map >= len(labels)).float().mean() < 1, "nothing to see here"
    segments = builtin(scene.image, labels, extend_labels="coco-stuff", other_label="rest", templates=template)
    assert segments[-1]["label"] == "rest"
    assert np.array_equal(as_map(segments, [*labels, "rest"]), label_map.clamp(max=len(labels)).numpy())


def test_common_names_without_their_files_are_one_clear_line(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(vocabulary_san, "_FOLDER", tmp_path)
    load_vocabulary.cache_clear()
    with pytest.raises(ValueError, match="not installed") as caught:
        pipe(random_image(), LABELS, extend_labels="coco-all")
    assert "\n" not in str(caught.value)
    pipe(random_image(), LABELS, extend_labels="none")


# Text work


def test_labels_are_encoded_once_for_a_call_and_not_again_for_the_next(pipe, text_calls):
    images = [random_image(40 + seed, seed=seed) for seed in range(4)]
    first = pipe(images, LABELS, batch_size=2)
    assert len(text_calls) == 1
    for result, other in zip(pipe(images, ", ".join(LABELS)), first, strict=True):
        assert_same(result, other)
    list(pipe((image for image in images), [label.upper() for label in LABELS]))
    assert len(text_calls) == 1


def test_copies_of_a_pipeline_work(pipe):
    image = random_image()
    expected = pipe(image, LABELS)
    for other in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert_same(other(image, LABELS), expected)


# Labels and options that hold for all calls


def test_stored_labels_are_used_without_any_text_work(pipe, model, processor, text_calls):
    image = random_image()
    expected = pipe(image, LABELS)
    model.set_labels(LABELS, processor)
    count = len(text_calls)
    assert_same(pipe(image), expected)
    assert len(text_calls) == count
    assert_same(pipe(image, templates=["{}"]), pipe(image, LABELS, templates=["{}"]))


def test_options_given_with_the_pipeline_hold_until_a_call_says_otherwise(model, processor):
    image = random_image()
    options = {"candidate_labels": iter(LABELS), "threshold": 1.0, "other_label": "x", "templates": None}
    pipe = pipeline(TASK, model=model, processor=processor, **options)
    assert [segment["label"] for segment in pipe(image)] == ["x"]
    assert [segment["label"] for segment in pipe(image, other_label="y")] == ["y"]
    assert_same(
        pipe(image, threshold=0), OpenVocabularySegmentationPipeline(model, processor=processor)(image, LABELS)
    )
    assert {segment["label"] for segment in pipe(image, ["sky"], threshold=0)} == {"sky"}


def test_a_misspelled_option_is_refused(pipe):
    with pytest.raises(TypeError, match="treshold"):
        pipe(random_image(), LABELS, treshold=0.5)


# What cannot be used


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (None, "images is None"),
        ([], "images is empty"),
        (np.zeros((0, 8, 8, 3), np.uint8), "images is empty"),
        ("there-is-no-such.png", "there is no file 'there-is-no-such.png'"),
        (__file__, "cannot be opened as an image"),
        (7, "the image is a int"),
        (b"bytes", "the image is a bytes"),
        ([random_image(), "nowhere.png"], "image 1: there is no file 'nowhere.png'"),
        ([random_image(), object()], "image 1 is a object"),
        ([[random_image()]], "image 0 is a list"),
        ({"image": random_image()}, "column"),
        ([{"image": random_image()}], "column"),
        (io.BytesIO(b"x"), "an open file"),
        (np.zeros((9, 9, 7)), "7 channels"),
        (np.zeros(4), "shape 4"),
        (np.full((4, 4, 3), np.nan), "NaN"),
        (np.full((4, 4, 3), 300.0), "from 300 to 300"),
        ("data:image/png;base64,AAAA", "an address with data gave no image"),
    ],
)
def test_what_is_no_image_is_one_clear_line(pipe, images, message):
    with pytest.raises(ValueError, match=message) as caught:
        pipe(images, LABELS)
    assert "\n" not in str(caught.value)


def test_a_bad_image_in_a_stream_is_named(pipe):
    results = pipe((image for image in [random_image(), "nowhere.png"]), LABELS)
    next(results)
    with pytest.raises(ValueError, match=r"^image 1: there is no file .nowhere\.png."):
        next(results)


def test_an_address_without_an_image_is_one_clear_line_that_shows_no_secret(pipe, tmp_path, server):
    (tmp_path / "page.html").write_text("<html>no image</html>")
    unused = server.rpartition(":")[0] + ":9"
    for address in (f"{server}/page.html", f"{server}/missing.png", f"{unused}/a.png", "http://"):
        host = address.partition("://")[2]
        with pytest.raises(ValueError, match="gave no image") as caught:
            pipe(f"http://user:hush@{host}?signature=hush#hush", LABELS, timeout=5)
        message = str(caught.value)
        assert "\n" not in message
        assert "hush" not in message
        assert host in message
        assert caught.value.__cause__ is None
        assert caught.value.__context__ is None


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "set_labels"),
        ([], "no labels"),
        ("  ", "label 0"),
        (["sky", ""], "label 1"),
        (["sky", "car|"], "car|"),
        (["sky", " SKY"], "'sky'"),
        (["car|truck", "truck"], "'truck'"),
        (["sky", 3], "label 1 is 3"),
        ([["sky"], ["road"]], "label 0"),
        ({0: "sky"}, "dict"),
        (7, "int"),
        ('"sky', "double quotes"),
        (["road " * 40], "road road"),
        ((f"label {index}" for index in range(10**9)), "50000"),
    ],
)
def test_labels_that_cannot_be_used_are_one_clear_line(pipe, labels, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        pipe(random_image(), labels)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        *[("threshold", value, repr(value)) for value in (-0.1, 50, float("nan"), "0.5", True, [0.5])],
        *[("other_label", value, repr(value)) for value in ("", "  ", 3)],
        ("extend_labels", "coco", "'coco'"),
        ("extend_labels", [], "[]"),
        ("templates", "nobody", "'nobody'"),
        ("templates", [], "template"),
        ("templates", ["a photo"], "'a photo'"),
    ],
)
def test_options_out_of_range_are_one_clear_line(pipe, name, value, shown):
    with pytest.raises(ValueError, match=re.escape(shown)) as caught:
        pipe(random_image(), LABELS, **{name: value})
    assert "\n" not in str(caught.value)


def test_a_pipeline_without_its_parts_is_refused(model, processor):
    with pytest.raises(ValueError, match="processor is a NoneType"):
        OpenVocabularySegmentationPipeline(model=model)
    with pytest.raises(ValueError, match="model is a CLIPVisionModel"):
        OpenVocabularySegmentationPipeline(model=model.vision_model, processor=processor)


# Saving and loading


@pytest.fixture
def saved(pipe, model, processor, tmp_path):
    """A folder with labels, written by the pipeline."""
    model.set_labels(LABELS, processor)
    pipe.save_pretrained(tmp_path / "saved")
    return str(tmp_path / "saved")


def test_a_saved_pipeline_loads_with_its_templates_and_gives_the_same(pipe, saved, tmp_path):
    pipeline(TASK, model=saved, device="cpu").save_pretrained(tmp_path / "again")
    loaded = pipeline(TASK, model=str(tmp_path / "again"), device="cpu")
    assert type(loaded) is OpenVocabularySegmentationPipeline
    assert loaded.processor.templates == ["a photo of a {}.", "{}"]
    assert_same(loaded(random_image(), LABELS[::-1]), pipe(random_image(), LABELS[::-1]))
    assert_same(loaded(random_image()), pipe(random_image()))
    halved = pipeline(TASK, model=saved, device="cpu", dtype=torch.bfloat16)
    assert halved.model.dtype == torch.bfloat16
    assert_partition(halved(random_image(), LABELS))


def test_a_saved_folder_names_the_pipeline_and_carries_its_code(saved, tmp_path):
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    module, _, name = config["custom_pipelines"][TASK]["impl"].partition(".")
    assert name == OpenVocabularySegmentationPipeline.__name__
    assert (tmp_path / "saved" / f"{module}.py").is_file()
    # The image processor's options have one home
    assert not (tmp_path / "saved" / "preprocessor_config.json").exists()


def test_saving_to_a_file_is_refused(pipe, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file: pass a folder"):
        pipe.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


# The stock pipeline for image segmentation


@pytest.fixture
def errors(monkeypatch):
    """What transformers' pipelines log as errors."""
    logged = []
    monkeypatch.setattr(logging.get_logger("transformers.pipelines.base"), "error", lambda *args: logged.append(args))
    return logged


def test_the_stock_pipeline_finds_the_same_regions_with_the_stored_labels(pipe, saved, errors):
    stock = pipeline("image-segmentation", model=saved, device="cpu")
    assert type(stock.model) is SANForSemanticSegmentation
    image = random_image(61, 37)
    segments, ours = stock(image), pipe(image, LABELS)
    assert [segment["label"] for segment in segments] == [segment["label"] for segment in ours]
    assert np.array_equal(as_map(segments, LABELS), as_map(ours, LABELS))
    # As for every model for semantic segmentation
    assert {segment["score"] for segment in segments} == {None}
    assert errors == []
    # The model of the one in the other
    assert_same(pipeline(TASK, model=stock.model, processor=pipe.processor, device="cpu")(image), ours)


def test_the_stock_pipeline_gives_in_a_batch_what_it_gives_alone(saved):
    stock = pipeline("image-segmentation", model=saved, device="cpu")
    images = [random_image(seed=seed) for seed in range(len(LABELS) + 3)]
    batched = stock(images, batch_size=len(images))
    for segments, image in zip(batched, images, strict=True):
        alone = stock(image)
        assert [segment["label"] for segment in segments] == [segment["label"] for segment in alone]
        assert np.array_equal(as_map(segments, LABELS), as_map(alone, LABELS))


def test_the_built_in_model_names_what_was_drawn(builtin):
    scenes = [draw_scene(424_243, index) for index in range(8)]
    results = builtin([scene.image for scene in scenes], CLASS_NAMES, batch_size=8)
    right = [as_map(found, CLASS_NAMES) == scene.label_map for found, scene in zip(results, scenes, strict=True)]
    assert np.mean(right) > 0.7
    assert isinstance(builtin.model, SANForOpenVocabSegmentation)
