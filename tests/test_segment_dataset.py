"""Labelling whole data sets: complete, the same however often it was cut off, and ready to load."""

import copy
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
from datasets import Dataset, Features, IterableDataset, Value, load_dataset
from datasets import Image as ImageFeature
from PIL import Image

from modeling_san import SANImageProcessor, SANProcessor
from modeling_san.commands.main import main
from modeling_san.commands.segment_dataset import load_segmenter
from modeling_san.processing import Segmenter
from modeling_san.processing.segment_dataset import Options, segment_dataset, segment_dataset_with_ray
from modeling_san.training.label_sets import load_label_set
from modeling_san.training.sources import load_images

# In every test: the segmenter is shared by all, and keeps the vocabulary as the first of them encoded it
pytestmark = pytest.mark.usefixtures("one_thread")

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


def read_dataset(path, streaming=False):
    return load_dataset("parquet", data_files=str(path), split="train", streaming=streaming)


@pytest.fixture(scope="module")
def segmenter(make_config, make_model, tokenizer):
    long_tokenizer = copy.deepcopy(tokenizer)
    long_tokenizer.model_max_length = 96
    image_processor = SANImageProcessor(size={"shortest_edge": 64, "longest_edge": 256})
    processor = SANProcessor(image_processor, long_tokenizer, templates=["a photo of a {}.", "{}"])
    model = make_model(text_config={**make_config().text_config.to_dict(), "max_position_embeddings": 96})
    return Segmenter(model, processor)


@pytest.fixture(scope="module")
def model_folder(segmenter, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny-san"
    segmenter.model.save_pretrained(folder)
    segmenter.processor.save_pretrained(folder)
    return folder


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
def san(capsys, arguments):
    """Runs `san segment-dataset`; returns its exit code and the lines of standard output and standard error."""

    def run(*more, **changes):
        try:
            code = main(arguments(*more, **changes))
        except SystemExit as stop:
            code = stop.code
        written = capsys.readouterr()
        return code, written.out.splitlines(), written.err.splitlines()

    return run


def stored(folder):
    """All rows of a folder in the order of their files."""
    return [row for path in sorted(folder.glob("part-*.parquet")) for row in pq.read_table(path).to_pylist()]


def loaded(folder):
    return list(read_dataset(folder / "part-*.parquet"))


def kill_when(process, is_time):
    while not is_time() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


# --------------------------------------------------------------------------------------------------- what is written


def test_each_image_gets_the_label_map_it_gets_alone(label, segmenter, source, tmp_path):
    label()
    rows = loaded(tmp_path / "out")
    assert [row["row"] for row in rows] == list(range(22))
    vocabulary = segmenter.vocabulary(LABELS)
    for row, original in zip(rows, read_dataset(source), strict=True):
        [expected] = segmenter(original["image"], vocabulary)
        assert np.array_equal(np.asarray(row["annotation"]), expected.label_map.numpy())


def test_segments_name_what_the_label_map_holds(label, tmp_path):
    label(with_scores=True)
    for row in loaded(tmp_path / "out"):
        label_map, scores = np.asarray(row["annotation"]), np.asarray(row["scores"]) / 1000
        assert {segment["index"] for segment in row["segments"]} == set(np.unique(label_map))
        for segment in row["segments"]:
            inside = label_map == segment["index"]
            assert segment["label"] == LABELS[segment["index"]]
            assert segment["area"] == pytest.approx(inside.mean())
            assert segment["score"] == pytest.approx(scores[inside].clip(max=1).mean(), abs=6e-4)


def test_images_and_columns_are_stored_as_they_came(san, source, tmp_path):
    assert san("--with-images", "--keep-columns", "name")[0] == 0
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


def test_more_than_255_labels_take_16_bits(label, segmenter, tmp_path):
    names = tuple(f"{first} {second}" for first in "abcdefghijklmnopqrst" for second in "abcdefghijklmno")
    label(labels=names)
    label("turned", labels=names[::-1])
    pairs = zip(loaded(tmp_path / "out"), loaded(tmp_path / "turned"), strict=True)
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


def test_a_batch_too_large_for_the_memory_is_run_image_by_image(label, segmenter, tmp_path):
    class Small(Segmenter):
        def segment(self, prepared, *arguments):
            if len(prepared) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return super().segment(prepared, *arguments)

    label("small", by=Small(segmenter.model, segmenter.processor))
    label("one", batch_size=1)
    assert stored(tmp_path / "small") == stored(tmp_path / "one")


# ------------------------------------------------------------------------------------------------- cuts and restarts


def test_a_killed_run_goes_on_without_a_row_twice_or_missing(arguments, san, label, tmp_path):
    data = write_dataset(tmp_path / "many.parquet", [encoded(seed, SIZES[seed % 4]) for seed in range(40)])
    changes = {"dataset": data, "output": tmp_path / "cut", "shard-size": 2}
    command = [sys.executable, "-m", "modeling_san.commands.main", *arguments(**changes)]
    kill_when(subprocess.Popen(command), lambda: len(list((tmp_path / "cut").glob("part-*.parquet"))) >= 3)
    done = len(stored(tmp_path / "cut"))
    assert 0 < done < 40
    # What a kill in the middle of writing leaves behind, and what it does not
    (tmp_path / "cut" / "part-000019.parquet.unfinished-0123abcd").write_bytes(b"half")

    code, lines, _ = san(**changes)
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


def test_sigterm_leaves_whole_files_and_ends_with_143(san, label, tmp_path, monkeypatch):
    whole = Segmenter.segment

    def segment(self, *arguments):
        if len(list((tmp_path / "out").glob("part-*.parquet"))) >= 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, *arguments)

    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(Segmenter, "segment", segment)
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
    assert "File too large" in errors[-1]
    assert not list((tmp_path / "out").glob("*unfinished*"))
    label()
    assert stored(tmp_path / "out") == stored(tmp_path / "uncut")


@pytest.mark.parametrize("change", ["labels", "model", "dataset", "shard_size", "columns", "templates"])
def test_a_folder_of_another_run_is_refused(label, segmenter, make_model, tmp_path, change):
    label()
    before = stored(tmp_path / "out")
    other = write_dataset(tmp_path / "other.parquet", [encoded(seed) for seed in range(1, 23)])
    another_model = make_model(seed=1, text_config=segmenter.model.config.text_config.to_dict())
    arguments = {
        "labels": {"labels": ("sky", "street", "red truck")},
        "model": {"by": Segmenter(another_model, segmenter.processor)},
        "dataset": {"data": other},
        "shard_size": {"shard_size": 4},
        "columns": {"with_scores": True},
        "templates": {"settings": {"templates": ["{}"]}},
    }
    with pytest.raises(ValueError, match=rf"another run \(other {change}\)"):
        label(**arguments[change])
    assert stored(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["part-000001.parquet", "README.md", "id2label.json"])
def test_files_that_the_run_did_not_write_are_not_overwritten(label, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(ValueError, match=name):
        label()
    assert [path.read_text() for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_stream_that_ends_with_a_shard_makes_no_empty_file(label, tmp_path):
    data = write_dataset(tmp_path / "ten.parquet", [encoded(seed) for seed in range(10)])
    assert label(data=data, streaming=True).parts == 2
    assert label(data=data, streaming=True).images == 0


def test_a_stream_that_breaks_off_loses_nothing_that_was_done(label, tmp_path):
    broken = threading.Event()
    broken.set()

    def examples():
        for seed in range(13):
            if seed == 8 and broken.is_set():
                raise ConnectionError("the network is gone")
            yield {"image": {"bytes": encoded(seed), "path": None}}

    rows = IterableDataset.from_generator(examples, features=Features({"image": ImageFeature(decode=False)}))
    with pytest.raises(ConnectionError, match="the network is gone"):
        label(data=rows, shard_size=3)
    assert [row["row"] for row in stored(tmp_path / "out")] == list(range(6))
    broken.clear()
    assert label(data=rows, shard_size=3).images == 7
    assert [row["row"] for row in stored(tmp_path / "out")] == list(range(13))


# ------------------------------------------------------------------------------------------------- images gone bad


@pytest.fixture
def partly_damaged(tmp_path):
    """Nine images, of which number 2 is cut off, number 4 no image, and number 7 missing."""
    files = [encoded(seed) for seed in range(9)]
    files[2], files[4], files[7] = files[2][:200], b"no image", None
    return write_dataset(tmp_path / "damaged.parquet", files)


def test_unreadable_images_are_recorded_and_the_others_labelled(san, partly_damaged, tmp_path):
    code, lines, errors = san("--with-images", dataset=partly_damaged)
    assert code == 0
    rows = loaded(tmp_path / "out")
    assert [row["row"] for row in rows if row["error"] is not None] == [2, 4, 7]
    assert [row["row"] for row in rows if row["annotation"] is None] == [2, 4, 7]
    assert "missing" in rows[7]["error"]
    assert "3 of 9 images" in errors[-1]
    assert "row 2" in errors[-1]
    assert "9 images" in lines[1]


def test_strict_stops_at_the_first_unreadable_image(san, partly_damaged):
    code, _, errors = san("--strict", dataset=partly_damaged)
    assert code == 2
    assert "row 2" in errors[-1]


def test_no_readable_image_at_all_is_an_error(san, tmp_path):
    code, _, errors = san(dataset=write_dataset(tmp_path / "bad.parquet", [b"no image"] * 3))
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


# ------------------------------------------------------------------------------------------------------- the command


def test_the_command_says_how_many_how_fast_and_how_to_load(san):
    code, lines, _ = san()
    assert code == 0
    assert lines[0].startswith("22 images in 0.")
    assert "5 files with 22 images" in lines[1]
    assert eval(lines[2], {"datasets": datasets})["row"][:] == list(range(22))


@pytest.mark.parametrize(
    ("option", "value", "word"),
    [
        ("keep-columns", "nothing", "'nothing'"),
        ("keep-columns", "image", "'image'"),
        ("image-column", "nothing", "'nothing'"),
        ("dataset", "nowhere.parquet", "nowhere.parquet"),
        ("model", "/nowhere/model", "/nowhere/model"),
        ("ray-actors", "2", "--ray"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(san, option, value, word):
    code, _, errors = san(**{option: value})
    assert code == 2
    assert len(errors) == 1
    assert word in errors[0]


def test_without_ray_its_extra_is_named(san, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, errors = san("--ray")
    assert code == 2
    assert "[ray]" in errors[-1]


# --------------------------------------------------------------------------------------------------------------- Ray


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
def test_a_cluster_writes_of_a_stream_what_one_process_writes(cluster, san, label, tmp_path):
    code, lines, _ = san("--keep-columns", "name", "--scores", "--streaming", "--ray-actors", 1, ray=cluster)
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
    driver = [sys.executable, "-m", "modeling_san.commands.main"]
    driver += arguments(dataset=data, ray=cluster, output=tmp_path / "cut", **{"shard-size": 2, "ray-actors": 1})
    kill_when(subprocess.Popen(driver), lambda: len(list((tmp_path / "cut").glob("part-*.parquet"))) >= 2)
    done = len(stored(tmp_path / "cut"))
    assert 0 < done < 40

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
