"""What only a GPU can show: the same answers as on a CPU, and never a wait in the middle."""

import pytest
import torch
from PIL import Image
from test_post_processing import CASES
from test_train import common, options, progress_of, run, start, weights  # noqa: F401 - fixtures

from modeling_san.commands.models import BUILTIN_MODEL, load_model
from modeling_san.processing import Segmenter
from modeling_san.processing.post_processing_san import segment

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LABELS = ("grass", "snow", "wood", "red dotted", "blue checkered", "cyan dotted", "pink striped", "yellow plain")


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """Convolutions in float32 proper, which cuDNN rounds to TF32 unless it is told otherwise."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="module")
def images():
    return [Image.open(BUILTIN_MODEL.parent / "drawn_examples" / f"{name}.png") for name in ("grass", "snow", "wood")]


@pytest.fixture(scope="module")
def on_cpu():
    return load_model(None, torch.device("cpu"))


@pytest.fixture(scope="module")
def on_gpu():
    return load_model(None, torch.device("cuda"))


def agreement(first, second):
    """Share of equal pixels, over all images."""
    equal = [(a.label_map == b.label_map).flatten() for a, b in zip(first, second, strict=True)]
    return torch.cat(equal).float().mean().item()


def segment_both(on_cpu, on_gpu, images, **how):
    for loaded in (on_cpu, on_gpu):
        segmenter = Segmenter(loaded.model, loaded.processor)
        yield segmenter(images, segmenter.vocabulary(LABELS, extend="none"), **how)


@pytest.mark.parametrize("how", [{}, {"threshold": 0.5}, {"tta": True}], ids=["plain", "threshold", "tta"])
def test_labels_and_scores_are_those_of_a_cpu(on_cpu, on_gpu, images, how):
    expected, found = segment_both(on_cpu, on_gpu, images, **how)
    assert len(images) == 3
    assert agreement(expected, found) > 0.999
    for right, answer in zip(expected, found, strict=True):
        assert answer.scores.device.type == "cpu"
        torch.testing.assert_close(answer.scores, right.scores, atol=1e-3, rtol=0)


def test_bfloat16_keeps_the_labels(on_gpu, images):
    vocabulary = Segmenter(on_gpu.model, on_gpu.processor).vocabulary(LABELS)
    exact, rounded = (
        Segmenter(on_gpu.model, on_gpu.processor, dtype=dtype)(images, vocabulary) for dtype in (None, torch.bfloat16)
    )
    assert agreement(exact, rounded) > 0.99


@pytest.mark.parametrize("case", CASES)
def test_post_processing_is_that_of_a_cpu(case):
    masks, class_logits, where = CASES[case]
    labels, scores = segment(masks, class_logits, where)
    found_labels, found_scores = segment(masks.cuda(), class_logits.cuda(), where)
    torch.testing.assert_close(found_scores.cpu(), scores, atol=1e-5, rtol=1e-5)
    assert (found_labels.cpu() == labels).float().mean() > 0.999


def test_post_processing_never_waits_for_the_device():
    masks, class_logits, where = CASES["padded"]
    masks, class_logits = masks.cuda(), class_logits.cuda()
    segment(masks, class_logits, where)
    torch.cuda.set_sync_debug_mode("error")
    try:
        segment(masks, class_logits, where)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training_runs_and_goes_on_where_it_stopped(options, precision):  # noqa: F811
    options = {**options, "cpu": False, "mixed_precision": precision}
    folder = run(options, steps=3)
    before = weights(folder)
    run(options, steps=6, resume="auto")
    assert progress_of(folder / "checkpoints" / "step-00000006")["step"] == 6
    after = weights(folder)
    assert all(torch.isfinite(value).all() for value in after.values())
    assert any(not torch.equal(before[name], value) for name, value in after.items())
