"""Labelling whole data sets: complete, the same however often it was cut off, and ready to load."""

import io
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import coarse_image
from datasets import Dataset, Features, IterableDataset, Value, load_dataset
from datasets import Image as ImageFeature
from PIL import Image

from modeling_san import SANForOpenVocabSegmentation, SANProcessor
from modeling_san.commands.segment_dataset import load_segmenter
from modeling_san.processing import Segmenter
from modeling_san.processing.segment_dataset import Options, segment_dataset, segment_dataset_with_ray
from modeling_san.training.label_sets import load_label_set
from modeling_san.training.sources import load_images

# In every test: the segmenter is shared by all, and keeps the vocabulary as the first of them encoded it
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

LABELS = ("sky", "road", "red truck")
SIZES = ((90, 60), (60, 90), (70, 70), (90, 60))


def encoded(seed, size=(90, 60), form="PNG", **options):
    """A file with an image of random coarse colours; size is width and height."""
    buffer = io.BytesIO()
    coarse_image(seed, size).save(buffer, form, **options)
    return buffer.getvalue()


def write_dataset(path, files, **columns):
    rows = {"image": [None if file is None else {"bytes": file, "path": None} for file in files], **columns}
    features = Features({"image": ImageFeature(), **dict.fromkeys(columns, Value("string"))})
    Dataset.from_dict(rows, features=features).to_parquet(path)
    return path


def read_dataset(path, streaming=False):
    return load_dataset("parquet", data_files=str(path), split="train", streaming=streaming)


@pytest.fixture(scope="module")
def segmenter(model_folder):
    model = SANForOpenVocabSegmentation.from_pretrained(model_folder)
    return Segmenter(model, SANProcessor.from_pretrained(model_folder))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A data set of 22 images of three sizes with names."""
    files = [encoded(seed, SIZES[seed % 4]) for seed in range(22)]
    path = tmp_path_factory.mktemp("data") / "images.parquet"
    return write_dataset(path, files, name=[f"image {number}" for number in range(22)])


@pytest.fixture
def label(segmenter, source, tmp_path):
    """Labels a data set into a folder, five rows to a file, and returns the report."""

    def run(folder="out", data=source, by=segmenter, labels=LABELS, streaming=False, **options):
        rows = data if isinstance(data, IterableDataset) else read_dataset(data, streaming)
        options = Options(**{"shard_size": 5, "batch_size": 4, "workers": 2, "progress": False, **options})
        return segment_dataset(by, by.vocabulary(labels), rows, tmp_path / folder, options)

    return run


@pytest.fixture
def arguments(model_folder, source, tmp_path):
    """Of `san segment-dataset`, those in `changes` replaced or, if None, left out."""

    def make(*more, **changes):
        given = {"dataset": source, "output": tmp_path / "out", "model": model_folder, "labels": ", ".join(LABELS)}
        given |= {"device": "cpu", "shard-size": 5, "batch-size": 4, **changes}
        options = [part for name, value in given.items() if value is not None for part in (f"--{name}", value)]
        return ["segment-dataset", *map(str, [*options, *more])]

    return make


@pytest.fixture
def run(san, arguments):
    """Runs `san segment-dataset`; returns its exit code and the lines of standard output and standard error."""
    return lambda *more, **changes: san(*arguments(*more, **changes))


def stored(folder):
    """All rows of a folder in the order of their files."""
    return [row for path in sorted(folder.glob("part-*.parquet")) for row in pq.read_table(path).to_pylist()]


def loaded(folder):
    return list(read_dataset(folder / "part-*.parquet"))


def kill_when_files_are_there(arguments, folder, number):
    """Starts `san` and kills it when it has written so many files; returns how many rows these hold."""
    process = subprocess.Popen([sys.executable, "-m", "modeling_san.commands.main", *arguments])
    while len(list(folder.glob("part-*.parquet"))) < number and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = len(stored(folder))
    assert 0 < done < 40
    return done


MANY_LABELS = tuple(f"{first} {second}" for first in "tsrqponmlkjihgfedcba" for second in "onmlkjihgfedcba")


@pytest.mark.parametrize(("labels", "bits"), [(LABELS, 8), (MANY_LABELS, 16)], ids=["3 labels", "300 labels"])
def test_each_image_gets_the_label_map_it_gets_alone_and_segments_that_name_what_is_in_it(
    label, segmenter, source, tmp_path, labels, bits
):
    label(labels=labels, with_scores=True)
    rows = loaded(tmp_path / "out")
    assert [row["row"] for row in rows] == list(range(22))
    assert max(part["index"] for row in rows for part in row["segments"]) > (255 if bits == 16 else 1)
    vocabulary = segmenter.vocabulary(labels)
    for row, original in zip(rows, read_dataset(source), strict=True):
        [expected] = segmenter(original["image"], vocabulary)
        label_map, scores = np.asarray(row["annotation"]), np.asarray(row["scores"]) / 1000
        assert label_map.dtype == f"uint{bits}"
        assert np.array_equal(label_map, expected.label_map.numpy())
        assert {segment["index"] for segment in row["segments"]} == set(np.unique(label_map))
        for segment in row["segments"]:
            inside = label_map == segment["index"]
            assert segment["label"] == labels[segment["index"]]
            assert segment["area"] == pytest.approx(inside.mean())
            assert segment["score"] == pytest.approx(scores[inside].clip(max=1).mean(), abs=6e-4)


def test_the_command_stores_images_and_columns_as_they_came_in_a_data_set_to_train_on(run, source, tmp_path):
    code, lines, _ = run("--with-images", "--keep-columns", "name")
    assert code == 0
    assert lines[0].startswith("22 images in 0.")
    assert "5 files with 22 images" in lines[1]
    assert eval(lines[2], {"datasets": datasets})["row"][:] == list(range(22))
    originals, rows = pq.read_table(source).to_pylist(), stored(tmp_path / "out")
    assert [row["image"]["bytes"] for row in rows] == [row["image"]["bytes"] for row in originals]
    assert [row["name"] for row in rows] == [row["name"] for row in originals]
    images = load_images(tmp_path / "out")
    labels = load_label_set(None, dataset=images, source=tmp_path / "out")
    assert (labels.names, len(images)) == (LABELS, 22)
    assert labels.read(images[1]["annotation"]).shape == images[1]["image"].size[::-1]


def test_a_turned_photograph_gets_an_upright_label_map(label, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = write_dataset(tmp_path / "turned.parquet", [encoded(0, (90, 60), "JPEG", exif=exif)])
    label(data=data, with_images=True)
    [row] = loaded(tmp_path / "out")
    assert row["annotation"].size == row["image"].size == (60, 90)


def test_what_an_added_name_wins_becomes_other(run, tmp_path):
    assert run("--extend-labels", "coco-stuff", labels="sky, road")[0] == 0
    rows = stored(tmp_path / "out")
    assert {segment["label"] for row in rows for segment in row["segments"]} <= {"sky", "road", "other"}
    assert any(segment["label"] == "other" and segment["index"] == 2 for row in rows for segment in row["segments"])


def test_a_batch_too_large_for_the_memory_is_run_image_by_image(label, segmenter, tmp_path):
    class Small(Segmenter):
        def segment(self, prepared, *arguments):
            if len(prepared) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return super().segment(prepared, *arguments)

    label("small", by=Small(segmenter.model, segmenter.processor))
    label("one", batch_size=1)
    assert stored(tmp_path / "small") == stored(tmp_path / "one")


def test_a_killed_run_goes_on_without_a_row_twice_or_missing(arguments, run, label, tmp_path):
    data = write_dataset(tmp_path / "many.parquet", [encoded(seed, SIZES[seed % 4]) for seed in range(40)])
    changes = {"dataset": data, "output": tmp_path / "cut", "shard-size": 2}
    done = kill_when_files_are_there(arguments(**changes), tmp_path / "cut", 3)
    # What a kill in the middle of writing leaves behind, and what it does not
    (tmp_path / "cut" / "part-000019.parquet.unfinished-0123abcd").write_bytes(b"half")

    code, lines, _ = run(**changes)
    assert code == 0
    assert lines[0].startswith(f"{40 - done} images")
    label("uncut", data, shard_size=2)
    assert [row["row"] for row in stored(tmp_path / "cut")] == list(range(40))
    assert stored(tmp_path / "cut") == stored(tmp_path / "uncut")
    assert not list((tmp_path / "cut").glob("*unfinished*"))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_finished_run_does_nothing_more_and_one_with_missing_or_damaged_files_makes_these_anew(
    label, tmp_path, streaming
):
    label("uncut", keep_columns=("name",))
    assert label(streaming=streaming, keep_columns=("name",)).images == 22
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    report = label(streaming=streaming, keep_columns=("name",))
    assert (report.images, report.total, report.parts) == (0, 22, 5)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    (tmp_path / "out" / "part-000004.parquet").unlink()
    path = tmp_path / "out" / "part-000001.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    assert label(streaming=streaming, keep_columns=("name",)).images == 5 + 2
    assert stored(tmp_path / "out") == stored(tmp_path / "uncut")


def test_sigterm_leaves_whole_files_and_ends_with_143(run, label, tmp_path, monkeypatch):
    whole = Segmenter.segment

    def segment(self, *arguments):
        if len(list((tmp_path / "out").glob("part-*.parquet"))) >= 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, *arguments)

    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(Segmenter, "segment", segment)
        code, _, _ = run()
    assert code == 143
    assert signal.getsignal(signal.SIGTERM) is handler
    assert not list((tmp_path / "out").glob("*unfinished*"))
    rows = [row["row"] for row in stored(tmp_path / "out")]
    assert rows == list(range(len(rows)))
    assert 10 <= len(rows) < 22
    label()
    assert [row["row"] for row in stored(tmp_path / "out")] == list(range(22))


def test_a_full_disk_is_named_and_the_run_goes_on_later(run, label, tmp_path):
    label("uncut")
    sizes = [path.stat().st_size for path in sorted((tmp_path / "uncut").glob("part-*.parquet"))]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # As a disk without room does, a limit lets a write fail halfway
    resource.setrlimit(resource.RLIMIT_FSIZE, (min(sizes[:4]) - 200, hard))
    try:
        code, _, errors = run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2
    assert "File too large" in errors[-1]
    assert not list((tmp_path / "out").glob("*unfinished*"))
    label()
    assert stored(tmp_path / "out") == stored(tmp_path / "uncut")


def test_a_folder_of_another_run_is_refused(label, segmenter, make_model, tmp_path):
    label()
    before = stored(tmp_path / "out")
    another_model = make_model(seed=1, text_config=segmenter.model.config.text_config.to_dict())
    other = {
        "labels": {"labels": ("sky", "street", "red truck")},
        "model": {"by": Segmenter(another_model, segmenter.processor)},
        "dataset": {"data": write_dataset(tmp_path / "other.parquet", [encoded(seed) for seed in range(1, 23)])},
        "shard_size": {"shard_size": 4},
        "columns": {"with_scores": True},
        "templates": {"settings": {"templates": ["{}"]}},
    }
    for what, changes in other.items():
        with pytest.raises(ValueError, match=rf"another run \(other {what}\)"):
            label(**changes)
    assert stored(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["part-000001.parquet", "README.md", "id2label.json"])
def test_files_that_the_run_did_not_write_are_not_overwritten(label, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(ValueError, match=name):
        label()
    assert [path.read_text() for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_stream_that_breaks_off_loses_nothing_that_was_done_and_ends_without_an_empty_file(label, tmp_path):
    broken = threading.Event()
    broken.set()

    def examples():
        for seed in range(12):
            if seed == 8 and broken.is_set():
                raise ConnectionError("the network is gone")
            yield {"image": {"bytes": encoded(seed), "path": None}}

    rows = IterableDataset.from_generator(examples, features=Features({"image": ImageFeature(decode=False)}))
    with pytest.raises(ConnectionError, match="the network is gone"):
        label(data=rows, shard_size=3)
    assert [row["row"] for row in stored(tmp_path / "out")] == list(range(6))
    broken.clear()
    report = label(data=rows, shard_size=3)
    assert (report.images, report.parts) == (6, 4)
    assert label(data=rows, shard_size=3).images == 0
    assert [row["row"] for row in stored(tmp_path / "out")] == list(range(12))


@pytest.fixture
def partly_damaged(tmp_path):
    """Nine images, of which number 2 is cut off, number 4 no image, and number 7 missing."""
    files = [encoded(seed) for seed in range(9)]
    files[2], files[4], files[7] = files[2][:200], b"no image", None
    return write_dataset(tmp_path / "damaged.parquet", files)


def test_unreadable_images_are_recorded_and_the_others_labelled_unless_it_is_to_be_strict(
    run, partly_damaged, tmp_path
):
    code, lines, errors = run("--with-images", dataset=partly_damaged)
    assert code == 0
    rows = loaded(tmp_path / "out")
    assert [row["row"] for row in rows if row["error"] is not None] == [2, 4, 7]
    assert [row["row"] for row in rows if row["annotation"] is None] == [2, 4, 7]
    assert "missing" in rows[7]["error"]
    assert "3 of 9 images" in errors[-1]
    assert "row 2" in errors[-1]
    assert "9 images" in lines[1]
    code, _, errors = run("--strict", dataset=partly_damaged, output=tmp_path / "strict")
    assert code == 2
    assert "row 2" in errors[-1]


def test_label_maps_beside_the_images_are_not_segmented(run, tmp_path):
    for kind, names in (("images", "abc"), ("annotations", "ab")):
        (tmp_path / "data" / kind).mkdir(parents=True)
        for name in names:
            (tmp_path / "data" / kind / f"{name}.png").write_bytes(encoded(0))
    code, lines, _ = run(dataset=tmp_path / "data")
    assert code == 0
    assert lines[0].startswith("3 images")
    assert len(loaded(tmp_path / "out")) == 3


def test_no_readable_image_at_all_is_an_error(run, tmp_path):
    code, _, errors = run(dataset=write_dataset(tmp_path / "bad.parquet", [b"no image"] * 3))
    assert code == 2
    assert "3 of 3 images" in errors[-2]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_of_too_many_pixels_is_recorded(label, tmp_path, monkeypatch):
    data = write_dataset(tmp_path / "large.parquet", [encoded(0), encoded(1, (200, 100))])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15000)
    label(data=data)
    first, second = stored(tmp_path / "out")
    assert first["error"] is None
    assert "200 x 100" in second["error"]


@pytest.mark.parametrize(
    ("option", "value", "word"),
    [
        ("keep-columns", "nothing", "'nothing'"),
        ("keep-columns", "image", "'image'"),
        ("image-column", "nothing", "'nothing'"),
        ("dataset", "nowhere.parquet", "nowhere.parquet"),
        ("model", "/nowhere/model", "/nowhere/model"),
        ("ray-actors", "2", "--ray"),
        ("ray", "", "[ray]"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(run, monkeypatch, option, value, word):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, errors = run(**{option: value})
    assert (code, len(errors)) == (2, 1)
    assert word in errors[0]


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one CPU each; the address to connect to."""
    ray = pytest.importorskip("ray")
    # Workers take the interpreter that runs, whatever started it
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 * 1024**2, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    cluster.add_node(**{name: value for name, value in node.items() if name != "include_dashboard"})
    yield cluster.address
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.ray
def test_a_cluster_writes_of_a_stream_what_one_process_writes(cluster, run, label, tmp_path):
    code, lines, _ = run("--keep-columns", "name", "--scores", "--streaming", "--ray-actors", 1, ray=cluster)
    assert code == 0
    assert lines[0].startswith("22 images")
    options = {"streaming": True, "keep_columns": ("name",), "with_scores": True}
    assert label(**options).images == 0
    label("local", **options)
    assert stored(tmp_path / "out") == stored(tmp_path / "local")


@pytest.mark.ray
def test_a_killed_driver_and_a_killed_worker_cost_no_row_and_repeat_none(
    cluster, arguments, model_folder, label, tmp_path
):
    data = write_dataset(tmp_path / "many.parquet", [encoded(seed, SIZES[seed % 4]) for seed in range(40)])
    changes = {"ray": cluster, "output": tmp_path / "cut", "shard-size": 2, "ray-actors": 1}
    kill_when_files_are_there(arguments(dataset=data, **changes), tmp_path / "cut", 2)

    import ray

    died = tmp_path / "died"

    def load(device):
        segmenter, vocabulary = load_segmenter(str(model_folder), list(LABELS), None, "none", "cpu")
        whole, calls = segmenter.segment, []

        def segment(*prepared):
            calls.append(prepared)
            if len(calls) == 3 and not died.exists():
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(*prepared)

        segmenter.segment = segment
        return segmenter, vocabulary

    open_rows = partial(load_dataset, "parquet", data_files=str(data), split="train")
    options = Options(shard_size=2, batch_size=4, progress=False)
    ray.init(cluster, log_to_driver=False)
    report = segment_dataset_with_ray(load, open_rows, tmp_path / "cut", options, actors=2)
    ray.shutdown()
    assert died.exists()
    assert (report.parts, report.total) == (20, 40)
    label("uncut", data, shard_size=2)
    assert [row["row"] for row in stored(tmp_path / "cut")] == list(range(40))
    assert stored(tmp_path / "cut") == stored(tmp_path / "uncut")
