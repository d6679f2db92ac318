"""Evaluation: its figures, its files, its processes, and what is left of a run that was cut."""

import csv
import io
import json
import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, Features, IterableDataset
from datasets import Image as ImageFeature
from PIL import Image

from modeling_san.commands.main import main
from modeling_san.processing import views_san
from modeling_san.processing.fingerprints import digest_weights
from modeling_san.processing.segmenter import Segmenter
from modeling_san.training import data
from modeling_san.training import evaluate as evaluation
from modeling_san.training.evaluate import evaluate, format_table, model_index, save_overlays
from modeling_san.training.label_sets import LabelSet, load_label_set
from modeling_san.training.plots import plot_class_iou

pytestmark = pytest.mark.slow

NAMES = ("sky", "road", "car", "tree")
SIZE = {"shortest_edge": 32, "longest_edge": 128}


@pytest.fixture(scope="module")
def label_set():
    return LabelSet(NAMES)


@pytest.fixture(scope="module")
def images():
    """Seven small images of different sizes; the third has no labels."""
    rng = np.random.default_rng(0)
    examples = []
    for index in range(7):
        size = (30 + index, 44 - index)
        label_map = rng.choice([0, 1, 2, 255], size).astype(np.uint8)
        if index == 2:
            label_map[:] = 255
        image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        examples.append({"image": image, "annotation": Image.fromarray(label_map)})
    return examples


@pytest.fixture
def small_processor(processor):
    """The processor at a working size of 32 pixels."""
    before = processor.image_processor.size
    processor.image_processor.size = SIZE
    yield processor
    processor.image_processor.size = before


@pytest.fixture(scope="module")
def tiny(make_model):
    return make_model()


@pytest.fixture
def without_plot(monkeypatch):
    """Leaves out the plot, which takes longer than all else."""
    monkeypatch.setattr(evaluation, "plot_class_iou", lambda *_, **__: None)


@torch.no_grad()
def counts_by_hand(model, processor, images, predict=None):
    """Pairs of true and predicted classes, image by image and pixel by pixel."""
    counts = np.zeros((len(NAMES), len(NAMES)), dtype=np.int64)
    text = processor(text=list(NAMES), return_tensors="pt")
    for example in images:
        inputs = processor(images=example["image"], return_tensors="pt")
        outputs = model(**inputs, **text)
        true = np.asarray(example["annotation"])
        [predicted] = processor.post_process_semantic_segmentation(outputs, target_sizes=[true.shape])
        for one, two in zip(true[true < 255], predicted.numpy()[true < 255], strict=True):
            counts[one, two] += 1
    return counts


def means_by_hand(counts):
    hits = np.diag(counts).astype(float)
    with np.errstate(invalid="ignore"):
        return hits / (counts.sum(0) + counts.sum(1) - hits), hits / counts.sum(1)


def test_figures_are_those_of_the_pixels(tiny, small_processor, images, label_set):
    results = evaluate(
        tiny,
        small_processor,
        images,
        label_set,
        subsets={"base": ["sky", "road"], "novel": ["Car "]},
        progress=False,
    )
    iou, accuracy = means_by_hand(counts_by_hand(tiny, small_processor, images))
    assert results["mean_iou"] == pytest.approx(np.nanmean(iou))
    assert results["mean_accuracy"] == pytest.approx(np.nanmean(accuracy))
    assert results["per_class_accuracy"]["tree"] is None
    assert results["subsets"]["base"]["mean_iou"] == pytest.approx(np.nanmean(iou[:2]))
    assert results["subsets"]["novel"]["mean_iou"] == pytest.approx(iou[2])
    assert (results["images"], results["unlabelled_images"]) == (7, 1)
    rows = [line for line in format_table(results).splitlines() if line.startswith((*NAMES, "mean"))]
    assert len(rows) == 4 + 3
    assert len({len(row) for row in rows}) == 1


def test_the_model_is_given_back_as_it_was(make_model, small_processor, images, label_set):
    model = make_model()
    model.set_labels(["truck", "car"], small_processor)
    model.train()
    before, config = {name: value.clone() for name, value in model.state_dict().items()}, model.config.to_dict()
    evaluate(model, small_processor, images[:1], label_set, progress=False)
    assert model.training
    assert model.config.to_dict() == config
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_stored_class_embeddings_serve_only_for_their_own_names(make_model, small_processor, images, label_set):
    model = make_model()
    model.set_labels(list(NAMES), small_processor)
    encoded = evaluate(model, small_processor, images, label_set, progress=False)
    # The same names with other vectors: whoever encodes them anew would not see the difference
    model.stored_class_embeds = model.stored_class_embeds.flip(0)
    stored = evaluate(model, small_processor, images, label_set, progress=False)
    assert stored != encoded
    others = LabelSet(NAMES[::-1])
    renamed = evaluate(model, small_processor, images, others, progress=False)
    assert renamed == evaluate(make_model(), small_processor, images, others, progress=False)
    given = evaluate(
        model, small_processor, images, label_set, class_embeds=model.stored_class_embeds.flip(0), progress=False
    )
    assert given == encoded


def test_limit_takes_the_first_images(tiny, small_processor, images, label_set):
    assert evaluate(tiny, small_processor, images, label_set, limit=4, progress=False) == evaluate(
        tiny, small_processor, images[:4], label_set, progress=False
    )


def test_a_streamed_data_set_gives_the_same(tiny, small_processor, images, label_set):
    streamed = IterableDataset.from_generator(lambda: iter(images))
    for limit in (None, 5):
        assert evaluate(tiny, small_processor, streamed, label_set, limit=limit, progress=False) == evaluate(
            tiny, small_processor, images, label_set, limit=limit, progress=False
        )


# Test-time augmentation


def test_the_views_of_a_model_that_works_at_640_are_those_of_the_paper():
    sizes = views_san.view_sizes({"shortest_edge": 640, "longest_edge": 2560})
    assert [size["shortest_edge"] for size in sizes] == [320, 480, 640, 800, 960, 1120]
    assert all(size["longest_edge"] == 4 * size["shortest_edge"] for size in sizes)


@pytest.mark.parametrize("block", [views_san._BLOCK_FLOATS, 500])
@torch.no_grad()
def test_augmentation_takes_the_best_mean_score(tiny, small_processor, images, monkeypatch, block):
    monkeypatch.setattr(views_san, "_BLOCK_FLOATS", block)
    image = images[0]["image"]
    text = small_processor(text=list(NAMES), return_tensors="pt")
    scores = []
    for size in views_san.view_sizes(SIZE):
        for flip in (False, True):
            view = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image
            outputs = tiny(**small_processor(images=view, size=size, return_tensors="pt"), **text)
            [score] = small_processor.post_process_semantic_scores(outputs, target_sizes=[image.size[::-1]])
            scores.append(score.flip(-1) if flip else score)
    mean = torch.stack(scores).mean(0)
    first, second = mean.topk(2, dim=0).values
    clear = first - second > 1e-5
    segmenter = Segmenter(tiny, small_processor)
    [segmentation] = segmenter(image, segmenter.vocabulary(NAMES), tta=True)
    assert clear.float().mean() > 0.9
    assert (segmentation.label_map == mean.argmax(0))[clear].all()
    assert torch.allclose(segmentation.scores, first, atol=1e-5)


def test_evaluation_averages_the_views_where_it_is_asked_to(tiny, small_processor, images, label_set):
    segmenter = Segmenter(tiny, small_processor)
    results = evaluate(tiny, small_processor, images[:1], label_set, tta=True, progress=False)
    [segmentation] = segmenter(images[0]["image"], segmenter.vocabulary(NAMES), tta=True)
    true = np.asarray(images[0]["annotation"])
    counted = true < 255
    right = segmentation.label_map.numpy()[counted] == true[counted]
    assert results["overall_accuracy"] == pytest.approx(right.mean())


# Files


def test_files_hold_what_was_measured(tiny, small_processor, images, label_set, tmp_path):
    about = {"model": "some/san", "dataset": "org/streets", "split": "val"}
    results = evaluate(
        tiny,
        small_processor,
        images,
        label_set,
        output_dir=tmp_path,
        subsets={"base": ["sky"]},
        overlays=2,
        progress=False,
        about=about,
    )
    written = json.loads((tmp_path / "results.json").read_text())
    assert written.pop("weights") == digest_weights(tiny.state_dict())
    assert written.pop("evaluation")
    assert written == {**results, **about, "tta": False, "limit": None}
    rows = list(csv.DictReader((tmp_path / "per_class.csv").open()))
    counts = counts_by_hand(tiny, small_processor, images)
    assert [row["class"] for row in rows] == list(NAMES)
    assert [int(row["pixels"]) for row in rows] == counts.sum(1).tolist()
    assert [row["base"] for row in rows] == ["1", "0", "0", "0"]
    assert (np.load(tmp_path / "confusion_matrix.npz")["counts"] == counts).all()
    [entry] = yaml.safe_load((tmp_path / "model-index.yml").read_text())["model-index"]
    assert entry["name"] == "san"
    assert entry["results"][0]["dataset"] == {"name": "streets", "type": "org/streets", "split": "val"}
    metrics = {metric["name"]: metric["value"] for metric in entry["results"][0]["metrics"]}
    assert metrics["Mean IoU"] == pytest.approx(results["mean_iou"], abs=1e-6)
    assert metrics["Mean IoU of base"] == pytest.approx(results["per_class_iou"]["sky"], abs=1e-6)
    assert len(list((tmp_path / "overlays").glob("best_*.png"))) == 2
    assert len(list((tmp_path / "overlays").glob("worst_*.png"))) == 2
    assert Image.open(tmp_path / "per_class_iou.png").size[0] > 400
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())


@pytest.mark.usefixtures("without_plot")
def test_the_best_and_worst_images_are_drawn(tiny, small_processor, images, label_set, tmp_path):
    evaluate(tiny, small_processor, images, label_set, output_dir=tmp_path, overlays=1, progress=False)
    scores = {
        index: np.nanmean(means_by_hand(counts_by_hand(tiny, small_processor, [example]))[0])
        for index, example in enumerate(images)
        if index != 2
    }
    # Several images may share the best score, or the worst
    drawn = sorted(path.stem.rpartition("_") for path in (tmp_path / "overlays").iterdir())
    assert [(name, scores[int(index)]) for name, _, index in drawn] == [
        ("best_1_image", max(scores.values())),
        ("worst_1_image", min(scores.values())),
    ]


def test_overlays_show_image_truth_and_prediction(tiny, small_processor, images, label_set, tmp_path):
    paths = save_overlays(tiny, small_processor, images, label_set, tmp_path / "step", count=2)
    assert sorted((tmp_path / "step").iterdir()) == paths
    assert len(paths) == 2
    for path in paths:
        with Image.open(path) as sheet:
            assert sheet.width > 3 * 512


@pytest.mark.parametrize("classes", [1, 11, 171, 847])
def test_a_plot_of_any_number_of_classes_is_drawn(tmp_path, classes):
    iou = {f"class $_{index}": None if index % 7 == 6 else index / classes for index in range(classes)}
    image = Image.open(plot_class_iou(iou, tmp_path / "plot.png", title="all $ of them"))
    assert image.width < 4000
    assert image.height < 4000


def test_results_without_a_file_system_path_in_the_card(tmp_path):
    (tmp_path / "val.parquet").touch()
    results = {**dict.fromkeys(evaluation.MEASURES, 0.5), "subsets": {}}
    [entry] = model_index(results, {"model": str(tmp_path / "model"), "dataset": str(tmp_path / "val.parquet")})
    assert str(tmp_path) not in json.dumps(entry)


# Bad input


def test_what_cannot_be_evaluated_is_said(tiny, small_processor, images, label_set):
    for changes, message in (
        ({"images": [images[2]]}, "no pixel of the images has a label"),
        ({"limit": 0}, "limit is 0"),
        ({"subsets": {"base": ["sky", "ocean"]}}, "'ocean', which the 4 classes"),
        ({"subsets": {"base": []}}, "subset 'base' is empty"),
        ({"label_set": LabelSet(NAMES[:2])}, "example 0: the label map holds"),
        ({"class_embeds": torch.zeros(3, 16)}, "of 3 classes and there are 4"),
    ):
        arguments = {"images": images, "label_set": label_set, **changes}
        with pytest.raises(ValueError, match=message):
            evaluate(tiny, small_processor, progress=False, **arguments)


# Runs that are cut, and runs on several processes


class Cut(Exception):
    """Stops an evaluation in the middle."""


@contextmanager
def cut_after(monkeypatch, count):
    """Let the evaluation fail at its image number `count`; counts how many it decodes."""
    seen = SimpleNamespace(count=0)
    decode = data.to_arrays

    def decode_or_stop(example, label_set):
        seen.count += 1
        # One image more is decoded for the fingerprint
        if count is not None and seen.count > count + 1:
            raise Cut
        return decode(example, label_set)

    with monkeypatch.context() as patch:
        patch.setattr(data, "to_arrays", decode_or_stop)
        yield seen


def run_files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("without_plot")
@pytest.mark.parametrize("streamed", [False, True], ids=["map", "stream"])
def test_a_cut_run_goes_on(tiny, small_processor, images, label_set, tmp_path, monkeypatch, streamed):
    read = IterableDataset.from_generator(lambda: iter(images)) if streamed else images
    arguments = {"overlays": 1, "save_every": 0.0, "progress": False}
    evaluate(tiny, small_processor, read, label_set, output_dir=tmp_path / "uncut", **arguments)
    with cut_after(monkeypatch, 5), pytest.raises(Cut):
        evaluate(tiny, small_processor, read, label_set, output_dir=tmp_path / "cut", **arguments)
    with cut_after(monkeypatch, None) as seen:
        evaluate(tiny, small_processor, read, label_set, output_dir=tmp_path / "cut", **arguments)
    # The first for the fingerprint, those that were not counted, and the best and the worst to be drawn
    assert seen.count == 1 + (7 - 5) + 2
    assert run_files(tmp_path / "cut") == run_files(tmp_path / "uncut")


@pytest.mark.usefixtures("without_plot")
@pytest.mark.parametrize("content", [b"half a file", b"[]", b"{}", b"\xff"])
def test_a_damaged_state_is_begun_anew(tiny, small_processor, images, label_set, tmp_path, monkeypatch, content):
    arguments = {"output_dir": tmp_path, "overlays": 0, "save_every": 0.0, "progress": False}
    with cut_after(monkeypatch, 3), pytest.raises(Cut):
        evaluate(tiny, small_processor, images, label_set, **arguments)
    [state] = tmp_path.glob(".evaluating-*.json")
    state.write_bytes(content)
    assert evaluate(tiny, small_processor, images, label_set, **arguments)["images"] == 7


@pytest.mark.usefixtures("without_plot")
@pytest.mark.parametrize("change", ["model", "data", "labels", "size", "limit"])
def test_another_run_does_not_go_on_from_an_old_one(
    make_model, small_processor, images, label_set, tmp_path, monkeypatch, change
):
    model = make_model()
    with cut_after(monkeypatch, 3), pytest.raises(Cut):
        evaluate(
            model,
            small_processor,
            images,
            label_set,
            output_dir=tmp_path,
            save_every=0.0,
            progress=False,
            overlays=1,
        )
    limit = None
    if change == "model":
        with torch.no_grad():
            model.background_embedding += 1e-3
    elif change == "data":
        images = [images[1], *images[1:]]
    elif change == "labels":
        label_set = LabelSet(NAMES, ignore_index=200)
        images = [
            {**one, "annotation": Image.fromarray(np.minimum(np.asarray(one["annotation"]), 200))} for one in images
        ]
    elif change == "size":
        small_processor.image_processor.size = {"shortest_edge": 48, "longest_edge": 128}
    else:
        limit = 6
    with cut_after(monkeypatch, None) as seen:
        results = evaluate(
            model, small_processor, images, label_set, output_dir=tmp_path, progress=False, limit=limit, overlays=1
        )
    assert results["images"] == (limit or 7)
    assert seen.count == 1 + results["images"] + 2


@pytest.mark.usefixtures("without_plot")
def test_what_others_have_in_the_folder_stays(tiny, small_processor, images, label_set, tmp_path):
    foreign = ["notes.txt", "overlays/best_of_all.png", "overlays/mine.png", ".hidden"]
    for name in foreign:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    for _ in range(2):
        evaluate(tiny, small_processor, images, label_set, output_dir=tmp_path, progress=False, overlays=1)
    assert all((tmp_path / name).read_text() == "mine" for name in foreign)
    assert len(list((tmp_path / "overlays").iterdir())) == 2 + 2


@pytest.mark.usefixtures("without_plot")
def test_results_of_another_evaluation_are_not_replaced(make_model, small_processor, images, label_set, tmp_path):
    arguments = {"output_dir": tmp_path, "progress": False, "overlays": 1}
    model = make_model()
    evaluate(model, small_processor, images, label_set, **arguments)
    before = run_files(tmp_path)
    with torch.no_grad():
        model.background_embedding += 1
    for other in ({}, {"limit": 3}):
        with pytest.raises(ValueError, match=r"results\.json holds other results"):
            evaluate(model, small_processor, images, label_set, **arguments, **other)
    assert run_files(tmp_path) == before


@pytest.mark.usefixtures("without_plot")
@pytest.mark.parametrize("streamed", [False, True], ids=["map", "stream"])
def test_damaged_images_are_counted_and_left_out_where_that_is_meant(
    tiny, small_processor, images, label_set, tmp_path, monkeypatch, streamed
):
    file = io.BytesIO()
    images[3]["image"].save(file, "png")
    eps = io.BytesIO()
    images[4]["image"].save(eps, "eps")
    damaged = list(images)
    damaged[0] = {**images[3], "image": {"bytes": file.getvalue()[:200], "path": None}}
    damaged[4] = {**images[4], "image": {"bytes": eps.getvalue(), "path": "holiday.jpg"}}
    damaged[5] = {**images[5], "annotation": np.full((2, 2), 0)}
    read = IterableDataset.from_generator(lambda: iter(damaged)) if streamed else damaged
    arguments = {"output_dir": tmp_path, "progress": False, "overlays": 1, "save_every": 0.0}
    with pytest.raises(data.ImageError, match="val, example 0: "):
        evaluate(tiny, small_processor, read, label_set, **arguments, about={"dataset": "val"})
    with cut_after(monkeypatch, 5), pytest.raises(Cut):
        evaluate(tiny, small_processor, read, label_set, **arguments, skip_damaged=True)
    results = evaluate(tiny, small_processor, read, label_set, **arguments, skip_damaged=True)
    assert (results["images"], results["damaged_images"]) == (4, 3)
    sound = [images[index] for index in (1, 2, 3, 6)]
    expected = evaluate(tiny, small_processor, sound, label_set, progress=False)
    assert results == {**expected, "damaged_images": 3}


def test_classes_that_no_image_holds_are_named(tiny, small_processor, images, label_set, caplog):
    evaluate(tiny, small_processor, images, label_set, progress=False)
    assert "1 of 4 classes are in no label map of these images: tree" in caplog.text
    masks = [{**one, "annotation": np.where(np.asarray(one["annotation"]) == 1, 255, 0)} for one in images]
    binary = LabelSet(("background", "lesion"))
    evaluate(tiny, small_processor, masks, binary, progress=False)
    assert "--map 255=1" in caplog.text
    mapped = load_label_set(binary, value_map={255: 1})
    assert evaluate(tiny, small_processor, masks, mapped, progress=False)["per_class_iou"]["lesion"] is not None


PROCESSES = """
import multiprocessing, os, signal, sys

from modeling_san.commands.main import main
from modeling_san.training import data
from modeling_san.training import evaluate as evaluation

model, images, labels, distributed, killed, port = sys.argv[1:]
command = ["evaluate", "--model", model, "--dataset", images, "--labels", labels, "--device", "cpu", "--overlays", "1"]
# Every image is saved, so that the killed process leaves something
evaluation.evaluate.__kwdefaults__.update(save_every=0)


def process(rank):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    sys.exit(main([*command, "--output", distributed]))


def killed_process():
    decode, seen = data.to_arrays, []

    def decode_or_die(example, label_set):
        seen.append(example)
        if len(seen) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(example, label_set)

    data.to_arrays = decode_or_die
    main([*command, "--output", killed])


# Loaded once for all
fork = multiprocessing.get_context("fork")
processes = [fork.Process(target=process, args=(rank,)) for rank in (0, 1)] + [fork.Process(target=killed_process)]
for one in processes:
    one.start()
for one in processes:
    one.join()
sys.exit([one.exitcode for one in processes] != [0, 0, -signal.SIGKILL])
"""


@pytest.mark.usefixtures("one_thread")
def test_two_processes_and_a_killed_one_measure_what_one_does(
    tiny, small_processor, images, tmp_path, capsys, monkeypatch
):
    model, parquet, labels = tmp_path / "model", tmp_path / "val.parquet", tmp_path / "labels.json"
    tiny.save_pretrained(model)
    small_processor.save_pretrained(model)
    Dataset.from_list(images, features=Features(image=ImageFeature(), annotation=ImageFeature())).to_parquet(parquet)
    labels.write_text(json.dumps(NAMES))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    program = tmp_path / "program.py"
    program.write_text(PROCESSES)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, program, model, parquet, labels, tmp_path / "two", tmp_path / "killed", port],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("overall accuracy") == 1

    command = [
        "evaluate",
        "--model",
        str(model),
        "--dataset",
        str(parquet),
        "--labels",
        str(labels),
        "--device",
        "cpu",
    ]
    command += ["--overlays", "1"]
    assert main([*command, "--output", str(tmp_path / "one")]) == 0
    with cut_after(monkeypatch, None) as seen:
        assert main([*command, "--output", str(tmp_path / "killed")]) == 0
    # The first image for the fingerprint, those that the killed process had not counted, and the two that are drawn
    assert seen.count == 1 + (7 - 3) + 2
    one = run_files(tmp_path / "one")
    assert run_files(tmp_path / "two") == one
    assert run_files(tmp_path / "killed") == one


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "nowhere.parquet"], "nowhere.parquet cannot be read as a data set"),
        (["--labels", "ade20k_151"], "ade20k_151"),
        (["--subset", "base"], "write NAME=FILE"),
        (["--subset", "base=ocean"], "'ocean'"),
        (["--subset", "base=sky", "--subset", "base=road"], "given twice"),
        (["--overlays", "-1"], "-1"),
        (["--label-column", "nothing"], "nothing"),
        (["--limit", "0"], "whole number of at least 1"),
    ],
)
def test_wrong_options_end_with_one_line(tmp_path, capsys, images, options, message):
    data, labels = tmp_path / "val.parquet", tmp_path / "labels.json"
    features = Features(image=ImageFeature(), annotation=ImageFeature())
    Dataset.from_list(images[:1], features=features).to_parquet(data)
    labels.write_text(json.dumps(NAMES))
    command = ["evaluate", "--dataset", str(data), "--labels", str(labels), "--output", str(tmp_path / "out")]
    capsys.readouterr()
    try:
        code = main([*command, *options])
    except SystemExit as error:
        code = error.code
    assert code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
