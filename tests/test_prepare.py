"""Official benchmark folders become parquet files: pixel for pixel, complete, and whatever interrupts it."""

import io
import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from PIL import Image, ImageOps
from scipy.io import savemat

from modeling_san.commands.main import main
from modeling_san.processing.files import locked_folder
from modeling_san.processing.vocabulary_san import load_vocabulary, vocabulary_names
from modeling_san.training import prepare as prepare_module
from modeling_san.training.data import load_images
from modeling_san.training.label_sets import load_label_set
from modeling_san.training.official_files import make_reader
from modeling_san.training.prepare import prepare
from modeling_san.training.presets import load_preset

# Of VOC's palette: what it looks like does not matter, that there is one does.
PALETTE = [value for index in range(256) for value in (index, 255 - index, 7 * index % 256)]


def save_image(path, size=(5, 1), seed=0):
    """An image of `size`, width first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format="JPEG")
    return path.read_bytes()


def save_map(path, values, palette=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.array(values, dtype=np.uint8))
    if palette:
        image.putpalette(PALETTE)
    image.save(path)


def make_ade(root, numbers=range(3), split="training", size=(5, 1)):
    """An ADE20K-150 folder whose image `n` is labelled with class n + 1 all over."""
    for number in numbers:
        name = f"ADE_{'train' if split == 'training' else 'val'}_{number:08d}"
        save_image(root / "images" / split / f"{name}.jpg", size, seed=number)
        save_map(root / "annotations" / split / f"{name}.png", np.full(size[::-1], number + 1))
    return root


def run(preset, source, output, split="train", **options):
    """Prepare a folder that is far from complete."""
    options = {"allow_incomplete": True, "progress": False, "warn": lambda message: None, **options}
    return prepare(preset, source, output, split=split, **options)


def warnings_of(*arguments, **options):
    """What `run` warns of."""
    said = []
    run(*arguments, **options, warn=said.append)
    return said


def label_maps(output, split="train"):
    """Label maps by the names of their images, in the order of the shards."""
    maps = {}
    for path in sorted(output.glob(f"{split}-*.parquet")):
        for row in pq.read_table(path).to_pylist():
            with Image.open(io.BytesIO(row["annotation"]["bytes"])) as image:
                assert image.format == "PNG"
                assert row["image"]["path"] not in maps
                maps[row["image"]["path"]] = np.asarray(image)
    return maps


def only_map(output, split="train"):
    [values] = label_maps(output, split).values()
    return values


# ------------------------------------------------------------------------------------------------- what values become


def write_image_and_map(source, image, label_map, values, lists=None):
    """One image and its label map in an official layout, by the paths that the archives give them."""
    save_image(source / image, (len(values[0]), len(values)))
    path = source / label_map
    if path.suffix == ".mat":
        path.parent.mkdir(parents=True, exist_ok=True)
        savemat(path, {"LabelMap": np.array(values, dtype=np.uint16)})
    else:
        save_map(path, values, palette="VOC2012" in label_map)
    for name, text in (lists or {}).items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)


COCO_VALUES = [[0, 12, 91, 181, 255]], [[0, 11, 80, 170, 255]], ["person", "stop sign", "banner", "wood"]
# wall (2978 = 11 * 256 + 162) twice, building (312), airplane (14), adding machine (3148), none, and the first and the
# last (3688) of the full list, which are none of the 847
ADE_COLORS = [
    [(110, 162, 9), (119, 162, 0), (10, 56, 0), (0, 14, 0), (120, 76, 1), (0, 0, 0), (0, 1, 3), (140, 104, 0)]
]
ADE_NAMES = ["wall", "wall", "building, edifice", "airplane, aeroplane, plane", "adding machine, totalizer, totaliser"]
CONTEXT, VOC = "JPEGImages/2008_000002.jpg", "VOCdevkit/VOC2012/"
CONTEXT_LIST = {"ImageSets/SegmentationContext/train.txt": "2008_000002\n\n"}
CONTEXT_459 = [[0, 1, 397, 459]], [[65535, 0, 396, 458]], ["accordion", "table", "wool"]

CASES = {
    # preset, image, label map, lists; stored values, class indices, names of those that are classes
    "coco": ("coco_stuff_171", "train2017/9.jpg", "stuffthingmaps/train2017/9.png", {}, *COCO_VALUES),
    "coco in images": ("coco_stuff_171", "images/train2017/9.jpg", "annotations/train2017/9.png", {}, *COCO_VALUES),
    "coco apart": ("coco_stuff_171", "images/train2017/9.jpg", "train2017/9.png", {}, *COCO_VALUES),
    "coco together": ("coco_stuff_171", "train2017/9.jpg", "train2017/9.png", {}, *COCO_VALUES),
    "coco below": ("coco_stuff_171", "coco/train2017/9.jpg", "coco/stuffthingmaps/train2017/9.png", {}, *COCO_VALUES),
    "ade 150": (
        "ade20k_150", "images/training/1.jpg", "annotations/training/1.png", {},
        [[0, 1, 2], [150, 150, 0]], [[255, 0, 1], [149, 149, 255]], ["wall", "building", "flag", "flag"],
    ),
    "ade 150 below": (
        "ade20k_150", "ADEChallengeData2016/images/training/1.jpg", "ADEChallengeData2016/annotations/training/1.png",
        {}, [[0, 1]], [[255, 0]], ["wall"],
    ),
    "ade 847": (
        "ade20k_847", "images/ADE/training/urban/street/1.jpg", "images/ADE/training/urban/street/1_seg.png", {},
        ADE_COLORS, [[0, 0, 1, 94, 846, 65535, 65535, 65535]], ADE_NAMES,
    ),
    "ade 847 without any class": (
        "ade20k_847", "images/ADE/training/a/1.jpg", "images/ADE/training/a/1_seg.png", {},
        [[(0, 0, 0), (0, 0, 0)]], [[65535, 65535]], [],
    ),
    "context 459": ("pascal_context_459", CONTEXT, "trainval/2008_000002.mat", CONTEXT_LIST, *CONTEXT_459),
    "context 459 below": (
        "pascal_context_459", f"VOC2010/{CONTEXT}", "VOC2010/trainval/2008_000002.mat",
        {"VOC2010/pascalcontext_train.txt": "JPEGImages/2008_000002.jpg GroundTruth_trainval_png/2008_000002.png\n"},
        *CONTEXT_459,
    ),
    "context 459 with another list": (
        "pascal_context_459", f"VOCdevkit/VOC2010/{CONTEXT}", "VOCdevkit/VOC2010/trainval/2008_000002.mat",
        {"VOCdevkit/VOC2010/pascal_context_train.txt": "2008_000002"}, *CONTEXT_459,
    ),
    # The 459 ids by name: accordion is none of the 59, and a diningtable is called table
    "context 59 of 459": (
        "pascal_context_59", CONTEXT, "trainval/2008_000002.mat", {"ImageSets/Main/train.txt": "2008_000002"},
        [[0, 1, 2, 9, 397, 427, 458]], [[255, 255, 0, 1, 49, 54, 58]],
        ["aeroplane", "bag", "diningtable", "tvmonitor", "wood"],
    ),
    "context 59 counted alphabetically": (
        "pascal_context_59", CONTEXT, "SegmentationClassContext/2008_000002.png", CONTEXT_LIST,
        [[0, 1, 2, 50, 59]], [[255, 0, 1, 49, 58]], ["aeroplane", "bag", "diningtable", "wood"],
    ),
    "context 59 counted officially": (
        "pascal_context_59", CONTEXT, "59_context_labels/2008_000002.png", CONTEXT_LIST,
        [[0, 1, 2, 11, 21, 52, 59]], [[255, 0, 5, 49, 1, 3, 58]],
        ["aeroplane", "bicycle", "diningtable", "bag", "bedclothes", "wood"],
    ),
    "voc": (
        "pascal_voc_20", f"{VOC}JPEGImages/1.jpg", f"{VOC}SegmentationClass/1.png",
        {f"{VOC}ImageSets/Segmentation/train.txt": "1\n"},
        [[0, 1, 20, 255]], [[255, 0, 19, 255]], ["aeroplane", "tv"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("preset", "image", "label_map", "lists", "stored", "expected", "names"), CASES.values(), ids=CASES
)
def test_values_become_class_indices(tmp_path, preset, image, label_map, lists, stored, expected, names):
    write_image_and_map(tmp_path / "in", image, label_map, stored, lists)
    run(preset, tmp_path / "in", tmp_path / "out")
    values, classes = only_map(tmp_path / "out"), load_vocabulary(preset)
    assert values.tolist() == expected
    assert values.dtype == (np.uint8 if classes.ignore_index == 255 else np.uint16)
    assert [classes.classes[index] for index in values[values != classes.ignore_index]] == names


def test_coco_maps_that_another_tool_wrote_beside_are_passed_over(tmp_path):
    folder = "annotations/val2017"
    write_image_and_map(tmp_path / "in", "images/val2017/139.jpg", f"{folder}/139.png", [[181]])
    for beside in ("139_labelTrainIds.png", "._139.png"):
        save_map(tmp_path / "in" / folder / beside, [[170]])
    [warning] = warnings_of("coco_stuff_171", tmp_path / "in", tmp_path / "out", "validation")
    assert "1 of 5000" in warning
    assert only_map(tmp_path / "out", "validation").tolist() == [[170]]


def test_context_59_agrees_with_the_ids_that_others_use():
    # The 59 of the 459 ids as the PASCAL in Detail challenge lists them; its label maps count them in order of ids.
    ids = [
        *(2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113, 115, 144, 158),
        *(159, 162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326, 347, 349, 354, 355, 360),
        *(366, 368, 397, 415, 416, 420, 424, 427, 440, 445, 454, 458),
    ]
    preset = load_preset("pascal_context_59")
    table = make_reader(preset, preset.labels[0]).table
    assert [table[number] for number in ids] == list(range(59))
    assert (table == 255).sum() == 460 - 59


def test_voc_takes_augmented_label_maps_for_train_aug_alone(tmp_path):
    root = tmp_path / "in"
    lists = {
        "ImageSets/Segmentation/train.txt": "1\n",
        "ImageSets/Segmentation/trainaug.txt": "/JPEGImages/1.jpg /SegmentationClassAug/1.png\n",
    }
    write_image_and_map(root, "JPEGImages/1.jpg", "SegmentationClass/1.png", [[5]], lists)
    save_map(root / "SegmentationClassAug/1.png", [[7]])
    run("pascal_voc_20", root, tmp_path / "out")
    run("pascal_voc_20", root, tmp_path / "out", "train_aug")
    read = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert {split: np.asarray(read[split][0]["annotation"]).item() for split in read} == {"train": 4, "train_aug": 6}


# ---------------------------------------------------------------------------------------------------- what is written


def test_images_are_copied_byte_for_byte_and_datasets_reads_them(tmp_path):
    source = make_ade(tmp_path / "in", range(5))
    make_ade(tmp_path / "in", range(2), "validation")
    prepared = run("ade20k_150", source, tmp_path / "out", "all", images_per_shard=2, workers=3)
    assert [(split.images, split.shards) for split in prepared.values()] == [(5, 3), (2, 1)]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.parquet")) == [
        *(f"train-{shard:05}-of-00003.parquet" for shard in range(3)),
        "validation-00000-of-00001.parquet",
    ]
    rows = [row for path in sorted((tmp_path / "out").glob("train-*")) for row in pq.read_table(path).to_pylist()]
    for number, row in enumerate(rows):
        file = source / f"images/training/ADE_train_{number:08d}.jpg"
        assert row["image"] == {"bytes": file.read_bytes(), "path": file.name}
    read = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert read.column_names == ["image", "annotation"]
    assert [np.unique(example["annotation"]).tolist() for example in read] == [[0], [1], [2], [3], [4]]
    assert read[0]["image"].size == (5, 1)


def test_the_result_is_what_training_reads(tmp_path):
    preset, image, label_map, *_ = CASES["ade 847"]
    write_image_and_map(tmp_path / "in", image, label_map, [[(110, 162, 9), (0, 0, 0)]])
    run(preset, tmp_path / "in", tmp_path / "out")
    [example] = load_images(tmp_path / "out", "train")
    for labels in ("ade20k_847", tmp_path / "out/label_set.json"):
        label_set = load_label_set(labels)
        assert (len(label_set.names), label_set.ignore_index) == (847, 65535)
        assert label_set.read(example["annotation"]).tolist() == [[0, 65535]]
    id2label = json.loads((tmp_path / "out/id2label.json").read_text())
    assert (len(id2label), id2label["0"], id2label["846"]) == (847, "wall", label_set.names[846])


def test_the_card_says_what_is_there_and_nothing_of_this_machine(tmp_path):
    source, card = make_ade(tmp_path / "in"), tmp_path / "out/README.md"
    run("ade20k_150", source, tmp_path / "out")
    assert "validation" not in card.read_text()
    run("ade20k_150", make_ade(source, range(2), "validation"), tmp_path / "out", "all")
    assert "| train | 3 | 20210 | 0 |" in card.read_text()
    assert "| validation | 2 | 2000 | 0 |" in card.read_text()
    assert str(tmp_path) not in card.read_text()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_label_maps_are_turned_as_readers_turn_images(tmp_path, orientation):
    bright = np.zeros((16, 32), dtype=bool)
    bright[:8, :16] = True
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = tmp_path / "in/images/training/ADE_train_00000001.jpg"
    image.parent.mkdir(parents=True)
    Image.fromarray(bright.astype(np.uint8) * 255).convert("RGB").save(image, exif=exif)
    save_map(tmp_path / "in/annotations/training/ADE_train_00000001.png", bright + 1)
    run("ade20k_150", tmp_path / "in", tmp_path / "out")
    with Image.open(image) as image:
        upright = np.asarray(ImageOps.exif_transpose(image).convert("L")) > 127
    np.testing.assert_array_equal(only_map(tmp_path / "out"), upright.astype(np.uint8))


# ---------------------------------------------------------------------------------------------------- what interrupts

KILLED = """
import importlib.util, os, signal, sys
# The package without what it imports: neither torch nor transformers have a part in this, and both take long
spec = importlib.util.find_spec("modeling_san.processing")
sys.modules[spec.name] = importlib.util.module_from_spec(spec)
from modeling_san.training import prepare as module
source, output, at = sys.argv[1:]
read, replace = module._read_row, os.replace
def dying_at(name, function, *arguments, **options):
    if name.endswith(at):
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*arguments, **options)
module._read_row = lambda pair, **options: dying_at(pair.image.stem, read, pair, **options)
os.replace = lambda before, after: dying_at(str(after), replace, before, after)
module.prepare("ade20k_150", source, output, split="train", workers=2, images_per_shard=4, allow_incomplete=True,
               progress=False, warn=lambda message: None)
"""


def kill_at(name, source, output):
    """Prepare in a process that dies at the file whose name ends as given."""
    finished = subprocess.run([sys.executable, "-c", KILLED, source, output, name], check=False)
    assert finished.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    source, output = make_ade(tmp_path / "in", range(30)), tmp_path / "out"

    # In the middle of the third shard: no other program finds a part of the data set
    kill_at("_00000017", source, output)
    assert list(output.glob("*.parquet")) == []
    finished = sorted((output / ".unfinished/train").glob("*.parquet"))
    assert [path.name[:11] for path in finished[:2]] == ["train-00000", "train-00001"]
    assert len(finished) < 5
    stamps = {path.name: path.stat().st_mtime_ns for path in finished}

    # While the shards move to their place
    kill_at("out/train-00003-of-00008.parquet", source, output)
    assert len(list(output.glob("*.parquet"))) == 3

    reading = Mock(wraps=prepare_module._read_row)
    monkeypatch.setattr(prepare_module, "_read_row", reading)
    assert run("ade20k_150", source, output, images_per_shard=4)["train"].images == 30
    assert not reading.called
    assert {name: (output / name).stat().st_mtime_ns for name in stamps} == stamps
    maps = label_maps(output)
    assert list(maps) == [f"ADE_train_{number:08d}.jpg" for number in range(30)]
    assert all((values == number).all() for number, values in enumerate(maps.values()))
    others = {path.name for path in output.iterdir() if path.suffix != ".parquet"}
    assert others == {"README.md", "id2label.json", "label_set.json"}


def test_a_full_disk_is_said_in_one_line_and_finished_shards_stay(tmp_path, monkeypatch):
    source, output = make_ade(tmp_path / "in", range(6)), tmp_path / "out"
    replacing = prepare_module.replacing_file

    @contextmanager
    def full_disk(path):
        if "00002" in path.name[:12]:
            yield Path("/dev/full")
        else:
            with replacing(path) as beside:
                yield beside

    monkeypatch.setattr(prepare_module, "replacing_file", full_disk)
    with pytest.raises(OSError, match=r"no space is left on the disk of .*out: finished shards stay") as raised:
        run("ade20k_150", source, output, images_per_shard=2)
    assert "\n" not in str(raised.value)
    monkeypatch.setattr(prepare_module, "replacing_file", replacing)
    assert len(list((output / ".unfinished/train").glob("*.parquet"))) == 2
    run("ade20k_150", source, output, images_per_shard=2)
    assert len(label_maps(output)) == 6


@pytest.mark.parametrize("finished", [True, False])
def test_other_images_or_shards_do_not_mix_with_those_of_before(tmp_path, finished):
    source, output = make_ade(tmp_path / "in", range(4)), tmp_path / "out"
    if finished:
        run("ade20k_150", source, output, images_per_shard=2)
    else:
        (source / "images/training/ADE_train_00000003.jpg").write_bytes(b"no image")
        with pytest.raises(ValueError, match="cannot be read"):
            run("ade20k_150", source, output, images_per_shard=2)
    before = {path: path.read_bytes() for path in output.rglob("*.parquet")}
    assert before
    make_ade(source, range(4, 6))
    for shard_size in (2, 3):
        with pytest.raises(ValueError, match="holds other images of train, or another number of them"):
            run("ade20k_150", source, output, images_per_shard=shard_size)
    assert {path: path.read_bytes() for path in output.rglob("*.parquet")} == before


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    source, output = make_ade(tmp_path / "in"), tmp_path / "out"
    with locked_folder(output), pytest.raises(ValueError, match=f"process {os.getpid()} .* is writing to"):
        run("ade20k_150", source, output)
    run("ade20k_150", source, output)
    assert len(label_maps(output)) == 3


# ------------------------------------------------------------------------------------------------------ what is wrong


def test_an_incomplete_copy_stops_unless_it_is_meant_and_a_complete_one_passes_silently(tmp_path, monkeypatch):
    source, output = make_ade(tmp_path / "in"), tmp_path / "out"
    save_image(source / "images/training/ADE_train_00000007.jpg")
    save_map(source / "annotations/training/ADE_train_00000008.png", [[1]])
    facts = ("3 of 20210", "1 without label map: ADE_train_00000007", "1 without image: ADE_train_00000008")
    with pytest.raises(ValueError, match=".*".join([*facts, "--allow-incomplete"])):
        run("ade20k_150", source, output, allow_incomplete=False)
    assert not output.exists()
    [warning] = warnings_of("ade20k_150", source, output)
    assert warning.startswith("train: found 3 of 20210 images")
    assert len(label_maps(output)) == 3
    monkeypatch.setitem(load_preset("ade20k_150").splits["train"], "count", [3])
    complete = make_ade(tmp_path / "complete")
    assert warnings_of("ade20k_150", complete, tmp_path / "all", allow_incomplete=False) == []


def test_a_missing_split_is_left_out_only_if_that_is_meant(tmp_path):
    source = make_ade(tmp_path / "in", split="validation")
    with pytest.raises(ValueError, match=r"train: .* has no images/training/\*\.jpg; .* go on with validation alone"):
        run("ade20k_150", source, tmp_path / "out", "all", allow_incomplete=False)
    assert warnings_of("ade20k_150", source, tmp_path / "out", "all")[0].startswith("left out: train:")
    assert [path.name[:10] for path in (tmp_path / "out").glob("*.parquet")] == ["validation"]


def test_a_list_entry_without_files_is_counted(tmp_path):
    names = "2008_000002\n2008_000003\n2008_000004\n2008_000002\n"
    lists = {"ImageSets/SegmentationContext/train.txt": names}
    write_image_and_map(tmp_path / "in", CONTEXT, "trainval/2008_000002.mat", [[1]], lists)
    save_image(tmp_path / "in/JPEGImages/2008_000003.jpg")
    [warning] = warnings_of("pascal_context_459", tmp_path / "in", tmp_path / "out")
    facts = "1 of 4998 or 4996", "1 without label map: 2008_000003", "1 without image: 2008_000004"
    assert [fact for fact in facts if fact not in warning] == []
    assert list(label_maps(tmp_path / "out")) == ["2008_000002.jpg"]


@pytest.mark.parametrize("name", vocabulary_names())
def test_a_wrong_folder_is_told_what_was_looked_for_and_what_is_there(tmp_path, name):
    (tmp_path / "in/holiday").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"it holds holiday/\. .* expects ") as raised:
        run(name, tmp_path / "in", tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="does not exist: pass the folder"):
        run(name, tmp_path / "nowhere", tmp_path / "out")


DAMAGES = {
    "cut image": (lambda image, label_map: image.write_bytes(image.read_bytes()[:-80]), "cannot be read as an image"),
    "empty map": (lambda image, label_map: label_map.write_bytes(b""), "cannot be read as a label map"),
    "colours": (lambda image, label_map: Image.new("RGB", (60, 40)).save(label_map), "mode RGB, expected 1 channel"),
    "size": (lambda image, label_map: save_map(label_map, [[1, 2]]), "is 2 x 1 pixels and its image 60 x 40"),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_files_stop_the_run_or_are_skipped_and_counted(tmp_path, damage, reason):
    source, name = make_ade(tmp_path / "in", size=(60, 40)), "training/ADE_train_00000001"
    damage(source / f"images/{name}.jpg", source / f"annotations/{name}.png")
    with pytest.raises(ValueError, match=f"ADE_train_00000001.*{reason}.*--skip-unreadable"):
        run("ade20k_150", source, tmp_path / "out")
    assert reason in warnings_of("ade20k_150", source, tmp_path / "out", skip_unreadable=True)[-1]
    assert "| train | 2 | 20210 | 1 |" in (tmp_path / "out/README.md").read_text()
    assert list(label_maps(tmp_path / "out")) == ["ADE_train_00000000.jpg", "ADE_train_00000002.jpg"]


def test_a_damaged_matlab_file_is_named(tmp_path):
    write_image_and_map(tmp_path / "in", CONTEXT, "trainval/2008_000002.mat", [[1]], CONTEXT_LIST)
    path = tmp_path / "in/trainval/2008_000002.mat"
    for content, reason in ((b"MATLAB? no", "cannot be read"), (None, ".*no matrix LabelMap")):
        path.write_bytes(content) if content else savemat(path, {"other": np.ones((1, 1))})
        with pytest.raises(ValueError, match=rf"2008_000002\.mat {reason}"):
            run("pascal_context_459", tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize(
    ("case", "stored", "value"),
    [
        ("ade 150", [[1, 151]], 151),
        ("ade 150", [[1, 255]], 255),
        ("coco", [[1, 11]], 11),
        ("coco", [[1, 182]], 182),
        # One beyond the full list: 3689 = 14 * 256 + 105
        ("ade 847", [[(0, 0, 0), (140, 105, 0)]], 3689),
    ],
)
def test_values_that_the_data_set_does_not_define_stop_the_run(tmp_path, case, stored, value):
    preset, image, label_map, *_ = CASES[case]
    write_image_and_map(tmp_path / "in", image, label_map, stored)
    with pytest.raises(ValueError, match=rf"\.png holds values .* no meaning, {value}:"):
        # A wrong release is no damaged file
        run(preset, tmp_path / "in", tmp_path / "out", skip_unreadable=True)


def test_a_folder_of_something_else_is_not_written_to(tmp_path):
    source, output = make_ade(tmp_path / "in"), tmp_path / "out"
    output.mkdir()
    (output / "diary.txt").write_text("mine")
    for taken, reason in ((output, "is not empty"), (source, "is not empty"), (output / "diary.txt", "is a file")):
        with pytest.raises(ValueError, match=f"{taken} {reason}"):
            run("ade20k_150", source, taken)
    assert os.listdir(output) == ["diary.txt"]
    # Nor to one of another data set
    run("ade20k_150", source, tmp_path / "ade")
    _, image, label_map, *_ = CASES["coco"]
    write_image_and_map(tmp_path / "coco", image, label_map, [[0]])
    with pytest.raises(ValueError, match="not written by `san prepare coco_stuff_171`"):
        run("coco_stuff_171", tmp_path / "coco", tmp_path / "ade")


# -------------------------------------------------------------------------------------------------------- the command


def test_the_command_prepares_and_says_what_it_did(tmp_path, capsys):
    source = make_ade(tmp_path / "in")
    arguments = ["prepare", "ade20k_150", source, tmp_path / "out", "--split", "train", "--shard-size", 2]
    assert main([*map(str, arguments), "--workers", "2", "--allow-incomplete"]) == 0
    written = capsys.readouterr()
    assert written.out.splitlines()[0] == "train: 3 images in 2 files"
    assert "san: warning: train: found 3 of 20210 images with label maps" in written.err
    assert len(label_maps(tmp_path / "out")) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ade20k", "in", "out"], "no preset 'ade20k': choose one of ade20k_150, ade20k_847"),
        (["ade20k_150", "in", "out", "--split", "test"], "no split 'test': choose one of all, train, validation"),
        (["ade20k_150", "in/images/training/ADE_train_00000000.jpg", "out"], "is a file: pass the folder"),
        (["ade20k_150", "in", "out", "--workers", "0"], "'0' is not a whole number of at least 1"),
    ],
)
def test_the_command_refuses_in_one_line(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    source = make_ade(tmp_path / "in")
    make_ade(source, range(2), "validation")
    try:
        code = main(["prepare", *arguments])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("san: error: ")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_the_help_describes_every_preset(capsys):
    with pytest.raises(SystemExit):
        main(["prepare", "--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in vocabulary_names())
    assert "san prepare ade20k_150" in text
