"""From outputs to segmentations: equal to the plain recipe, whatever the memory layout, and small in memory."""

import contextlib
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from modeling_san.processing import SANImageProcessor, contenders_san, post_processing_san
from modeling_san.processing.post_processing_san import MaskGeometry, segment
from reference import REFERENCE


def make_outputs(sizes, classes=5, queries=7, cells=(6, 8), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return SimpleNamespace(
        masks_queries_logits=(4 * torch.randn(len(sizes), queries, *cells, generator=generator)).to(dtype),
        class_queries_logits=(3 * torch.randn(len(sizes), queries, classes + 1, generator=generator)).to(dtype),
        image_sizes=torch.tensor(sizes),
    )


def plain_scores(masks, classes, size, target):
    """The recipe in whole tensors: interpolate, crop, interpolate, sum over queries."""
    padded = [-(-side // 32) * 32 for side in size]
    own = masks[None, :, : padded[0] // 16, : padded[1] // 16].float()
    full = F.interpolate(own, padded, mode="bilinear", align_corners=False)[:, :, : size[0], : size[1]]
    full = F.interpolate(full, target, mode="bilinear", align_corners=False)[0]
    return torch.einsum("qc,qhw->chw", classes.float().softmax(-1)[:, :-1], full.sigmoid())


@pytest.fixture(params=["one block", "many blocks"])
def processor(request, monkeypatch):
    if request.param == "many blocks":
        monkeypatch.setattr(post_processing_san, "BLOCK_FLOATS", 3000)
        monkeypatch.setattr(contenders_san, "BLOCK_FLOATS", 3000)
        monkeypatch.setattr(post_processing_san, "_TILE_SIDES", (5, 7))
    return SANImageProcessor()


@pytest.mark.parametrize("target", [(90, 120), (31, 200), (240, 17), (1, 1)])
@pytest.mark.parametrize("classes", [5, 70])
def test_blocks_give_what_two_interpolations_of_whole_tensors_give(processor, target, classes):
    outputs = make_outputs([(90, 120), (64, 97)], classes)
    scores = processor.post_process_semantic_scores(outputs, [target, target])
    for i, size in enumerate([(90, 120), (64, 97)]):
        expected = plain_scores(outputs.masks_queries_logits[i], outputs.class_queries_logits[i], size, target)
        torch.testing.assert_close(scores[i], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("classes", [1, 5, 70])
def test_segmentation_is_the_best_score_at_every_pixel(processor, classes):
    outputs = make_outputs([(90, 120)], classes)
    scores = processor.post_process_semantic_scores(outputs, [(50, 70)])[0]
    maps, winning = processor.post_process_with_scores(outputs, [(50, 70)])
    assert maps[0].dtype == torch.int64
    assert maps[0].shape == (50, 70)
    assert torch.equal(maps[0], scores.argmax(0))
    assert torch.equal(winning[0], scores.amax(0))


def test_scores_come_in_the_form_of_transformers_where_they_are_asked_for(processor):
    outputs = make_outputs([(90, 120), (64, 97)])
    found = processor.post_process_semantic_segmentation(outputs, [(9, 12), (7, 5)], return_segmentation_scores=True)
    expected = processor.post_process_semantic_scores(outputs, [(9, 12), (7, 5)])
    for each, scores in zip(found, expected, strict=True):
        assert torch.equal(each.segmentation_scores, scores)
        assert torch.equal(each.segmentation, scores.argmax(0))


def test_without_target_sizes_a_map_has_the_size_the_network_saw():
    outputs = make_outputs([(90, 120), (64, 97)])
    maps = SANImageProcessor().post_process_semantic_segmentation(outputs)
    assert [tuple(map_.shape) for map_ in maps] == [(90, 120), (64, 97)]


def test_without_image_sizes_the_whole_map_is_image():
    outputs = make_outputs([(96, 128)])
    expected = SANImageProcessor().post_process_semantic_segmentation(outputs)[0]
    outputs.image_sizes = None
    assert torch.equal(SANImageProcessor().post_process_semantic_segmentation(outputs)[0], expected)


def test_what_lies_outside_the_own_part_of_the_mask_map_never_counts():
    outputs = make_outputs([(60, 60)])
    expected = SANImageProcessor().post_process_semantic_segmentation(outputs)[0]
    outputs.masks_queries_logits[:, :, 4:] = 50
    outputs.masks_queries_logits[:, :, :, 4:] = -50
    assert torch.equal(SANImageProcessor().post_process_semantic_segmentation(outputs)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_outputs_are_computed_in_float32(dtype):
    outputs = make_outputs([(90, 120)], dtype=dtype)
    scores = SANImageProcessor().post_process_semantic_scores(outputs)[0]
    expected = plain_scores(outputs.masks_queries_logits[0], outputs.class_queries_logits[0], (90, 120), (90, 120))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)


def test_autocast_and_gradients_around_the_call_change_nothing():
    outputs = make_outputs([(90, 120)])
    expected = SANImageProcessor().post_process_semantic_scores(outputs)[0]
    outputs.masks_queries_logits.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = SANImageProcessor().post_process_semantic_scores(outputs)[0]
    assert torch.equal(scores, expected)
    assert not scores.requires_grad


@pytest.mark.parametrize(
    ("targets", "sentence"),
    [
        ([(4, 4), (4, 4)], "2 sizes for 1 images"),
        ([(4, 4, 3)], "expected \\(height, width\\)"),
        ([(0, 4)], "at least 1"),
    ],
)
def test_target_sizes_that_do_not_fit_are_refused(targets, sentence):
    with pytest.raises(ValueError, match=sentence):
        SANImageProcessor().post_process_semantic_segmentation(make_outputs([(90, 120)]), targets)


def test_images_larger_than_their_masks_are_refused():
    with pytest.raises(ValueError, match="needs masks of 14 x 8 cells"):
        SANImageProcessor().post_process_semantic_segmentation(make_outputs([(200, 120)]))


@pytest.mark.parametrize("name", ["tiny_96x150", "tiny_128x128"])
def test_reference_scores_and_segmentations_are_reproduced(name):
    tensors = load_file(REFERENCE / f"{name}.safetensors")
    image = json.loads((REFERENCE / f"{name}.json").read_text())["image"]
    size = (image["height"], image["width"])
    outputs = SimpleNamespace(
        masks_queries_logits=tensors["mask_logits"].reshape(1, -1, *tensors["mask_logits"].shape[-2:]),
        class_queries_logits=tensors["class_logits"].reshape(1, -1, tensors["class_logits"].shape[-1]),
        image_sizes=torch.tensor([size]),
    )
    processor = SANImageProcessor()
    scores = processor.post_process_semantic_scores(outputs)[0]
    torch.testing.assert_close(scores, tensors["semantic_scores"].reshape(scores.shape), atol=1e-4, rtol=0)
    assert_equal_where_clear(scores, processor, outputs, size, tensors["segmentation"])
    resized = (size[0] // 2 + 3, size[1] // 2 + 5)
    scores = processor.post_process_semantic_scores(outputs, [resized])[0]
    assert_equal_where_clear(scores, processor, outputs, resized, tensors["segmentation_resized"])


def assert_equal_where_clear(scores, processor, outputs, size, expected):
    segmentation = processor.post_process_semantic_segmentation(outputs, [size])[0]
    top = scores.topk(2, dim=0).values
    clear = top[0] - top[1] > 1e-4
    assert clear.float().mean() > 0.95
    assert torch.equal(segmentation[clear], expected.reshape(size)[clear].long())


def geometry(own, padded=None, image=None, target=None):
    padded = padded or tuple(16 * cells for cells in own)
    return MaskGeometry(own, padded, image or padded, target or image or padded)


def blobs(queries, size, cells=5, seed=0):
    """Smooth masks, as networks give them; the segmentation then has large areas of one class."""
    generator = torch.Generator().manual_seed(seed)
    noise = 5 * torch.randn(1, queries, cells, cells, generator=generator)
    return F.interpolate(noise, size, mode="bicubic", align_corners=False)[0]


def opinions(queries, classes, spread=5.0, seed=1):
    """Class logits; with a large spread every query is sure of some class."""
    return spread * torch.randn(queries, classes + 1, generator=torch.Generator().manual_seed(seed))


def exact_scores(masks, class_logits, geometry):
    """The recipe in whole float64 tensors; interpolation weights are PyTorch's own, which are of float32."""

    def lines(own, padded, image, target):
        shares = F.interpolate(torch.eye(own)[None], padded, mode="linear", align_corners=False)[..., :image]
        return F.interpolate(shares, target, mode="linear", align_corners=False)[0].double()

    sides = zip(geometry.own, geometry.padded, geometry.image, geometry.target, strict=True)
    rows, columns = (lines(*lengths) for lengths in sides)
    own = masks[:, : geometry.own[0], : geometry.own[1]].double()
    probabilities = class_logits.double().softmax(-1)[:, :-1]
    return torch.einsum("qc,qhw->chw", probabilities, (rows.T @ own @ columns).sigmoid())


def assert_best(found, scores):
    """Labels may differ from the best where another class is within 1e-5 of it, and nowhere else."""
    labels, winning = found
    best = scores.amax(0)
    assert labels.dtype == torch.int64
    assert labels.shape == winning.shape == best.shape
    torch.testing.assert_close(winning.double(), best, atol=1e-5, rtol=0)
    chosen = scores.gather(0, labels[None])[0]
    assert (best - chosen).max() <= 1e-5, f"{int((best - chosen > 1e-5).sum())} pixels have another best class"


WHOLE = geometry((12, 12), target=(150, 210))
CASES = {
    "blobs": (blobs(40, (12, 12)), opinions(40, 171), WHOLE),
    "blobs, unsure": (blobs(40, (12, 12)), opinions(40, 171, spread=0.3), WHOLE),
    "noise": (5 * torch.randn(40, 12, 12, generator=torch.Generator().manual_seed(2)), opinions(40, 171), WHOLE),
    "saturated": (50 * blobs(40, (12, 12)).sign(), opinions(40, 171), WHOLE),
    "saturated and smooth": (10 * blobs(40, (12, 12)), opinions(40, 171, spread=20), WHOLE),
    "never": (blobs(9, (12, 12)) - 60, opinions(9, 30), WHOLE),
    "a thousand classes": (blobs(20, (6, 8)), opinions(20, 1000), geometry((6, 8))),
    "two classes": (blobs(20, (6, 8)), opinions(20, 2), geometry((6, 8))),
    "one class": (blobs(20, (6, 8)), opinions(20, 1), geometry((6, 8))),
    "one query": (blobs(1, (6, 8)), opinions(1, 70), geometry((6, 8))),
    "many queries": (blobs(700, (6, 8)), opinions(700, 70), geometry((6, 8))),
    "one cell": (blobs(20, (1, 1)), opinions(20, 70), geometry((1, 1), target=(1, 1))),
    "one cell, larger": (blobs(20, (1, 1)), opinions(20, 70), geometry((1, 1), target=(77, 41))),
    "one row": (blobs(20, (1, 9)), opinions(20, 70), geometry((1, 9), target=(3, 333))),
    "one pixel": (blobs(20, (12, 12)), opinions(20, 70), geometry((12, 12), target=(1, 1))),
    "reduced": (blobs(20, (40, 30)), opinions(20, 70), geometry((40, 30), target=(23, 91))),
    "enlarged": (blobs(20, (3, 4)), opinions(20, 70), geometry((3, 4), target=(401, 307))),
    "padded": (blobs(20, (14, 16)), opinions(20, 70), geometry((10, 14), image=(147, 209), target=(211, 299))),
    "padded by a row of cells": (blobs(20, (14, 14)), opinions(20, 70), geometry((14, 14), image=(193, 222))),
    "stride 8": (blobs(20, (12, 12)), opinions(20, 70), geometry((12, 12), padded=(96, 96), target=(355, 301))),
    "bfloat16": (blobs(20, (12, 12)).bfloat16(), opinions(20, 70).bfloat16(), geometry((12, 12))),
}


@pytest.mark.parametrize("name", CASES)
def test_no_pixel_has_a_better_class_in_float64(name):
    masks, class_logits, where = CASES[name]
    assert_best(segment(masks, class_logits, where), exact_scores(masks, class_logits, where))


@pytest.mark.parametrize("seed", range(10))
def test_no_pixel_has_a_better_class_whatever_the_outputs(seed):
    random = torch.Generator().manual_seed(seed)
    draw = [int(number) for number in torch.randint(1, 13, (6,), generator=random)]
    masks, class_logits = (
        blobs(4 * draw[0], draw[1:3], cells=4, seed=seed),
        opinions(4 * draw[0], 8 * draw[3], seed=seed),
    )
    where = geometry(tuple(draw[1:3]), target=(17 * draw[4], 17 * draw[5]))
    assert_best(segment(masks, class_logits, where), exact_scores(masks, class_logits, where))


def test_of_equal_classes_the_first_wins():
    labels, _ = segment(blobs(20, (12, 12)), torch.zeros(20, 71), geometry((12, 12)))
    assert not labels.any()
    swapped = torch.zeros(20, 71)
    swapped[:, :3] = -1
    assert (segment(blobs(20, (12, 12)), swapped, geometry((12, 12)))[0] == 3).all()


def test_where_all_masks_are_zero_the_first_class_wins_with_no_score():
    labels, winning = segment(torch.full((20, 6, 8), -300.0), opinions(20, 70), geometry((6, 8)))
    assert not labels.any()
    assert not winning.any()


def test_of_171_classes_few_are_multiplied():
    masks, class_logits = blobs(100, (40, 40), cells=10), opinions(100, 171)
    tiling = post_processing_san._Tiling(masks, geometry((40, 40)))
    corners = next(tiling.bands(10**6)).corners
    probabilities = post_processing_san._class_probabilities(class_logits)
    contenders = contenders_san.contenders(corners, probabilities).sum(dim=1)
    assert len(contenders) == 41 * 41
    assert contenders.min() >= 1
    assert contenders.float().mean() < 171 / 10
    blocks = contenders_san.contending_blocks(corners, probabilities, tiling.pixels)
    multiplied = sum(classes.numel() for _, classes, _ in blocks)
    assert multiplied < 2 * contenders.sum() + 4 * len(contenders)


def sure(*rows):
    """Class logits with these probabilities, the rest being "no object"."""
    probabilities = torch.tensor(rows)
    return torch.cat([probabilities, 1 - probabilities.sum(dim=1, keepdim=True)], dim=1).log()


def logit(probability):
    return torch.tensor(probability).logit()


def test_a_class_that_could_score_less_than_another_but_does_score_more_is_kept():
    # Class 0 would reach 0.9 if both its masks were at their best in one place, class 1 has 0.89 everywhere
    masks = torch.zeros(3, 1, 2)
    masks[0, 0] = logit([0.9, 0.01])
    masks[1, 0] = logit([0.01, 0.9])
    masks[2] = logit(0.89)
    class_logits = sure([0.5, 0.0], [0.5, 0.0], [0.0, 0.999])
    labels, winning = segment(masks, class_logits, geometry((1, 2)))
    assert (labels == 1).all()
    torch.testing.assert_close(winning, torch.full_like(winning, 0.999 * 0.89))


def test_a_class_that_wins_by_a_hair_in_one_corner_of_a_tile_is_kept():
    # Class 1 is better at the last pixels alone, and there by a ten thousandth: it reaches its bound, no more
    masks = torch.zeros(2, 1, 2)
    masks[0] = logit(0.5)
    masks[1, 0] = logit([0.1, 0.5001])
    labels, _ = segment(masks, sure([0.9, 0.0], [0.0, 0.9]), geometry((1, 2)))
    # From the centre of the last cell on, masks do not change
    assert (labels[:, :23] == 0).all()
    assert (labels[:, 24:] == 1).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_mask_logit_that_is_no_number_spoils_its_surroundings_alone(value):
    masks, class_logits = blobs(20, (12, 12)), opinions(20, 70)
    labels, winning = segment(masks, class_logits, geometry((12, 12)))
    masks[3, 1, 1] = value
    broken_labels, broken = segment(masks, class_logits, geometry((12, 12)))
    assert broken[8:40, 8:40].isnan().all()
    assert not broken_labels[broken.isnan()].any()
    for part in [(slice(48, None),), (slice(None), slice(48, None))]:
        assert torch.equal(broken_labels[part], labels[part])
        torch.testing.assert_close(broken[part], winning[part], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_class_logit_that_is_no_number_leaves_no_score(value):
    class_logits = opinions(20, 70)
    class_logits[4, 5] = value
    labels, winning = segment(blobs(20, (6, 8)), class_logits, geometry((6, 8)))
    assert winning.isnan().all()
    assert not labels.any()


def test_other_devices_are_never_waited_for(monkeypatch):
    """Tensors without data cannot be read, and a device is waited for where something is read from it."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    labels, winning = segment(blobs(20, (12, 12)).to("meta"), opinions(20, 70).to("meta"), WHOLE)
    assert labels.shape == winning.shape == WHOLE.target


@pytest.mark.parametrize("floats", [1, post_processing_san._DEVICE_FLOATS])
def test_what_other_devices_compute_is_the_same(monkeypatch, floats):
    masks, class_logits, where = CASES["padded"]
    expected = segment(masks, class_logits, where)
    monkeypatch.setattr(post_processing_san, "BLOCK_FLOATS", floats)
    monkeypatch.setattr(post_processing_san, "contending_blocks", post_processing_san._whole_block)
    for found, right in zip(segment(masks, class_logits, where), expected, strict=True):
        assert torch.equal(found, right)


MEASURED = """
import re, types, torch
from pathlib import Path
from modeling_san.processing import SANImageProcessor

def peak():  # of this process alone: getrusage begins with the peak of the one that started it
    return re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]

torch.set_num_threads(1)  # on a busy machine, threads that wait for each other take many times as long
processor = SANImageProcessor()
outputs = types.SimpleNamespace(
    masks_queries_logits=torch.randn(1, 100, 40, 40),
    class_queries_logits=torch.randn(1, 100, 848),
    image_sizes=torch.tensor([[640, 640]]),
)
processor.post_process_semantic_segmentation(outputs, [(8, 8)])
before = peak()
processor.post_process_semantic_segmentation(outputs, [(1024, 1024)])
after = peak()
print(before, after)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read on Linux")
def test_847_classes_at_1024_pixels_stay_far_below_a_gigabyte():
    ran = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True, timeout=500)
    before, after = (int(number) / 1024 for number in ran.stdout.split())
    assert after < 1000, f"peak of the whole process: {after:.0f} MB"
    assert after - before < 300, f"added by the call: {after - before:.0f} MB"
