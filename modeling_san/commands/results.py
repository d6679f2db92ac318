"""Segment images with one vocabulary, and write what came out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CommandError
from .images import LABELS_ENDING, OVERLAY_ENDING, SUMMARY_ENDING
from .models import LoadedModel

if TYPE_CHECKING:
    import numpy as np
    import torch

_LABELS_ON_A_LINE = 5


@dataclass(frozen=True)
class Segmenter:
    """A model with a vocabulary, encoded once for all images.

    Attributes:
        loaded: the model.
        labels: names by index. Where names were added, "other" is among them and stands for all of those.
        class_embeds: `(classes, projection_dim)`, of the labels and the added names.
        own_labels: how many of the classes are the user's own; the others become "other".
        added: how the vocabulary was extended, or "none".
    """

    loaded: LoadedModel
    labels: tuple[str, ...]
    class_embeds: torch.Tensor
    own_labels: int
    added: str = "none"

    def segment(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """
        Label every pixel.

        Args:
            image: `(height, width, 3)` bytes.

        Returns:
            indices into `labels` and the scores they won with, each `(height, width)`.
        """
        import torch

        from modeling_san.processing import OTHER_LABEL

        model, processor = self.loaded.model, self.loaded.processor
        with torch.inference_mode():
            inputs = processor(images=image, return_tensors="pt").to(model.device)
            outputs = model(**inputs, class_embeds=self.class_embeds)
            [label_map], [scores] = processor.post_process_semantic_segmentation(
                outputs, target_sizes=[image.shape[:2]], return_scores=True
            )
            if self.own_labels < len(self.class_embeds):
                label_map[label_map >= self.own_labels] = self.labels.index(OTHER_LABEL)
        return label_map.cpu().numpy(), scores.cpu().numpy()


def make_segmenter(
    loaded: LoadedModel,
    labels: Sequence[str] | None,
    *,
    templates: str | Sequence[str] | None = None,
    added: str = "none",
) -> Segmenter:
    """
    Encode a vocabulary.

    Args:
        loaded: the model.
        labels: names; None takes those stored with the model.
        templates: prompt templates; None takes those saved with the processor.
        added: how to extend the labels, see `modeling_san.processing.extend_labels`.

    Raises:
        CommandError: there are no labels, or they cannot be used.
    """
    import torch

    from modeling_san.processing import OTHER_LABEL, extend_labels

    model = loaded.model
    is_stored = labels is None
    if labels is None:
        labels = stored_labels(loaded)
    try:
        vocabulary = extend_labels(labels, added)
        if is_stored and templates is None and added == "none":
            class_embeds = model.stored_class_embeds
        else:
            inputs = loaded.processor(text=vocabulary, templates=templates, return_tensors="pt").to(model.device)
            with torch.inference_mode():
                class_embeds = model.get_class_embeds(**inputs)
    except ValueError as error:
        raise CommandError(f"labels: {error}") from error
    shown = tuple(labels)
    if len(vocabulary) > len(shown) and OTHER_LABEL not in shown:
        shown += (OTHER_LABEL,)
    return Segmenter(loaded, shown, class_embeds, len(labels), added)


def stored_labels(loaded: LoadedModel) -> list[str]:
    """
    The vocabulary that was saved with a model.

    Raises:
        CommandError: there is none.
    """
    config = loaded.model.config
    if not config.has_stored_labels:
        raise CommandError(
            f'model {loaded.name} has no labels of its own: name what to look for, for example --labels "sky, road"'
        )
    names: dict[Any, str] = dict(config.id2label or {})
    return [names[index] for index in sorted(names)]


def untrained_words(loaded: LoadedModel, labels: Sequence[str]) -> tuple[list[str], list[str]]:
    """
    Words that a model was not trained on.

    Returns:
        those among `labels` and their synonyms, and the words that it was trained on; both empty where the model does
        not say.
    """
    from modeling_san.processing.results import unknown_words

    trained = list(loaded.model.config.training_labels or [])
    return (unknown_words(labels, trained), trained) if trained else ([], [])


@dataclass(frozen=True)
class WrittenResult:
    """What was written for one image.

    Attributes:
        overlay: path of the image with the segmentation painted over it.
        segments: labels that are present, largest first, see `modeling_san.processing.summarize`.
    """

    overlay: Path
    segments: list[dict[str, Any]]

    def __str__(self) -> str:
        """The main labels with their shares of the image."""
        parts = [f"{segment['label']} {segment['area']:.0%}" for segment in self.segments[:_LABELS_ON_A_LINE]]
        if len(self.segments) > _LABELS_ON_A_LINE:
            parts.append(f"{len(self.segments) - _LABELS_ON_A_LINE} more")
        return ", ".join(parts)


def write_results(
    segmenter: Segmenter,
    image: np.ndarray,
    segmentation: tuple[np.ndarray, np.ndarray],
    folder: Path,
    name: str,
    *,
    source: str,
    opacity: float = 0.5,
) -> WrittenResult:
    """
    Write the overlay, the indexed label image and the summary of one image.

    Args:
        segmenter: that segmented it.
        image: `(height, width, 3)` bytes.
        segmentation: what `Segmenter.segment` returned for it.
        folder: to write to.
        name: that the files' names begin with.
        source: where the image came from, for the summary.
        opacity: of the colours in the overlay.

    Raises:
        OSError: a file cannot be written.
    """
    from modeling_san.processing import label_colors, label_png, overlay
    from modeling_san.processing.results import list_segments, make_summary

    label_map, scores = segmentation
    labels = segmenter.labels
    colors = label_colors(labels)
    segments = list_segments(label_map, scores, labels)
    overlay_path, labels_path = folder / (name + OVERLAY_ENDING), folder / (name + LABELS_ENDING)
    overlay(image, label_map, labels, opacity, colors=colors).save(overlay_path)
    label_png(label_map, colors[:256]).save(labels_path)
    summary = make_summary(
        segments,
        labels,
        image=source,
        size=image.shape[:2],
        model=segmenter.loaded.name,
        extended_by=segmenter.added,
        overlay=overlay_path.name,
        label_map=labels_path.name,
    )
    # Last, so that where there is a summary the images are complete
    text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
    (folder / (name + SUMMARY_ENDING)).write_text(text, encoding="utf-8", errors="replace")
    return WrittenResult(overlay_path, segments)


def make_folder(path: str | Path) -> Path:
    """
    Make the folder that results go to.

    Raises:
        CommandError: it cannot be made or written to.
    """
    import tempfile

    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Whether a folder can be written to depends on more than its mode: on the user, the mount, the quota
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise CommandError(f"output folder {folder} cannot be written to ({reason}): pass another --output") from error
    return folder
