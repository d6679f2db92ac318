"""What the demo page does with an image and words, apart from how it is shown: checks, results, heat maps, files."""

from __future__ import annotations

import base64
import io
import json
import re
import secrets
import stat
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from modeling_san import SANForOpenVocabSegmentation, SANOutput, SANProcessor
from modeling_san.processing import (
    EXTENSIONS,
    OTHER_LABEL,
    extend_labels,
    label_colors,
    label_png,
    normalize_labels,
    overlay,
)
from modeling_san.processing.images_san import read_byte_image, resize_image
from modeling_san.processing.results import color_code, list_segments, make_summary, unknown_words
from modeling_san.training.data import open_encoded

MAX_BYTES = 20 * 2**20
MAX_PIXELS = 32_000_000
"""Largest image that is decoded; twice that would take half a gigabyte on its way through."""
MAX_LABELS = 300
MAX_CHARACTERS = 20_000
"""Of all labels together: more than anybody types, less than what would keep the tokenizer busy."""

_DISPLAY_SIDE = 1280
_JPEG_QUALITY = 90
_CACHED_VOCABULARIES = 32
_LISTED_WORDS = 8
_FILES = ("overlay", "labels", "json")


def read_words(given: Any) -> list[str]:
    """
    Labels as the page's field of words sends them.

    Args:
        given: a list of labels, or a line of them separated by commas. It comes from a browser and may be anything.

    Returns:
        normalised labels.

    Raises:
        ValueError: there are none, too many, or one cannot be used.
    """
    if given is None or given == [] or (isinstance(given, str) and not given.strip()):
        raise ValueError("There are no words yet: type what to look for, for example: sky, road, car")
    if not isinstance(given, str) and not (isinstance(given, list) and all(isinstance(word, str) for word in given)):
        raise ValueError("The words are not a list of texts: type them into the field, separated by commas")
    characters = len(given) if isinstance(given, str) else sum(map(len, given))
    if characters > MAX_CHARACTERS:
        raise ValueError(f"The words have {characters:,} letters: keep to {MAX_CHARACTERS:,}")
    labels = normalize_labels(given)
    if len(labels) > MAX_LABELS:
        raise ValueError(f"There are {len(labels)} labels: keep to {MAX_LABELS}")
    return labels


def read_upload(path: str | None) -> bytes:
    """
    Content of an uploaded image file, whose size on disk is checked before it is read.

    Args:
        path: of the file; None where nothing was uploaded.

    Raises:
        ValueError: there is none, it is gone, empty or too large.
    """
    if path is None:
        raise ValueError("There is no image yet: upload one, paste one, or choose an example")
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("That is no file: upload an image")
        if status.st_size > MAX_BYTES:
            raise ValueError(
                f"The file has {status.st_size / 2**20:.0f} MB: keep to {MAX_BYTES // 2**20} MB, or shrink the image"
            )
        with Path(path).open("rb") as file:
            content = file.read(MAX_BYTES)
    except OSError as error:
        raise ValueError("The image is no longer here: uploads are kept for a short time, upload it again") from error
    if not content:
        raise ValueError("The file is empty: it may not have been saved completely")
    return content


def open_upload(content: bytes) -> np.ndarray:
    """
    Pixels of an image file, whose number of pixels is checked before they are decoded.

    Returns:
        `(height, width, 3)` bytes, upright.

    Raises:
        ValueError: it is no image of a usual format, damaged, or too large.
    """
    unreadable = "The file is no image that can be read: use PNG, JPEG, WebP, TIFF, BMP or GIF"
    try:
        with open_encoded(content) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise _TooLarge(
                    f"The image has {width} x {height} pixels: keep to {MAX_PIXELS // 10**6} million, or shrink it"
                )
            return read_byte_image(image, "The image")
    except _TooLarge:
        raise
    except Image.DecompressionBombError as error:
        raise ValueError(f"The image has too many pixels: keep to {MAX_PIXELS // 10**6} million") from error
    except Exception as error:
        # Decoders of damaged files raise what they please
        raise ValueError(unreadable) from error


class _TooLarge(ValueError):
    """An image with more pixels than are decoded."""


class Segmenter:
    """
    A model that many visitors share. It keeps nothing of theirs but the embeddings of recent vocabularies.

    Args:
        model: in evaluation mode.
        processor: that was saved with it.
        name: what results call the model.
    """

    def __init__(self, model: SANForOpenVocabSegmentation, processor: SANProcessor, name: str) -> None:
        self.model = model
        self.processor = processor
        self.name = name
        self._class_embeds = lru_cache(maxsize=_CACHED_VOCABULARIES)(self._encode)

    @property
    def trained_words(self) -> list[str]:
        """Labels that the model says it was trained on; empty where it does not say."""
        return list(self.model.config.training_labels or [])

    def segment(self, content: bytes, labels: Iterable[str], added: str = "none", source: str = "") -> Segmentation:
        """
        Segment an image file.

        Args:
            content: of the file.
            labels: normalised labels.
            added: how to extend them, see `modeling_san.processing.extend_labels`.
            source: name of the file.

        Raises:
            ValueError: the image or the labels cannot be used.
        """
        if added not in EXTENSIONS:
            raise ValueError(f"Choose one of {', '.join(EXTENSIONS)} to extend the words by")
        image, own = open_upload(content), tuple(labels)
        class_embeds = self._class_embeds(own, added)
        with torch.inference_mode():
            inputs = self.processor(images=image, return_tensors="pt").to(self.model.device)
            outputs = self.model(**inputs, class_embeds=class_embeds)
        shown = own
        if len(class_embeds) > len(own) and OTHER_LABEL not in own:
            shown += (OTHER_LABEL,)
        return Segmentation(
            segmenter=self,
            content=content,
            source=source,
            size=image.shape[:2],
            labels=shown,
            own_labels=len(own),
            added=added,
            masks_queries_logits=outputs.masks_queries_logits.cpu(),
            class_queries_logits=outputs.class_queries_logits.cpu(),
            image_sizes=None if outputs.image_sizes is None else outputs.image_sizes.cpu(),
        )

    def _encode(self, labels: tuple[str, ...], added: str) -> torch.Tensor:
        """Embeddings of labels and those added, `(classes, projection_dim)`."""
        with torch.inference_mode():
            inputs = self.processor(text=extend_labels(labels, added), return_tensors="pt").to(self.model.device)
            return self.model.get_class_embeds(**inputs)


@dataclass(frozen=True)
class Segmentation:
    """
    One visitor's image, segmented. What is derived from it is computed when it is asked for, without the network.

    Attributes:
        segmenter: that made it.
        content: of the image's file.
        source: name of the image's file.
        size: height and width of the image, upright.
        labels: names by index. Where names were added, "other" is among them and stands for all of those.
        own_labels: how many classes are the visitor's own.
        added: how the labels were extended.
        masks_queries_logits: `(1, queries, h, w)`.
        class_queries_logits: `(1, queries, classes + 1)`.
        image_sizes: `(1, 2)`, or None.
    """

    segmenter: Segmenter
    content: bytes
    source: str
    size: tuple[int, int]
    labels: tuple[str, ...]
    own_labels: int
    added: str
    masks_queries_logits: torch.Tensor
    class_queries_logits: torch.Tensor
    image_sizes: torch.Tensor | None

    @property
    def display_size(self) -> tuple[int, int]:
        """Height and width at which a browser gets the image."""
        height, width = self.size
        scale = min(1.0, _DISPLAY_SIDE / max(height, width))
        return max(1, round(height * scale)), max(1, round(width * scale))

    def label_map(self, size: tuple[int, int] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """
        Indices into `labels` and the scores they won with.

        Args:
            size: height and width to compute them at; None takes the image's.
        """
        [label_map], [scores] = self.segmenter.processor.post_process_semantic_segmentation(
            self._outputs(self.class_queries_logits), target_sizes=[size or self.size], return_scores=True
        )
        if self.own_labels < self.class_queries_logits.shape[-1] - 1:
            label_map[label_map >= self.own_labels] = self.labels.index(OTHER_LABEL)
        return label_map.numpy(), scores.numpy()

    def heat_map(self, index: int, size: tuple[int, int] | None = None) -> np.ndarray:
        """
        Score of one label at every pixel; that of "other" is the sum over the added names.

        Args:
            index: of the label.
            size: height and width to compute it at; None takes the image's.

        Returns:
            `(height, width)` float32.

        Raises:
            ValueError: there is no such label.
        """
        if not 0 <= index < len(self.labels):
            raise ValueError(f"There is no label {index} among the {len(self.labels)} of this image")
        classes = self.class_queries_logits.shape[-1] - 1
        chosen = torch.zeros(classes + 1, dtype=torch.bool)
        if index < self.own_labels:
            chosen[index] = True
        if self.labels[index] == OTHER_LABEL:
            chosen[self.own_labels : classes] = True
        # Two classes, the chosen and the rest: the probabilities stay, and no map of all classes is needed
        logits = self.class_queries_logits.float()
        pair = torch.stack([logits[..., chosen].logsumexp(-1), logits[..., ~chosen].logsumexp(-1)], dim=-1)
        [scores] = self.segmenter.processor.post_process_semantic_scores(
            self._outputs(pair), target_sizes=[size or self.size]
        )
        return scores[0].numpy()

    def view(self) -> dict[str, Any]:
        """What the page shows, ready for JSON: images as data, so that no file of them has to lie anywhere."""
        height, width = self.display_size
        label_map, scores = self.label_map((height, width))
        segments = list_segments(label_map, scores, self.labels)
        return {
            # A browser ignores what equals the last value; the same image again is to be shown all the same
            "run": secrets.token_hex(8),
            "source": self.source,
            "size": list(self.size),
            "width": width,
            "height": height,
            "image": _jpeg_address(resize_image(open_upload(self.content), (height, width), Image.Resampling.BOX)),
            "map": _packed(label_map.astype("<u2")),
            "labels": list(self.labels),
            "colors": [color_code(color) for color in label_colors(self.labels)],
            "segments": [{key: segment[key] for key in ("index", "area", "mean_score")} for segment in segments],
            "notice": self._notice(),
        }

    def heat_view(self, index: int) -> dict[str, Any]:
        """
        A heat map for the page, ready for JSON: bytes from 0 to the highest score.

        Raises:
            ValueError: there is no such label.
        """
        scores = self.heat_map(index, self.display_size)
        highest = float(scores.max())
        values = np.rint(scores * (255 / max(highest, 1e-12))).clip(0, 255).astype(np.uint8)
        return {"run": secrets.token_hex(8), "index": index, "highest": highest, "values": _packed(values)}

    def file(self, kind: str, opacity: float = 0.5) -> tuple[str, bytes]:
        """
        A file to download, at the image's own size.

        Args:
            kind: "overlay", "labels" or "json".
            opacity: of the overlay's colours.

        Returns:
            the file's name and its content.

        Raises:
            ValueError: there is no such kind, or the opacity is out of range.
        """
        if kind not in _FILES:
            raise ValueError(f"There is no file of the kind {kind!r}: choose one of {', '.join(_FILES)}")
        names = {
            "overlay": f"{self._stem}_overlay.png",
            "labels": f"{self._stem}_labels.png",
            "json": f"{self._stem}.json",
        }
        label_map, scores = self.label_map()
        if kind == "overlay":
            content = _png(overlay(open_upload(self.content), label_map, self.labels, opacity))
        elif kind == "labels":
            content = _png(label_png(label_map, label_colors(self.labels)[:256]))
        else:
            summary = make_summary(
                list_segments(label_map, scores, self.labels),
                self.labels,
                image=self.source,
                size=self.size,
                model=self.segmenter.name,
                extended_by=self.added,
                overlay=names["overlay"],
                label_map=names["labels"],
            )
            content = (json.dumps(summary, indent=2, ensure_ascii=False) + "\n").encode("utf-8", errors="replace")
        return names[kind], content

    def _outputs(self, class_queries_logits: torch.Tensor) -> SANOutput:
        return SANOutput(
            masks_queries_logits=self.masks_queries_logits,
            class_queries_logits=class_queries_logits,
            image_sizes=self.image_sizes,
        )

    @property
    def _stem(self) -> str:
        return re.sub(r"[^\w.-]+", "_", Path(self.source).stem)[:60].strip("._") or "image"

    def _notice(self) -> str:
        """What a visitor should know about the words, or nothing."""
        trained = self.segmenter.trained_words
        unknown = unknown_words(self.labels[: self.own_labels], trained) if trained else []
        if not unknown:
            return ""
        more = f" and {len(unknown) - _LISTED_WORDS} more" if len(unknown) > _LISTED_WORDS else ""
        return f"This model was not trained on {', '.join(unknown[:_LISTED_WORDS])}{more}: expect poor results there."


def _packed(values: np.ndarray) -> str:
    """The bytes of an array for a browser, which has a decompressor for them."""
    return base64.b64encode(zlib.compress(np.ascontiguousarray(values).tobytes(), 6)).decode()


def _jpeg_address(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=_JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
