"""The metric `mean_iou`: the stock one's numbers, from counts that do not grow."""

import itertools
import json
import threading
from functools import partial

import evaluate
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from modeling_san.training.mean_iou import MEAN_IOU, MeanIoU
from modeling_san.training.metrics import ConfusionMatrix

CASES = ("plain", "ade_like", "nan_to_zero", "many_classes")
STOCK_KEYS = ("mean_iou", "mean_accuracy", "overall_accuracy", "per_category_iou", "per_category_accuracy")


@pytest.fixture
def metric(tmp_path):
    return evaluate.load(MEAN_IOU, cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def maps():
    """Three predictions and references of different sizes: classes 0 ... 4, ignored pixels, values outside."""
    rng = np.random.default_rng(0)
    sizes = ((7, 9), (12, 5), (8, 8))
    predictions = [rng.integers(0, 7, size).astype(np.uint8) for size in sizes]
    references = [rng.choice([0, 1, 2, 3, 4, 6, 254, 255], size).astype(np.uint8) for size in sizes]
    return predictions, references


def count_by_hand(predictions, references, num_labels, ignore_index, label_map=None, reduce_labels=False):
    """The stock metric's figures pixel by pixel, straight from its description."""
    hits, predicted, true = ([0] * num_labels for _ in range(3))
    for prediction, reference in zip(predictions, references, strict=True):
        for guess, truth in zip(np.ravel(prediction).tolist(), np.ravel(reference).tolist(), strict=True):
            value = (label_map or {}).get(truth, truth)
            if reduce_labels:
                value = 255 if value in (0, 255) else value - 1
            if value == ignore_index:
                continue
            if 0 <= guess < num_labels:
                predicted[guess] += 1
            if 0 <= value < num_labels:
                true[value] += 1
                hits[value] += value == guess
    union = [one + two - hit for one, two, hit in zip(predicted, true, hits, strict=True)]
    iou = [hit / pixels if pixels else float("nan") for hit, pixels in zip(hits, union, strict=True)]
    accuracy = [hit / pixels if pixels else float("nan") for hit, pixels in zip(hits, true, strict=True)]
    return {
        "mean_iou": np.nanmean(iou),
        "mean_accuracy": np.nanmean(accuracy),
        "overall_accuracy": sum(hits) / sum(true),
        "per_category_iou": iou,
        "per_category_accuracy": accuracy,
    }


def assert_figures(results, expected):
    for key in STOCK_KEYS:
        np.testing.assert_allclose(
            np.asarray(results[key], dtype=float), np.asarray(expected[key], dtype=float), rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("streamed", [False, True], ids=["at once", "streamed"])
@pytest.mark.parametrize("name", CASES)
def test_numbers_are_those_of_the_stock_metric(metric, reference, name, streamed):
    [case] = [case for case in json.loads((reference / "mean_iou.json").read_text()) if case["name"] == name]
    arrays = load_file(reference / "mean_iou.safetensors")
    predictions, references = (
        [arrays[f"{name}.{kind}_{index}"] for index in range(case["images"])] for kind in ("prediction", "reference")
    )
    options = {key: case[key] for key in ("num_labels", "ignore_index", "nan_to_num", "label_map", "reduce_labels")}
    if streamed:
        for prediction, truth in zip(predictions, references, strict=True):
            metric.add_batch(predictions=[torch.from_numpy(prediction.astype(np.int64))], references=[truth])
        results = metric.compute(**options)
    else:
        results = metric.compute(predictions=predictions, references=references, **options)
    assert_figures(results, case["expected"])


@pytest.mark.parametrize("reduce_labels", [False, True])
@pytest.mark.parametrize("label_map", [None, {0: 1, 1: 0, 254: 3, 6: 255}])
@pytest.mark.parametrize("ignore_index", [255, 2, None])
def test_options_given_at_the_end_count_for_all_that_was_added(metric, maps, ignore_index, label_map, reduce_labels):
    for prediction, truth in zip(*maps, strict=True):
        metric.add(prediction=prediction, reference=truth)
    options = {"ignore_index": ignore_index, "label_map": label_map, "reduce_labels": reduce_labels}
    assert_figures(metric.compute(num_labels=5, **options), count_by_hand(*maps, 5, **options))


def test_the_class_itself_takes_options_in_advance(maps):
    metric = MeanIoU(num_labels=5, ignore_index=255)
    metric.add_batch(predictions=maps[0], references=maps[1])
    assert_figures(metric.compute(), count_by_hand(*maps, 5, 255))


DTYPES = (np.uint8, np.int16, np.uint16, np.int32, np.int64, ">u2")
CONVERSIONS = [partial(np.asarray, dtype=dtype) for dtype in DTYPES]
CONVERSIONS += [torch.from_numpy, Image.fromarray, np.ndarray.tolist]


@pytest.mark.parametrize("convert", CONVERSIONS)
def test_every_kind_of_label_map_counts_alike(metric, maps, convert):
    predictions, references = ([convert(array) for array in arrays] for arrays in maps)
    results = metric.compute(predictions=predictions, references=references, num_labels=5)
    assert_figures(results, count_by_hand(*maps, 5, 255))
    # A result starts anew
    assert len(metric) == 0


def test_a_stack_counts_like_its_maps(metric):
    predictions, references = torch.randint(0, 4, (2, 3, 6, 5), generator=torch.Generator().manual_seed(0)).unbind()
    stacked = metric.compute(predictions=predictions, references=references, num_labels=4)
    assert_figures(stacked, count_by_hand(predictions.numpy(), references.numpy(), 4, 255))


def test_new_figures_fit_a_count_by_hand(metric):
    results = metric.compute(
        predictions=[[[0, 0, 1, 1]], [[2, 2, 1, 0]]],
        references=[[[0, 1, 1, 1]], [[2, 0, 255, 0]]],
        num_labels=4,
        return_confusion_matrix=True,
    )
    assert results["confusion_matrix"].tolist() == [[2, 0, 1, 0], [1, 2, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    # IoU 2/4, 2/3, 1/2 of 3, 3 and 1 pixels
    assert results["frequency_weighted_iou"] == pytest.approx((3 / 2 + 3 * 2 / 3 + 1 / 2) / 7)
    assert np.isnan(results["per_category_iou"][3])


def test_what_a_trainer_stores_is_json_once_the_classes_are_listed(metric):
    results = metric.compute(predictions=[[[0, 1]]], references=[[[0, 0]]], num_labels=2)
    for name in ("per_category_iou", "per_category_accuracy"):
        results[name] = results[name].tolist()
    assert json.loads(json.dumps(results))["overall_accuracy"] == 0.5


def test_847_classes_with_65535_ignored(metric):
    rng = np.random.default_rng(0)
    reference = rng.integers(0, 847, (40, 50)).astype(np.uint16)
    reference[:5] = 65535
    prediction = rng.permutation(847)[np.minimum(reference, 846)]
    for _ in range(3):
        metric.add_batch(predictions=[torch.from_numpy(prediction)], references=[reference])
    results = metric.compute(num_labels=847, ignore_index=65535, return_confusion_matrix=True)
    assert results["confusion_matrix"].shape == (847, 847)
    assert_figures(results, count_by_hand([prediction] * 3, [reference] * 3, 847, 65535))


def test_memory_does_not_grow_and_nothing_is_written(metric, tmp_path):
    rng = np.random.default_rng(0)
    for _ in range(20):
        metric.add_batch(predictions=rng.integers(0, 30, (4, 20, 30)), references=rng.integers(0, 30, (4, 20, 30)))
        assert len(metric.state_dict()["pairs"]) <= 30 * 30
    assert not list((tmp_path / "cache").rglob("*"))


def test_saved_counts_go_on(metric, maps, tmp_path):
    predictions, references = maps
    metric.add(prediction=predictions[0], reference=references[0])
    torch.save(metric.state_dict(), tmp_path / "state")
    other = MeanIoU()
    other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    other.add_batch(predictions=predictions[1:], references=references[1:])
    assert_figures(other.compute(num_labels=5), count_by_hand(*maps, 5, 255))


def test_processes_add_up_their_counts_through_files(maps, tmp_path):
    results, pairs = {}, list(zip(*maps, strict=True))

    def one_process(process_id):
        metric = evaluate.load(MEAN_IOU, num_process=2, process_id=process_id, cache_dir=str(tmp_path), timeout=20)
        for turn in range(2):
            # In the second turn the first process has nothing
            for prediction, truth in pairs[process_id::2] if turn == 0 else pairs * process_id:
                metric.add(prediction=prediction, reference=truth.astype(np.int64) + 1000 * (truth == 6))
            results[turn, process_id] = metric.compute(num_labels=5)

    threads = [threading.Thread(target=one_process, args=(process_id,)) for process_id in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for turn in range(2):
        assert results[turn, 1] is None
        assert_figures(results[turn, 0], count_by_hand(*maps, 5, 255))
    assert not list(tmp_path.rglob("*.arrow"))


def test_processes_add_up_their_counts_through_torch_distributed(maps, monkeypatch):
    metrics = [MeanIoU(num_process=2, process_id=process_id) for process_id in (0, 1)]
    for number, (prediction, truth) in enumerate(zip(*maps, strict=True)):
        metrics[number % 2].add(prediction=prediction, reference=truth)

    def all_gather_object(everybody, own):
        everybody[:] = [metric._pairs for metric in metrics]

    for name, fake in (("is_initialized", lambda: True), ("get_world_size", lambda: 2)):
        monkeypatch.setattr(torch.distributed, name, fake)
    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    assert_figures(metrics[0].compute(num_labels=5), count_by_hand(*maps, 5, 255))
    assert metrics[1].compute(num_labels=5) is None


def test_a_process_that_never_computes_is_named(tmp_path, maps):
    metric = evaluate.load(MEAN_IOU, num_process=2, process_id=0, cache_dir=str(tmp_path), timeout=0.1)
    metric.add_batch(predictions=maps[0], references=maps[1])
    with pytest.raises(ValueError, match=r"2-1\.arrow"):
        metric.compute(num_labels=5)


def test_combined_metrics_pass_label_maps_on(maps):
    combined = evaluate.combine([MeanIoU()])
    for prediction, truth in zip(*maps, strict=True):
        combined.add(prediction=prediction, reference=truth)
    assert_figures(combined.compute(num_labels=5), count_by_hand(*maps, 5, 255))


@pytest.mark.parametrize(
    ("prediction", "truth", "message"),
    [
        ([[0, 1]], [[0], [1]], "sizes must agree"),
        (np.zeros((2, 2)), np.zeros((2, 2), int), "holds float64 values"),
        (torch.zeros(2, 2), torch.zeros(2, 2, dtype=int), "holds torch.float32 values"),
        ([[0, 1], [1]], [[0, 1], [1, 1]], "different lengths"),
        (np.full((1, 2), 70000), np.zeros((1, 2), int), "from 70000 to 70000"),
        (Image.new("RGB", (2, 2)), np.zeros((2, 2), int), "mode RGB"),
    ],
)
def test_what_is_no_label_map_is_refused(metric, prediction, truth, message):
    with pytest.raises(ValueError, match=message):
        metric.add_batch(predictions=[prediction], references=[truth])


def test_maps_of_thousands_of_values_are_refused(metric):
    noise = np.arange(10000).reshape(100, 100)
    with pytest.raises(ValueError, match="no maps of class indices"):
        metric.add(prediction=noise, reference=noise)


def test_a_wrong_call_loses_no_counts(metric, maps):
    metric.add_batch(predictions=maps[0], references=maps[1])
    for options, message in (
        ({}, "num_labels is missing"),
        ({"num_labels": 0}, "at least one class"),
        ({"num_labels": 5, "ignore": 3}, "ignore: unknown here"),
        ({"num_labels": 5, "predictions": maps[0], "references": maps[1][:2]}, "3 predictions and 2 references"),
        ({"num_labels": 5, "predictions": maps[0]}, "both predictions and references"),
    ):
        with pytest.raises(ValueError, match=message):
            metric.compute(**options)
    assert_figures(metric.compute(num_labels=5), count_by_hand(*maps, 5, 255))


def test_nothing_added_is_said(metric):
    with pytest.raises(ValueError, match="nothing was added"):
        metric.compute(num_labels=5)


# The shared counts


def test_merged_counts_are_those_of_all_images():
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randint(0, 5, (2, 6, 7), generator=generator) for _ in range(4)]
    whole, first, second = (ConfusionMatrix(5, ignore_index=4) for _ in range(3))
    for index, (predicted, true) in enumerate(maps):
        for confusion in (whole, (first, second)[index % 2]):
            confusion.update(predicted.clamp(max=3), true)
    first.merge(second)
    assert (first.table == whole.table).all()


def test_counts_of_other_classes_are_refused():
    with pytest.raises(ValueError, match="4 classes"):
        ConfusionMatrix(5).merge(ConfusionMatrix(4))


def test_means_over_a_subset_of_classes():
    confusion = ConfusionMatrix(3)
    confusion.update(torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 2]))
    for classes in itertools.chain.from_iterable(itertools.combinations(range(3), size) for size in (1, 2, 3)):
        assert confusion.mean_iou(classes) == pytest.approx(np.mean([[0.5, 0.5, 1.0][index] for index in classes]))
        assert confusion.mean_accuracy(classes) == pytest.approx(np.mean([[1, 0.5, 1][index] for index in classes]))


@pytest.mark.parametrize(
    ("predicted", "true", "message"),
    [([[0, 1]], [[0]], "sizes must agree"), ([[0]], [[7]], "true labels"), ([[-1]], [[0]], "predicted labels")],
)
def test_labels_that_cannot_be_counted_are_named(predicted, true, message):
    with pytest.raises(ValueError, match=message):
        ConfusionMatrix(2).update(torch.tensor(predicted), torch.tensor(true))
