"""From outputs to segmentations: equal to the plain recipe, whatever the memory layout, and small in memory."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from modeling_san.processing import SANImageProcessor, post_processing

REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "reference"


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
        monkeypatch.setattr(post_processing, "_BLOCK_FLOATS", 3000)
        monkeypatch.setattr(post_processing, "_TILE_SIDES", (5, 7))
    return SANImageProcessor()


@pytest.mark.parametrize("target", [(90, 120), (31, 200), (240, 17), (1, 1)])
@pytest.mark.parametrize("classes", [5, 70])
def test_blocks_give_what_two_interpolations_of_whole_tensors_give(processor, target, classes):
    outputs = make_outputs([(90, 120), (64, 97)], classes)
    scores = processor.post_process_semantic_scores(outputs, [target, target])
    for i, size in enumerate([(90, 120), (64, 97)]):
        expected = plain_scores(outputs.masks_queries_logits[i], outputs.class_queries_logits[i], size, target)
        torch.testing.assert_close(scores[i], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("classes", [5, 70])
def test_segmentation_is_the_best_score_at_every_pixel(processor, classes):
    outputs = make_outputs([(90, 120)], classes)
    scores = processor.post_process_semantic_scores(outputs, [(50, 70)])[0]
    maps, winning = processor.post_process_semantic_segmentation(outputs, [(50, 70)], return_scores=True)
    assert maps[0].dtype == torch.int64
    assert maps[0].shape == (50, 70)
    assert torch.equal(maps[0], scores.argmax(0))
    assert torch.equal(winning[0], scores.amax(0))


def test_without_target_sizes_a_map_has_the_size_the_network_saw():
    outputs = make_outputs([(90, 120), (64, 97)])
    maps = SANImageProcessor().post_process_semantic_segmentation(outputs)
    assert [tuple(map_.shape) for map_ in maps] == [(90, 120), (64, 97)]


def test_without_image_sizes_the_whole_map_is_picture():
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


def test_one_class_wins_everywhere():
    maps = SANImageProcessor().post_process_semantic_segmentation(make_outputs([(90, 120)], classes=1))
    assert not maps[0].any()


@pytest.mark.parametrize(
    ("targets", "sentence"),
    [
        ([(4, 4), (4, 4)], "2 sizes for 1 pictures"),
        ([(4, 4, 3)], "expected \\(height, width\\)"),
        ([(0, 4)], "at least 1"),
    ],
)
def test_target_sizes_that_do_not_fit_are_refused(targets, sentence):
    with pytest.raises(ValueError, match=sentence):
        SANImageProcessor().post_process_semantic_segmentation(make_outputs([(90, 120)]), targets)


def test_pictures_larger_than_their_masks_are_refused():
    with pytest.raises(ValueError, match="needs masks of 14 x 8 cells"):
        SANImageProcessor().post_process_semantic_segmentation(make_outputs([(200, 120)]))


@pytest.mark.parametrize("name", ["tiny_96x150", "tiny_128x128"])
def test_reference_scores_and_segmentations_are_reproduced(name):
    if not REFERENCE.is_dir():
        pytest.skip(f"the reference numbers are not at {REFERENCE}")
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


MEASURED = """
import resource, types, torch
from modeling_san.processing import SANImageProcessor
torch.set_num_threads(1)  # on a busy machine, threads that wait for each other take many times as long
processor = SANImageProcessor()
outputs = types.SimpleNamespace(
    masks_queries_logits=torch.randn(1, 100, 40, 40),
    class_queries_logits=torch.randn(1, 100, 848),
    image_sizes=torch.tensor([[640, 640]]),
)
processor.post_process_semantic_segmentation(outputs, [(8, 8)])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
processor.post_process_semantic_segmentation(outputs, [(1024, 1024)])
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(before, after)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read on Linux")
def test_847_classes_at_1024_pixels_stay_far_below_a_gigabyte():
    ran = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True, timeout=500)
    before, after = (int(number) / 1024 for number in ran.stdout.split())
    assert after < 1000, f"peak of the whole process: {after:.0f} MB"
    assert after - before < 300, f"added by the call: {after - before:.0f} MB"
