# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""Whatever people pass as images and label maps, turned into numpy arrays of one form.

Images become (height, width, 3) arrays of uint8, or of float32 where floats were given; label maps become
(height, width) arrays of int32. Everything that cannot be such an array is refused here, with a sentence that says
which one it is, what it is, and what to pass.
"""

import io
import os
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import cache
from threading import Lock
from typing import IO, Any, TypeVar

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

from .wording_san import one_line

_EXIF_ORIENTATION = 0x0112
_ON_ITS_SIDE = (5, 6, 7, 8)
_CHANNELS = (1, 3, 4)
_Result = TypeVar("_Result")

_ACCEPTED = "a PIL image, a path, a numpy array or a torch tensor"

RASTER_FORMATS = (
    *("PNG", "JPEG", "MPO", "JPEG2000", "WEBP", "AVIF", "HEIF", "TIFF", "BMP", "GIF", "ICO", "PPM", "TGA", "QOI"),
)
"""Formats that image files are read in, as far as PIL has them."""


def open_image(source: str | os.PathLike | bytes | IO[bytes], name: str | None = None) -> Image.Image:
    """Open an image file of a usual format; PIL reads its pixels later.

    Any other format is refused: PIL hands some to programs of the system, EPS to Ghostscript for one, which is too
    much trust in files that may come from anywhere. So is an image of more pixels than `PIL.Image.MAX_IMAGE_PIXELS`
    (None: of any number): it takes gigabytes, however small its file is.

    Args:
        source: a path, the content of a file, or an open file.
        name: what an error calls it, for example "image 2"; by default its path.

    Raises:
        ValueError: it cannot be read, is no image in one of `RASTER_FORMATS`, or has too many pixels.
    """
    path = os.fspath(source) if isinstance(source, (str, os.PathLike)) else None
    what = ": ".join(part for part in (name, path and repr(path)) if part) or "the image"
    formats = _readable_formats()
    try:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats)
        size = f"{image.width} x {image.height}"
        is_bomb = Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        size, is_bomb = "far more", True
    except FileNotFoundError as error:
        raise ValueError(f"{name or 'the image'}: there is no file {path!r}: check the path") from error
    except IsADirectoryError as error:
        raise ValueError(f"{what} is a folder: pass the images in it") from error
    # Plugins stumble over damaged files in ways of their own
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:
            raise ValueError(f"{what} cannot be read ({error.strerror}): check the path") from error
        if path is not None and os.path.isfile(path) and not os.path.getsize(path):
            raise ValueError(f"{what} is empty (0 bytes): it may not have been copied completely") from error
        raise ValueError(
            f"{what} cannot be opened as an image ({one_line(error)}): pass {', '.join(formats)}"
        ) from error
    if is_bomb:
        raise ValueError(
            f"{what} has {size} pixels, more than the {Image.MAX_IMAGE_PIXELS:,} that are read: shrink it, or raise "
            "PIL.Image.MAX_IMAGE_PIXELS"
        )
    return image


def image_endings() -> frozenset[str]:
    """What names of files end in that hold images as `open_image` opens them, in lower case with the dot."""
    formats = _readable_formats()
    return frozenset(ending for ending, its_format in Image.registered_extensions().items() if its_format in formats)


def flatten_images(images: Any) -> list[Any]:
    """One image, a batch array (batch, ...), or lists of either, nested at will, as a flat list of images.

    Raises:
        ValueError: there is no image at all.
    """
    images = _flatten(images, batch_ndim=4)
    if not images:
        raise ValueError(f"images is empty: pass at least one image, each {_ACCEPTED}")
    return images


def flatten_maps(maps: Any, images: int) -> list[Any]:
    """Label maps as a flat list, one for each of `images` images.

    Args:
        maps: one label map, a batch array (batch, height, width), or lists of either.
        images: how many maps there have to be.

    Raises:
        ValueError: there are more or fewer maps than images.
    """
    # An array of three axes is a batch, unless there is one image: then it is one map with a channel axis.
    flat = _flatten(maps, batch_ndim=3 if images > 1 and not isinstance(maps, (list, tuple)) else 4)
    if len(flat) != images:
        raise ValueError(
            f"there are {len(flat)} segmentation maps for {images} images: pass one map for each image, in order"
        )
    return flat


def read_image(image: Any, name: str, *, to_rgb: bool = True, channels_first: bool | None = None) -> np.ndarray:
    """One image as an array: what `load_image` gives, with PIL images as arrays of bytes (height, width, 3)."""
    return np.asarray(load_image(image, name, to_rgb=to_rgb, channels_first=channels_first))


def load_image(
    image: Any, name: str, *, to_rgb: bool = True, channels_first: bool | None = None
) -> Image.Image | np.ndarray:
    """One image, decoded and checked, in the form it comes in: a PIL image stays one, which spares two copies.

    PIL images have mode RGB. Those with more than 8 bits, and all arrays, become arrays (height, width, 3): uint8 in
    0 ... 255, or float32 with the values given.

    Files and PIL images are turned upright by their EXIF orientation. Grey becomes three equal channels, palettes are
    looked up, and transparency is dropped as PIL's `convert("RGB")` and the reference implementation do: the colour
    stored under transparent pixels shows. Values of 16 bits (PIL's `I;16`, uint16, or integers above 255) are scaled
    to 8 bits by 255 / 65535, so that nothing is clipped.

    Args:
        image: a PIL image, a path or an address, a numpy array or a torch tensor: (height, width),
            (height, width, channels) or (channels, height, width) with 1, 3 or 4 channels.
        name: what an error calls it, for example "image 2".
        to_rgb: make three channels out of one or four; false refuses what does not have three.
        channels_first: layout of an array; None finds out (if both ends could be channels: arrays have them last,
            tensors first).

    Raises:
        ValueError: the image cannot be read, has no pixels, the wrong axes or channels, or values that are not
            numbers.
    """
    if isinstance(image, (str, os.PathLike)):
        image = open_image(image, name)
    if isinstance(image, Image.Image):
        image = _decoded(image, name)
        # PIL clips modes of more than 8 bits when it converts them; these are scaled with the values of arrays instead
        if to_rgb and image.mode not in ("RGB", "I", "F") and not image.mode.startswith("I;16"):
            with _decoding(name):
                image = image.convert("RGB")
        if image.mode == "RGB":
            return image
        array, channels_first = np.asarray(image), False
    else:
        array = _as_array(image, name)
        if channels_first is None:
            channels_first = _infer_channels_first(array, if_both=isinstance(image, torch.Tensor))
    if array.size == 0:
        raise ValueError(f"{name} has no pixels (shape {_shape(array)}): pass an image of at least 1 x 1")
    return _to_values(_to_three_channels(array, name, to_rgb, channels_first), name)


def decode_images(images: Any) -> list[Image.Image | np.ndarray]:
    """One image or a list, nested at will, decoded side by side: what `load_image` gives of each.

    Raises:
        ValueError: as `load_image`; the sentence says which image it is, counted from 0.
    """
    items = flatten_images(images)
    # Images in memory may share a file, or be one and the same object
    one_at_a_time = Lock()

    def decode(index: int) -> Image.Image | np.ndarray:
        with nullcontext() if isinstance(items[index], (str, os.PathLike)) else one_at_a_time:
            return load_image(items[index], f"image {index}")

    return side_by_side(decode, len(items))


def side_by_side(function: Callable[[int], _Result], count: int) -> list[_Result]:
    """The function of 0 ... count - 1, in as many threads as torch computes with: PIL lets go of the GIL meanwhile.

    In the workers of a data loader that is one thread. Of several errors, that of the smallest number is raised.
    """
    threads = min(count, torch.get_num_threads())
    if threads == 1:
        return [function(index) for index in range(count)]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, range(count)))


def draft_image(
    image: Any, name: str, wanted_size: Callable[[int, int], tuple[int, int]], resample: int
) -> tuple[Any, tuple[int, int] | None]:
    """Decode a large JPEG image at 1/2, 1/4 or 1/8 of its size, and resize that: faster, and not quite the same.

    It is decoded to at least twice the size wanted, so that resizing still averages over its pixels.

    Args:
        image: what `load_image` takes. Drafted are JPEG files, and PIL images of them that are not decoded yet;
            these stay as they are, another image is made of their file.
        name: what an error calls it.
        wanted_size: gives the height and width to resize to, for an image of such a height and width.
        resample: one of `PIL.Image.Resampling`.

    Returns:
        What to pass to `load_image`, and the height and width that it has in full and upright, None if it is not
        drafted.

    Raises:
        ValueError: the image cannot be opened or decoded.
    """
    opened = open_image(image, name) if isinstance(image, (str, os.PathLike)) else image
    # PIL lets go of the file when it has decoded it; the frame or draft that someone chose stays chosen
    if not isinstance(opened, JpegImageFile) or opened.fp is None or opened.tell() or opened.decoderconfig:
        return opened, None
    # Draft mode changes the image that it is set on
    drafted = open_image(opened.fp, name) if opened is image else opened
    with _decoding(name):
        on_its_side = drafted.getexif().get(_EXIF_ORIENTATION, 1) in _ON_ITS_SIDE
    width, height = drafted.size
    full_size = (width, height) if on_its_side else (height, width)
    wanted = wanted_size(*full_size)
    new_width, new_height = wanted if on_its_side else wanted[::-1]
    draft = drafted.draft(None, (2 * new_width, 2 * new_height))
    if draft is None or drafted.size == (width, height):
        return opened, None
    with _decoding(name):
        # The box ends where the image does: where its sides are no multiples of 8, the last pixels lie beyond
        return drafted.resize((new_width, new_height), Image.Resampling(resample), box=draft[1]), full_size


def read_map(segmentation_map: Any, name: str, *, also: Collection[int] = ()) -> np.ndarray:
    """One label map as an array (height, width) of int32.

    A palette image counts by its indices, not by its colours. Grey that is stored as three equal channels, or with an
    alpha channel that is opaque, counts as grey.

    Args:
        segmentation_map: a PIL image, a path, a numpy array or a torch tensor of class indices, (height, width), or
            with channels before or behind.
        name: what an error calls it, for example "segmentation map 2".
        also: values that may occur beside 0 ... 65535, such as -1 where that stands for no class.

    Raises:
        ValueError: it cannot be read, is empty, is in colours or transparent, or holds other values.
    """
    if isinstance(segmentation_map, (str, os.PathLike)):
        segmentation_map = open_image(segmentation_map, name)
    if isinstance(segmentation_map, Image.Image):
        segmentation_map = np.asarray(_decoded(segmentation_map, name))
    array = _as_array(segmentation_map, name)
    if array.size == 0:
        raise ValueError(f"{name} has no pixels (shape {_shape(array)}): pass one class index per pixel")
    return _to_indices(_one_channel(array, name, isinstance(segmentation_map, torch.Tensor)), name, also)


def to_byte_scale(image: np.ndarray, name: str) -> np.ndarray:
    """Bring an image of floats to 0 ... 255, the scale of bytes; bytes are returned as they are.

    Floats that lie within 0 ... 1 are taken to be on that scale already, so that they are not rescaled twice.

    Args:
        image: (height, width, 3), uint8 or float32.
        name: what an error calls it.

    Raises:
        ValueError: values lie outside 0 ... 255.
    """
    if image.dtype == np.uint8:
        return image
    low, high = float(image.min()), float(image.max())
    if low < 0 or high > 255:
        raise ValueError(
            f"{name} holds floats from {low:g} to {high:g}, expected 0 ... 1 or 0 ... 255: scale it, or pass "
            "do_rescale=False (and do_normalize=False if it is normalised already)"
        )
    return image * np.float32(255) if high <= 1 else image


def read_byte_image(image: Any, name: str) -> np.ndarray:
    """One image as bytes (height, width, 3): `read_image` on the scale of `to_byte_scale`, rounded.

    Args:
        image: what `read_image` takes.
        name: what an error calls it.

    Raises:
        ValueError: as those two.
    """
    image = to_byte_scale(read_image(image, name), name)
    return image if image.dtype == np.uint8 else np.rint(image).astype(np.uint8)


def image_size(image: Image.Image | np.ndarray) -> tuple[int, int]:
    """Height and width of what `load_image` gives."""
    height, width = image.size[::-1] if isinstance(image, Image.Image) else image.shape[:2]
    return height, width


def resize_image(image: Image.Image | np.ndarray, size: tuple[int, int], resample: int) -> np.ndarray:
    """Resize with PIL's filters: bytes as bytes (rounded, like the reference), floats as floats.

    Args:
        image: a PIL image of mode RGB, or (height, width, 3), uint8 or float32.
        size: height and width to reach, in pixels.
        resample: one of `PIL.Image.Resampling`.
    """
    height, width = size
    if image_size(image) == (height, width):
        return np.asarray(image)
    if isinstance(image, np.ndarray) and image.dtype == np.uint8:
        image = Image.fromarray(image)
    if isinstance(image, Image.Image):
        return np.asarray(image.resize((width, height), Image.Resampling(resample)))
    resized = np.empty((height, width, image.shape[2]), dtype=np.float32)
    for channel in range(image.shape[2]):
        plane = Image.fromarray(np.ascontiguousarray(image[..., channel]))
        resized[..., channel] = np.asarray(plane.resize((width, height), Image.Resampling(resample)))
    return resized


def resize_map(segmentation_map: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a label map (height, width) of int32 by picking the nearest pixel."""
    height, width = size
    if segmentation_map.shape == (height, width):
        return segmentation_map
    return np.asarray(Image.fromarray(segmentation_map).resize((width, height), Image.Resampling.NEAREST))


def _flatten(items: Any, batch_ndim: int) -> list[Any]:
    """Unpack nested lists, and arrays that have a batch axis."""
    if isinstance(items, (list, tuple)):
        return [item for nested in items for item in _flatten(nested, batch_ndim)]
    if isinstance(items, (np.ndarray, torch.Tensor)) and items.ndim == batch_ndim:
        return list(items)
    return [items]


def _decoded(image: Image.Image, name: str) -> Image.Image:
    """The pixels of a PIL image, turned upright by its EXIF orientation."""
    if 0 in image.size:
        raise ValueError(f"{name} has no pixels (size {image.size}): pass an image of at least 1 x 1")
    if isinstance(image, ImageFile.ImageFile) and image.tile and image.fp is None:
        raise ValueError(f"{name} was closed before it was decoded: pass it inside its `with` block, or pass its path")
    if isinstance(image, ImageFile.ImageFile) and image.tile and image.format not in RASTER_FORMATS:
        raise ValueError(
            f"{name} is a file of the format {image.format}, which is not decoded here: pass one of "
            f"{', '.join(_readable_formats())}, or decode it before (image.load())"
        )
    with _decoding(name):
        image.load()
        # exif_transpose copies what is upright already, which most images are
        turned = image.getexif().get(_EXIF_ORIENTATION, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Say in one sentence what goes wrong inside: decoders stumble over damaged files in ways of their own."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"{name} cannot be decoded ({one_line(error)}): the file may be damaged or cut off"
        ) from error


def _readable_formats() -> list[str]:
    """Those of `RASTER_FORMATS` that PIL has, by itself or by what is installed."""
    _register_formats()
    return [image_format for image_format in RASTER_FORMATS if image_format in Image.OPEN]


@cache
def _register_formats() -> None:
    """Make PIL know its own formats, and HEIF."""
    Image.init()
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return
    register_heif_opener()


def _as_array(item: Any, name: str) -> np.ndarray:
    """An array or a tensor as an array; numpy has no bfloat16."""
    if isinstance(item, torch.Tensor):
        item = item.detach().cpu()
        return (item.float() if item.is_floating_point() else item).numpy()
    if not isinstance(item, np.ndarray):
        raise ValueError(f"{name} is a {type(item).__name__}: pass {_ACCEPTED}")
    return item


def _infer_channels_first(array: np.ndarray, if_both: bool) -> bool:
    """Whether the channels of a three-axis array come first."""
    if array.ndim != 3:
        return False
    first, last = array.shape[0] in _CHANNELS, array.shape[-1] in _CHANNELS
    return if_both if first and last else first


def _to_three_channels(array: np.ndarray, name: str, to_rgb: bool, channels_first: bool) -> np.ndarray:
    """(height, width), (height, width, channels) or (channels, height, width) -> (height, width, 3)."""
    if array.ndim == 2:
        array = array[..., None]
    elif array.ndim != 3:
        raise ValueError(
            f"{name} has shape {_shape(array)}: expected (height, width), (height, width, channels) or "
            "(channels, height, width)"
        )
    elif channels_first:
        array = np.moveaxis(array, 0, -1)
    channels = array.shape[-1]
    if channels not in _CHANNELS:
        raise ValueError(
            f"{name} has {channels} channels (shape {_shape(array)}): expected 1 (grey), 3 (RGB) or 4 (RGBA)"
        )
    if channels == 3:
        return array
    if not to_rgb:
        raise ValueError(f"{name} has {channels} channels, expected 3: leave do_convert_rgb=True")
    return np.repeat(array, 3, axis=-1) if channels == 1 else array[..., :3]


def _to_values(array: np.ndarray, name: str) -> np.ndarray:
    """uint8 out of integers of 8 or 16 bits and truth values, finite float32 out of floats."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * np.uint8(255)
    if np.issubdtype(array.dtype, np.integer):
        low, high = int(array.min()), int(array.max())
        if low < 0 or high > 65535:
            raise ValueError(f"{name} holds integers from {low} to {high}: expected 0 ... 255 or 0 ... 65535")
        if array.dtype == np.uint16 or high > 255:
            # 65535 = 257 * 255, and 128 rounds to the nearest
            array = (array.astype(np.uint32) + 128) // 257
        return array.astype(np.uint8)
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{name} holds values of type {array.dtype}: expected integers or floats")
    array = array.astype(np.float32, copy=False)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds values that are NaN or infinite: replace them before")
    return array


def _one_channel(array: np.ndarray, name: str, is_tensor: bool) -> np.ndarray:
    """(height, width) out of a map with channels before or behind: grey, once or three times, and perhaps alpha."""
    if array.ndim == 2:
        return array
    # Where both ends could be channels: arrays have them last, tensors first
    ends = (0, -1) if is_tensor or array.shape[0] == 1 else (-1, 0)
    axis = next((axis for axis in ends if array.ndim == 3 and array.shape[axis] in (1, 2, 3, 4)), None)
    if axis is None:
        raise ValueError(f"{name} has shape {_shape(array)}, expected (height, width): pass one class index per pixel")
    grey, *others = np.moveaxis(array, axis, 0)
    if len(others) % 2 and not (others.pop() == (np.iinfo(array.dtype).max if array.dtype.kind == "u" else 255)).all():
        raise ValueError(f"{name} is transparent in places: store one class index per pixel, without an alpha channel")
    if not all(np.array_equal(grey, other) for other in others):
        raise ValueError(
            f"{name} is in colours (shape {_shape(array)}): store one class index per pixel; training and evaluation "
            "read colours too, if the label file names the classes' `colors`"
        )
    return grey


def _to_indices(array: np.ndarray, name: str, also: Collection[int]) -> np.ndarray:
    """Class indices as int32, in 0 ... 65535 or among those others."""
    if array.dtype.kind not in "buif":
        raise ValueError(f"{name} holds values of type {array.dtype}: expected class indices")
    if array.dtype.kind == "f" and not (np.isfinite(array) & (array == np.rint(array))).all():
        raise ValueError(f"{name} holds floats that are no whole numbers: pass one class index per pixel")
    low, high = int(array.min()), int(array.max())
    others = [value for value in also if not 0 <= value <= 65535]
    if (low < 0 or high > 65535) and not (((array >= 0) & (array <= 65535)) | np.isin(array, others)).all():
        expected = " or ".join(["0 ... 65535", *map(str, others)])
        raise ValueError(f"{name} holds indices from {low} to {high}: expected {expected}")
    return np.ascontiguousarray(array, dtype=np.int32)


def _shape(array: np.ndarray) -> str:
    """A shape for an error message."""
    return " x ".join(map(str, array.shape))
