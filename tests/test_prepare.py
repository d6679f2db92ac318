"""Official benchmark folders become parquet files: pixel for pixel, complete, and whatever interrupts it."""

import fcntl
import io
import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from PIL import Image, ImageOps
from scipy.io import savemat

from modeling_san.commands.main import main, make_parser
from modeling_san.processing.vocabulary_san import load_vocabulary, vocabulary_names
from modeling_san.training import prepare as prepare_module
from modeling_san.training.data import load_images
from modeling_san.training.label_sets import load_label_set
from modeling_san.training.official_files import _reader_of_459
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


def save_matlab(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"LabelMap": np.array(values, dtype=np.uint16)})


def save_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


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


@pytest.mark.parametrize(
    ("images", "maps"),
    [
        ("train2017", "stuffthingmaps/train2017"),
        ("images/train2017", "annotations/train2017"),
        ("images/train2017", "train2017"),
        ("train2017", "train2017"),
        ("coco/train2017", "coco/stuffthingmaps/train2017"),
    ],
)
def test_coco_stuff_counts_source_ids_from_0_and_255_is_no_label(tmp_path, images, maps):
    save_image(tmp_path / "in" / images / "000000000009.jpg")
    # person (id 1), stop sign (13), banner (92), wood (182)
    save_map(tmp_path / "in" / maps / "000000000009.png", [[0, 12, 91, 181, 255]])
    run("coco_stuff_171", tmp_path / "in", tmp_path / "out")
    values = only_map(tmp_path / "out")
    assert values.dtype == np.uint8
    assert values.tolist() == [[0, 11, 80, 170, 255]]
    names = load_vocabulary("coco_stuff_171").classes
    assert [names[index] for index in (0, 11, 80, 170)] == ["person", "stop sign", "banner", "wood"]


def test_coco_maps_that_another_tool_wrote_beside_are_passed_over(tmp_path):
    save_image(tmp_path / "in/images/val2017/000000000139.jpg", (1, 1))
    save_map(tmp_path / "in/annotations/val2017/000000000139.png", [[181]])
    save_map(tmp_path / "in/annotations/val2017/000000000139_labelTrainIds.png", [[170]])
    warnings = []
    run("coco_stuff_171", tmp_path / "in", tmp_path / "out", "validation", warn=warnings.append)
    assert warnings == ["validation: found 1 of 5000 images with label maps"]
    assert only_map(tmp_path / "out", "validation").tolist() == [[170]]


@pytest.mark.parametrize("root", ["in", "in/ADEChallengeData2016"])
def test_ade_150_is_shifted_by_one_and_0_is_no_label(tmp_path, root):
    save_image(tmp_path / root / "images/validation/ADE_val_00000001.jpg", (3, 2))
    save_map(tmp_path / root / "annotations/validation/ADE_val_00000001.png", [[0, 1, 2], [150, 150, 0]])
    run("ade20k_150", tmp_path / "in", tmp_path / "out", "validation")
    assert only_map(tmp_path / "out", "validation").tolist() == [[255, 0, 1], [149, 149, 255]]


def test_ade_847_reads_ids_from_red_and_green(tmp_path):
    folder = tmp_path / "in/images/ADE/training/urban/street"
    save_image(folder / "ADE_train_00000001.jpg", (7, 1))
    # wall (2978 = 11 * 256 + 162) twice, building (312), airplane (14), adding machine (3148), none, one of the others
    colors = [(110, 162, 9), (119, 162, 0), (10, 56, 200), (0, 14, 0), (120, 76, 1), (0, 0, 0), (0, 1, 3)]
    Image.fromarray(np.array([colors], dtype=np.uint8)).save(folder / "ADE_train_00000001_seg.png")
    Image.fromarray(np.array([colors], dtype=np.uint8)).save(folder / "ADE_train_00000001_parts_1.png")
    run("ade20k_847", tmp_path / "in", tmp_path / "out")
    values = only_map(tmp_path / "out")
    assert values.dtype == np.uint16
    assert values.tolist() == [[0, 0, 1, 94, 846, 65535, 65535]]


def test_ade_847_keeps_images_without_any_of_the_classes(tmp_path):
    folder = tmp_path / "in/images/ADE/validation/urban/street"
    save_image(folder / "ADE_val_00000001.jpg", (2, 1))
    Image.fromarray(np.zeros((1, 2, 3), dtype=np.uint8)).save(folder / "ADE_val_00000001_seg.png")
    run("ade20k_847", tmp_path / "in", tmp_path / "out", "validation")
    assert only_map(tmp_path / "out", "validation").tolist() == [[65535, 65535]]


def make_context(root, folder, save, ending, values, lists="ImageSets/SegmentationContext"):
    save_image(root / "JPEGImages/2008_000002.jpg", (len(values[0]), len(values)))
    save_image(root / "JPEGImages/2008_000003.jpg")
    save(root / folder / f"2008_000002{ending}", values)
    save_text(root / lists / "train.txt", "2008_000002\n\n")
    return root


@pytest.mark.parametrize("root", ["in", "in/VOC2010", "in/VOCdevkit/VOC2010"])
def test_context_459_is_shifted_by_one_in_16_bits(tmp_path, root):
    # accordion is 1, table 397, wool 459
    make_context(tmp_path / root, "trainval", save_matlab, ".mat", [[0, 1, 397, 459]])
    run("pascal_context_459", tmp_path / "in", tmp_path / "out")
    values = only_map(tmp_path / "out")
    assert values.dtype == np.uint16
    assert values.tolist() == [[65535, 0, 396, 458]]
    names = load_vocabulary("pascal_context_459").classes
    assert [names[index] for index in (0, 396, 458)] == ["accordion", "table", "wool"]


def test_context_59_maps_the_459_ids_by_name(tmp_path):
    # none, accordion (not among the 59), aeroplane, bag, table (called diningtable), tvmonitor, wood
    make_context(tmp_path / "in", "trainval", save_matlab, ".mat", [[0, 1, 2, 9, 397, 427, 458]])
    run("pascal_context_59", tmp_path / "in", tmp_path / "out")
    values = only_map(tmp_path / "out")
    assert values.dtype == np.uint8
    assert values.tolist() == [[255, 255, 0, 1, 49, 54, 58]]
    names = load_vocabulary("pascal_context_59").classes
    assert [names[index] for index in (0, 1, 49, 54, 58)] == ["aeroplane", "bag", "diningtable", "tvmonitor", "wood"]


def test_context_59_agrees_with_the_ids_that_others_use():
    # The 59 of the 459 ids as the PASCAL in Detail challenge lists them; its label maps count them in order of ids.
    ids = [
        *(2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113, 115, 144, 158),
        *(159, 162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326, 347, 349, 354, 355, 360),
        *(366, 368, 397, 415, 416, 420, 424, 427, 440, 445, 454, 458),
    ]
    table = _reader_of_459(Path()).table
    assert [table[number] for number in ids] == list(range(59))
    assert (table == 255).sum() == 460 - 59


def test_context_59_counts_alphabetically_in_segmentation_class_context(tmp_path):
    make_context(tmp_path / "in", "SegmentationClassContext", save_map, ".png", [[0, 1, 2, 50, 59]])
    run("pascal_context_59", tmp_path / "in", tmp_path / "out")
    assert only_map(tmp_path / "out").tolist() == [[255, 0, 1, 49, 58]]


def test_context_59_counts_in_the_official_order_in_59_context_labels(tmp_path):
    # aeroplane, bicycle, table, bag, bedclothes, wood
    make_context(tmp_path / "in", "59_context_labels", save_map, ".png", [[0, 1, 2, 11, 21, 52, 59]])
    run("pascal_context_59", tmp_path / "in", tmp_path / "out")
    assert only_map(tmp_path / "out").tolist() == [[255, 0, 5, 49, 1, 3, 58]]


def test_context_59_goes_by_the_names_of_59_labels_txt(tmp_path):
    names = [*reversed(load_vocabulary("pascal_context_59").classes)]
    names[names.index("cloth")], names[names.index("diningtable")] = "clothes", "table"
    make_context(tmp_path / "in", "59_context_labels", save_map, ".png", [[1, 59, 60 - 50]])
    save_text(tmp_path / "in/59_labels.txt", "".join(f"{number}: {name}\n" for number, name in enumerate(names, 1)))
    run("pascal_context_59", tmp_path / "in", tmp_path / "out")
    assert only_map(tmp_path / "out").tolist() == [[58, 0, 49]]
    save_text(tmp_path / "in/59_labels.txt", "1: aeroplane\n2: spaceship\n")
    with pytest.raises(ValueError, match="does not number Pascal-Context's 59 classes"):
        run("pascal_context_59", tmp_path / "in", tmp_path / "other")


@pytest.mark.parametrize("name", ["pascalcontext_train.txt", "pascal_context_train.txt", "ImageSets/Main/train.txt"])
def test_context_takes_other_lists_of_the_split(tmp_path, name):
    make_context(tmp_path / "in", "trainval", save_matlab, ".mat", [[1]], lists="elsewhere")
    save_text(tmp_path / "in" / name, "JPEGImages/2008_000002.jpg GroundTruth_trainval_png/2008_000002.png\n")
    assert run("pascal_context_459", tmp_path / "in", tmp_path / "out")["train"].images == 1


@pytest.mark.parametrize("root", ["in", "in/VOCdevkit/VOC2012"])
def test_voc_takes_palette_indices_and_ignores_background_and_borders(tmp_path, root):
    save_image(tmp_path / root / "JPEGImages/2007_000032.jpg", (4, 1))
    save_image(tmp_path / root / "JPEGImages/2007_000033.jpg", (4, 1))
    save_map(tmp_path / root / "SegmentationClass/2007_000032.png", [[0, 1, 20, 255]], palette=True)
    save_text(tmp_path / root / "ImageSets/Segmentation/train.txt", "2007_000032\n")
    run("pascal_voc_20", tmp_path / "in", tmp_path / "out")
    assert only_map(tmp_path / "out").tolist() == [[255, 0, 19, 255]]


def test_voc_takes_augmented_label_maps_for_train_aug_alone(tmp_path):
    root = tmp_path / "in"
    save_image(root / "JPEGImages/2007_000032.jpg", (1, 1))
    save_map(root / "SegmentationClass/2007_000032.png", [[5]], palette=True)
    save_map(root / "SegmentationClassAug/2007_000032.png", [[7]])
    save_text(root / "ImageSets/Segmentation/train.txt", "2007_000032\n")
    save_text(
        root / "ImageSets/Segmentation/trainaug.txt",
        "/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png\n",
    )
    run("pascal_voc_20", root, tmp_path / "out")
    run("pascal_voc_20", root, tmp_path / "out", "train_aug")
    assert only_map(tmp_path / "out", "train").tolist() == [[4]]
    assert only_map(tmp_path / "out", "train_aug").tolist() == [[6]]
    read = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert {split: np.asarray(read[split][0]["annotation"]).item() for split in read} == {"train": 4, "train_aug": 6}


def test_every_label_set_has_a_preset():
    for name in vocabulary_names():
        preset = load_preset(name)
        assert preset.vocabulary.name == name
        assert {"train", "validation"} <= set(preset.counts)


# ---------------------------------------------------------------------------------------------------- what is written


def test_images_are_copied_byte_for_byte_and_datasets_reads_them(tmp_path):
    source = make_ade(tmp_path / "in", range(5))
    make_ade(tmp_path / "in", range(2), "validation")
    prepared = run("ade20k_150", source, tmp_path / "out", "all", images_per_shard=2, workers=3)
    assert [(name, split.images, split.shards) for name, split in prepared.items()] == [
        ("train", 5, 3),
        ("validation", 2, 1),
    ]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.parquet")) == [
        "train-00000-of-00003.parquet",
        "train-00001-of-00003.parquet",
        "train-00002-of-00003.parquet",
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
    folder = tmp_path / "in/images/ADE/training/urban/street"
    save_image(folder / "ADE_train_00000001.jpg", (2, 1))
    Image.fromarray(np.array([[(110, 162, 9), (0, 0, 0)]], np.uint8)).save(folder / "ADE_train_00000001_seg.png")
    run("ade20k_847", tmp_path / "in", tmp_path / "out")
    [example] = load_images(tmp_path / "out", "train")
    for labels in ("ade20k_847", tmp_path / "out/label_set.json"):
        label_set = load_label_set(labels)
        assert (len(label_set.names), label_set.ignore_index) == (847, 65535)
        assert label_set.read(example["annotation"]).tolist() == [[0, 65535]]
    id2label = json.loads((tmp_path / "out/id2label.json").read_text())
    assert (len(id2label), id2label["0"], id2label["846"]) == (847, "wall", label_set.names[846])


def test_the_card_says_what_is_there_and_nothing_of_this_machine(tmp_path):
    source = make_ade(tmp_path / "in")
    run("ade20k_150", source, tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "| train | 3 | 20210 | 0 |" in card
    assert "validation" not in card
    assert str(tmp_path) not in card
    make_ade(source, range(2), "validation")
    run("ade20k_150", source, tmp_path / "out", "all")
    card = (tmp_path / "out/README.md").read_text()
    assert "| train | 3 | 20210 | 0 |" in card
    assert "| validation | 2 | 2000 | 0 |" in card


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

# Forks a process for each line it reads, which dies where the line says; one import serves all.
KILLED = """
import importlib.util, os, signal, sys
# The package without what it imports: neither torch nor transformers have a part in this, and both take long
spec = importlib.util.find_spec("modeling_san.processing")
sys.modules[spec.name] = importlib.util.module_from_spec(spec)
from modeling_san.training import prepare as module
source, output = sys.argv[1:]
read, replace = module._read_row, os.replace
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
for line in sys.stdin:
    at = line.strip()
    process = os.fork()
    if process == 0:
        def read_row(pair, reader):
            return die() if pair.image.stem.endswith(at) else read(pair, reader)
        def replace_file(before, after):
            return die() if str(after).endswith(at) else replace(before, after)
        module._read_row, os.replace = read_row, replace_file
        module.prepare("ade20k_150", source, output, split="train", workers=2, images_per_shard=4,
                       allow_incomplete=True, progress=False, warn=lambda message: None)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""


@pytest.fixture
def kill_at(tmp_path):
    """Prepares tmp_path / "in" into tmp_path / "out" and kills the process at the file whose name ends as given."""
    command = [sys.executable, "-c", KILLED, tmp_path / "in", tmp_path / "out"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def kill(where):
            process.stdin.write(f"{where}\n")
            process.stdin.flush()
            assert int(process.stdout.readline()) == -signal.SIGKILL

        yield kill
        process.kill()


def test_a_killed_run_goes_on_where_it_stopped(tmp_path, monkeypatch, kill_at):
    source, output = make_ade(tmp_path / "in", range(30)), tmp_path / "out"

    # In the middle of the third shard: no other program finds a part of the data set
    kill_at("_00000017")
    assert list(output.glob("*.parquet")) == []
    finished = sorted((output / ".unfinished/train").glob("*.parquet"))
    assert [path.name[:11] for path in finished[:2]] == ["train-00000", "train-00001"]
    assert len(finished) < 5
    stamps = {path.name: path.stat().st_mtime_ns for path in finished}

    # While the shards move to their place
    kill_at("out/train-00003-of-00008.parquet")
    assert len(list(output.glob("*.parquet"))) == 3

    read, opened = prepare_module._read_row, []
    monkeypatch.setattr(
        prepare_module, "_read_row", lambda pair, reader: opened.append(pair.image.stem) or read(pair, reader)
    )
    assert run("ade20k_150", source, output, images_per_shard=4)["train"].images == 30
    assert opened == []
    assert {name: (output / name).stat().st_mtime_ns for name in stamps} == stamps
    maps = label_maps(output)
    assert list(maps) == [f"ADE_train_{number:08d}.jpg" for number in range(30)]
    assert all((values == number).all() for number, values in enumerate(maps.values()))
    assert sorted(path.name for path in output.iterdir() if not path.name.endswith(".parquet")) == [
        "README.md",
        "id2label.json",
        "label_set.json",
        "prepared.json",
    ]


def test_finished_shards_are_not_read_again_after_an_error(tmp_path, monkeypatch):
    source, output = make_ade(tmp_path / "in", range(6)), tmp_path / "out"
    broken = source / "images/training/ADE_train_00000003.jpg"
    good = broken.read_bytes()
    broken.write_bytes(good[:200])
    with pytest.raises(ValueError, match=r"ADE_train_00000003\.jpg cannot be read as an image"):
        run("ade20k_150", source, output, images_per_shard=2)
    broken.write_bytes(good)
    read, opened = prepare_module._read_row, []
    monkeypatch.setattr(
        prepare_module, "_read_row", lambda pair, reader: opened.append(pair.image.stem[-1]) or read(pair, reader)
    )
    run("ade20k_150", source, output, images_per_shard=2, workers=1)
    assert opened == ["2", "3", "4", "5"]
    assert len(label_maps(output)) == 6
    opened.clear()
    run("ade20k_150", source, output, images_per_shard=2)
    assert opened == []


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


def test_other_images_or_shards_do_not_mix_with_those_of_before(tmp_path):
    source, output = make_ade(tmp_path / "in", range(4)), tmp_path / "out"
    run("ade20k_150", source, output, images_per_shard=2)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    make_ade(source, range(4, 6))
    for options in ({"images_per_shard": 2}, {"images_per_shard": 3}):
        with pytest.raises(ValueError, match="holds train already, of other images or other shards"):
            run("ade20k_150", source, output, **options)
    save_image(tmp_path / "coco/train2017/1.jpg", (1, 1))
    save_map(tmp_path / "coco/stuffthingmaps/train2017/1.png", [[0]])
    with pytest.raises(ValueError, match="holds ade20k_150, not coco_stuff_171"):
        run("coco_stuff_171", tmp_path / "coco", output)
    assert {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()} == before


def test_an_unfinished_run_does_not_go_on_with_other_images(tmp_path):
    source, output = make_ade(tmp_path / "in", range(4)), tmp_path / "out"
    (source / "images/training/ADE_train_00000003.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match="cannot be read"):
        run("ade20k_150", source, output, images_per_shard=2)
    make_ade(source, range(4, 6))
    with pytest.raises(
        ValueError, match="an unfinished run over 4 images of train in 2 shards, and this one is over 6"
    ):
        run("ade20k_150", source, output, images_per_shard=2)


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    source, output = make_ade(tmp_path / "in"), tmp_path / "out"
    (output / ".unfinished").mkdir(parents=True)
    with open(output / ".unfinished/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is writing to"):
            run("ade20k_150", source, output)
    run("ade20k_150", source, output)
    assert len(label_maps(output)) == 3


# ------------------------------------------------------------------------------------------------------ what is wrong


def test_an_incomplete_copy_stops_unless_it_is_meant(tmp_path):
    source, output = make_ade(tmp_path / "in"), tmp_path / "out"
    save_image(source / "images/training/ADE_train_00000007.jpg")
    save_map(source / "annotations/training/ADE_train_00000008.png", [[1]])
    with pytest.raises(ValueError, match="found 3 of 20210 images") as raised:
        run("ade20k_150", source, output, allow_incomplete=False)
    assert "1 without label map: ADE_train_00000007" in str(raised.value)
    assert "1 without image: ADE_train_00000008" in str(raised.value)
    assert "--allow-incomplete" in str(raised.value)
    assert not output.exists()
    warnings = []
    run("ade20k_150", source, output, warn=warnings.append)
    assert len(warnings) == 1
    assert warnings[0].startswith("train: found 3 of 20210 images")
    assert len(label_maps(output)) == 3


def test_a_complete_copy_passes_without_a_word(tmp_path, monkeypatch):
    source = make_ade(tmp_path / "in")
    monkeypatch.setitem(load_preset("ade20k_150").counts, "train", (3,))
    warnings = []
    run("ade20k_150", source, tmp_path / "out", allow_incomplete=False, warn=warnings.append)
    assert warnings == []


def test_a_missing_split_is_left_out_only_if_that_is_meant(tmp_path):
    source = make_ade(tmp_path / "in", split="validation")
    with pytest.raises(ValueError, match=r"train: .* has no folder images/training .* go on with validation alone"):
        run("ade20k_150", source, tmp_path / "out", "all", allow_incomplete=False)
    warnings = []
    assert list(run("ade20k_150", source, tmp_path / "out", "all", warn=warnings.append)) == ["validation"]
    assert warnings[0].startswith("left out: train:")


def test_a_list_entry_without_files_is_counted(tmp_path):
    make_context(tmp_path / "in", "trainval", save_matlab, ".mat", [[1]])
    save_text(
        tmp_path / "in/ImageSets/SegmentationContext/train.txt", "2008_000002\n2008_000003\n2008_000004\n2008_000002\n"
    )
    warnings = []
    run("pascal_context_459", tmp_path / "in", tmp_path / "out", warn=warnings.append)
    assert warnings == [
        "train: found 1 of 4998 or 4996 images with label maps; 1 without label map: 2008_000003; 1 without "
        "image: 2008_000004"
    ]
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


def damage_image(source):
    path = source / "images/training/ADE_train_00000001.jpg"
    path.write_bytes(path.read_bytes()[:-80])
    return "cannot be read as an image"


def damage_map(source):
    (source / "annotations/training/ADE_train_00000001.png").write_bytes(b"")
    return "cannot be read as a label map"


def color_map(source):
    Image.new("RGB", (60, 40)).save(source / "annotations/training/ADE_train_00000001.png")
    return "mode RGB, expected one channel"


def shrink_map(source):
    save_map(source / "annotations/training/ADE_train_00000001.png", [[1, 2]])
    return "is 2 x 1 pixels and its image 60 x 40"


@pytest.mark.parametrize("damage", [damage_image, damage_map, color_map, shrink_map])
def test_damaged_files_stop_the_run_or_are_skipped_and_counted(tmp_path, damage):
    source = make_ade(tmp_path / "in", size=(60, 40))
    reason = damage(source)
    with pytest.raises(ValueError, match=f"ADE_train_00000001.*{reason}.*--skip-unreadable"):
        run("ade20k_150", source, tmp_path / "out")
    warnings = []
    prepared = run("ade20k_150", source, tmp_path / "out", skip_unreadable=True, warn=warnings.append)["train"]
    assert (prepared.images, len(prepared.skipped)) == (2, 1)
    assert reason in prepared.skipped[0]
    assert "train: skipped 1:" in warnings[-1]
    assert list(label_maps(tmp_path / "out")) == ["ADE_train_00000000.jpg", "ADE_train_00000002.jpg"]


def test_a_damaged_matlab_file_is_named(tmp_path):
    make_context(tmp_path / "in", "trainval", save_matlab, ".mat", [[1]])
    path = tmp_path / "in/trainval/2008_000002.mat"
    for content, reason in ((b"MATLAB? no", "cannot be read as a MATLAB file"), (None, "holds no matrix LabelMap")):
        path.write_bytes(content) if content else savemat(path, {"other": np.ones((1, 1))})
        with pytest.raises(ValueError, match=rf"2008_000002\.mat {reason}"):
            run("pascal_context_459", tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize(
    ("preset", "value"), [("ade20k_150", 151), ("ade20k_150", 255), ("coco_stuff_171", 11), ("coco_stuff_171", 182)]
)
def test_values_that_the_data_set_does_not_define_stop_the_run(tmp_path, preset, value):
    images, maps = {
        "ade20k_150": ("images/training", "annotations/training"),
        "coco_stuff_171": ("train2017", "stuffthingmaps/train2017"),
    }[preset]
    save_image(tmp_path / "in" / images / "1.jpg", (2, 1))
    save_map(tmp_path / "in" / maps / "1.png", [[1, value]])
    with pytest.raises(ValueError, match=rf"1\.png holds the value {value}, to which"):
        # A wrong release is no damaged file
        run(preset, tmp_path / "in", tmp_path / "out", skip_unreadable=True)


def test_ids_beyond_the_full_list_of_ade_stop_the_run(tmp_path):
    folder = tmp_path / "in/images/ADE/training/urban/street"
    save_image(folder / "ADE_train_00000001.jpg", (2, 1))
    # The last id, 3688 = 14 * 256 + 104, and the one behind it
    for green, fails in ((104, False), (105, True)):
        colors = np.array([[(140, green, 0), (0, 0, 0)]], dtype=np.uint8)
        Image.fromarray(colors).save(folder / "ADE_train_00000001_seg.png")
        if fails:
            with pytest.raises(ValueError, match="holds the value 3689"):
                run("ade20k_847", tmp_path / "in", tmp_path / "out-2")
        else:
            run("ade20k_847", tmp_path / "in", tmp_path / "out-1")


def test_a_folder_of_something_else_is_not_written_to(tmp_path):
    source = make_ade(tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/diary.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty, and not from `san prepare`"):
        run("ade20k_150", source, tmp_path / "out")
    with pytest.raises(ValueError, match="is not empty"):
        run("ade20k_150", source, source)
    with pytest.raises(ValueError, match="is a file"):
        run("ade20k_150", source, tmp_path / "out/diary.txt")
    assert os.listdir(tmp_path / "out") == ["diary.txt"]


@pytest.mark.parametrize(
    "content", ["", "[]", '{"preset": "ade20k_150"}', '{"preset": "ade20k_150", "splits": {"a": 1}}']
)
def test_a_damaged_record_is_named(tmp_path, content):
    source = make_ade(tmp_path / "in")
    run("ade20k_150", source, tmp_path / "out")
    (tmp_path / "out/prepared.json").write_text(content)
    with pytest.raises(ValueError, match=r"prepared\.json is damaged"):
        run("ade20k_150", source, tmp_path / "out")


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
        (["ade20k", "in", "out"], "there is no preset 'ade20k': choose one of ade20k_150, ade20k_847"),
        (["ade20k_150", "in", "out"], "found 3 of 20210 images with label maps"),
        (["ade20k_150", "in", "out", "--split", "test"], "has no split 'test': choose one of all, train, validation"),
        (["ade20k_150", "nowhere", "out"], "nowhere does not exist"),
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
        make_parser().parse_args(["prepare", "--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in vocabulary_names())
    assert "san prepare ade20k_150" in text
