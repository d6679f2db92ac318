"""How many pixels keep their label when the network computes in another number format, or compiled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from modeling_san import SANProcessor
from modeling_san.processing import Segmenter

from .settings import Settings
from .workload import Workload, make_labels


def measure_agreement(settings: Settings, images: Sequence[Path], folder: Path) -> Iterator[tuple[Path, float]]:
    """
    Label image files as the settings say, and in float32, eager.

    The model is a folder with its processor. The vocabulary is the one stored with the model, or as many labels as the
    settings say.

    Yields:
        each file, and the share of its pixels that have the same label both ways.

    Raises:
        ValueError: the model or an image cannot be used.
        OSError: the folder holds no processor.
    """
    if not Path(settings.model).is_dir():
        raise ValueError(f"--agreement with --model {settings.model}: pass a trained model's folder")
    processor = SANProcessor.from_pretrained(settings.model)
    exact = Workload(replace(settings, dtype="float32", compile=None), folder)
    other = Workload(settings, folder)
    segmenters = [Segmenter(work.compiled(work.model), processor) for work in (exact, other)]
    stored = exact.model.config.stored_labels
    vocabulary = segmenters[0].vocabulary(None if stored else make_labels(settings.classes))
    for path in images:
        [first], [second] = (segmenter(path, vocabulary) for segmenter in segmenters)
        yield path, (first.label_map == second.label_map).double().mean().item()


def format_agreement(agreement: dict[str, float], settings: Settings) -> str:
    """The mean and the least of all images, a line."""
    lowest = min(agreement, key=lambda path: agreement[path])
    return (
        f"Pixels with the same label in {settings.dtype}, {settings.mode}, as in float32: "
        f"{sum(agreement.values()) / len(agreement):.2%} of {len(agreement)} images, at least {agreement[lowest]:.2%} "
        f"({lowest})."
    )
