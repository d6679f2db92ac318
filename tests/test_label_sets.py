"""Label maps in every form that data sets keep them in, and the names that belong to them."""

import io
import json
import re

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from modeling_san.commands.datasets import open_dataset
from modeling_san.commands.main import make_parser
from modeling_san.processing import load_vocabulary
from modeling_san.training.label_sets import LabelSet, load_label_set, parse_map
from modeling_san.training.sources import load_images

NAMES = ("sky", "road", "tree")
STORED = np.array([[0, 1, 2], [255, 2, 0]], dtype=np.uint8)
COLORS = ((10, 20, 30), (0, 0, 255), (255, 0, 0))


def reopened(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "png")
    return Image.open(file)


def palette_image(values: np.ndarray) -> Image.Image:
    indexed = Image.new("P", values.shape[::-1])
    indexed.putdata(values.ravel().tolist())
    # Colours that say nothing about the indices
    indexed.putpalette(np.random.default_rng(0).integers(0, 256, 768).astype(np.uint8).tobytes())
    return indexed


def colored(values: np.ndarray) -> np.ndarray:
    table = np.zeros((256, 3), np.uint8)
    table[:3], table[255] = COLORS, (9, 9, 9)
    return table[values]


@pytest.mark.parametrize(
    "image",
    [
        STORED,
        STORED.astype(np.int64),
        Image.fromarray(STORED),
        *(reopened(Image.fromarray(STORED.astype(dtype))) for dtype in (np.uint8, np.uint16)),
        Image.fromarray(STORED.astype(np.int32)),
        reopened(palette_image(STORED)),
    ],
    ids=["bytes", "integers", "grey", "8 bits", "16 bits", "32 bits", "palette"],
)
def test_a_label_map_means_the_same_in_every_form(image):
    label_map = LabelSet(NAMES).read(image)
    assert label_map.dtype == np.int32
    assert label_map.tolist() == STORED.tolist()


def test_other_ways_to_store_labels(tmp_path):
    image = reopened(Image.fromarray(np.array([[True, False]])))
    assert image.mode == "1"
    assert LabelSet(NAMES).read(image).tolist() == [[1, 0]]
    Image.fromarray(STORED).save(tmp_path / "map.png")
    assert LabelSet(NAMES).read(tmp_path / "map.png").tolist() == STORED.tolist()
    # Classes from 1 on, and no label at 0
    stored = np.array([[0, 1, 3, 255]])
    assert LabelSet(NAMES, reduce_labels=True).read(stored).tolist() == [[255, 0, 2, 255]]


@pytest.mark.parametrize(
    ("given", "stored", "read"),
    [
        ({"value_map": {255: 1}, "ignore_index": 254}, [0, 255, 254], [0, 1, 254]),
        ({"value_map": {0: 1, 1: 0}}, [0, 1, 255], [1, 0, 255]),
        ({"value_map": {7: 255}}, [0, 7, 2], [0, 255, 2]),
        ({"ignore_index": -100}, [-100, 2, 0], [255, 2, 0]),
        ({"ignore_index": -1, "reduce_labels": True}, [-1, 0, 3], [255, 255, 2]),
    ],
)
def test_values_stand_for_others_where_that_is_said(tmp_path, given, stored, read):
    assert load_label_set(NAMES, **given).read(np.array([stored])).tolist() == [read]
    file = tmp_path / "classes.json"
    renamed = {"map" if name == "value_map" else name: value for name, value in given.items()}
    file.write_text(json.dumps({"classes": NAMES, **renamed}))
    assert load_label_set(file).read(np.array([stored])).tolist() == [read]


def test_values_are_given_as_on_the_command_line():
    assert parse_map(["255=1", " -1 = 0"]) == {255: 1, -1: 0}
    for wrong in (["255"], ["a=b"], ["1=-1"], ["1=2", "1=3"], ["=1"], ["123456=1"]):
        with pytest.raises(ValueError, match="write OLD=NEW"):
            parse_map(wrong)


def test_847_classes_and_65535_for_no_label_are_read():
    stored = np.array([[0, 300, 846, 65535]], np.uint16)
    label_set = load_label_set("ade20k_847")
    assert label_set.ignore_index == 65535
    assert label_set.read(reopened(Image.fromarray(stored))).tolist() == stored.tolist()


def test_colours_stand_for_classes():
    label_set = LabelSet(NAMES, colors=COLORS, ignore_color=(9, 9, 9))
    assert label_set.read(reopened(Image.fromarray(colored(STORED)))).tolist() == STORED.tolist()
    # A palette is another way to store the same colours
    quantised = Image.fromarray(colored(STORED)).convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
    assert np.array_equal(np.asarray(quantised.convert("RGB")), colored(STORED))
    assert label_set.read(quantised).tolist() == STORED.tolist()


@pytest.mark.parametrize(
    ("stored", "options", "facts"),
    [
        ([[3, 3, 0]], {}, ["3 on 2 pixels", "0 to 2", "255 = no label", "reduce the labels"]),
        ([[4]], {"reduce_labels": True}, ["4 on 1 pixel,", "1 to 3", "0 and 255 = no label"]),
        ([[255]], {"ignore_index": 65535}, ["255 on 1 pixel,"]),
        ([list(range(3, 12))], {}, ["and 4 more"]),
        ([[-1]], {}, ["-1"]),
        ([[70000]], {}, ["70000"]),
        ([[0.0, 1.0]], {}, ["floats"]),
        (colored(STORED), {"colors": COLORS}, ["(9, 9, 9) on 1 pixel:"]),
        (Image.fromarray(colored(STORED)), {}, ["colours", "`colors`"]),
        (Image.new("LA", (4, 3)), {}, ["transparent"]),
        (Image.new("F", (4, 3)), {}, ["floats"]),
    ],
)
def test_what_stands_for_no_class_is_named(stored, options, facts):
    with pytest.raises(ValueError, match=".*".join(map(re.escape, facts))):
        LabelSet(NAMES, **options).read(np.array(stored) if isinstance(stored, list) else stored)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("classes.json", '["Sky", "road", "tree"]'),
        ("classes.json", '{"classes": ["sky", "road", "tree"]}'),
        ("id2label.json", '{"2": "tree", "0": "sky", "1": "road"}'),
        ("classes.txt", "sky\n\nroad\ntree\n"),
    ],
)
def test_names_come_from_a_file(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert load_label_set(tmp_path / name) == LabelSet(NAMES)


def test_a_file_says_how_label_maps_are_stored(tmp_path):
    expected = LabelSet(NAMES, ignore_index=65535, colors=COLORS, ignore_color=(9, 9, 9))
    for colors in (COLORS, ["#0a141e", "#0000FF", [255, 0, 0]]):
        data = {"classes": NAMES, "ignore_index": 65535, "colors": colors, "ignore_color": "#090909"}
        (tmp_path / "classes.json").write_text(json.dumps(data))
        assert load_label_set(str(tmp_path / "classes.json")) == expected
    (tmp_path / "classes.json").write_text(json.dumps({"classes": NAMES, "reduce_labels": True}))
    assert load_label_set(tmp_path / "classes.json", ignore_index=254) == LabelSet(NAMES, 254, reduce_labels=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"0": "sky", "2": "road"}', "none of index 1"),
        ('{"0": "sky", "one": "road"}', "keys '0', 'one'"),
        ("{}", "keys none"),
        ('{"classes": "sky"}', "single value 'sky'"),
        ("[" * 100_000, "not valid JSON"),
        ({"ignore_index": "255"}, "`ignore_index` is '255'"),
        ({"ignore_index": True}, "`ignore_index` is True"),
        ({"ignore_index": 2}, "ignore_index is 2"),
        ({"map": {"255": "one"}}, "'one'"),
        ({"map": {"255": 1}, "colors": COLORS}, "mapped"),
        ({"map": [255]}, "`map` is"),
        ({"ignore_index": 65536}, "at most 65535"),
        ({"reduce_labels": 1}, "`reduce_labels` is 1"),
        ({"reduce_labels": True, "colors": COLORS}, "do not reduce"),
        ({"colors": [[1, 2]]}, r"\[1, 2\]"),
        ({"colors": [[1, 2, 256]]}, "256"),
        ({"colors": ["grey"]}, "'grey'"),
        ({"colors": ["#12345g"]}, "'#12345g'"),
        ({"colors": "#808080"}, "#808080"),
        ({"colors": []}, "0 colours for 3 classes"),
        ({"colors": [*COLORS[:2], COLORS[0]]}, "stands for two classes"),
        ({"ignore_color": (0, 0, 0)}, "without colors"),
    ],
)
def test_files_that_say_something_else_or_contradict_themselves_are_refused(tmp_path, content, message):
    text = content if isinstance(content, str) else json.dumps({"classes": NAMES, **content})
    (tmp_path / "classes.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_label_set(tmp_path / "classes.json")


def test_what_stands_for_no_label_is_given_or_follows_from_the_number_of_classes():
    assert load_label_set(LabelSet(NAMES), ignore_index=9, reduce_labels=True) == LabelSet(NAMES, 9, True)
    assert load_label_set("coco_stuff_171") == LabelSet(load_vocabulary("coco_stuff_171").classes, 255)
    for count, ignored in ((255, 255), (256, 65535)):
        assert load_label_set([f"class {number}" for number in range(count)]).ignore_index == ignored


def test_what_is_neither_preset_nor_file_nor_name_is_refused():
    with pytest.raises(ValueError, match="no class names"):
        LabelSet(())
    with pytest.raises(ValueError, match=r"neither a label set \(ade20k_150.* nor a file"):
        load_label_set("ade20k")


@pytest.mark.parametrize("option", ["--labels=sky, Road, tree", "--labels=classes.json", "--labels-file=classes.json"])
def test_commands_take_the_labels_of_a_data_set_as_names_or_from_a_file(tmp_path, monkeypatch, option):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "classes.json").write_text(json.dumps(NAMES))
    image = Image.new("L", (4, 4))
    Dataset.from_dict({"image": [image], "annotation": [image]}).to_parquet("data.parquet")
    arguments = ["contact-sheet", "--dataset", "data.parquet", "--ignore-index", "9", option]
    images, label_set = open_dataset(make_parser(["contact-sheet"]).parse_args(arguments))
    assert label_set == LabelSet(NAMES, 9)
    assert images.column_names == ["image", "annotation"]


@pytest.mark.parametrize("streaming", [False, True])
def test_names_come_from_class_features_of_the_label_maps_or_beside_them(tmp_path, streaming):
    classes = ClassLabel(names=list(NAMES))
    image = Image.new("RGB", (2, 2))
    beside = {"image": ImageFeature(), "annotation": ImageFeature(), "classes": List(classes)}
    rows = {"image": [image], "annotation": [image.convert("L")], "classes": [[0]]}
    Dataset.from_dict(rows, features=Features(beside)).to_parquet(tmp_path / "beside.parquet")
    images = load_images(tmp_path / "beside.parquet", streaming=streaming)
    assert load_label_set(None, dataset=images) == LabelSet(NAMES)

    themselves = {"image": ImageFeature(), "label": List(List(classes)), "scene": Value("string")}
    rows = {"image": [image], "label": [[[0, 1], [2, 2]]], "scene": ["town"]}
    Dataset.from_dict(rows, features=Features(themselves)).to_parquet(tmp_path / "themselves.parquet")
    images = load_images(tmp_path / "themselves.parquet", streaming=streaming)
    label_set = load_label_set(None, dataset=images)
    assert label_set.names == NAMES
    assert label_set.read(np.asarray(next(iter(images))["annotation"])).tolist() == [[0, 1], [2, 2]]


def test_names_come_from_id2label_in_the_folder(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "id2label.json").write_text('{"0": "sky", "1": "road", "2": "tree"}')
    assert load_label_set(None, source=tmp_path).names == NAMES
    assert load_label_set(None, source=tmp_path / "data").names == NAMES
