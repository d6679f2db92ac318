"""Labelling whole data sets: complete, the same however it was cut, and ready to load."""

import copy
import io
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, Features, IterableDataset, Value, load_dataset
from datasets import Image as ImageFeature
from PIL import Image

from modeling_san import SANImageProcessor, SANProcessor
from modeling_san.commands.main import main
from modeling_san.training.label_sets import load_label_set
from modeling_san.training.segment_dataset import Labeler, Options, Part, open_rows, segment_dataset
from modeling_san.training.sources import load_images

LABELS = ("sky", "road", "red truck")
SIZES = ((90, 60), (60, 90), (70, 70), (90, 60))


def encoded(seed, size=(90, 60), form="PNG", **options):
    """A file with an image of random coarse colours; size is width and height."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize(size).save(buffer, form, **options)
    return buffer.getvalue()


def write_dataset(path, files, **columns):
    rows = {"image": [None if file is None else {"bytes": file, "path": None} for file in files], **columns}
    features = Features({"image": ImageFeature(), **dict.fromkeys(columns, Value("string"))})
    Dataset.from_dict(rows, features=features).to_parquet(path)
    return path


@pytest.fixture(scope="session")
def tiny_processor(tokenizer):
    long_tokenizer = copy.deepcopy(tokenizer)
    long_tokenizer.model_max_length = 96
    image_processor = SANImageProcessor(size={"shortest_edge": 64, "longest_edge": 256})
    return SANProcessor(image_processor, long_tokenizer, templates=["a photo of a {}.", "{}"])


@pytest.fixture(scope="session")
def tiny_model(make_config, make_model):
    return make_model(text_config={**make_config().text_config.to_dict(), "max_position_embeddings": 96})


@pytest.fixture(scope="session")
def labeler(tiny_model, tiny_processor):
    with torch.inference_mode():
        class_embeds = tiny_model.get_class_embeds(**tiny_processor(text=list(LABELS), return_tensors="pt"))
    return Labeler(
        tiny_model, tiny_processor, LABELS, class_embeds, len(LABELS), templates=tuple(tiny_processor.templates)
    )


@pytest.fixture(scope="session")
def model_folder(tiny_model, tiny_processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny-san"
    tiny_model.save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """A data set of 22 images of three sizes with names."""
    files = [encoded(seed, SIZES[seed % 4]) for seed in range(22)]
    path = tmp_path_factory.mktemp("data") / "images.parquet"
    return write_dataset(path, files, name=[f"image {number}" for number in range(22)])


@pytest.fixture
def label(labeler, source, tmp_path):
    """Labels a data set into a folder, five rows to a file, and returns the report."""

    def run(folder="out", data=source, by=labeler, part=None, streaming=False, **options):
        options = {"shard_size": 5, "batch_size": 4, "workers": 2, **options}
        rows = open_rows(data, streaming=streaming, keep_columns=options.get("keep_columns", ()))
        return segment_dataset(by, rows, tmp_path / folder, Options(**options), part=part, progress=False)

    return run


@pytest.fixture
def san(capsys, model_folder, source, tmp_path):
    """Runs `san segment-dataset`; returns its exit code and the lines of standard output and standard error."""

    def run(*arguments, data=source, output="out", labels="sky, road, red truck"):
        given = ["--dataset", data, "--output", tmp_path / output, "--model", model_folder, "--device", "cpu"]
        if labels is not None:
            given += ["--labels", labels]
        try:
            code = main(["segment-dataset", *map(str, [*given, "--shard-size", 5, *arguments])])
        except SystemExit as stop:
            code = stop.code
        written = capsys.readouterr()
        return code, written.out.splitlines(), written.err.splitlines()

    return run


def stored(folder):
    """All rows of a folder in the order of their files."""
    return [row for path in sorted(folder.glob("part-*.parquet")) for row in pq.read_table(path).to_pylist()]


def loaded(folder):
    return load_dataset(
        "parquet", data_files=str(folder / "part-*.parquet"), split="train", cache_dir=folder / "cache"
    )


# --------------------------------------------------------------------------------------------------- what is written


def test_each_image_gets_the_label_map_it_gets_alone(label, labeler, source, tmp_path):
    label()
    rows = loaded(tmp_path / "out")
    assert rows["row"][:] == list(range(22))
    for row, original in zip(rows, load_dataset("parquet", data_files=str(source), split="train"), strict=True):
        image = original["image"]
        inputs = labeler.processor(images=image, return_tensors="pt")
        with torch.inference_mode():
            outputs = labeler.model(**inputs, class_embeds=labeler.class_embeds)
        [expected] = labeler.processor.post_process_semantic_segmentation(outputs, [image.size[::-1]])
        assert np.array_equal(np.asarray(row["annotation"]), expected.numpy())


def test_segments_name_what_the_label_map_holds(label, tmp_path):
    label(with_scores=True)
    for row in loaded(tmp_path / "out"):
        label_map, scores = np.asarray(row["annotation"]), np.asarray(row["scores"]) / 1000
        assert {segment["index"] for segment in row["segments"]} == set(np.unique(label_map))
        for segment in row["segments"]:
            inside = label_map == segment["index"]
            assert segment["label"] == LABELS[segment["index"]]
            assert segment["area"] == pytest.approx(inside.mean())
            assert segment["mean_score"] == pytest.approx(scores[inside].mean(), abs=6e-4)


def test_images_and_columns_are_stored_as_they_came(label, source, tmp_path):
    label(with_images=True, keep_columns=("name",))
    originals = pq.read_table(source).to_pylist()
    rows = stored(tmp_path / "out")
    assert [row["image"]["bytes"] for row in rows] == [row["image"]["bytes"] for row in originals]
    assert [row["name"] for row in rows] == [row["name"] for row in originals]


def test_the_result_is_a_data_set_to_train_on(label, tmp_path):
    label(with_images=True)
    images = load_images(tmp_path / "out")
    labels = load_label_set(None, dataset=images, source=tmp_path / "out")
    assert labels.names == LABELS
    assert len(images) == 22
    assert labels.read(images[1]["annotation"]).shape == images[1]["image"].size[::-1]


def test_a_turned_photograph_gets_an_upright_label_map(label, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = write_dataset(tmp_path / "turned.parquet", [encoded(0, (90, 60), "JPEG", exif=exif)])
    label(data=data, with_images=True)
    [row] = loaded(tmp_path / "out")
    assert row["annotation"].size == row["image"].size == (60, 90)


def test_more_than_255_labels_take_16_bits(label, labeler, tmp_path):
    names = tuple(f"label {number}" for number in range(300))
    embeds = torch.nn.functional.normalize(torch.randn(300, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    many = replace(labeler, labels=names, class_embeds=embeds, own_labels=300)
    label(by=many)
    label("wide", by=replace(many, labels=(*names[::-1],), class_embeds=embeds.flip(0)))
    pairs = zip(loaded(tmp_path / "out"), loaded(tmp_path / "wide"), strict=True)
    maps = [(np.asarray(row["annotation"]), np.asarray(turned["annotation"])) for row, turned in pairs]
    assert all(label_map.dtype == np.uint16 for label_map, _ in maps)
    assert max(label_map.max() for pair in maps for label_map in pair) > 255
    # Ties aside, the same label wins wherever it stands in the list
    assert np.mean([np.mean(first == 299 - second.astype(int)) for first, second in maps]) > 0.999


def test_what_an_added_name_wins_becomes_other(san, tmp_path):
    assert san("--extend-labels", "coco-stuff", labels="sky, road")[0] == 0
    rows = stored(tmp_path / "out")
    assert {segment["label"] for row in rows for segment in row["segments"]} <= {"sky", "road", "other"}
    assert any(segment["label"] == "other" and segment["index"] == 2 for row in rows for segment in row["segments"])


# ------------------------------------------------------------------------------------------ parts, cuts and restarts


@pytest.mark.parametrize("count", [4])
def test_the_number_of_processes_changes_nothing(label, tmp_path, count):
    label("one")
    reports = [label("many", part=Part(index, count)) for index in range(count)]
    assert stored(tmp_path / "many") == stored(tmp_path / "one")
    assert sum(report.images for report in reports) == 22


@pytest.mark.usefixtures("one_thread")
def test_a_killed_run_goes_on_without_a_row_twice_or_missing(model_folder, label, labeler, tmp_path):
    files = [encoded(seed, SIZES[seed % 4]) for seed in range(80)]
    data = write_dataset(tmp_path / "many.parquet", files)
    command = "import sys; from modeling_san.commands.main import main; sys.exit(main(sys.argv[1:]))"
    arguments = [
        "segment-dataset",
        "--dataset",
        data,
        "--output",
        tmp_path / "cut",
        "--model",
        model_folder,
        "--device",
        "cpu",
    ]
    arguments += ["--labels", "sky, road, red truck", "--shard-size", 2, "--batch-size", 4]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", command, *map(str, arguments)], env=environment)
    while len(list((tmp_path / "cut").glob("part-*.parquet"))) < 3 and process.poll() is None:
        time.sleep(0.002)
    time.sleep(random.uniform(0, 0.1))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = len(stored(tmp_path / "cut"))
    assert 0 < done < 80
    # What a kill in the middle of writing leaves behind
    (tmp_path / "cut" / "part-000039.parquet.unfinished-0123abcd").write_bytes(b"half")

    reports = [label("cut", data, part=Part(index, 2), shard_size=2) for index in range(2)]
    label("uncut", data, shard_size=2)
    cut, uncut = stored(tmp_path / "cut"), stored(tmp_path / "uncut")
    assert [row["row"] for row in cut] == list(range(80))
    # Sums depend on what shares a batch, in the last bit
    scores, expected = (
        [segment.pop("mean_score") for row in rows for segment in row["segments"]] for rows in (cut, uncut)
    )
    assert cut == uncut
    assert scores == pytest.approx(expected, rel=1e-5)
    assert sum(report.images for report in reports) == 80 - done
    assert not list((tmp_path / "cut").glob("*unfinished*"))


def test_a_finished_run_does_nothing_more(label, tmp_path):
    label()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    report = label()
    assert (report.images, report.total, report.parts, report.expected_parts) == (0, 22, 5, 5)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_a_damaged_part_file_is_made_anew(label, tmp_path):
    label()
    expected = stored(tmp_path / "out")
    path = tmp_path / "out" / "part-000002.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    assert label().images == 5
    assert stored(tmp_path / "out") == expected


def test_leftovers_of_other_processes_stay(label, tmp_path):
    label()
    own, others = (tmp_path / "out" / f"part-00000{block}.parquet.unfinished-aa" for block in (2, 3))
    own.touch()
    others.touch()
    label(part=Part(0, 2))
    assert not own.exists()
    assert others.exists()


def test_sigterm_leaves_whole_files_and_ends_with_143(san, label, tmp_path, monkeypatch):
    whole = Labeler.segment

    def segment(self, *arguments):
        if len(list((tmp_path / "out").glob("part-*.parquet"))) >= 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, *arguments)

    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(Labeler, "segment", segment)
        code, _, _ = san()
    assert code == 143
    assert signal.getsignal(signal.SIGTERM) is handler
    assert not list((tmp_path / "out").glob("*unfinished*"))
    rows = [row["row"] for row in stored(tmp_path / "out")]
    assert rows == list(range(len(rows)))
    assert 10 <= len(rows) < 22
    label()
    assert [row["row"] for row in stored(tmp_path / "out")] == list(range(22))


def test_a_full_disk_is_named_and_the_run_goes_on_later(san, label, tmp_path):
    label("uncut")
    sizes = [path.stat().st_size for path in sorted((tmp_path / "uncut").glob("part-*.parquet"))]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # As a disk without room does, a limit lets a write fail halfway
    resource.setrlimit(resource.RLIMIT_FSIZE, (min(sizes[:4]) - 200, hard))
    try:
        code, _, errors = san()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2
    assert "cannot be written (File too large)" in errors[-1]
    assert "run the same command again" in errors[-1]
    assert not list((tmp_path / "out").glob("*unfinished*"))
    label()
    assert stored(tmp_path / "out") == stored(tmp_path / "uncut")


@pytest.mark.parametrize("change", ["labels", "model", "dataset", "shard_size", "columns", "templates"])
def test_a_folder_of_another_run_is_refused(label, labeler, make_model, tiny_model, source, tmp_path, change):
    label()
    before = stored(tmp_path / "out")
    other = write_dataset(tmp_path / "other.parquet", [encoded(seed) for seed in range(1, 23)])
    arguments = {
        "labels": {"by": replace(labeler, labels=("sky", "street", "red truck"))},
        "model": {
            "by": replace(labeler, model=make_model(seed=1, text_config=tiny_model.config.text_config.to_dict()))
        },
        "dataset": {"data": other},
        "shard_size": {"shard_size": 4},
        "columns": {"with_scores": True},
        "templates": {"by": replace(labeler, templates=("{}",))},
    }
    with pytest.raises(ValueError, match=rf"results of another run \(other {change}\)"):
        label(**arguments[change])
    assert stored(tmp_path / "out") == before


def test_part_files_of_unknown_origin_are_refused(label, tmp_path):
    label()
    (tmp_path / "out" / "run.json").unlink()
    with pytest.raises(ValueError, match=r"holds part files but no run\.json"):
        label()


def test_batches_of_one_and_of_many_agree(label, tmp_path):
    label("one", batch_size=1)
    label("many", batch_size=16)
    for one, many in zip(loaded(tmp_path / "one"), loaded(tmp_path / "many"), strict=True):
        assert np.mean(np.asarray(one["annotation"]) == np.asarray(many["annotation"])) > 0.999


def test_a_batch_too_large_for_the_memory_is_run_image_by_image(label, labeler, tmp_path):
    class Small(Labeler):
        def segment(self, pixel_values, *arguments):
            if len(pixel_values) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().segment(pixel_values, *arguments)

    label("small", by=Small(**vars(labeler)))
    label("one", batch_size=1)
    assert stored(tmp_path / "small") == stored(tmp_path / "one")


# ----------------------------------------------------------------------------------------------------------- streams


def test_a_stream_gives_what_the_stored_data_set_gives(label, tmp_path):
    label("stored", keep_columns=("name",))
    for index in range(2):
        label("streamed", streaming=True, part=Part(index, 2), keep_columns=("name",))
    assert stored(tmp_path / "streamed") == stored(tmp_path / "stored")


def test_a_finished_stream_does_nothing_more_and_a_cut_one_goes_on(label, tmp_path):
    label(streaming=True)
    expected = stored(tmp_path / "out")
    assert label(streaming=True).images == 0
    (tmp_path / "out" / "part-000001.parquet").unlink()
    (tmp_path / "out" / "part-000004.parquet").unlink()
    assert label(streaming=True).images == 7
    assert stored(tmp_path / "out") == expected


def test_a_stream_that_ends_with_a_block_makes_no_empty_file(label, tmp_path):
    data = write_dataset(tmp_path / "ten.parquet", [encoded(seed) for seed in range(10)])
    assert label(data=data, streaming=True).parts == 2
    assert label(data=data, streaming=True).images == 0


def test_a_stream_that_breaks_off_loses_nothing_that_was_done(labeler, tmp_path):
    broken = threading.Event()
    broken.set()

    def examples():
        for seed in range(13):
            if seed == 8 and broken.is_set():
                raise ConnectionError("the network is gone")
            yield {"image": {"bytes": encoded(seed), "path": None}}

    rows = IterableDataset.from_generator(examples, features=Features({"image": ImageFeature(decode=False)}))
    options = Options(shard_size=3, batch_size=2)
    with pytest.raises(ConnectionError, match="the network is gone"):
        segment_dataset(labeler, rows, tmp_path / "out", options, progress=False)
    assert [row["row"] for row in stored(tmp_path / "out")] == list(range(6))
    broken.clear()
    assert segment_dataset(labeler, rows, tmp_path / "out", options, progress=False).images == 7
    assert [row["row"] for row in stored(tmp_path / "out")] == list(range(13))


# ------------------------------------------------------------------------------------------------- images gone bad


@pytest.fixture
def partly_damaged(tmp_path):
    """Nine images, of which number 2 is cut off, number 4 no image, and number 7 missing."""
    files = [encoded(seed) for seed in range(9)]
    files[2], files[4], files[7] = files[2][:200], b"no image", None
    return write_dataset(tmp_path / "damaged.parquet", files)


def test_unreadable_images_are_recorded_and_the_others_labelled(san, partly_damaged, tmp_path):
    code, lines, errors = san("--with-images", data=partly_damaged)
    assert code == 0
    rows = list(loaded(tmp_path / "out"))
    assert [row["row"] for row in rows if row["error"] is not None] == [2, 4, 7]
    assert [row["row"] for row in rows if row["annotation"] is None] == [2, 4, 7]
    assert "no image of a known format" in rows[4]["error"]
    assert "the image is missing" in rows[7]["error"]
    assert "3 of them could not be read, the first is row 2" in errors[-1]
    assert any("9 images, 3 of them unreadable" in line for line in lines)


def test_strict_stops_at_the_first_unreadable_image(san, partly_damaged):
    code, _, errors = san("--strict", data=partly_damaged)
    assert code == 2
    assert "row 2: the image cannot be decoded" in errors[-1]


def test_no_readable_image_at_all_is_an_error(san, tmp_path):
    data = write_dataset(tmp_path / "bad.parquet", [b"no image"] * 3)
    code, _, errors = san(data=data)
    assert code == 2
    assert "none of the 3 images could be read" in errors[-1]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_image_of_too_many_pixels_is_recorded(label, tmp_path, monkeypatch):
    data = write_dataset(tmp_path / "large.parquet", [encoded(0), encoded(1, (200, 100))])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15000)
    label(data=data)
    assert [row["error"] for row in stored(tmp_path / "out")] == [
        None,
        "the image has 200 x 100 pixels, more than the 15,000 allowed",
    ]


# ------------------------------------------------------------------------------------------------------- the command


def test_the_command_says_how_many_how_fast_and_how_to_load(san, tmp_path):
    code, lines, _ = san("--part", "1/2")
    assert code == 0
    assert lines[0].startswith("process 1 of 2: 12 images in 0.")
    assert "holds 3 of 5 files with 12 images" in lines[1]
    san("--part", "2/2")
    assert eval(lines[2], {"datasets": datasets})["row"][:] == list(range(22))


@pytest.mark.parametrize("part", ["0/4", "5/4", "3", "a/b", "1/0", "-1/2"])
def test_a_part_that_is_none_is_refused(san, part):
    code, _, errors = san(f"--part={part}")
    assert code == 2
    assert "expected I/N with I from 1 to N" in errors[-1]


@pytest.mark.parametrize(
    ("labels", "word"),
    [("classes.jsn", "no such file and no such label set"), (" ", "is empty"), ("sky,,road", "is empty")],
)
def test_labels_that_are_none_are_refused(san, labels, word):
    code, _, errors = san(labels=labels)
    assert code == 2
    assert word in errors[-1]


def test_labels_may_be_a_file(san, tmp_path):
    (tmp_path / "classes.txt").write_text("sky\nroad\n", encoding="utf-8")
    assert san(labels=tmp_path / "classes.txt")[0] == 0
    assert load_label_set(None, source=tmp_path / "out").names == ("sky", "road")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--keep-columns", "nothing"), "has no column 'nothing' to keep, but"),
        (("--keep-columns", "image"), "column 'image' cannot be kept"),
        (("--image-column", "nothing"), "has no column 'nothing', but"),
        (("--dataset", "nowhere.parquet"), "cannot be read as a data set"),
        (("--extend-labels", "all"), "choose one of"),
        (("--model", "/nowhere/model"), "there is no such folder"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(san, arguments, word):
    code, _, errors = san(*arguments)
    assert code == 2
    assert len(errors) == 1
    assert word in errors[0]
