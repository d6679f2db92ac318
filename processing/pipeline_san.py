"""Pipeline of SAN: images and any words in, one mask for each word that is there out."""

from __future__ import annotations

import itertools
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Pipeline
from transformers.image_utils import load_image

from .images_san import read_image, to_byte_scale
from .labels_san import normalize_labels
from .processing_san import resolve_templates
from .vocabulary_san import EXTENSIONS, OTHER_LABEL, vocabulary_names
from .vocabulary_san import extend_labels as add_common_names

_ADDRESS_SCHEMES = ("http://", "https://", "data:image/")
_LABELS_AT_ONCE = 512
_OPTIONS = ("candidate_labels", "threshold", "other_label", "extend_labels", "templates", "timeout")
_EXAMPLE = 'candidate_labels=["sky", "road"]'


class OpenVocabularySegmentationPipeline(Pipeline):
    """Label every pixel of images with the best of any words.

    Everything that other pipelines take works here: `device`, `dtype`, `batch_size`, `num_workers`. Images of any
    sizes share a batch; each is run on the size it has alone, so what shares a batch never changes an answer.

    The options of a call (`candidate_labels`, `threshold`, ...) can be given when the pipeline is made as well, and
    hold for calls that do not name them.

    Words are encoded once for each call and kept: a call with the vocabulary and the templates of an earlier one does
    no text work. The last `MAX_CACHED_VOCABULARIES` are kept, the least recently used goes first, and all are
    forgotten when the text encoder changes: its weights, its precision, or its device.

    Args:
        model ([`SANForOpenVocabSegmentation`]): what to segment with.
        processor ([`SANProcessor`]): saved with the model.
        kwargs: see `transformers.Pipeline`; and the options of `__call__`.

    Attributes:
        MAX_CACHED_VOCABULARIES: how many encoded vocabularies are kept.
        MAX_LABELS: labels that a call may have, and that all vocabularies kept may have together.

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

    MAX_CACHED_VOCABULARIES = 16
    MAX_LABELS = 50_000

    _load_processor: Any = True
    _load_image_processor: Any = False
    _load_feature_extractor: Any = False
    _load_video_processor: Any = False
    _load_tokenizer: Any = False

    model: Any
    processor: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take the model, the processor, and what holds for all calls."""
        options = {name: kwargs.pop(name, None) for name in _OPTIONS}
        self._options = {name: value for name, value in options.items() if value is not None}
        if "candidate_labels" in self._options:
            # An iterator could be read for one call only
            self._options["candidate_labels"] = _list_labels(self._options["candidate_labels"], self.MAX_LABELS)
        super().__init__(*args, **kwargs)
        if not hasattr(self.model, "get_class_embeds"):
            raise ValueError(f"model is a {type(self.model).__name__}: pass a SAN model, which encodes any words")
        if not hasattr(self.processor, "tokenize_labels"):
            raise ValueError(
                f"processor is a {type(self.processor).__name__}: pass processor=SANProcessor.from_pretrained(folder)"
            )
        self._cache = _EmbeddingCache()

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
            - **score** (`float`): mean over the mask of the score that won each pixel: the sum over the model's
              masks of (how much the mask is the label) * (how much the pixel is in the mask). It is near 1 where the
              model is sure; where masks overlap it can pass 1.

            For a list or an array of images a list of such lists. For a generator a generator of them, for data
            sets an iterable; both read images as they go.

        Raises:
            ValueError: an image, the labels or an option cannot be used; the message says which, and what to do.
        """
        given = {
            "candidate_labels": candidate_labels,
            "threshold": threshold,
            "other_label": other_label,
            "extend_labels": extend_labels,
            "templates": templates,
            "timeout": timeout,
        }
        options = {**self._options, **{name: value for name, value in given.items() if value is not None}}
        threshold = _check_threshold(options.get("threshold", 0.0))
        other_label = _check_other_label(options.get("other_label", OTHER_LABEL))
        images = _arrange_images(images)
        vocabulary = self._make_vocabulary(
            options.get("candidate_labels"), options.get("templates"), options.get("extend_labels", "none")
        )
        results = super().__call__(
            images,
            batch_size=batch_size,
            num_workers=num_workers,
            timeout=options.get("timeout"),
            vocabulary=vocabulary,
            threshold=threshold,
            other_label=other_label,
        )
        if isinstance(images, _Image):
            return results
        if isinstance(images, _Images):
            return list(results) if isinstance(images, (list, tuple)) or _is_array(images) else results
        return _one_by_one(results)

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
        vocabulary: _Vocabulary | None = None,
        threshold: float = 0.0,
        other_label: str = OTHER_LABEL,
        timeout: float | None = None,
        **_: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Options of the three steps. What else `pipeline(...)` passes on is not for them."""
        if vocabulary is None:
            return {}, {}, {}
        return (
            {"timeout": timeout},
            {"class_embeds": vocabulary.class_embeds},
            {"labels": vocabulary.labels, "threshold": threshold, "other_label": other_label},
        )

    def preprocess(self, input_: _Image, timeout: float | None = None) -> dict[str, Any]:  # type: ignore[override]
        """
        Read an image.

        Returns:
            `pixel_values`, a list with one (1, 3, height, width), as images of several sizes make no tensor;
            `image_sizes` (1, 2), without the padding; `target_sizes`, a list with the image's own (height, width).
        """
        image = _read(input_, timeout)
        inputs = self.processor(images=image, return_tensors="pt")
        return {
            "pixel_values": [inputs["pixel_values"]],
            "image_sizes": inputs["image_sizes"],
            "target_sizes": [image.shape[:2]],
        }

    def _forward(self, input_tensors: dict[str, Any], class_embeds: Tensor) -> dict[str, Any]:  # type: ignore[override]
        """
        Label every pixel where the model is, images of one padded size together.

        Returns:
            `label_maps`, for each image (height, width) int64, and `scores`, (height, width) float32.
        """
        pixel_values = _flat(input_tensors["pixel_values"])
        target_sizes = _flat(input_tensors["target_sizes"])
        groups: dict[torch.Size, list[int]] = {}
        for index, pixels in enumerate(pixel_values):
            groups.setdefault(pixels.shape, []).append(index)
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for indices in groups.values():
            outputs = self.model(
                pixel_values=torch.cat([pixel_values[index] for index in indices]),
                image_sizes=input_tensors["image_sizes"][indices],
                class_embeds=class_embeds,
            )
            maps, scores = self.processor.post_process_semantic_segmentation(
                outputs, target_sizes=[target_sizes[index] for index in indices], return_scores=True
            )
            found.update(zip(indices, zip(maps, scores, strict=True), strict=True))
        return {
            "label_maps": [found[index][0] for index in range(len(found))],
            "scores": [found[index][1] for index in range(len(found))],
        }

    def postprocess(  # type: ignore[override]
        self,
        model_outputs: dict[str, Any],
        labels: Sequence[str],
        threshold: float = 0.0,
        other_label: str = OTHER_LABEL,
    ) -> list[dict[str, Any]]:
        """
        Masks of one image.

        Args:
            model_outputs: `label_maps` and `scores`, each holding one (height, width).
            labels: the labels asked for; indices beyond them are added names.
            threshold: see `__call__`.
            other_label: see `__call__`.

        Returns:
            label, mask and score of each label that has pixels.
        """
        label_map, scores = model_outputs["label_maps"][0].numpy(), model_outputs["scores"][0].numpy()
        names = list(labels)
        other = _position(other_label, names)
        if other == len(names):
            names.append(other_label)
        label_map = np.where((label_map >= len(labels)) | (scores < threshold), other, label_map)
        areas = np.bincount(label_map.ravel(), minlength=len(names))
        sums = np.bincount(label_map.ravel(), weights=scores.ravel(), minlength=len(names))
        return [
            {
                "label": names[index],
                "mask": Image.fromarray((label_map == index).astype(np.uint8) * np.uint8(255)),
                "score": float(sums[index] / areas[index]),
            }
            for index in areas.nonzero()[0]
        ]

    def _make_vocabulary(self, candidate_labels: Any, templates: Any, extension: Any) -> _Vocabulary:
        """The labels as they were given, and the embeddings of them and of the names added."""
        if extension not in EXTENSIONS:
            raise ValueError(
                f"extend_labels is {extension!r}: choose one of {', '.join(repr(name) for name in EXTENSIONS)}"
            )
        if extension != "none" and not vocabulary_names():
            raise ValueError(
                f"extend_labels={extension!r} needs the lists of names that come with the package modeling_san, and "
                "they are not beside this code: install the package, or name what else there may be in "
                "candidate_labels"
            )
        if candidate_labels is None:
            labels = self._stored_labels()
            stored = self.model.stored_class_embeds
            if stored is not None and templates is None and extension == "none":
                return _Vocabulary(tuple(labels), stored)
        else:
            labels = _list_labels(candidate_labels, self.MAX_LABELS)
        try:
            names = add_common_names(normalize_labels(labels), extension)
        except ValueError as error:
            raise ValueError(f"candidate_labels: {error}") from error
        patterns = resolve_templates(self.processor.templates if templates is None else templates)[1]
        class_embeds = self._cache.get(
            (tuple(names), tuple(patterns)),
            lambda: self._encode(names, patterns),
            state=(id(self.processor), _text_encoder_state(self.model), str(self.device)),
            max_entries=self.MAX_CACHED_VOCABULARIES,
            max_labels=self.MAX_LABELS,
        )
        return _Vocabulary(tuple(labels), class_embeds)

    @torch.no_grad()
    def _encode(self, names: list[str], templates: list[str]) -> Tensor:
        """Unit vectors (labels, projection_dim) on the pipeline's device."""
        parts = []
        # Each part has the memory of its own prompts only, however long the vocabulary
        for start in range(0, len(names), _LABELS_AT_ONCE):
            inputs = self.processor(
                text=names[start : start + _LABELS_AT_ONCE], templates=templates, return_tensors="pt"
            )
            with self.device_placement():
                parts.append(
                    self.model.get_class_embeds(
                        inputs["input_ids"].to(self.device), inputs["attention_mask"].to(self.device)
                    )
                )
        return torch.cat(parts).detach()

    def _stored_labels(self) -> list[str]:
        """The vocabulary saved with the model."""
        config = self.model.config
        if not config.has_stored_labels:
            raise ValueError(
                f"there are no labels: pass some, for example {_EXAMPLE}, or store a vocabulary with the model by "
                "model.set_labels(labels, processor)"
            )
        names: dict[Any, str] = dict(config.id2label or {})
        return [names[index] for index in sorted(names)]


@dataclass(frozen=True)
class _Vocabulary:
    """Labels as they were given, and class embeddings (classes, projection_dim) of them and of added names."""

    labels: tuple[str, ...]
    class_embeds: Tensor


@dataclass(frozen=True)
class _Image:
    """An image as it was given, and what errors call it."""

    image: Any
    name: str


class _Images(Dataset):
    """Images by number: a list, a column, a data set."""

    def __init__(self, images: Any) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> _Image:
        return _Image(self.images[index], f"image {index}")


class _EmbeddingCache:
    """Vocabularies that were encoded, the least recently used first. Threads may share it; copies start empty."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._state: Hashable = None

    def __reduce__(self) -> tuple[type, tuple]:
        # A lock cannot travel to the worker processes that read images, and they need no vocabulary
        return _EmbeddingCache, ()

    def __len__(self) -> int:
        return len(self._entries)

    def get(
        self, key: Hashable, encode: Callable[[], Tensor], *, state: Hashable, max_entries: int, max_labels: int
    ) -> Tensor:
        """
        An entry, encoded now if it is not there.

        Args:
            key: what the entry is of.
            encode: makes it.
            state: of the encoder; with another one than before all entries are forgotten.
            max_entries: that are kept.
            max_labels: that all entries kept hold together; the newest one is kept in any case.
        """
        # Threads that ask for one vocabulary at a time wait for one of them to encode it
        with self._lock:
            if state != self._state:
                self._entries.clear()
                self._state = state
            if key not in self._entries:
                self._entries[key] = encode()
            self._entries.move_to_end(key)
            while len(self._entries) > 1 and (
                len(self._entries) > max_entries or sum(map(len, self._entries.values())) > max_labels
            ):
                self._entries.popitem(last=False)
            return self._entries[key]


def _text_encoder_state(model: Any) -> Hashable:
    """Something that changes when the text encoder's weights are trained, loaded anew, converted or moved."""
    parameters = itertools.chain(model.text_model.parameters(), model.text_projection.parameters())
    return tuple(
        # Tensors made in inference mode have no counter of changes
        (parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version, parameter.dtype)
        for parameter in parameters
    )


def _arrange_images(images: Any) -> Any:
    """One `_Image`, a data set of them, or a generator of them."""
    if images is None:
        raise ValueError("images is None: pass an image: a path, an address, a PIL image or an array")
    if isinstance(images, Mapping) or hasattr(images, "read"):
        what = "a mapping" if isinstance(images, Mapping) else "an open file"
        raise ValueError(
            f"images is {what} ({type(images).__name__}): pass images: paths, addresses, PIL images, arrays, or the "
            'column of a data set that holds them, such as dataset["image"]'
        )
    if _is_array(images) and images.ndim != 4:
        return _Image(images, "the image")
    if isinstance(images, (str, bytes, os.PathLike, Image.Image)):
        return _Image(images, "the image")
    if isinstance(images, Sized) and hasattr(images, "__getitem__"):
        if len(images) == 0:
            raise ValueError("images is empty: pass at least one image")
        return _Images(images)
    if isinstance(images, Iterable):
        return (_Image(image, f"image {index}") for index, image in enumerate(images))
    return _Image(images, "the image")


def _is_array(images: Any) -> bool:
    return isinstance(images, (np.ndarray, Tensor))


def _read(image: _Image, timeout: float | None) -> np.ndarray:
    """Pixels (height, width, 3), upright, of whatever was given."""
    image, name = image.image, image.name
    if isinstance(image, str) and image.startswith(_ADDRESS_SCHEMES):
        image = _fetch(image, name, timeout)
    if isinstance(image, Mapping):
        raise ValueError(
            f'{name} is a {type(image).__name__}: pass the column that holds the images, such as dataset["image"]'
        )
    array = read_image(image, name)
    # The processor would call it "image 0"
    to_byte_scale(array, name)
    return array


def _fetch(address: str, name: str, timeout: float | None) -> Image.Image:
    """Load an image from an address."""
    try:
        return load_image(address, timeout=timeout)
    except Exception as error:
        # Networks, servers and decoders each have exceptions of their own
        shown, reason = _without_secrets(address, error)
    # Outside of the handler, so that the traceback does not show the whole address either
    raise ValueError(f"{name}: {shown} gave no image ({reason}): check that it leads to an image file")


def _without_secrets(address: str, error: Exception) -> tuple[str, str]:
    """An address without what may be a key, a password or a whole image; and an error without the address."""
    scheme, _, rest = address.partition("://")
    if not rest:
        return "an address with data", "it does not hold one in base64"
    shown = f"{scheme}://{rest.partition('?')[0].partition('#')[0].rpartition('@')[2]}"
    return shown, " ".join(str(error).replace(address, shown).split()) or type(error).__name__


def _list_labels(labels: Any, limit: int) -> list[str]:
    """Labels as a list; one string is split at commas."""
    if isinstance(labels, str):
        try:
            labels = normalize_labels(labels) if labels.strip() else []
        except ValueError as error:
            raise ValueError(f"candidate_labels: {error}") from error
    if isinstance(labels, (Mapping, bytes)) or not isinstance(labels, Iterable):
        raise ValueError(
            f"candidate_labels is a {type(labels).__name__}: pass a list of words, for example {_EXAMPLE}"
        )
    listed = list(itertools.islice(labels, limit + 1))
    if not listed:
        raise ValueError(f"candidate_labels is empty: pass at least one word, for example {_EXAMPLE}")
    if len(listed) > limit:
        raise ValueError(f"candidate_labels holds more than {limit} labels: pass fewer of them")
    for index, label in enumerate(listed):
        if not isinstance(label, str):
            raise ValueError(
                f"candidate_labels[{index}] is a {type(label).__name__} and no word: pass a flat list of strings, for "
                f"example {_EXAMPLE}"
            )
    return listed


def _check_threshold(threshold: Any) -> float:
    is_number = isinstance(threshold, (int, float, np.number)) and not isinstance(threshold, bool)
    # NaN fails the comparison as well
    if not is_number or not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold!r}: pass a number from 0 (no other label) to 1")
    return float(threshold)


def _check_other_label(other_label: Any) -> str:
    if not isinstance(other_label, str) or not other_label.strip():
        raise ValueError(f'other_label is {other_label!r}: pass a name for what no label fits, for example "other"')
    return other_label


def _position(name: str, names: Sequence[str]) -> int:
    """Where a name is among others, whatever its case; behind them if it is not."""
    folded = [" ".join(other.lower().split()) for other in names]
    wanted = " ".join(name.lower().split())
    return folded.index(wanted) if wanted in folded else len(folded)


def _flat(items: Iterable[Any]) -> list[Any]:
    """What each image brought, in one list: batches come as lists of lists."""
    return [part for item in items for part in (item if isinstance(item, list) else [item])]


def _one_by_one(results: Iterable[Any]) -> Iterator[Any]:
    yield from results


__all__ = ["OpenVocabularySegmentationPipeline"]
