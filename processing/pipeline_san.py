# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""Pipeline of SAN: images and any words in, one mask for each word that is there out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import Pipeline
from transformers.image_utils import load_image as fetch_image

from .images_san import load_image, to_byte_scale
from .labels_san import list_labels
from .segmenter import PreparedImages, Segmentation, Segmenter, Vocabulary, check_threshold
from .vocabulary_san import OTHER_LABEL
from .wording_san import one_line

_ADDRESS_SCHEMES = ("http://", "https://", "data:image/")
_OPTIONS = ("candidate_labels", "threshold", "other_label", "extend_labels", "templates", "timeout")


class OpenVocabularySegmentationPipeline(Pipeline):
    """Label every pixel of images with the best of any words.

    Everything that other pipelines take works here: `device`, `dtype`, `batch_size`, `num_workers`. Images of any
    sizes share a batch; each is run on the size it has alone, so what shares a batch never changes an answer.

    The options of a call (`candidate_labels`, `threshold`, ...) can be given when the pipeline is made as well, and
    hold for calls that do not name them. Words are encoded once and kept, see `Segmenter.vocabulary`.

    Args:
        model ([`SANForOpenVocabSegmentation`]): what to segment with.
        processor ([`SANProcessor`]): saved with the model.
        kwargs: see `transformers.Pipeline`; and the options of `__call__`.

    Attributes:
        segmenter: what labels the images, for those who want more than masks.

    Raises:
        ValueError: the model or the processor is missing or of another kind.

    Example:

    ```python
    >>> from transformers import pipeline
    >>> import modeling_san

    >>> segment = pipeline("open-vocabulary-segmentation", model=str(modeling_san.BUILTIN_MODEL))
    >>> segments = segment("hub_card/assets/demo.png", candidate_labels=["red striped", "grass"])
    >>> segments[0]["label"], segments[0]["mask"].mode
    ('red striped', 'L')
    ```
    """

    _load_processor: Any = True
    _load_image_processor: Any = False
    _load_feature_extractor: Any = False
    _load_video_processor: Any = False
    _load_tokenizer: Any = False

    model: Any
    processor: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take the model, the processor, and what holds for all calls."""
        self._options = _given({name: kwargs.pop(name, None) for name in _OPTIONS})
        if "candidate_labels" in self._options:
            # An iterator could be read for one call only
            self._options["candidate_labels"] = list_labels(self._options["candidate_labels"])
        super().__init__(*args, **kwargs)
        self.segmenter = Segmenter(self.model, self.processor)

    def __call__(  # type: ignore[override]
        self,
        images: Any,
        candidate_labels: str | Iterable[str] | None = None,
        *,
        threshold: float | None = None,
        other_label: str | None = None,
        extend_labels: str | None = None,
        templates: str | Iterable[str] | None = None,
        timeout: float | None = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
    ) -> Any:
        """
        Segment images with one vocabulary.

        Options left at None are those given when the pipeline was made, or else the defaults named here.

        Args:
            images: one image: a path, an address (http, https, data), a PIL image, a numpy array or a torch tensor;
                a list of them, or an array (batch, ...); or any number of them from a data set, a column of one
                (`dataset["image"]`), a `KeyDataset`, a generator or another iterator.
            candidate_labels: the words, one string for each label; "car|automobile" is one label with two synonyms.
                One string is split at commas. By default those stored with the model.
            threshold: in 0 ... 1. Pixels whose best label scores less become `other_label`; 0, the default, leaves
                every pixel the best label that there is.
            other_label: what those are called, "other" by default. If it is among the labels, they join its pixels.
            extend_labels: "coco-stuff" or "coco-all" lets common names compete for pixels that no label fits, which
                become `other_label` as well; "none", the default, adds nothing.
            templates: prompt templates, see [`SANProcessor`]; the processor's own by default.
            timeout: seconds to wait for each answer of a server; without one by default.
            batch_size: images that run together, 1 by default.
            num_workers: processes that read images, 0 by default.

        Returns:
            for one image a list with one dictionary for each label that has pixels, in the order of the labels, the
            other label last:

            - **label** (`str`): as it was given.
            - **mask** (`PIL.Image.Image`): mode "L", 255 where the label is and 0 elsewhere, of the image's size
              (turned upright where EXIF data say so). The masks of an image share no pixel and cover it.
            - **score** (`float`): in 0 ... 1, how sure the model is, see `Segment.score`.

            For a list or an array of images a list of such lists. For a generator a generator of them, for data
            sets an iterable; both read images as they go.

        Raises:
            ValueError: an image, the labels or an option cannot be used; the message says which, and what to do.
        """
        call = _given(
            {
                "candidate_labels": candidate_labels,
                "threshold": threshold,
                "other_label": other_label,
                "extend_labels": extend_labels,
                "templates": templates,
                "timeout": timeout,
            }
        )
        defaults = {"threshold": 0.0, "other_label": OTHER_LABEL, "extend_labels": "none"}
        options: dict[str, Any] = {**defaults, **self._options, **call}
        check_threshold(options["threshold"])
        arranged = _arrange(images)
        vocabulary = self.segmenter.vocabulary(
            options.get("candidate_labels"),
            templates=options.get("templates"),
            extend=options["extend_labels"],
            other_label=options["other_label"],
        )
        results = super().__call__(
            arranged,
            batch_size=batch_size,
            num_workers=num_workers,
            timeout=options.get("timeout"),
            vocabulary=vocabulary,
            threshold=options["threshold"],
        )
        if isinstance(arranged, _Image):
            return results
        if isinstance(arranged, _Images):
            return list(results) if isinstance(images, (list, tuple, np.ndarray, torch.Tensor)) else results
        return (result for result in results)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """
        Write the model and the processor, templates included, into a folder that loads again.

        Args:
            save_directory: the folder; made if it is not there.
            kwargs: see `PreTrainedModel.save_pretrained`.

        Raises:
            ValueError: there is a file of that name.
        """
        if os.path.isfile(save_directory):
            raise ValueError(f"{os.fspath(save_directory)!r} is a file: pass a folder to save the pipeline to")
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)

    def _sanitize_parameters(
        self,
        vocabulary: Vocabulary | None = None,
        threshold: float = 0.0,
        timeout: float | None = None,
        **_: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Options of the three steps. What else `pipeline(...)` passes on is not for them."""
        return {"timeout": timeout}, {"vocabulary": vocabulary, "threshold": threshold}, {}

    def preprocess(  # type: ignore[override]
        self, input_: _Image, timeout: float | None = None
    ) -> dict[str, PreparedImages]:
        """Read an image and make it what the network takes."""
        return {"prepared": self.segmenter.prepare(input_.read(timeout))}

    def _forward(  # type: ignore[override]
        self, input_tensors: dict[str, Any], vocabulary: Vocabulary, threshold: float
    ) -> dict[str, Any]:
        """Label every pixel where the model is: of one image, or of a list, those of one padded size together."""
        prepared = input_tensors["prepared"]
        segmentations = self.segmenter.segment(prepared, vocabulary, threshold=threshold)
        return {"segmentation": segmentations if isinstance(prepared, list) else segmentations[0]}

    def postprocess(self, model_outputs: dict[str, Segmentation]) -> list[dict[str, Any]]:  # type: ignore[override]
        """Label, mask and score of each label that one image shows."""
        segmentation = model_outputs["segmentation"]
        return [
            {"label": segment.label, "mask": segmentation.mask(segment.index), "score": segment.score}
            for segment in sorted(segmentation.segments(), key=lambda segment: segment.index)
        ]


@dataclass(frozen=True)
class _Image:
    """An image as it was given, and what errors call it."""

    image: Any
    name: str

    def read(self, timeout: float | None) -> Image.Image | np.ndarray:
        """The image decoded, whatever was given."""
        image = self.image
        if isinstance(image, Mapping):
            raise ValueError(
                f"{self.name} is a {type(image).__name__}: pass the column that holds the images, such as "
                'dataset["image"]'
            )
        if isinstance(image, str) and image.startswith(_ADDRESS_SCHEMES):
            image = _fetch(image, self.name, timeout)
        image = load_image(image, self.name)
        if isinstance(image, np.ndarray):
            # The segmenter would call it "image 0"
            to_byte_scale(image, self.name)
        return image


class _Images(Dataset):
    """Images by number: a list, a column, a data set."""

    def __init__(self, images: Any) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> _Image:
        return _Image(self.images[index], f"image {index}")


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def _arrange(images: Any) -> Any:
    """One `_Image`, a data set of them, or a generator of them."""
    if images is None:
        raise ValueError("images is None: pass an image: a path, an address, a PIL image or an array")
    if isinstance(images, Mapping) or hasattr(images, "read"):
        what = "a mapping" if isinstance(images, Mapping) else "an open file"
        raise ValueError(
            f"images is {what} ({type(images).__name__}): pass images: paths, addresses, PIL images, arrays, or the "
            'column of a data set that holds them, such as dataset["image"]'
        )
    is_array = isinstance(images, (np.ndarray, torch.Tensor))
    if isinstance(images, (str, bytes, os.PathLike, Image.Image)) or (is_array and images.ndim != 4):
        return _Image(images, "the image")
    if isinstance(images, Sized) and hasattr(images, "__getitem__"):
        if len(images) == 0:
            raise ValueError("images is empty: pass at least one image")
        return _Images(images)
    if isinstance(images, Iterable):
        return (_Image(image, f"image {index}") for index, image in enumerate(images))
    return _Image(images, "the image")


def _fetch(address: str, name: str, timeout: float | None) -> Image.Image:
    """Load an image from an address; no message shows what may be a key, a password or a whole image."""
    try:
        return fetch_image(address, timeout=timeout)
    except Exception as error:
        # Networks, servers and decoders each have exceptions of their own
        scheme, _, rest = address.partition("://")
        shown, reason = "an address with data", "it does not hold one in base64"
        if rest:
            shown = f"{scheme}://{rest.partition('?')[0].partition('#')[0].rpartition('@')[2]}"
            reason = one_line(str(error).replace(address, shown) or type(error).__name__)
    # Outside of the handler, so that the traceback does not show the whole address either
    raise ValueError(f"{name}: {shown} gave no image ({reason}): check that it leads to an image file")


__all__ = ["OpenVocabularySegmentationPipeline"]
