# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""The one place of inference: this model, with this vocabulary, labels these images."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .drawing import label_colors, label_png, overlay
from .images_san import decode_images, image_size
from .labels_san import list_labels, normalize_labels
from .templates_san import resolve_templates
from .views_san import MIN_WINDOW, View, cut_windows, make_views, segment_views, view_sizes
from .vocabulary_san import OTHER_LABEL, extend_labels
from .wording_san import listed

_logger = logging.getLogger(__name__)

KEPT_VOCABULARIES = 16
"""Encoded vocabularies that a segmenter keeps, the least recently used goes first."""

KEPT_LABELS = 50_000
"""Labels that all vocabularies kept may have together."""

_LABELS_AT_ONCE = 512
_WINDOWS_AT_ONCE = 8
_KEPT_OUTPUTS = ("masks_queries_logits", "class_queries_logits", "logits", "image_sizes")


@dataclass(frozen=True)
class Vocabulary:
    """
    Labels to choose from, encoded.

    Attributes:
        labels: what the caller asked for, as given, then names that compete with them for pixels.
        class_embeds: `(classes, projection_dim)`, a row for each of the labels.
        num_own: how many of the labels are the caller's own.
        extended_by: how names were added, see `extend_labels`.
        other_label: what pixels are called that an added name won.
    """

    labels: tuple[str, ...]
    class_embeds: Tensor
    num_own: int
    extended_by: str = "none"
    other_label: str = OTHER_LABEL

    @property
    def is_extended(self) -> bool:
        """Whether names were added to the caller's own."""
        return self.num_own < len(self.labels)

    @property
    def other_index(self) -> int:
        """Where "other" is among the caller's labels, whatever its case; behind them if it is not there."""
        wanted = " ".join(self.other_label.lower().split())
        own = [" ".join(label.lower().split()) for label in self.labels[: self.num_own]]
        return own.index(wanted) if wanted in own else self.num_own

    @property
    def labels_with_other(self) -> tuple[str, ...]:
        """The caller's labels, and "other" behind them unless it is among them."""
        own = self.labels[: self.num_own]
        return own if self.other_index < self.num_own else (*own, self.other_label)

    @property
    def shown_labels(self) -> tuple[str, ...]:
        """What `fold` gives indices into."""
        return self.labels_with_other if self.is_extended else self.labels

    def fold(self, label_map: Tensor) -> Tensor:
        """Added names become "other": indices into `labels`, of any shape, as indices into `shown_labels`."""
        return label_map.masked_fill(label_map >= self.num_own, self.other_index) if self.is_extended else label_map


@dataclass(frozen=True)
class Segment:
    """
    What of an image has one label.

    Attributes:
        label: its name.
        index: of the label among those of the segmentation.
        area: share of the image, 0 ... 1.
        pixels: how many there are.
        score: mean over the pixels of the score that won them, where each counts 1 at most: where masks overlap, the
            sum over them can pass it.
        color: "#rrggbb", as in overlays.
    """

    label: str
    index: int
    area: float
    pixels: int
    score: float
    color: str


@dataclass(frozen=True)
class Segmentation:
    """
    A labelled image. What is derived from it is computed when it is asked for, without the network.

    Attributes:
        label_map: `(height, width)` int64, indices into `labels`, on the CPU.
        scores: `(height, width)` float32, what each pixel's label won with, on the CPU: the sum over the model's masks
            of (how much the mask is the label) * (how much the pixel is in the mask).
        labels: names by index; "other" stands for all names added.
        vocabulary: that the model chose from.
    """

    label_map: Tensor
    scores: Tensor
    labels: tuple[str, ...]
    vocabulary: Vocabulary = field(repr=False)
    _outputs: Any = field(repr=False, default=None)
    _segmenter: Segmenter | None = field(repr=False, default=None)
    _threshold: float = field(repr=False, default=0.0)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = self.label_map.shape
        return height, width

    @property
    def colors(self) -> np.ndarray:
        """Red, green and blue of each label, `(labels, 3)` uint8."""
        return label_colors(self.labels)

    def segments(self) -> list[Segment]:
        """The labels that are present, largest first."""
        flat = self.label_map.flatten()
        pixels = torch.bincount(flat, minlength=len(self.labels))
        sums = torch.bincount(flat, weights=self.scores.flatten().double().clamp(max=1), minlength=len(self.labels))
        colors = self.colors
        return [
            Segment(
                label=self.labels[index],
                index=index,
                area=int(pixels[index]) / flat.numel(),
                pixels=int(pixels[index]),
                score=float(sums[index] / pixels[index]),
                color="#{:02x}{:02x}{:02x}".format(*colors[index]),
            )
            for index in pixels.argsort(descending=True, stable=True).tolist()
            if pixels[index]
        ]

    def mask(self, index: int) -> Image.Image:
        """Where a label is: mode "L", 255 there and 0 elsewhere."""
        return Image.fromarray((self.label_map == index).numpy().astype(np.uint8) * np.uint8(255))

    def overlay(self, image: Any, opacity: float = 0.5, **options: Any) -> Image.Image:
        """The image painted over with the labels' colours, with a legend; see `drawing.overlay`."""
        return overlay(image, self.label_map, self.labels, opacity, colors=self.colors, **options)

    def label_image(self) -> Image.Image:
        """An indexed image: each value is a label's index, and its colour is for looking at; see `label_png`."""
        return label_png(self.label_map, self.colors[:256])

    def resized(self, size: tuple[int, int]) -> Segmentation:
        """
        The segmentation at another height and width, computed from the model's outputs again.

        Raises:
            ValueError: it was averaged over several views, whose outputs are not kept.
        """
        if self._segmenter is None:
            raise ValueError("a segmentation averaged over views has one size: ask for it without tta and window")
        [resized] = self._segmenter.post_process(self._outputs, [size], self.vocabulary, threshold=self._threshold)
        return resized

    def heat_map(self, label: int | str) -> Tensor:
        """
        The score of one label at every pixel, 1 at most; that of "other" is the sum over the added names.

        Args:
            label: its name or index.

        Returns:
            `(height, width)` float32.

        Raises:
            ValueError: there is no such label, or the segmentation was averaged over several views.
        """
        index = self.labels.index(label) if label in self.labels else label
        if not isinstance(index, int) or not 0 <= index < len(self.labels):
            raise ValueError(f"there is no label {label!r} among the {len(self.labels)} of this segmentation")
        if self._segmenter is None:
            raise ValueError("a segmentation averaged over views has no heat maps: ask for it without tta and window")
        classes, own = len(self.vocabulary.labels), self.vocabulary.num_own
        # The classes of masks have "no object" behind them; where masks are classes, these lie along another dimension
        name, dim = ("class_queries_logits", -1) if hasattr(self._outputs, "class_queries_logits") else ("logits", 1)
        chosen = torch.zeros(classes + (dim == -1), dtype=torch.bool)
        chosen[:own][index : index + 1] = True
        if self.vocabulary.is_extended and index == self.vocabulary.other_index:
            chosen[own:classes] = True
        # Two classes, the chosen and the rest: the probabilities stay, and no map of all classes is needed
        logits = getattr(self._outputs, name).float().movedim(dim, -1)
        pair = torch.stack([logits[..., chosen].logsumexp(-1), logits[..., ~chosen].logsumexp(-1)], dim=dim)
        outputs = SimpleNamespace(**vars(self._outputs) | {name: pair})
        [scores] = self._segmenter.processor.post_process_semantic_scores(outputs, target_sizes=[self.size])
        return scores[0].clamp_(max=1)

    def summary(self, **about: Any) -> dict[str, Any]:
        """
        What is to be known of the segmentation, ready for JSON.

        Args:
            about: entries to begin with, such as `image` and `model`.
        """
        height, width = self.size
        return {
            **about,
            "width": width,
            "height": height,
            "labels": list(self.labels),
            "extended_by": self.vocabulary.extended_by,
            "segments": [vars(segment) for segment in self.segments()],
        }


@dataclass(frozen=True)
class PreparedImages:
    """
    Images as the network takes them, padded to one size.

    Attributes:
        pixel_values: `(batch, 3, height, width)`.
        image_sizes: `(batch, 2)`, heights and widths without the padding.
        target_sizes: height and width of each image as it was given, upright.
    """

    pixel_values: Tensor
    image_sizes: Tensor
    target_sizes: list[tuple[int, int]]


class Segmenter:
    """
    A model and its processor, ready to label images. Threads may share it.

    Whichever model it is: it has `get_class_embeds` and a config with `stored_labels`, and its processor makes prompts
    of labels and label maps of outputs.

    Args:
        model: in evaluation mode, where it is to compute.
        processor: that was saved with it.
        dtype: for autocast, such as `torch.bfloat16`; None computes in the model's own.

    Example:

    ```python
    >>> from PIL import Image
    >>> from modeling_san import BUILTIN_MODEL, SANForOpenVocabSegmentation, SANProcessor
    >>> from modeling_san.processing import Segmenter

    >>> model = SANForOpenVocabSegmentation.from_pretrained(BUILTIN_MODEL)
    >>> segmenter = Segmenter(model, SANProcessor.from_pretrained(BUILTIN_MODEL))
    >>> [segmentation] = segmenter(Image.new("RGB", (160, 120), "red"), segmenter.vocabulary("red plain, grass"))
    >>> segmentation.size, segmentation.labels
    ((120, 160), ('red plain', 'grass'))
    ```
    """

    def __init__(self, model: Any, processor: Any, *, dtype: torch.dtype | None = None) -> None:
        for owner, name, what in ((model, "get_class_embeds", "model"), (processor, "tokenize_labels", "processor")):
            if not hasattr(owner, name):
                raise ValueError(f"{what} is a {type(owner).__name__}: pass one that encodes any words, such as SAN's")
        self.model = model
        self.processor = processor
        self.dtype = dtype
        self._kept = _Kept()

    def vocabulary(
        self,
        labels: str | Iterable[str] | None = None,
        *,
        templates: Any = None,
        extend: str = "none",
        other_label: str = OTHER_LABEL,
    ) -> Vocabulary:
        """
        Encode labels, with a logged warning of words that the model was not trained on. Vocabularies are kept, until
        the text encoder changes: its weights, their precision or device.

        Args:
            labels: names, or a line of them separated by commas; None takes those stored with the model.
            templates: prompt templates, see [`SANProcessor`]; None takes the processor's own.
            extend: names to add, see `extend_labels`.
            other_label: what pixels are called that an added name won, or that no label is sure of.

        Raises:
            ValueError: there are no labels, or something cannot be used.
        """
        if not isinstance(other_label, str) or not other_label.strip():
            raise ValueError(f'other_label is {other_label!r}: pass a name for what no label fits, such as "other"')
        stored = self.model.config.stored_labels
        if labels is None and stored is None:
            raise ValueError(
                'there are no labels: name what to look for, for example ["sky", "road"], or store a vocabulary with '
                "the model by model.set_labels(labels, processor)"
            )
        given = tuple(stored if labels is None else list_labels(labels))
        names = extend_labels(given, extend)
        class_embeds = self.model.stored_class_embeds if labels is None and extend == "none" else None
        if class_embeds is None or templates is not None:
            patterns = resolve_templates(self.processor.templates if templates is None else templates)[1]
            state = (id(self.processor), _text_encoder_state(self.model))

            def encode() -> Tensor:
                if unknown := self.unknown_words(given):
                    _logger.warning(
                        "the model was not trained on: %s; expect poor results for them. It was trained on: %s",
                        listed(unknown, 10),
                        listed(self.model.config.training_labels, 40),
                    )
                return self._encode(names, patterns)

            class_embeds = self._kept.get((tuple(names), tuple(patterns)), state, encode)
        return Vocabulary((*given, *names[len(given) :]), class_embeds, len(given), extend, other_label)

    def unknown_words(self, labels: Iterable[str]) -> list[str]:
        """Words that the model says it was not trained on; none where it does not say."""
        return self.model.unknown_words(normalize_labels(labels))

    def prepare(self, images: Any, **options: Any) -> PreparedImages:
        """
        Decode, resize, normalise and pad images, on the CPU; any thread or process may do it.

        Args:
            images: one image or a list: PIL images, paths, arrays or tensors.
            options: of the image processor.

        Raises:
            ValueError: an image cannot be used; the sentence says which.
        """
        decoded = decode_images(images)
        inputs = self.processor(images=decoded, return_tensors="pt", **options)
        return PreparedImages(inputs["pixel_values"], inputs["image_sizes"], [image_size(image) for image in decoded])

    @torch.no_grad()
    def segment(
        self,
        prepared: PreparedImages | Sequence[PreparedImages],
        vocabulary: Vocabulary | Sequence[Vocabulary] | None = None,
        *,
        threshold: float = 0.0,
    ) -> list[Segmentation]:
        """
        Label every pixel of prepared images; those of one padded size and vocabulary run together.

        Args:
            prepared: what `prepare` returned, or several of these.
            vocabulary: to choose from, or one for each of `prepared`; None takes the labels stored with the model.
            threshold: in 0 ... 1; pixels whose best label scores less become "other".

        Returns:
            one segmentation for each image.

        Raises:
            ValueError: there is no vocabulary, or the threshold is out of range.
        """
        check_threshold(threshold)
        parts = [prepared] if isinstance(prepared, PreparedImages) else list(prepared)
        vocabularies = self._vocabulary_of_each(vocabulary, len(parts))
        groups: dict[tuple[int, ...], list[int]] = {}
        for position, (part, own) in enumerate(zip(parts, vocabularies, strict=True)):
            groups.setdefault((*part.pixel_values.shape[-2:], id(own)), []).append(position)
        found: dict[int, list[Segmentation]] = {}
        for positions in groups.values():
            together, shared = [parts[position] for position in positions], vocabularies[positions[0]]
            target_sizes = [size for part in together for size in part.target_sizes]
            outputs = self._run(
                torch.cat([part.pixel_values for part in together]),
                torch.cat([part.image_sizes for part in together]),
                shared,
            )
            done = iter(self.post_process(outputs, target_sizes, shared, threshold=threshold))
            found |= {
                position: [next(done) for _ in part.target_sizes]
                for position, part in zip(positions, together, strict=True)
            }
        return [segmentation for position in range(len(parts)) for segmentation in found[position]]

    def __call__(
        self,
        images: Any,
        vocabulary: Vocabulary | Sequence[Vocabulary] | None = None,
        *,
        threshold: float = 0.0,
        tta: bool = False,
        window: int | None = None,
    ) -> list[Segmentation]:
        """
        Label every pixel of images.

        Args:
            images: one image or a list: PIL images, paths, arrays or tensors.
            vocabulary: to choose from, or one for each image; None takes the labels stored with the model.
            threshold: in 0 ... 1; pixels whose best label scores less become "other".
            tta: average the scores of six sizes of each image, each with its mirror image.
            window: see larger images in square windows of this side in pixels, which overlap by a third of it, and
                average the scores: small things are found, and the memory of the network is that of a window. Each
                window is resized as an image is.

        Returns:
            one segmentation for each image.

        Raises:
            ValueError: an image, the vocabulary or an option cannot be used.
        """
        check_threshold(threshold)
        check_window(window)
        if not tta and window is None and not isinstance(vocabulary, Sequence):
            return self.segment(self.prepare(images), vocabulary, threshold=threshold)
        decoded = decode_images(images)
        found = []
        for image, own in zip(decoded, self._vocabulary_of_each(vocabulary, len(decoded)), strict=True):
            if not tta and (window is None or window >= max(image_size(image))):
                found += self.segment(self.prepare(image), own, threshold=threshold)
            else:
                views = self._views(np.asarray(image), own, tta, window)
                found.append(_finish(*segment_views(views, image_size(image)), own, threshold))
        return found

    @torch.no_grad()
    def post_process(
        self,
        outputs: Any,
        target_sizes: Sequence[tuple[int, int]],
        vocabulary: Vocabulary,
        *,
        threshold: float = 0.0,
    ) -> list[Segmentation]:
        """
        Segmentations of a batch of the model's outputs.

        Args:
            outputs: of the model, with the vocabulary's class embeddings.
            target_sizes: height and width of each segmentation.
            vocabulary: to choose from.
            threshold: as for `segment`.
        """
        maps, scores = self.processor.post_process_with_scores(outputs, target_sizes=list(target_sizes))
        kept = {name: value.cpu() for name in _KEPT_OUTPUTS if (value := getattr(outputs, name, None)) is not None}
        return [
            replace(
                _finish(label_map, score, vocabulary, threshold),
                _outputs=SimpleNamespace(**{name: value[index : index + 1] for name, value in kept.items()}),
                _segmenter=self,
            )
            for index, (label_map, score) in enumerate(zip(maps, scores, strict=True))
        ]

    def _run(self, pixel_values: Tensor, image_sizes: Tensor, vocabulary: Vocabulary) -> Any:
        device = self.model.device
        if device.type == "cuda":
            pixel_values = pixel_values.pin_memory()
        with torch.autocast(device.type, self.dtype, enabled=self.dtype is not None):
            outputs = self.model(
                pixel_values=pixel_values.to(device, non_blocking=True),
                image_sizes=image_sizes,
                class_embeds=vocabulary.class_embeds,
            )
        _refuse_non_finite(self.model, outputs)
        return outputs

    @torch.no_grad()
    def _encode(self, names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Class embeddings `(labels, projection_dim)`; each part has the memory of its own prompts only."""
        parts = []
        for start in range(0, len(names), _LABELS_AT_ONCE):
            inputs = self.processor(
                text=names[start : start + _LABELS_AT_ONCE], templates=templates, return_tensors="pt"
            ).to(self.model.device)
            parts.append(self.model.get_class_embeds(inputs["input_ids"], inputs["attention_mask"]))
        return torch.cat(parts)

    def _vocabulary_of_each(
        self, vocabulary: Vocabulary | Sequence[Vocabulary] | None, images: int
    ) -> Sequence[Vocabulary]:
        """
        One for each image.

        Raises:
            ValueError: there are more or fewer, or something else.
        """
        if vocabulary is None or isinstance(vocabulary, Vocabulary):
            return [self.vocabulary() if vocabulary is None else vocabulary] * images
        if isinstance(vocabulary, str) or not all(isinstance(each, Vocabulary) for each in vocabulary):
            raise ValueError(f"vocabulary is {vocabulary!r:.80}: pass what segmenter.vocabulary(labels) gives")
        if len(vocabulary) != images:
            raise ValueError(f"there are {len(vocabulary)} vocabularies for {images} images: pass one for each")
        return vocabulary

    @torch.no_grad()
    def _views(self, pixels: np.ndarray, vocabulary: Vocabulary, tta: bool, window: int | None) -> Iterator[View]:
        """What the model makes of each part of an image, from top to bottom, at each size."""
        sides = [cut_windows(length, window) for length in image_size(pixels)]
        parts = [(rows, columns) for rows in sides[0] for columns in sides[1]]
        sizes: list[dict[str, Any]] = [{}]
        if tta:
            sizes = [{"size": size} for size in view_sizes(dict(self.processor.image_processor.size))]
        for start in range(0, len(parts), _WINDOWS_AT_ONCE):
            some = parts[start : start + _WINDOWS_AT_ONCE]
            cut = [pixels[rows.pixels, columns.pixels] for rows, columns in some]
            for options in sizes:
                for mirrored in (False, True)[: 1 + tta]:
                    images = [np.ascontiguousarray(image[:, ::-1] if mirrored else image) for image in cut]
                    prepared = self.prepare(images, **options)
                    outputs = self._run(prepared.pixel_values, prepared.image_sizes, vocabulary)
                    size = prepared.pixel_values.shape[-2:]
                    share = 1 / (len(sizes) * (1 + tta))
                    yield from make_views(outputs, size, some, mirrored=mirrored, share=share)


def _refuse_non_finite(model: Any, outputs: Any) -> None:
    """
    Say what is wrong with a model whose scores are no numbers.

    Raises:
        ValueError: names the parameter, if it is one's fault.
    """
    scores = [value for name in _KEPT_OUTPUTS if (value := getattr(outputs, name, None)) is not None]
    if all(torch.isfinite(value).all() for value in scores):
        return
    broken = next((name for name, value in model.named_parameters() if not torch.isfinite(value).all()), None)
    cause = f"its weights {broken} are NaN or infinite" if broken else "try a higher precision, such as float32"
    raise ValueError(f"the model's scores are NaN or infinite: {cause}")


def _finish(label_map: Tensor, scores: Tensor, vocabulary: Vocabulary, threshold: float) -> Segmentation:
    """Fold added names, and pixels below the threshold, into "other"."""
    label_map, labels = vocabulary.fold(label_map), vocabulary.shown_labels
    if threshold > 0:
        label_map, labels = (
            label_map.masked_fill(scores < threshold, vocabulary.other_index),
            vocabulary.labels_with_other,
        )
    # Small numbers travel faster
    return Segmentation(label_map.int().cpu().long(), scores.cpu(), labels, vocabulary, _threshold=threshold)


def check_threshold(threshold: Any) -> None:
    """
    Refuse what is no share.

    Raises:
        ValueError: it is no number from 0 to 1.
    """
    is_number = isinstance(threshold, (int, float, np.number)) and not isinstance(threshold, bool)
    # NaN fails the comparison as well
    if not is_number or not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold!r}: pass a number from 0 (no other label) to 1")


def check_window(window: Any) -> None:
    """
    Refuse what is neither None nor the side of a window.

    Raises:
        ValueError: it is no whole number, or too small.
    """
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < MIN_WINDOW):
        raise ValueError(f"window is {window!r}: pass the pixels of its side, at least {MIN_WINDOW}")


def _text_encoder_state(model: Any) -> Hashable:
    """Something that changes when the text encoder's weights are trained, loaded anew, converted or moved."""
    return tuple(
        # Tensors made in inference mode have no counter of changes
        (parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version, parameter.dtype)
        for name, parameter in model.named_parameters()
        if name.startswith("text_")
    )


class _Kept:
    """Vocabularies that were encoded, the least recently used first. Copies for other processes start empty."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._state: Hashable = None

    def __reduce__(self) -> tuple[type, tuple]:
        return _Kept, ()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable, state: Hashable, encode: Any) -> Tensor:
        """An entry, encoded now if it is not there; with another state of the encoder all are forgotten."""
        # Threads that ask for one vocabulary at a time wait for one of them to encode it
        with self._lock:
            if state != self._state:
                self._entries.clear()
                self._state = state
            if key not in self._entries:
                self._entries[key] = encode()
            self._entries.move_to_end(key)
            while len(self._entries) > 1 and (
                len(self._entries) > KEPT_VOCABULARIES or sum(map(len, self._entries.values())) > KEPT_LABELS
            ):
                self._entries.popitem(last=False)
            return self._entries[key]


__all__ = ["PreparedImages", "Segment", "Segmentation", "Segmenter", "Vocabulary", "check_threshold", "check_window"]
