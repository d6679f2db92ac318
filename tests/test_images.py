"""Damaged and hostile image files, and label maps as tools write them: read rightly, or refused in one sentence."""

import io
import struct
import sys
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, features

from modeling_san import SANImageProcessor
from modeling_san.loss_san import masks_from_label_map
from modeling_san.processing import images_san, overlay
from modeling_san.processing.images_san import RASTER_FORMATS, image_endings, load_image, open_image, read_map
from modeling_san.training.data import ImageError, read_examples
from modeling_san.training.label_sets import LabelSet

PIXELS = np.random.default_rng(0).integers(0, 256, (61, 97, 3), dtype=np.uint8)
STORED = np.array([[0, 1, 2], [255, 2, 0]], dtype=np.uint8)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"


def encoded(image_format, pixels=PIXELS, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, image_format, **options)
    return file.getvalue()


WRITTEN = [
    name
    for name in RASTER_FORMATS
    if name in Image.SAVE and (name not in ("AVIF", "WEBP") or features.check(name.lower()))
]
"""Formats that this PIL reads and writes."""

LOSSLESS = {"PNG", "TIFF", "BMP", "PPM", "TGA", "QOI"}


@pytest.mark.parametrize("image_format", WRITTEN)
def test_every_raster_format_is_read(image_format):
    # An icon has at most 256 pixels a side, and sizes of its own
    pixels = PIXELS[:48, :48] if image_format == "ICO" else PIXELS
    options = {"sizes": [(48, 48)]} if image_format == "ICO" else {}
    image = np.asarray(load_image(open_image(encoded(image_format, pixels, **options)), "the image"))
    assert image.shape == pixels.shape
    if image_format in LOSSLESS:
        assert np.array_equal(image, pixels)


def test_photographs_of_telephones_are_read_where_that_is_installed(monkeypatch):
    def register():
        Image.register_open("HEIF", Image.OPEN["PNG"][0], lambda start: start.startswith(b"\x89PNG"))
        Image.register_extension("HEIF", ".heic")

    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    monkeypatch.setattr(Image, "EXTENSION", dict(Image.EXTENSION))
    assert ".heic" not in image_endings()
    images_san._register_formats.cache_clear()
    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register))
    assert ".heic" in image_endings()
    with pytest.raises(ValueError, match="AVIF, HEIF, TIFF"):
        open_image(b"no image")
    images_san._register_formats.cache_clear()


@pytest.mark.parametrize("image_format", WRITTEN)
def test_a_damaged_file_is_one_error_whatever_its_decoder_raises(image_format):
    content = encoded(image_format)
    rng = np.random.default_rng(0)
    refused = 0
    for length in np.linspace(0, len(content) - 1, 12).astype(int):
        changed = bytearray(content)
        for place in rng.integers(0, min(len(content), 200), 4):
            changed[place] = rng.integers(256)
        for damaged in (content[:length], bytes(changed)):
            # What is read after all is as good as any image
            with suppress(ValueError):
                assert np.asarray(load_image(open_image(damaged, "image 3"), "image 3")).ndim == 3
                continue
            refused += 1
    assert refused >= 4


@pytest.mark.parametrize(
    "error",
    [
        OSError("broken"),
        SyntaxError("broken"),
        struct.error("broken"),
        ValueError("broken"),
        EOFError("broken"),
        IndexError("broken"),
        OverflowError("broken"),
        RecursionError("broken"),
        Image.DecompressionBombError("broken"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("step", ["open", "load"])
def test_the_sentence_about_an_image_does_not_depend_on_what_went_wrong(step, error, monkeypatch, tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "image.png")

    def fail(*args, **kwargs):
        raise error

    if step == "open":
        monkeypatch.setattr(Image, "open", fail)
    else:
        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(ValueError, match=r"^image 0.*(broken|pixels)") as caught:
        SANImageProcessor()(tmp_path / "image.png")
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_told_apart(tmp_path):
    (tmp_path / "endless.png").symlink_to(tmp_path / "endless.png")
    (tmp_path / "empty.png").touch()
    for name, fact in {
        "endless.png": "symbolic links",
        "empty.png": "is empty",
        "missing.png": "there is no file",
        "": "is a folder",
        "nul\0l.png": "null",
        "two\nlines.png": r"two\\nlines.png",
        "n" * 300: "too long",
    }.items():
        with pytest.raises(ValueError, match=fact) as caught:
            open_image(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("times", [1.5, 3], ids=["where PIL warns", "where PIL refuses"])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_images_that_would_fill_the_memory_are_refused_before_they_are_decoded(monkeypatch, tmp_path, times):
    path = tmp_path / "image.png"
    Image.new("1", (100, 100)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(10_000 / times))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("it was decoded"))
    for read in (open_image, SANImageProcessor(), LabelSet(("sky", "road")).read):
        with pytest.raises(ValueError, match=f"more than the {int(10_000 / times):,} that are read"):
            read(path)


def test_any_number_of_pixels_is_read_where_somebody_says_so(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert open_image(encoded("PNG")).size == (97, 61)


READERS = {
    "path": SANImageProcessor(),
    "image that somebody else opened": lambda path: SANImageProcessor()(Image.open(path)),
    "large photograph": SANImageProcessor(do_draft=True),
    "label map": lambda path: SANImageProcessor()(PIXELS, path),
    "label map of a data set": LabelSet(("sky", "road")).read,
    "segmentation": lambda path: overlay(path, np.zeros((9, 9), int), ["sky"]),
    "example": lambda path: list(read_examples([{"image": {"bytes": EPS}, "annotation": STORED}], LabelSet(("sky",)))),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_no_program_is_started_whatever_an_image_file_is_called(read, monkeypatch, tmp_path):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: pytest.fail("Ghostscript was started"))
    path = tmp_path / "holiday.jpg"
    path.write_bytes(EPS)
    with pytest.raises(ValueError, match="PNG, JPEG"):
        read(path)


def test_a_row_of_a_data_set_that_cannot_be_read_is_named():
    rows = [
        {"image": {"bytes": content, "path": None}, "annotation": np.zeros((61, 97), np.uint8)}
        for content in (encoded("PNG"), encoded("PNG")[:200], EPS, b"", None)
    ]
    for index, row in enumerate(rows[1:], start=1):
        with pytest.raises(ImageError, match=f"^streets, example {index}: the image"):
            list(read_examples([rows[0]] * index + [row], LabelSet(("sky",)), source="streets, "))


# Label maps


def reopened(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return Image.open(file)


def with_alpha(alpha):
    return np.stack([STORED, np.broadcast_to(np.uint8(alpha), STORED.shape)], axis=-1)


AS_TOOLS_WRITE = {
    "grey": Image.fromarray(STORED),
    "grey with alpha": Image.fromarray(with_alpha(255)),
    "colours that are grey": Image.fromarray(STORED).convert("RGB"),
    "colours with alpha that are grey": reopened(Image.fromarray(STORED).convert("RGBA")),
    "16 bits": reopened(Image.fromarray(STORED.astype(np.uint16))),
    "array of 16 bits": STORED.astype(np.uint16),
    "tensor of 16 bits": torch.from_numpy(STORED.astype(np.uint16)),
    "tensor with a channel": torch.from_numpy(STORED)[None],
    "tensor of three channels": torch.from_numpy(STORED).expand(3, -1, -1),
    "array of three channels": np.repeat(STORED[..., None], 3, axis=-1),
    "array with alpha": with_alpha(255),
    "whole floats": STORED.astype(np.float32),
}


@pytest.mark.parametrize("label_map", AS_TOOLS_WRITE.values(), ids=AS_TOOLS_WRITE)
def test_a_label_map_is_read_in_every_form_that_tools_write(label_map):
    assert read_map(label_map, "the map").tolist() == STORED.tolist()
    options = {"do_resize": False, "return_tensors": "np"}
    labels = SANImageProcessor()(np.zeros((2, 3, 3), np.uint8), label_map, **options)["labels"]
    assert labels[0, :2, :3].tolist() == STORED.tolist()


@pytest.mark.parametrize(
    ("label_map", "fact"),
    [
        (with_alpha(0), "transparent"),
        (Image.fromarray(with_alpha(128)), "transparent"),
        (Image.fromarray(PIXELS), "in colours"),
        (Image.new("RGBA", (3, 2), (7, 7, 7, 9)), "transparent"),
        (np.zeros((7, 3, 5)), "shape 7 x 3 x 5"),
        (np.zeros((2, 3, 4, 1)), "shape 2 x 3 x 4 x 1"),
        (np.zeros(6), "shape 6"),
        (np.full((2, 3), np.inf), "no whole numbers"),
        (np.full((2, 3), np.nan), "no whole numbers"),
        (np.full((2, 3), "sky"), "type <U3"),
        (np.full((2, 3), 65536), "indices from 65536"),
        (np.full((2, 3), -1), "indices from -1 .*expected 0 ... 65535$"),
    ],
)
def test_what_is_no_label_map_is_refused(label_map, fact):
    with pytest.raises(ValueError, match=fact):
        read_map(label_map, "the map")


@pytest.mark.parametrize("ignored", [-100, -1, 255, 65535])
@pytest.mark.parametrize("form", [np.asarray, torch.from_numpy])
def test_what_stands_for_no_label_may_be_any_number_in_the_map_itself(ignored, form):
    label_map = np.full((96, 130), 1, np.int64)
    label_map[:48] = ignored
    processor = SANImageProcessor(ignore_index=ignored, do_resize=False)
    labels = processor(np.zeros((96, 130, 3), np.uint8), form(label_map), return_tensors="np")["labels"][0]
    assert (labels[:48] == ignored).all()
    assert (labels[48:, :130] == 1).all()
    assert (labels[:, 130:] == ignored).all()
    with pytest.raises(ValueError, match=f"indices from -700 to .*{f'or {ignored}' if ignored < 0 else ''}"):
        processor(np.zeros((96, 130, 3), np.uint8), np.where(label_map == 1, -700, label_map))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64])
def test_the_loss_takes_label_maps_of_every_kind_of_integers(dtype):
    masks, classes = masks_from_label_map(torch.from_numpy(STORED).to(dtype), 3, 255)
    assert classes.tolist() == [0, 1, 2]
    assert torch.equal(masks, torch.from_numpy(np.stack([value == STORED for value in (0, 1, 2)])).float())
