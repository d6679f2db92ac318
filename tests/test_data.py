"""Opening data sets in every form, and reading each image once an epoch whoever reads."""

import io
import json
import logging
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, IterableDataset
from datasets import Image as ImageFeature
from PIL import Image
from torch.utils.data import DataLoader

from modeling_san.processing import SANImageProcessor
from modeling_san.training.augmentation import Augmentation
from modeling_san.training.data import (
    Collator,
    EndlessOrder,
    ImageError,
    StreamedImages,
    TrainingImages,
    check_first_images,
    load_images,
    to_arrays,
)
from modeling_san.training.label_sets import LabelSet

LABELS = LabelSet(("dark", "light"))
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
"""What PIL would have a program of the system draw."""

SIZE = (8, 12)
WHOLE = Augmentation((8,), 64, SIZE, photometric=False, flip=0.0)
"""Shows images as they are, so that their grey tells which one it is."""
VARIED = Augmentation((8, 9, 12, 20), 64, SIZE)


def encoded(pixels: np.ndarray) -> dict[str, bytes | None]:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return {"bytes": file.getvalue(), "path": None}


def make_dataset(count: int, image: str = "image", label: str = "annotation", first: int = 0, value=None) -> Dataset:
    """Images of the greys `first`, `first` + 1, ..., labelled 0 left and 1 right, or `value` all over."""
    labels = np.zeros(SIZE, np.uint8)
    labels[:, 6:] = 1
    rows = {
        image: [encoded(np.full((*SIZE, 3), first + index, np.uint8)) for index in range(count)],
        label: [encoded(labels if value is None else np.full(SIZE, value, np.uint8))] * count,
    }
    return Dataset.from_dict(rows, features=Features({image: ImageFeature(), label: ImageFeature()}))


def greys(batch: dict[str, torch.Tensor]) -> list[int]:
    """Which images a batch holds."""
    mean, std = SANImageProcessor.image_mean[0], SANImageProcessor.image_std[0]
    return ((batch["pixel_values"][:, 0, 0, 0] * std + mean) * 255).round().int().tolist()


def training_images(dataset: Dataset, augmentation: Augmentation = WHOLE, **options) -> TrainingImages:
    return TrainingImages(dataset, LABELS, SANImageProcessor(), augmentation, **options)


def streamed(dataset: IterableDataset, **options) -> StreamedImages:
    options = {"batch_size": 3, "buffer_size": 4, **options}
    return StreamedImages(dataset, LABELS, SANImageProcessor(), options.pop("augmentation", WHOLE), **options)


def load(dataset, workers: int, batch_size: int = 3, **options) -> DataLoader:
    return DataLoader(dataset, batch_size=batch_size, num_workers=workers, collate_fn=Collator(), **options)


def take(loader: DataLoader, batches: int) -> list[dict[str, torch.Tensor]]:
    return list(islice(loader, batches))


def write_folders(folder, names=("0", "1", "2"), images="images", labels="annotations", split=""):
    for index, name in enumerate(names):
        for kind, pixels in ((images, np.full((*SIZE, 3), index, np.uint8)), (labels, np.ones(SIZE, np.uint8))):
            path = folder / kind / split / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)


def parquet(folder, dataset):
    dataset.to_parquet(folder / "data.parquet")
    return folder / "data.parquet"


def saved(folder, dataset):
    dataset.save_to_disk(folder / "saved")
    return folder / "saved"


def write(folder, form):
    """Three labelled images in a form that users have them in."""
    three = make_dataset(3)
    match form:
        case "parquet":
            return parquet(folder, three)
        case "saved":
            return saved(folder, three)
        case "arrow":
            return next(saved(folder, three).glob("*.arrow"))
        case "saved split":
            return saved(folder, DatasetDict({"train": three}))
        case "saved splits":
            return saved(folder, DatasetDict({"train": three, "test": make_dataset(1)}))
        case "shards" | "pattern":
            for index in range(3):
                make_dataset(1, first=index).to_parquet(folder / f"train-{index:05}-of-00003.parquet")
            return folder if form == "shards" else folder / "train-*.parquet"
        case "two folders":
            write_folders(folder)
        case "two folders with splits":
            write_folders(folder, split="training")
            write_folders(folder, names="a", split="validation")
        case "splits with two folders":
            write_folders(folder / "train", images="img", labels="masks")
            write_folders(folder / "val", names="a", images="img", labels="masks")
        case "folder with metadata":
            write_folders(folder / "train", images="images", labels="truth")
            names = ({"image_file_name": f"images/{n}.png", "annotation_file_name": f"truth/{n}.png"} for n in "012")
            (folder / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, names)))
    return folder


def write_wrong(folder, form):
    """What holds no labelled images, or not where they are looked for."""
    three = make_dataset(3)
    match form:
        case "images alone":
            return parquet(folder, three.remove_columns("annotation"))
        case "classes of whole images":
            write_folders(folder, images="images/sky", labels="images/road")
            return folder / "images"
        case "no rows":
            return parquet(folder, three.select([]))
        case "nowhere":
            return folder / "nowhere.parquet"
        case "no parquet":
            (folder / "data.parquet").write_text("no parquet")
            return folder / "data.parquet"
        case "other names":
            write_folders(folder)
            for path in list((folder / "annotations").iterdir()):
                path.rename(path.with_name(f"{path.stem}_mask.png"))
            return folder
    return write(folder, form)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "form",
    [
        "parquet", "arrow", "saved", "saved splits", "shards", "pattern", "two folders", "two folders with splits",
        "splits with two folders", "folder with metadata",
    ],
)  # fmt: skip
def test_a_data_set_is_read_from_every_form(tmp_path, form, streaming):
    images = load_images(write(tmp_path, form), streaming=streaming)
    assert isinstance(images, IterableDataset if streaming else Dataset)
    examples = [to_arrays(example, LABELS) for example in images]
    assert sorted(image.getpixel((0, 0))[0] for image, _ in examples) == [0, 1, 2]
    assert all(label_map.shape == SIZE and label_map[0, -1] == 1 for _, label_map in examples)


@pytest.mark.parametrize("form", ["parquet", "saved", "two folders"])
def test_a_data_set_may_have_a_name_that_could_be_a_pattern(tmp_path, form):
    source = write(tmp_path, form)
    named = source.rename(source.with_name(f"street[1]?*{source.suffix}"))
    assert len(load_images(named)) == 3


def test_columns_are_chosen_by_name_even_where_others_would_be_recognised_or_hold_paths(tmp_path):
    source = parquet(tmp_path, make_dataset(2, "photo", "truth"))
    images = load_images(source, image_column="photo", label_column="truth")
    assert images.column_names == ["image", "annotation"]
    source = parquet(tmp_path, make_dataset(2, "image", "mask").add_column("label", [5, 6]))
    assert load_images(source, label_column="mask").column_names == ["image", "annotation"]
    write_folders(tmp_path)
    rows = {"image": [str(tmp_path / "images" / "2.png")], "truth": [str(tmp_path / "annotations" / "2.png")]}
    [example] = load_images(parquet(tmp_path, Dataset.from_dict(rows)), image_column="image", label_column="truth")
    assert to_arrays(example, LABELS)[0].getpixel((0, 0)) == (2, 2, 2)


@pytest.mark.parametrize(
    ("form", "options", "message"),
    [
        ("parquet", {"label_column": "truth"}, "no column 'truth', but image, annotation"),
        ("parquet", {"label_column": "image"}, "cannot hold both"),
        ("images alone", {}, "none of which is known to hold label maps"),
        ("classes of whole images", {}, "none of which is known to hold label maps"),
        ("no rows", {}, "holds no images"),
        ("no rows", {"streaming": True}, "holds no images"),
        ("saved splits", {"split": "validation"}, "train, test"),
        ("other names", {}, "3 images and 3 label maps lie there, but no two of the same name"),
        ("nowhere", {}, "nowhere.parquet cannot be read"),
        ("no parquet", {}, "data.parquet cannot be read"),
    ],
)
def test_what_holds_no_labelled_images_is_refused(tmp_path, form, options, message):
    with pytest.raises(ValueError, match=message):
        load_images(write_wrong(tmp_path, form), **options)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["shards", "saved split"])
def test_the_only_split_there_is_is_taken_whatever_it_is_called(tmp_path, caplog, form, streaming):
    assert len(list(load_images(write(tmp_path, form), "validation", streaming=streaming))) == 3
    assert "'train'" in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["two folders", "two folders with splits", "splits with two folders"])
def test_of_images_beside_label_maps_the_images_alone_are_segmented(tmp_path, form, streaming):
    folder = write(tmp_path, form)
    for path in list(folder.rglob("*/2.png")):
        if "annotations" in path.parts or "masks" in path.parts:
            path.unlink()
    images = load_images(folder, labelled=False, streaming=streaming)
    assert images.column_names == ["image"]
    assert sorted(example["image"].getpixel((0, 0)) for example in images) == [(value,) * 3 for value in (0, 1, 2)]


@pytest.mark.parametrize("ending", ["gif", "GIF", "qoi", "ppm", "tif"])
def test_files_of_every_format_are_found_in_two_folders(tmp_path, ending):
    write_folders(tmp_path)
    for path in list((tmp_path / "annotations").iterdir()):
        mask = Image.open(path)
        (mask.convert("RGB") if ending == "qoi" else mask).save(path.with_suffix(f".{ending}"))
        path.unlink()
    assert len(load_images(tmp_path)) == 3


def test_images_without_label_maps_are_left_out_and_counted(tmp_path, caplog):
    write_folders(tmp_path)
    (tmp_path / "annotations" / "1.png").unlink()
    assert len(load_images(tmp_path)) == 2
    assert "1 images without a label map of the same name and 0 label maps" in caplog.text


def example_with(**changes):
    return {**make_dataset(1).cast_column("image", ImageFeature(decode=False))[0], **changes}


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"annotation": encoded(np.full(SIZE, 7, np.uint8))}, "the label map .* 7 on 96 pixels"),
        ({"annotation": encoded(np.zeros((3, 4), np.uint8))}, ".*12 x 8 .* 4 x 3 pixels"),
        ({"annotation": None}, "the label map is missing"),
        ({"image": None}, "the image is missing"),
        ({"image": {"bytes": b"no image", "path": None}}, "the image"),
        ({"image": {"bytes": POSTSCRIPT, "path": None}}, "the image"),
        ({"image": {"bytes": encoded(np.ones((99, 99), np.uint8))["bytes"][:80], "path": None}}, "the image .*cut"),
        ({"image": {"bytes": None, "path": "/nowhere/image.png"}}, "the image.*/nowhere/image.png"),
    ],
    ids=["values", "size", "no map", "no image", "garbage", "postscript", "cut off", "path"],
)  # fmt: skip
def test_an_example_that_cannot_be_used_is_named(changes, facts):
    example = {**make_dataset(1)[0], **changes}
    dataset = [make_dataset(1)[0], example]
    with pytest.raises(ValueError, match=f"some data, example 1: {facts}"):
        check_first_images(dataset, LABELS, "some data")
    images = training_images(dataset)
    assert images[0]["index"] == 0
    with pytest.raises(ImageError, match=f"^example 1: {facts}"):
        images[1]


def test_a_worker_names_its_example_in_one_line():
    with pytest.raises(ImageError) as error:
        next(iter(load(training_images(make_dataset(1, value=7)), workers=1)))
    assert str(error.value).startswith("example 0: the label map holds 7 on")
    assert "\n" not in str(error.value)


def test_the_first_images_of_a_stream_are_checked_and_no_others():
    rows = [example_with()] * 8 + [example_with(image=None)]
    stream = Dataset.from_list(rows, features=make_dataset(1).features).to_iterable_dataset()
    check_first_images(stream, LABELS, "stream")
    with pytest.raises(ValueError, match="stream, example 8"):
        check_first_images(stream, LABELS, "stream", count=9)


def test_images_without_labels_are_kept_and_one_is_named(caplog):
    images = training_images(make_dataset(4, value=255))
    with caplog.at_level(logging.WARNING):
        assert all((images[index]["labels"] == 255).all() for index in range(4))
    assert [record.message.split(":")[0] for record in caplog.records] == ["example 0"]


def test_views_are_normalised_as_the_processor_does():
    dataset = make_dataset(3, first=100)
    expected = SANImageProcessor()(dataset[2]["image"], do_resize=False, do_pad=False, return_tensors="pt")
    example = training_images(dataset)[2]
    assert torch.allclose(example["pixel_values"], expected["pixel_values"][0], atol=1e-6)
    assert example["pixel_values"].dtype == torch.float32
    assert (example["labels"].dtype, example["index"].dtype) == (torch.int64, torch.int64)
    assert example["labels"].tolist() == [[0] * 6 + [1] * 6] * 8


@pytest.mark.slow
def test_views_do_not_depend_on_who_makes_them():
    images = training_images(make_dataset(5, first=60), VARIED, seed=3)
    order = list(range(10))
    alone = torch.stack([images[number]["pixel_values"] for number in order])
    for workers, batch_size in ((1, 2), (2, 5)):
        batches = [batch["pixel_values"] for batch in load(images, workers, batch_size, sampler=order)]
        assert torch.equal(torch.cat(batches), alone)


def test_an_epoch_has_views_of_its_own_however_it_is_told():
    dataset = make_dataset(2, first=60)
    images, told, other = (training_images(dataset, VARIED, seed=seed) for seed in (0, 0, 1))
    told.set_epoch(1)
    assert len(images) == 2
    assert torch.equal(images[2 + 1]["pixel_values"], told[1]["pixel_values"])
    assert images[2 + 1]["index"] == 1
    for view in (told[1], other[1]):
        assert not torch.equal(images[1]["pixel_values"], view["pixel_values"])


def test_workers_that_live_on_hear_of_the_next_epoch():
    images = training_images(make_dataset(2, first=60), VARIED)
    loader = load(images, workers=1, batch_size=2, persistent_workers=True)
    [first] = loader
    images.set_epoch(1)
    [second] = loader
    assert torch.equal(second["pixel_values"][1], images[1]["pixel_values"])
    assert not torch.equal(first["pixel_values"], second["pixel_values"])


def test_every_epoch_has_each_image_once_in_an_order_of_its_own():
    order = iter(EndlessOrder(10, seed=0))
    epochs = [[next(order) for _ in range(10)] for _ in range(3)]
    for epoch, numbers in enumerate(epochs):
        assert sorted(numbers) == list(range(10 * epoch, 10 * epoch + 10))
    assert len({tuple(number % 10 for number in numbers) for numbers in epochs}) == 3


def test_two_processes_see_together_what_one_of_twice_the_batch_sees():
    whole = iter(EndlessOrder(7, seed=1, batch_size=8))
    parts = [iter(EndlessOrder(7, seed=1, rank=rank, world_size=2, batch_size=4)) for rank in range(2)]
    for _ in range(5):
        step = [next(whole) for _ in range(8)]
        assert [next(part) for part in parts for _ in range(4)] == step


@pytest.mark.parametrize("start", [1, 8, 50])
def test_an_order_goes_on_from_any_place(start):
    whole, rest = iter(EndlessOrder(7, seed=1, batch_size=4)), iter(EndlessOrder(7, 1, start, batch_size=4))
    for _ in range(start):
        next(whole)
    assert [next(whole) for _ in range(20)] == [next(rest) for _ in range(20)]


@pytest.mark.slow
@pytest.mark.parametrize("num_shards", [1, 2, 5, 23])
@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (2, 0), (3, 0), (5, 0), (8, 0), (40, 0), (2, 2)])
def test_processes_and_workers_share_every_epoch_without_overlap_or_loss(num_shards, processes, workers):
    stream = make_dataset(23).to_iterable_dataset(num_shards=num_shards)
    for epochs in (1, 2, 3):
        read = Counter()
        for rank in range(processes):
            for batch in load(streamed(stream, rank=rank, world_size=processes, epochs=epochs), workers):
                read.update(greys(batch))
        assert read == dict.fromkeys(range(23), epochs)


def test_a_stream_is_shuffled_anew_each_epoch_and_never_ends():
    stream = make_dataset(12).to_iterable_dataset(num_shards=3)
    batches, again, other = (
        [greys(batch) for batch in take(load(streamed(stream, seed=seed), 0, batch_size=12), 3)] for seed in (0, 0, 1)
    )
    assert all(sorted(batch) == list(range(12)) for batch in batches)
    assert len({tuple(batch) for batch in [*batches, list(range(12))]}) == 4
    assert again == batches
    assert other != batches


@pytest.mark.parametrize(("workers", "num_shards"), [(0, 5), (2, 1), (2, 5)])
def test_a_stream_goes_on_exactly_where_it_was_left(workers, num_shards):
    stream = make_dataset(13).to_iterable_dataset(num_shards=num_shards)
    options = {"rank": 1, "world_size": 2, "augmentation": Augmentation((8, 9, 12), 64, SIZE)}
    whole = take(load(streamed(stream, **options), workers), 11)
    for skip in (1, 7):
        rest = take(load(streamed(stream, skip=skip, **options), workers), 4)
        for before, after in zip(whole[skip:], rest, strict=False):
            assert torch.equal(before["index"], after["index"])
            assert torch.equal(before["pixel_values"], after["pixel_values"])


def test_what_is_skipped_is_not_decoded():
    broken = example_with(image={"bytes": b"no image", "path": None})
    rows = [broken] * 6 + [example_with()] * 3
    dataset = Dataset.from_list(rows, features=make_dataset(1).features).to_iterable_dataset()
    [batch] = take(load(streamed(dataset, buffer_size=1, skip=2), 0), 1)
    assert batch["index"].tolist() == [6, 7, 8]
    with pytest.raises(ImageError, match="example 3"):
        take(load(streamed(dataset, buffer_size=1, skip=1), 0), 1)


def test_a_stream_of_unknown_columns_is_read(tmp_path):
    rows = [{"img": Image.new("RGB", SIZE[::-1]), "mask": np.zeros(SIZE, np.uint8)} for _ in range(3)]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    assert stream.features is None
    with pytest.raises(KeyError):
        next(iter(streamed(stream)))
    [batch] = load(streamed(stream.rename_columns({"img": "image", "mask": "annotation"}), epochs=1), 0)
    assert batch["labels"].shape == (3, *SIZE)


def test_more_readers_than_images_take_turns_unless_there_are_none():
    stream = make_dataset(2).to_iterable_dataset()
    read = [greys(take(load(streamed(stream, rank=rank, world_size=5), 0), 1)[0]) for rank in range(5)]
    assert all(len(batch) == 3 for batch in read)
    with pytest.raises(ValueError, match="too few images"):
        next(iter(streamed(IterableDataset.from_generator(lambda: iter(())))))


def test_encoded_images_are_turned_upright_like_their_label_maps():
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(file, "jpeg", exif=exif)
    labelled = {"image": {"bytes": file.getvalue(), "path": None}, "annotation": np.zeros((8, 4), np.uint8)}
    upright, label_map = to_arrays(labelled, LabelSet(("dark",)))
    assert upright.size == (4, 8)
    assert label_map.shape == (8, 4)
