# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""Image processors of SAN: images in, padded batches out, and segmentations back.

There are two, as of every model of transformers: one resizes with PIL, the other with torchvision, on any device.
"""

import os
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from threading import Lock
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, ChannelDimension, SizeDict
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import TensorType, is_torchvision_available

from .images_san import (
    draft_image,
    flatten_images,
    flatten_maps,
    image_size,
    load_image,
    read_map,
    resize_image,
    resize_map,
    side_by_side,
    to_byte_scale,
)
from .post_processing_san import MaskGeometry, as_masks, score_map, segment

try:
    from transformers.image_processing_outputs import (
        SemanticSegmentationPostProcessorOutput as SegmentationWithScores,
    )
except ImportError:
    # Before transformers 5.24
    SegmentationWithScores = BatchFeature  # type: ignore[misc, assignment]

_SIZE_FORMS = '{"shortest_edge": 640, "longest_edge": 2560}, {"shortest_edge": 640} or {"height": 640, "width": 640}'


class SANImageProcessorKwargs(ImagesKwargs, total=False):
    """Options of `SANImageProcessor` beside those of every image processor.

    Attributes:
        size_divisor: heights and widths are padded to a multiple of this many pixels.
        mask_stride: pixels of the network's input per cell of its mask map, in each direction.
        ignore_index: value of segmentation maps that stands for "no class".
        do_reduce_labels: take 1 off every value of segmentation maps and make 0 the ignored one, as data sets need
            that count classes from 1 and have background at 0.
        do_draft: decode large JPEG images at 1/2, 1/4 or 1/8 of their size where that is still twice the size they
            are resized to (PIL's draft mode). A photograph of 12 megapixels takes a third to a half of the time,
            and its resized bytes change by less than 1 on average.
    """

    size_divisor: int
    mask_stride: int
    ignore_index: int
    do_reduce_labels: bool
    do_draft: bool


class BaseSANImageProcessor(BaseImageProcessor):
    """Prepares images for SAN, and turns SAN's output into segmentations.

    An image is resized with a bilinear filter so that its short side is 640 pixels, unless its long side would
    then pass 2560; normalised with CLIP's mean and standard deviation; and padded at the right and at the bottom with
    0, after normalisation, to a multiple of 32 (the inference recipe of the reference implementation). In a batch, all
    are padded to the largest padded size, and `image_sizes` says what is image, so that a model can run each one on
    the size it would have alone.

    Every option can be set when the processor is made, is saved with it, and can be overridden in a call:
    `do_resize`, `size`, `resample`, `do_rescale`, `rescale_factor`, `do_normalize`, `image_mean`, `image_std`,
    `do_pad`, `pad_size`, `do_convert_rgb`, `input_data_format`, and those of `SANImageProcessorKwargs`.
    """

    valid_kwargs = SANImageProcessorKwargs
    model_input_names = ["pixel_values", "image_sizes"]
    # A saved image processor carries this code, so that it loads where the package is not installed.
    _auto_class = "AutoImageProcessor"  # type: ignore[assignment]

    do_convert_rgb = True
    do_resize = True
    size = {"shortest_edge": 640, "longest_edge": 2560}
    default_to_square = False
    resample = Image.Resampling.BILINEAR
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    do_pad = True
    size_divisor = 32
    mask_stride = 16
    ignore_index = 255
    do_reduce_labels = False
    do_draft = False

    def __init__(self, **kwargs: Unpack[SANImageProcessorKwargs]) -> None:
        """Take the options; what is not given has the default of the class."""
        super().__init__(**kwargs)

    def __call__(
        self, images: Any, segmentation_maps: Any = None, **kwargs: Unpack[SANImageProcessorKwargs]
    ) -> BatchFeature:
        """Prepare images, see `preprocess`."""
        return self.preprocess(images, segmentation_maps, **kwargs)

    def preprocess(  # type: ignore[override]
        self, images: Any, segmentation_maps: Any = None, **kwargs: Unpack[SANImageProcessorKwargs]
    ) -> BatchFeature:
        """Prepare one image or many, of any sizes, for the model.

        Args:
            images: PIL images, paths, numpy arrays or torch tensors, one or a list. RGB, grey, RGBA
                (transparency is dropped), palettes, 16 bits and EXIF-rotated files all work; floats count as 0 ... 1
                if they lie in there, else as 0 ... 255. With `do_rescale=False` values are taken as they are.
            segmentation_maps: class indices, one map (height, width) for each image and of the size it has
                upright. A map is turned only by EXIF data of its own.
            **kwargs: overrides of the processor's options, and `return_tensors` ("pt", "np" or None for numpy).

        Returns:
            `pixel_values` (batch, 3, height, width) float32 and `image_sizes` (batch, 2) int64, height and width of
            each image inside `pixel_values` before padding. With segmentation maps also `labels` (batch, height,
            width) int64 class indices at the padded size, `ignore_index` where padded or ignored.

        Raises:
            ValueError: an image, map or option cannot be used; the message says which, and what to do.
        """
        return super().preprocess(images, segmentation_maps, **kwargs)

    def post_process_semantic_segmentation(
        self, outputs: Any, target_sizes: Any = None, return_segmentation_scores: bool = False
    ) -> Any:
        """Label every pixel with its best class (SAN paper, section 3).

        Memory stays small whatever the number of classes: 847 classes on 1024 x 1024 pixels take tens of megabytes
        beside the result.

        Args:
            outputs: the model's output with `masks_queries_logits` (batch, queries, h, w), `class_queries_logits`
                (batch, queries, classes + 1), the last being "no object", and `image_sizes` (batch, 2) or None if
                the whole map is image. Any float type; computed in float32.
            target_sizes: (height, width) wanted for each image, for example `[image.size[::-1]]` (of an image that
                is upright; otherwise of `ImageOps.exif_transpose(image)`). None gives the size the network saw.
            return_segmentation_scores: as in other image processors, return what each class scores at every pixel,
                too. That takes memory, see `post_process_semantic_scores`; what the best class scores alone costs
                none, see `post_process_with_scores`.

        Returns:
            A list of maps (height, width) int64 with class indices. With `return_segmentation_scores` a list with
            such a map as `segmentation`, and `segmentation_scores` (classes, height, width) float32, for each image.

        Raises:
            ValueError: the sizes do not fit the outputs.
        """
        maps, _ = self.post_process_with_scores(outputs, target_sizes)
        if not return_segmentation_scores:
            return maps
        scores = self.post_process_semantic_scores(outputs, target_sizes)
        return [
            SegmentationWithScores({"segmentation": label_map, "segmentation_scores": of_classes})
            for label_map, of_classes in zip(maps, scores, strict=True)
        ]

    def post_process_with_scores(
        self, outputs: Any, target_sizes: Any = None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Label every pixel with its best class, and say what that scores.

        Args:
            outputs: as for `post_process_semantic_segmentation`.
            target_sizes: as for `post_process_semantic_segmentation`.

        Returns:
            A list of maps (height, width) int64 with class indices, and a list of maps (height, width) float32 with
            the scores of these classes.

        Raises:
            ValueError: the sizes do not fit the outputs.
        """
        found = [segment(*arguments) for arguments in self._images_of(outputs, target_sizes)]
        return [label_map for label_map, _ in found], [scores for _, scores in found]

    def post_process_semantic_scores(self, outputs: Any, target_sizes: Any = None) -> list[torch.Tensor]:
        """Scores of all classes at every pixel, for heat maps, ensembles and tests.

        This holds (classes, height, width) floats for each image, 3.5 GB for 847 classes on 1024 x 1024 pixels;
        `post_process_semantic_segmentation` does not.

        Args:
            outputs: as for `post_process_semantic_segmentation`.
            target_sizes: as for `post_process_semantic_segmentation`.

        Returns:
            A list of (classes, height, width) float32.

        Raises:
            ValueError: the sizes do not fit the outputs.
        """
        return [score_map(*arguments) for arguments in self._images_of(outputs, target_sizes)]

    def resized_size(self, height: int, width: int, size: SizeDict | dict[str, int] | None = None) -> tuple[int, int]:
        """Height and width that an image of `height` x `width` pixels is resized to.

        Args:
            height: of the image.
            width: of the image.
            size: a size option; None takes the processor's own.

        Raises:
            ValueError: the size has none of the forms known.
        """
        size = self.size if size is None else size
        if size.get("height") and size.get("width"):
            return int(size["height"]), int(size["width"])
        if not size.get("shortest_edge"):
            raise ValueError(f"size is {dict(size)}: pass {_SIZE_FORMS}")
        scale = size["shortest_edge"] / min(height, width)
        longest = size.get("longest_edge")
        if longest and scale * max(height, width) > longest:
            scale = longest / max(height, width)
        # A very long and thin image would lose its short side altogether
        return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))

    def _validate_preprocess_kwargs(self, **kwargs: Any) -> None:  # type: ignore[override]
        """Refuse options that contradict each other or that this processor does not have."""
        super()._validate_preprocess_kwargs(**kwargs)
        if kwargs.get("do_center_crop"):
            raise ValueError("do_center_crop=True is not supported, SAN takes whole images: crop them before")
        divisor, stride = kwargs["size_divisor"], kwargs["mask_stride"]
        if divisor < 1 or stride < 1 or divisor % stride:
            raise ValueError(
                f"size_divisor is {divisor} and mask_stride is {stride}: size_divisor has to be a multiple of "
                "mask_stride, and both at least 1"
            )

    def to_dict(self) -> dict[str, Any]:
        """What is saved: the options, and where the code is, which either backend loads."""
        saved = super().to_dict()
        if "auto_map" in saved:
            module = BaseSANImageProcessor.__module__.rpartition(".")[2]
            saved["auto_map"] = {self._auto_class: f"{module}.SANImageProcessor"}
        return saved

    def _resize_to(
        self, image: Image.Image | np.ndarray, size: tuple[int, int], resample: Any, device: Any
    ) -> torch.Tensor:
        """An image that was read, as (3, height, width) of this size, uint8 or float32; the backend's."""
        raise NotImplementedError

    def _preprocess_image_like_inputs(  # type: ignore[override]
        self,
        images: Any,
        segmentation_maps: Any = None,
        *,
        do_convert_rgb: bool,
        do_resize: bool,
        size: SizeDict,
        resample: Any,
        do_rescale: bool,
        ignore_index: int,
        do_reduce_labels: bool,
        do_draft: bool,
        return_tensors: str | TensorType | None = None,
        input_data_format: str | ChannelDimension | None = None,
        device: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Read, resize, and make a batch; options come complete and checked from `preprocess`."""
        channels_first = None if input_data_format is None else str(_value(input_data_format)) == "channels_first"
        items = flatten_images(images)
        maps = None if segmentation_maps is None else flatten_maps(segmentation_maps, len(items))
        wanted_size = partial(self.resized_size, size=size) if do_resize else _same_size
        # Images in memory may share a file, or be one and the same object
        one_at_a_time = Lock()

        def prepare(index: int) -> tuple[torch.Tensor, tuple[int, int]]:
            item, name, full_size = items[index], f"image {index}", None
            with nullcontext() if isinstance(item, (str, os.PathLike)) else one_at_a_time:
                if do_draft:
                    item, full_size = draft_image(item, name, wanted_size, resample)
                image = load_image(item, name, to_rgb=do_convert_rgb, channels_first=channels_first)
            if do_rescale and isinstance(image, np.ndarray):
                image = to_byte_scale(image, name)
            full_size = full_size or image_size(image)
            return self._resize_to(image, wanted_size(*full_size), resample, device), full_size

        images, full_sizes = zip(*side_by_side(prepare, len(items)), strict=True)
        pixel_values = _padded_batch(images, do_rescale=do_rescale, **kwargs)
        sizes = np.array([image.shape[1:] for image in images], dtype=np.int64)
        as_tensors = return_tensors == TensorType.PYTORCH
        data = {"pixel_values": pixel_values if as_tensors else pixel_values.cpu().numpy(), "image_sizes": sizes}
        if maps is not None:
            label_maps = []
            for index, item in enumerate(maps):
                label_map = read_map(item, f"segmentation map {index}", also=(ignore_index,))
                _check_same_size(label_map.shape, full_sizes[index], index)
                label_maps.append(resize_map(label_map, tuple(images[index].shape[1:])))
            data["labels"] = _padded_labels(label_maps, pixel_values.shape[-2:], ignore_index, do_reduce_labels)
        features = BatchFeature(data, tensor_type=return_tensors)
        if as_tensors and device is not None:
            features.to(device)
        return features

    def _images_of(
        self, outputs: Any, target_sizes: Any
    ) -> list[tuple[torch.Tensor, torch.Tensor | None, MaskGeometry]]:
        """Mask logits, class logits and geometry of each image in a batch of outputs."""
        masks, classes = as_masks(outputs)
        if classes is not None and classes.shape[-1] < 2:
            raise ValueError(
                f"class_queries_logits has shape {tuple(classes.shape)}: expected (batch, queries, classes + 1) with "
                "at least one class beside the last, which is no object"
            )
        batch, _, height, width = masks.shape
        sizes = _size_list(getattr(outputs, "image_sizes", None), batch, "image_sizes of the outputs")
        targets = _size_list(target_sizes, batch, "target_sizes")
        geometries = [self._geometry((height, width), sizes[i], targets[i]) for i in range(batch)]
        of_each = [None] * batch if classes is None else classes
        return list(zip(masks, of_each, geometries, strict=True))

    def _geometry(
        self, mask_size: tuple[int, int], image: tuple[int, int] | None, target: tuple[int, int] | None
    ) -> MaskGeometry:
        """Find an image in its mask map (height, width)."""
        whole = (mask_size[0] * self.mask_stride, mask_size[1] * self.mask_stride)
        if image is None:
            return MaskGeometry(own=mask_size, padded=whole, image=whole, target=target or whole)
        padded = (_round_up(image[0], self.size_divisor), _round_up(image[1], self.size_divisor))
        own = (padded[0] // self.mask_stride, padded[1] // self.mask_stride)
        if own[0] > mask_size[0] or own[1] > mask_size[1]:
            raise ValueError(
                f"an image of {image[0]} x {image[1]} pixels needs masks of {own[0]} x {own[1]} cells, the "
                f"outputs have {mask_size[0]} x {mask_size[1]}: image_sizes, size_divisor={self.size_divisor} and "
                f"mask_stride={self.mask_stride} have to be those the model ran with"
            )
        return MaskGeometry(own=own, padded=padded, image=image, target=target or image)


class SANImageProcessorPil(BaseSANImageProcessor, PilBackend):
    """`SANImageProcessor` on PIL, whose filter is that of the reference implementation."""

    def _resize_to(
        self, image: Image.Image | np.ndarray, size: tuple[int, int], resample: Any, device: Any
    ) -> torch.Tensor:
        # A copy, which PyTorch may write to
        return torch.from_numpy(np.array(resize_image(image, size, resample))).permute(2, 0, 1)


if is_torchvision_available():

    class SANImageProcessor(BaseSANImageProcessor, TorchvisionBackend):
        """`SANImageProcessorPil` on torchvision: resized values differ by 1 of 255 at most, on any `device`."""

        def _resize_to(
            self, image: Image.Image | np.ndarray, size: tuple[int, int], resample: Any, device: Any
        ) -> torch.Tensor:
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).to(device)
            return self.resize(pixels, SizeDict(height=size[0], width=size[1]), resample)

else:
    SANImageProcessor = SANImageProcessorPil  # type: ignore[assignment, misc]


def _same_size(height: int, width: int) -> tuple[int, int]:
    return height, width


def _padded_batch(
    images: Sequence[torch.Tensor],
    *,
    do_rescale: bool,
    rescale_factor: float,
    do_normalize: bool,
    image_mean: float | Sequence[float],
    image_std: float | Sequence[float],
    do_pad: bool,
    pad_size: SizeDict | None,
    size_divisor: int,
    **_: Any,
) -> torch.Tensor:
    """Rescale, normalise, and write each image (3, height, width) into its corner of one batch of zeros."""
    height, width = _canvas_size([tuple(image.shape[1:]) for image in images], do_pad, pad_size, size_divisor)
    # (value * factor - mean) / std, as one product and one difference
    factor, shift = np.full(3, rescale_factor if do_rescale else 1.0), np.zeros(3)
    if do_normalize:
        mean, std = _per_channel(image_mean, "image_mean"), _per_channel(image_std, "image_std")
        if not std.all():
            raise ValueError(f"image_std is {image_std}: it may not hold 0")
        factor, shift = factor / std, mean / std
    device = images[0].device
    batch = torch.zeros(len(images), 3, height, width, device=device)
    factors, shifts = (
        torch.tensor(each, dtype=torch.float32, device=device)[:, None, None] for each in (factor, shift)
    )
    for image, canvas in zip(images, batch, strict=True):
        corner = canvas[:, : image.shape[1], : image.shape[2]]
        torch.mul(image, factors, out=corner).sub_(shifts)
    return batch


def _canvas_size(
    sizes: list[tuple[int, ...]], do_pad: bool, pad_size: SizeDict | None, size_divisor: int
) -> tuple[int, int]:
    """Height and width of the batch that holds images of these sizes."""
    height, width = max(size[0] for size in sizes), max(size[1] for size in sizes)
    if not do_pad:
        if len(set(sizes)) > 1:
            raise ValueError(
                f"images of {len(set(sizes))} sizes cannot share a batch without padding: leave do_pad=True, or "
                "pass them one by one"
            )
        return height, width
    height, width = _round_up(height, size_divisor), _round_up(width, size_divisor)
    if pad_size is None:
        return height, width
    wanted = (pad_size.get("height") or 0, pad_size.get("width") or 0)
    if wanted[0] < height or wanted[1] < width or wanted[0] % size_divisor or wanted[1] % size_divisor:
        raise ValueError(
            f"pad_size is {dict(pad_size)}: expected a height of at least {height} and a width of at least {width}, "
            f"both multiples of {size_divisor}"
        )
    return wanted


def _padded_labels(
    label_maps: list[np.ndarray], canvas: tuple[int, ...], ignore_index: int, do_reduce_labels: bool
) -> np.ndarray:
    """Maps (height, width) in the corners of one batch (n, *canvas) int64 that is ignored elsewhere."""
    batch = np.full((len(label_maps), *canvas), ignore_index, dtype=np.int64)
    for label_map, canvas_map in zip(label_maps, batch, strict=True):
        corner = canvas_map[: label_map.shape[0], : label_map.shape[1]]
        corner[...] = label_map
        if do_reduce_labels:
            ignored = (corner == 0) | (corner == ignore_index)
            corner -= 1
            corner[ignored] = ignore_index
    return batch


def _check_same_size(map_size: tuple[int, ...], full_size: tuple[int, int], index: int) -> None:
    """A map has to fit the image it belongs to, pixel for pixel."""
    if map_size != full_size:
        (map_height, map_width), (height, width) = map_size, full_size
        raise ValueError(
            f"segmentation map {index} has {map_height} x {map_width} pixels (height x width) and image {index}, "
            f"upright, has {height} x {width}: pass a map of the image's own size"
        )


def _size_list(sizes: Any, batch: int, name: str) -> list[tuple[int, int] | None]:
    """Sizes given as pairs, a tensor or None, as a list with one pair or None per image."""
    if sizes is None:
        return [None] * batch
    pairs = sizes.tolist() if isinstance(sizes, (torch.Tensor, np.ndarray)) else list(sizes)
    if len(pairs) != batch:
        raise ValueError(f"{name} holds {len(pairs)} sizes for {batch} images: pass one (height, width) for each")
    checked: list[tuple[int, int] | None] = []
    for pair in pairs:
        values = pair.tolist() if isinstance(pair, (torch.Tensor, np.ndarray)) else pair
        if not isinstance(values, (tuple, list)) or len(values) != 2 or min(values) < 1:
            raise ValueError(f"{name} holds {pair!r}: expected (height, width), both at least 1")
        checked.append((int(values[0]), int(values[1])))
    return checked


def _per_channel(value: float | Sequence[float], name: str) -> np.ndarray:
    """A number, or one for each of three channels, as an array (3,)."""
    array = np.asarray(value, dtype=np.float64)
    if array.shape not in {(), (1,), (3,)}:
        raise ValueError(f"{name} is {value}: pass one number, or three for red, green and blue")
    return np.broadcast_to(array, (3,))


def _round_up(length: int, divisor: int) -> int:
    """The smallest multiple of `divisor` that is at least `length`."""
    return -(-length // divisor) * divisor


def _value(option: Any) -> Any:
    """The string behind an option that may be a member of an enumeration."""
    return getattr(option, "value", option)
