"""Images and labels in: every kind of input gives the tensors it should, or one clear sentence."""

import json
import re
import string
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from transformers import AutoImageProcessor, AutoProcessor, CLIPTokenizer
from transformers.utils import is_torchvision_available

from modeling_san.processing import (
    SANImageProcessor,
    SANImageProcessorPil,
    SANProcessor,
    extend_labels,
    load_vocabulary,
    normalize_labels,
    prompt_templates,
    vocabulary_names,
    vocabulary_san,
)
from modeling_san.processing.images_san import open_image
from reference import REFERENCE, clip_tokenizer, fingerprint

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
AS_IS = {"do_resize": False, "return_tensors": "pt"}


def random_image(height=40, width=50, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def normalized(image):
    """(height, width, 3) bytes as CLIP wants them, (3, height, width)."""
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - MEAN) / STD


def own_part(inputs, index=0):
    height, width = inputs["image_sizes"][index].tolist()
    return inputs["pixel_values"][index, :, :height, :width]


@pytest.fixture
def image_processor():
    return SANImageProcessor()


@pytest.fixture
def tokenizer():
    letters = string.ascii_lowercase + string.digits + string.punctuation
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


@pytest.fixture
def processor(image_processor, tokenizer):
    return SANProcessor(image_processor, tokenizer)


# Sizes, normalisation, padding


def test_sizes_are_those_of_the_reference(image_processor):
    for height, width, *resized in json.loads((REFERENCE / "resize_sizes.json").read_text())["sizes"]:
        assert list(image_processor.resized_size(height, width)) == resized


def test_no_image_is_so_thin_that_it_vanishes(image_processor):
    assert image_processor.resized_size(1, 100_000) == (1, 2560)


def test_resizing_is_pils_bilinear_filter():
    image = random_image(100, 130)
    inputs = SANImageProcessorPil()(image, size={"height": 64, "width": 96}, return_tensors="pt")
    expected = normalized(Image.fromarray(image).resize((96, 64), Image.Resampling.BILINEAR))
    torch.testing.assert_close(own_part(inputs), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("suffix", "mode"), [(".jpg", "RGB"), (".jpg", "L"), (".jpg", "CMYK"), (".png", "RGBA")])
def test_files_and_their_open_images_are_resized_to_the_very_bytes_of_pil(suffix, mode, tmp_path):
    path = tmp_path / f"image{suffix}"
    Image.fromarray(random_image(100, 130)).convert(mode).save(path)
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB").resize((96, 64), Image.Resampling.BILINEAR))
    options = {"size": {"height": 64, "width": 96}, "do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
    for image in (path, Image.open(path), np.asarray(Image.open(path).convert("RGB"))):
        inputs = SANImageProcessorPil()(image, **options)
        assert torch.equal(own_part(inputs), torch.from_numpy(expected.copy()).permute(2, 0, 1).float())


@pytest.mark.skipif(not is_torchvision_available(), reason="torchvision is not installed")
@pytest.mark.parametrize("shortest_edge", [64, 96, 150])
def test_with_torchvision_resized_images_differ_by_one_level_at_most(shortest_edge):
    images = [random_image(100, 130), Image.fromarray(random_image(90, 333)), random_image(120, 80) / 255.0]
    maps = [
        np.arange(height * width).reshape(height, width) % 7 for height, width in ((100, 130), (90, 333), (120, 80))
    ]
    options = {"size": {"shortest_edge": shortest_edge}, "do_normalize": False, "do_rescale": False}
    ours, expected = (each()(images, maps, **options) for each in (SANImageProcessor, SANImageProcessorPil))
    assert SANImageProcessor().backend == "torchvision"
    assert set(ours) == set(expected)
    for name in ("image_sizes", "labels"):
        assert np.array_equal(ours[name], expected[name])
    assert np.abs(ours["pixel_values"] - expected["pixel_values"]).max() <= 1


def test_a_processor_is_loaded_with_the_backend_that_is_asked_for(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    for backend in ("pil", None, *(["torchvision"] if is_torchvision_available() else [])):
        expected = SANImageProcessorPil if backend == "pil" else SANImageProcessor
        for loaded in (
            SANProcessor.from_pretrained(tmp_path, backend=backend).image_processor,
            AutoProcessor.from_pretrained(tmp_path, backend=backend).image_processor,
            AutoImageProcessor.from_pretrained(tmp_path, backend=backend),
        ):
            assert type(loaded) is expected


def test_a_batch_comes_to_the_device_that_is_asked_for():
    inputs = SANImageProcessorPil()(random_image(40, 50), np.zeros((40, 50), int), device="meta", return_tensors="pt")
    assert {value.device.type for value in inputs.values()} == {"meta"}


def test_padding_is_zero_after_normalisation_at_the_right_and_below(image_processor):
    inputs = image_processor(random_image(40, 50), **AS_IS)
    assert inputs["pixel_values"].shape == (1, 3, 64, 64)
    assert inputs["pixel_values"].dtype == torch.float32
    assert inputs["image_sizes"].tolist() == [[40, 50]]
    assert inputs["image_sizes"].dtype == torch.int64
    torch.testing.assert_close(own_part(inputs), normalized(random_image(40, 50)), atol=1e-5, rtol=0)
    assert not inputs["pixel_values"][:, :, 40:].any()
    assert not inputs["pixel_values"][:, :, :, 50:].any()


def test_images_of_a_batch_are_what_they_are_alone(image_processor):
    images = [random_image(40, 50), random_image(70, 30, seed=1)]
    inputs = image_processor(images, **AS_IS)
    assert inputs["pixel_values"].shape == (2, 3, 96, 64)
    for index, image in enumerate(images):
        assert torch.equal(own_part(inputs, index), own_part(image_processor(image, **AS_IS)))


def test_options_can_be_overridden_in_a_call(image_processor):
    image = random_image(40, 50)
    assert image_processor(image, size=64, return_tensors="pt")["image_sizes"].tolist() == [[64, 80]]
    assert image_processor(image, size_divisor=16, **AS_IS)["pixel_values"].shape == (1, 3, 48, 64)
    assert image_processor(image, do_pad=False, **AS_IS)["pixel_values"].shape == (1, 3, 40, 50)
    larger = image_processor(image, pad_size={"height": 128, "width": 96}, **AS_IS)
    assert larger["pixel_values"].shape == (1, 3, 128, 96)
    raw = image_processor(image, do_rescale=False, do_normalize=False, **AS_IS)
    assert torch.equal(own_part(raw), torch.from_numpy(image).permute(2, 0, 1).float())
    assert isinstance(image_processor(image, do_resize=False)["pixel_values"], np.ndarray)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"do_pad": False}, "cannot share a batch without padding"),
        ({"pad_size": {"height": 32, "width": 32}}, "at least 96"),
        ({"size_divisor": 24}, "multiple of mask_stride"),
        ({"do_center_crop": True, "crop_size": 10}, "crop them before"),
        ({"size": {"longest_edge": 50}, "do_resize": True}, "size is .*pass"),
        ({"image_mean": [0.5, 0.5]}, "image_mean"),
        ({"image_std": 0.0}, "may not hold 0"),
    ],
)
def test_options_that_cannot_be_met_are_refused(image_processor, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        image_processor([random_image(40, 50), random_image(70, 30)], **{**AS_IS, **options})


# Kinds of images


def test_arrays_tensors_files_and_pil_images_of_one_image_agree(image_processor, tmp_path):
    image = random_image()
    Image.fromarray(image).save(tmp_path / "image.png")
    expected = normalized(image)
    same = [
        Image.fromarray(image),
        str(tmp_path / "image.png"),
        tmp_path / "image.png",
        image.transpose(2, 0, 1),
        image.astype(np.int64),
        image.astype(np.float32) / 255,
        image.astype(np.float64),
        torch.from_numpy(image),
        torch.from_numpy(image).permute(2, 0, 1),
        torch.from_numpy(image).permute(2, 0, 1).double() / 255,
        np.dstack([image, random_image()[..., :1]]),
        Image.fromarray(np.dstack([image, random_image()[..., :1]])),
    ]
    for item in same:
        torch.testing.assert_close(own_part(image_processor(item, **AS_IS)), expected, atol=1e-4, rtol=0)


def test_batches_may_be_lists_of_lists_or_arrays_of_four_axes(image_processor):
    images = np.stack([random_image(), random_image(seed=1)])
    expected = image_processor(list(images), **AS_IS)["pixel_values"]
    for batch in (images, torch.from_numpy(images).permute(0, 3, 1, 2), [[images[0]], [images[1]]]):
        assert torch.equal(image_processor(batch, **AS_IS)["pixel_values"], expected)


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "CMYK", "YCbCr"])
def test_other_modes_give_what_pil_converts_them_to(image_processor, mode):
    image = Image.fromarray(random_image()).convert(mode)
    inputs = image_processor(image, **AS_IS)
    torch.testing.assert_close(own_part(inputs), normalized(image.convert("RGB")), atol=1e-5, rtol=0)


@pytest.mark.parametrize("as_file", [True, False])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(image_processor, as_file, tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (40, 50), dtype=np.uint16)
    sixteen = grey * np.uint16(257)
    Image.fromarray(sixteen).save(tmp_path / "grey.png")
    inputs = image_processor(tmp_path / "grey.png" if as_file else sixteen, **AS_IS)
    expected = normalized(np.repeat(grey.astype(np.uint8)[..., None], 3, axis=-1))
    torch.testing.assert_close(own_part(inputs), expected, atol=1e-5, rtol=0)


def test_rotated_files_are_turned_upright_and_their_maps_are_not(image_processor, tmp_path):
    image = random_image(40, 60)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side
    Image.fromarray(image).save(tmp_path / "rotated.png", exif=exif)
    upright = np.rot90(image, -1)
    label_map = np.zeros((60, 40), dtype=np.uint8)
    label_map[:10] = 3
    inputs = image_processor(Image.open(tmp_path / "rotated.png"), label_map, **AS_IS)
    torch.testing.assert_close(own_part(inputs), normalized(upright), atol=1e-5, rtol=0)
    assert torch.equal(inputs["labels"][0, :60, :40], torch.from_numpy(label_map).long())
    with pytest.raises(ValueError, match=r"has 40 x 60 pixels .* upright, has 60 x 40"):
        image_processor(Image.open(tmp_path / "rotated.png"), label_map.T, **AS_IS)


def test_floats_keep_their_precision_through_resizing(image_processor):
    ramp = np.linspace(0, 0.02, 64, dtype=np.float32)[None, :, None].repeat(64, 0).repeat(3, -1)
    inputs = image_processor(ramp, size={"height": 128, "width": 128}, do_normalize=False, return_tensors="pt")
    assert inputs["pixel_values"].unique().numel() > 100


@pytest.mark.parametrize(
    ("image", "fact"),
    [
        ([], "at least one image"),
        (np.zeros((8, 9, 2), np.uint8), "image 0 has 2 channels"),
        (np.zeros((0, 4, 3), np.uint8), "image 0 has no pixels"),
        (Image.new("RGB", (0, 5)), "image 0 has no pixels"),
        (np.zeros(7, np.uint8), "image 0 has shape 7"),
        (np.full((4, 4, 3), np.nan), "NaN"),
        (np.full((4, 4, 3), -1.0), "from -1 to -1"),
        (np.full((4, 4, 3), 70_000), "70000"),
        (np.full((4, 4, 3), "a"), "type <U1"),
        ([np.zeros((4, 4, 3), np.uint8), None], "image 1 is a NoneType"),
        (Path("no/such/file.png"), "no/such/file.png"),
    ],
)
def test_what_is_no_image_is_refused_in_one_sentence(image_processor, image, fact):
    with pytest.raises(ValueError, match=fact):
        image_processor(image, **AS_IS)


def test_damaged_files_are_refused_in_one_sentence(image_processor, tmp_path):
    Image.fromarray(random_image(200, 200)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:5000])
    (tmp_path / "text.png").write_text("no image")
    for name in ("cut.png", "text.png"):
        with pytest.raises(ValueError, match=r"^image 0"):
            image_processor(tmp_path / name, **AS_IS)


@pytest.mark.parametrize("error", [IndexError("index"), KeyError("key"), MemoryError(), struct.error("short")])
def test_whatever_a_decoder_raises_is_one_sentence_about_its_image(image_processor, error, monkeypatch, tmp_path):
    Image.fromarray(random_image()).save(tmp_path / "image.png")

    def fail(_self):
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(ValueError, match=r"^image 1 cannot be decoded"):
        image_processor([random_image(), tmp_path / "image.png"], **AS_IS)


@pytest.mark.parametrize("read", ["image", "segmentation map"])
def test_files_that_hold_programs_are_refused(image_processor, read, tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(random_image()).save(path, format="EPS")
    with pytest.raises(ValueError, match=f"^{read} 0: '.*image.png'.*PNG, JPEG"):
        image_processor(*([path] if read == "image" else [random_image(), path]), **AS_IS)


def test_images_open_from_paths_bytes_and_files(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(random_image()).save(path)
    with path.open("rb") as file:
        for source in (path, str(path), path.read_bytes(), file):
            assert np.array_equal(np.asarray(open_image(source)), random_image())


@pytest.mark.parametrize("do_draft", [False, True])
def test_closed_images_are_refused_in_one_sentence(image_processor, do_draft, tmp_path):
    Image.fromarray(random_image()).save(tmp_path / "image.jpg")
    with Image.open(tmp_path / "image.jpg") as image:
        pass
    with pytest.raises(ValueError, match="image 0 was closed before it was decoded: pass it inside"):
        image_processor(image, do_draft=do_draft)


# Several images at once


@pytest.fixture(params=[1, 4])
def threads(request, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)


def test_a_batch_keeps_its_order(image_processor, threads, tmp_path):
    images = [random_image(20 + 40 * (index % 3), 30, seed=index) for index in range(8)]
    for index, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    inputs = image_processor([tmp_path / f"{index}.png" for index in range(8)], **AS_IS)
    for index, image in enumerate(images):
        torch.testing.assert_close(own_part(inputs, index), normalized(image), atol=1e-5, rtol=0)


def test_the_first_bad_image_of_a_batch_is_the_one_named(image_processor, threads, tmp_path):
    Image.fromarray(random_image(300, 300)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:200_000])
    for _ in range(5):
        with pytest.raises(ValueError, match="image 2 cannot be decoded"):
            image_processor(
                [*[tmp_path / "whole.png"] * 2, tmp_path / "cut.png", None, tmp_path / "none.png"], **AS_IS
            )


def test_one_undecoded_image_may_be_many_times_in_a_batch(image_processor, threads, tmp_path):
    image = random_image(300, 300)
    Image.fromarray(image).save(tmp_path / "image.png")
    with (tmp_path / "image.png").open("rb") as file:
        image, same_file = Image.open(file), Image.open(file)
        inputs = image_processor([image, same_file] * 4, **AS_IS)
    for index in range(8):
        torch.testing.assert_close(own_part(inputs, index), normalized(image), atol=1e-5, rtol=0)


# Draft mode


@pytest.fixture
def photo(tmp_path):
    """A JPEG file of 481 x 601 pixels, that is stored upright."""
    smooth = Image.fromarray(random_image(8, 10)).resize((601, 481), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "photo.jpg", quality=95)
    return tmp_path / "photo.jpg"


SMALL = {"size": {"shortest_edge": 60}, "do_rescale": False, "do_normalize": False, "return_tensors": "pt"}


def test_draft_mode_resizes_what_pil_decodes_smaller(image_processor, photo):
    plain, drafted = image_processor(photo, **SMALL), image_processor(photo, do_draft=True, **SMALL)
    with Image.open(photo) as image:
        image.draft("RGB", (150, 120))
        assert image.size == (151, 121)
        # 601 x 481 pixels at a quarter
        small = image.resize((75, 60), Image.Resampling.BILINEAR, box=(0, 0, 150.25, 120.25))
    assert torch.equal(own_part(drafted), torch.from_numpy(np.array(small)).permute(2, 0, 1).float())
    assert drafted["image_sizes"].tolist() == plain["image_sizes"].tolist() == [[60, 75]]
    difference = (own_part(drafted) - own_part(plain)).abs()
    assert 0 < difference.max() < 4
    assert difference.mean() < 0.5


@pytest.mark.parametrize(("shortest_edge", "decoded"), [(30, 61), (60, 121), (61, 241), (120, 241), (121, 481)])
def test_draft_mode_decodes_at_least_twice_the_size(photo, shortest_edge, decoded, monkeypatch):
    resize, heights = Image.Image.resize, []

    def watched_resize(image, *args, **kwargs):
        heights.append(image.height)
        return resize(image, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", watched_resize)
    SANImageProcessorPil()(photo, do_draft=True, size={"shortest_edge": shortest_edge})
    assert heights == [decoded]


def test_draft_mode_leaves_the_image_that_was_passed_as_it_is(image_processor, photo):
    expected = image_processor(photo, do_draft=True, **SMALL)["pixel_values"]
    with photo.open("rb") as file:
        for image in (Image.open(photo), Image.open(file)):
            assert torch.equal(image_processor(image, do_draft=True, **SMALL)["pixel_values"], expected)
            assert image.size == (601, 481)
            assert np.array_equal(np.asarray(image), np.asarray(Image.open(photo)))


def test_draft_mode_leaves_alone_what_is_decoded_or_small_or_no_jpeg(image_processor, photo, tmp_path):
    decoded = Image.open(photo)
    decoded.load()
    decoded.save(tmp_path / "photo.png")
    expected = image_processor(photo, **SMALL)["pixel_values"]
    for image in (decoded, np.asarray(decoded), tmp_path / "photo.png", Image.open(tmp_path / "photo.png")):
        assert torch.equal(image_processor(image, do_draft=True, **SMALL)["pixel_values"], expected)
    for image in (photo, Image.open(photo)):
        plain, drafted = (image_processor(image, do_draft=draft, size=400) for draft in (False, True))
        assert np.array_equal(drafted["pixel_values"], plain["pixel_values"])


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_drafted_images_and_their_maps_keep_the_full_upright_size(image_processor, photo, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    with Image.open(photo) as image:
        image.save(photo.with_name("turned.jpg"), exif=exif, quality=95)
    height, width = (481, 601) if orientation in (1, 3) else (601, 481)
    label_map = np.arange(height * width).reshape(height, width) * 4 // (height * width)
    for size in ({"shortest_edge": 60}, {"height": 64, "width": 96}):
        options = {**SMALL, "size": size}
        plain = image_processor(photo.with_name("turned.jpg"), label_map, **options)
        drafted = image_processor(photo.with_name("turned.jpg"), label_map, do_draft=True, **options)
        assert torch.equal(drafted["image_sizes"], plain["image_sizes"])
        assert torch.equal(drafted["labels"], plain["labels"])
        assert (drafted["pixel_values"] - plain["pixel_values"]).abs().mean() < 1
        assert not torch.equal(drafted["pixel_values"], plain["pixel_values"])


def test_damaged_files_are_refused_in_draft_mode_too(image_processor, photo):
    photo.write_bytes(photo.read_bytes()[:2000])
    for image in (photo, Image.open(photo)):
        with pytest.raises(ValueError, match=r"image 0 cannot be decoded .* damaged or cut off"):
            image_processor(image, do_draft=True, **SMALL)
    with pytest.raises(ValueError, match="there is no file"):
        image_processor(photo.with_name("none.jpg"), do_draft=True)


def test_draft_mode_is_saved_with_the_processor(image_processor, photo, tmp_path):
    assert not image_processor.do_draft
    SANImageProcessor(do_draft=True).save_pretrained(tmp_path / "saved")
    loaded = SANImageProcessor.from_pretrained(tmp_path / "saved")
    drafted = image_processor(photo, do_draft=True, **SMALL)["pixel_values"]
    assert torch.equal(loaded(photo, **SMALL)["pixel_values"], drafted)
    plain = image_processor(photo, **SMALL)["pixel_values"]
    assert torch.equal(loaded(photo, do_draft=False, **SMALL)["pixel_values"], plain)


# Segmentation maps


def test_the_image_processor_alone_gives_the_maps_themselves(image_processor):
    label_map = np.array([[0, 1, 2, 255]], dtype=np.uint8)
    images = [random_image(1, 4), random_image(40, 50)]
    for reduced, row in ((False, [0, 1, 2, 255]), (True, [255, 0, 1, 255])):
        maps = [label_map, np.full((40, 50), 7, np.uint8)]
        labels = image_processor(images, maps, do_reduce_labels=reduced, **AS_IS)["labels"]
        assert labels.shape == (2, 64, 64)
        assert labels.dtype == torch.int64
        assert labels[0, 0, :4].tolist() == row
        assert labels[1, :40, :50].unique().tolist() == [7 - reduced]
        assert (labels[0].flatten()[4:].unique().tolist(), labels[1, 40:].unique().tolist()) == ([255], [255])


def test_maps_become_one_mask_for_each_class_present(processor):
    label_map = np.full((40, 50), 255, dtype=np.uint8)
    label_map[:10], label_map[20:30, :25] = 7, 2
    inputs = processor([random_image()] * 2, segmentation_maps=[label_map, np.full((40, 50), 255)], **AS_IS)
    (classes, no_classes), (masks, no_masks) = inputs["class_labels"], inputs["mask_labels"]
    assert classes.tolist() == [2, 7]
    assert (classes.dtype, masks.dtype) == (torch.int64, torch.float32)
    assert masks.shape == (2, 64, 64)
    assert masks.sum(dim=(1, 2)).tolist() == [250, 500]
    assert masks[0, 20:30, :25].all()
    assert masks[1, :10, :50].all()
    assert (no_classes.shape, no_masks.shape) == ((0,), (0, 64, 64))


def test_maps_are_resized_by_picking_pixels(processor):
    label_map = np.arange(4, dtype=np.uint8).reshape(2, 2)
    inputs = processor(
        random_image(2, 2), segmentation_maps=label_map, size={"height": 32, "width": 32}, return_tensors="pt"
    )
    assert inputs["class_labels"][0].tolist() == [0, 1, 2, 3]
    assert inputs["mask_labels"][0].sum(dim=(1, 2)).tolist() == [256] * 4
    assert inputs["mask_labels"][0][3, 16:, 16:].all()


def test_maps_of_many_kinds_agree(processor):
    label_map = np.random.default_rng(0).integers(0, 4, (40, 50), dtype=np.uint8)
    palette_image = Image.fromarray(label_map)
    palette_image.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    assert palette_image.mode == "P"
    expected = processor(random_image(), segmentation_maps=label_map, **AS_IS)["mask_labels"][0]
    tensor = torch.from_numpy(label_map)
    for same in (palette_image, [label_map], tensor.long(), tensor[None], label_map[..., None], label_map / 1.0):
        assert torch.equal(processor(random_image(), segmentation_maps=same, **AS_IS)["mask_labels"][0], expected)


def test_ids_beyond_255_survive(processor):
    label_map = np.array([[300, 65535], [846, 300]], dtype=np.uint16)
    inputs = processor(random_image(2, 2), segmentation_maps=Image.fromarray(label_map), ignore_index=65535, **AS_IS)
    assert inputs["class_labels"][0].tolist() == [300, 846]


@pytest.mark.parametrize(
    ("label_map", "sentence"),
    [
        (np.zeros((3, 3), np.uint8), "segmentation map 0 has 3 x 3 pixels"),
        (random_image(40, 50), "one class index per pixel"),
        (np.full((40, 50), -1), "indices from -1"),
        (np.full((40, 50), 0.5), "no whole numbers"),
        ([np.zeros((40, 50), np.uint8)] * 2, "2 segmentation maps for 1 images"),
    ],
)
def test_maps_that_do_not_fit_are_refused(image_processor, label_map, sentence):
    with pytest.raises(ValueError, match=sentence):
        image_processor(random_image(), label_map, **AS_IS)


# Labels and prompts


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    SANImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(OSError, match="tokenizer"):
        SANProcessor.from_pretrained(tmp_path)


def test_labels_are_lowered_stripped_and_folded():
    assert normalize_labels([" Red \n  Car", "SKY", "Car | Auto mobile"]) == ["red car", "sky", "car|auto mobile"]
    assert normalize_labels("Sky") == ["sky"]


@pytest.mark.parametrize(
    ("labels", "fact"),
    [
        ([], "no labels"),
        (["sky", " "], "label 1"),
        (["car|"], "car|"),
        (["car|auto", "auto"], "'car|auto'"),
        (["sky", "road", "Sky "], "positions 0, 2"),
        (["car|Car"], "'car' twice"),
        ([["sky"]], "['sky']"),
        (["e\u0301tang", "\u00e9tang"], "2 times"),
    ],
)
def test_labels_that_cannot_be_told_apart_are_refused(processor, labels, fact):
    with pytest.raises(ValueError, match=re.escape(fact)):
        processor(text=labels)


def test_typed_labels_split_at_commas_and_lines_outside_quotes(processor):
    line, listed = processor(text="sky, Road,car|van"), processor(text=["sky", "road", "car|van"])
    assert torch.equal(line["input_ids"], listed["input_ids"])
    assert normalize_labels('red striped, "road, route",GRASS') == ["red striped", "road, route", "grass"]
    assert normalize_labels("sky\nroad") == ["sky", "road"]
    for text in ("", "sky,,road", 'sky, "road'):
        with pytest.raises(ValueError, match="label"):
            normalize_labels(text)


def test_prompts_are_the_label_in_every_template_word_for_word(processor, tokenizer):
    inputs = processor(text=["Sky"], templates=["a {}.", "see the {} there"])
    prompts = [tokenizer(prompt)["input_ids"] for prompt in ("a sky.", "see the sky there")]
    assert inputs["input_ids"].dtype == torch.int64
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (1, 2, max(map(len, prompts)))
    for row, prompt in enumerate(prompts):
        assert inputs["input_ids"][0, row, : len(prompt)].tolist() == prompt
        assert inputs["attention_mask"][0, row].sum() == len(prompt)


def test_rows_that_a_label_does_not_need_are_masked_copies_of_its_first_prompt(processor):
    inputs = processor(text=["car|van", "sky"], templates=["a {}", "the {}"])
    assert inputs["input_ids"].shape[:2] == (2, 4)
    assert inputs["attention_mask"].any(dim=-1).tolist() == [[True] * 4, [True, True, False, False]]
    assert torch.equal(inputs["input_ids"][1, 2], inputs["input_ids"][1, 0])
    alone = processor(text=["van"], templates=["a {}", "the {}"])["input_ids"]
    length = alone.shape[-1]
    assert torch.equal(inputs["input_ids"][0, 2:, :length], alone[0])


def test_prompts_too_long_for_the_model_are_refused_by_label_or_cut(processor, tokenizer):
    arguments = {"text": ["sky", "x" * 80], "templates": ["a {}"]}
    with pytest.raises(ValueError, match=r"'x{80}' .* 83 .* 77"):
        processor(**arguments)
    cut = processor(**arguments, truncation=True)["input_ids"]
    assert cut.shape[-1] == 77
    assert cut[1, 0, -1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("templates", "fact"),
    [
        ("no such set", "choose one of 'imagenet', 'vild'"),
        ([], "templates is empty"),
        (["a photo"], "once"),
        (["{} and {}"], "once"),
        (["a {} in {place}"], "no other braces"),
        (["a {{}}"], "no other braces"),
        ("a {}", "pass a list"),
    ],
)
def test_templates_that_cannot_be_used_are_refused(image_processor, tokenizer, templates, fact):
    with pytest.raises(ValueError, match=fact):
        SANProcessor(image_processor, tokenizer, templates=templates)


def test_images_and_labels_come_together(processor):
    inputs = processor(images=random_image(), text=["sky", "road"], segmentation_maps=np.ones((40, 50)), size=64)
    assert set(inputs) == {*processor.model_input_names, "mask_labels", "class_labels"}
    assert all(isinstance(inputs[name], torch.Tensor) for name in processor.model_input_names)


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        ({}, "images=..., text="),
        ({"text": ["sky"], "segmentation_maps": np.ones((4, 4))}, "segmentation_maps"),
        ({"text": ["sky"], "size": 64}, "size"),
        ({"text": ["sky"], "sise": 64}, "sise"),
        ({"text": ["sky"], "padding": True, "text_kwargs": {"padding": True}}, "padding"),
    ],
)
def test_calls_that_lack_something_or_contradict_themselves_are_refused(processor, arguments, fact):
    with pytest.raises(ValueError, match=fact):
        processor(**arguments)


# Options, as transformers' processors take them


def test_options_may_be_flat_or_of_one_half(processor):
    arguments = {"images": random_image(), "text": ["sky", "road"], "templates": ["{}"]}
    flat = processor(**arguments, size=64, padding="max_length")
    assert flat["image_sizes"].tolist() == [[64, 80]]
    assert flat["input_ids"].shape == (2, 1, 77)
    apart = processor(**arguments, images_kwargs={"size": 64}, text_kwargs={"padding": "max_length"})
    assert all(torch.equal(flat[name], apart[name]) for name in processor.model_input_names)


def test_common_options_reach_both_halves(processor):
    arguments = {"images": random_image(), "text": ["sky"], "size": 64}
    for options in ({"common_kwargs": {"return_tensors": "np"}}, {"return_tensors": "np"}):
        inputs = processor(**arguments, **options)
        assert all(isinstance(inputs[name], np.ndarray) for name in processor.model_input_names)
    lists = processor(text="sky", return_tensors=None)
    assert isinstance(lists["input_ids"], list)


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({}, 5),
        ({"padding": "max_length", "max_length": 9}, 9),
        ({"pad_to_multiple_of": 8}, 8),
        ({"truncation": True, "max_length": 4}, 4),
    ],
)
def test_padding_and_truncation_are_those_of_tokenizers(processor, tokenizer, options, tokens):
    inputs = processor(text=["sky"], templates=["{}"], **options)
    expected = tokenizer(["sky"], **{"padding": True, "return_tensors": "pt", **options})
    assert torch.equal(inputs["input_ids"][:, 0], expected["input_ids"])
    assert torch.equal(inputs["attention_mask"][:, 0], expected["attention_mask"])
    assert inputs["input_ids"].shape[-1] == tokens


def test_prompts_of_several_lengths_need_padding(processor):
    with pytest.raises(ValueError, match="padding=True"):
        processor(text=["sky", "road"], templates=["{}"], padding=False)


def test_released_tokenizer_gives_clips_own_prompts():
    inputs = SANProcessor(tokenizer=clip_tokenizer())(text=["cat", "hot dog"], templates=["a photo of a {}."])
    # CLIP's published vocabulary: 49406 begins, 49407 ends and pads, 320 1125 539 320 is "a photo of a", 2368 "cat"
    assert inputs["input_ids"][0].tolist() == [[49406, 320, 1125, 539, 320, 2368, 269, 49407, 49407]]
    assert inputs["attention_mask"].sum(dim=-1).tolist() == [[8], [9]]


# Saved and loaded


def test_a_saved_processor_loads_exactly(tokenizer, tmp_path):
    image_processor = SANImageProcessor(size={"shortest_edge": 96}, size_divisor=16, mask_stride=8, ignore_index=7)
    processor = SANProcessor(image_processor, tokenizer, templates="imagenet")
    processor.save_pretrained(tmp_path)
    loaded = SANProcessor.from_pretrained(tmp_path)
    assert loaded.templates_name == "imagenet"
    assert tuple(loaded.templates) == prompt_templates("imagenet")
    assert loaded.image_processor.to_dict() == image_processor.to_dict()
    assert loaded.image_processor.mask_stride == 8
    arguments = {"images": random_image(), "text": ["sky", "red car|van"]}
    first, second = processor(**arguments), loaded(**arguments)
    assert all(torch.equal(first[name], second[name]) for name in processor.model_input_names)
    loaded.save_pretrained(tmp_path / "again")
    for file in ("processor_config.json", "tokenizer.json"):
        assert (tmp_path / "again" / file).read_text() == (tmp_path / file).read_text()


def test_templates_of_ones_own_are_saved_word_for_word(image_processor, tokenizer, tmp_path):
    SANProcessor(image_processor, tokenizer, templates=["the {}!"]).save_pretrained(tmp_path)
    loaded = SANProcessor.from_pretrained(tmp_path)
    assert (loaded.templates_name, loaded.templates) == (None, ["the {}!"])
    other = SANProcessor.from_pretrained(tmp_path, templates="vild", size={"shortest_edge": 64})
    assert tuple(other.templates) == prompt_templates("vild")
    assert SANProcessor(tokenizer=tokenizer).templates == other.templates
    assert other.image_processor.size == {"shortest_edge": 64}


def test_a_saved_folder_needs_no_data_files(processor, tmp_path, monkeypatch):
    processor.save_pretrained(tmp_path)
    monkeypatch.setattr("modeling_san.processing.vocabulary_san._FOLDER", tmp_path / "nowhere")
    assert SANProcessor.from_pretrained(tmp_path).templates == processor.templates


def test_a_processor_beside_a_model_config_of_an_unknown_type_loads(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "not_registered_anywhere"}')
    assert SANProcessor.from_pretrained(tmp_path).templates_name == "vild"


# Vocabularies


def test_vocabularies_have_the_sizes_in_their_names():
    assert {name: len(load_vocabulary(name)) for name in vocabulary_names()} == {
        "ade20k_150": 150,
        "ade20k_847": 847,
        "coco_stuff_171": 171,
        "pascal_context_459": 459,
        "pascal_context_59": 59,
        "pascal_voc_20": 20,
    }
    assert load_vocabulary("ade20k_847").ignore_index == 65535
    with pytest.raises(ValueError, match="ade20k_150"):
        load_vocabulary("cityscapes")


def test_labels_are_extended_by_names_that_are_not_among_them():
    assert extend_labels(["Sky", "road"], "none") == ["sky", "road"]
    stuff = extend_labels(["unicorn|Road", "grass"], "coco-stuff")
    assert stuff[:2] == ["unicorn|road", "grass"]
    assert len(stuff) == 2 + 91 - 2
    assert "person" not in stuff
    everything = extend_labels(["unicorn"], "coco-all")
    assert len(everything) == 172
    assert "person" in everything
    with pytest.raises(ValueError, match="choose one of 'none', 'coco-stuff', 'coco-all'"):
        extend_labels(["sky"], "ade")


def test_data_files_equal_the_published_ones():
    folder = Path(vocabulary_san.__file__).parent / "vocabularies"
    for name, published in json.loads((REFERENCE / "vocabularies.json").read_text()).items():
        assert fingerprint(folder / name) == published


def test_prompts_come_back_as_texts(processor):
    ids = processor(text=["sky", "red truck"], templates=["a photo of {}.", "a {}."])["input_ids"]
    texts = processor.batch_decode(ids, skip_special_tokens=True)
    assert len(texts) == 4
    assert ["sky" in text for text in texts] == [True, True, False, False]
