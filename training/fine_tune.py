"""Fine-tuning on labelled pictures of one's own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm import tqdm

from modeling_san.modeling_san import SANForOpenVocabSegmentation
from modeling_san.processing import SANProcessor
from modeling_san.training.augmentation import Augmentation
from modeling_san.training.data import TrainingPictures, check_first_pictures, load_pictures, to_arrays
from modeling_san.training.label_sets import LabelSet, load_label_set
from modeling_san.training.metrics import RESULTS_FILE, ConfusionMatrix
from modeling_san.training.run import run_training

TRAIN_CLIP = ("vision_model", "visual_projection", "text_model", "text_projection", "logit_scale")
"""All of CLIP: what to train as well where it knows neither the pictures nor the words."""


def fine_tune(
    model: SANForOpenVocabSegmentation,
    processor: SANProcessor,
    dataset: str | Path,
    labels: Sequence[str],
    output_dir: str | Path,
    *,
    validation: str | Path | None = None,
    short_side: int | None = None,
    train_clip: bool = False,
    templates: Sequence[str] | str | None = None,
    steps: int = 1000,
    batch_size: int = 8,
    learning_rate: float = 1e-4,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """
    Train a model further on pictures with label maps, and save it with the labels stored.

    Args:
        model: what to start from, in float32; changed in place.
        processor: its processor; changed in place where `short_side` is given.
        dataset: parquet file, folder or Hub id with pictures and label maps (255 = no label).
        labels: class names in the order of the label maps' values.
        output_dir: folder for the result; it must not hold a model already.
        validation: pictures for the final mIoU; a split named "validation" of `dataset` is not looked for.
        short_side: short side of the pictures in pixels; that of the model's processor by default.
        train_clip: whether CLIP trains too: needed where it does not know such pictures or words, as the built-in
            model's; a large CLIP is better left frozen.
        templates: prompt templates; those of the model's processor by default.
        steps: optimisation steps.
        batch_size: pictures a step.
        learning_rate: AdamW's.
        seed: of all random choices.
        device: `"cpu"` keeps the run off a GPU.
        progress: whether to show progress bars.

    Returns:
        `mean_iou` and `per_class_iou` where `validation` is given, otherwise nothing; saved as `results.json`, too.

    Raises:
        ValueError: where data, labels or folders do not fit; the sentence says what to change.
    """
    output_dir = Path(output_dir)
    if (output_dir / "model.safetensors").exists():
        raise ValueError(f"{output_dir} already holds a model: choose another output folder.")
    pictures = load_pictures(dataset)
    validation_pictures = None if validation is None else load_pictures(validation, split="validation")
    label_set = load_label_set(labels)
    for source, examples in ((dataset, pictures), (validation, validation_pictures)):
        if examples is not None:
            check_first_pictures(examples, label_set, source)

    if templates is not None:
        processor = SANProcessor(processor.image_processor, processor.tokenizer, templates=templates)
    if train_clip:
        model.config.trainable_clip_parameters = list(TRAIN_CLIP)
        model.freeze_clip()
    short_side = _set_short_side(processor, short_side)
    model.set_labels(labels, processor)
    prompts = dict(processor(text=list(labels), return_tensors="pt")) if train_clip else {}
    run_training(
        model,
        TrainingPictures(
            pictures,
            label_set,
            processor.image_processor,
            Augmentation.for_size(short_side, _crop_size(pictures, label_set, short_side, model.config.size_divisor)),
            seed,
        ),
        steps=steps,
        prompts=prompts,
        batch_size=min(batch_size, len(pictures)),
        learning_rate=learning_rate,
        seed=seed,
        device=device,
        progress=progress,
    )
    model.set_labels(labels, processor)
    model.config.training_labels = None if model.config.training_labels is None else list(labels)
    model.save_pretrained(output_dir)
    processor.save_pretrained(output_dir)
    if validation_pictures is None:
        return {}
    results = evaluate(model, processor, validation_pictures, labels, progress=progress)
    (output_dir / RESULTS_FILE).write_text(json.dumps(results, indent=2) + "\n")
    return results


@torch.inference_mode()
def evaluate(
    model: SANForOpenVocabSegmentation,
    processor: SANProcessor,
    pictures: Dataset,
    labels: Sequence[str],
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """
    Mean IoU at the pictures' own size.

    Args:
        model: with `labels` stored.
        processor: its processor.
        pictures: examples with `image` and `annotation`.
        labels: class names.
        progress: whether to show a progress bar.

    Returns:
        `mean_iou`, `pixel_accuracy`, and `per_class_iou` by name (`None` for a class that does not occur).

    Raises:
        ValueError: where no pixel has a label.
    """
    model.eval()
    label_set = load_label_set(labels)
    confusion = ConfusionMatrix(len(labels), label_set.ignore_index)
    for example in tqdm(pictures, desc="evaluating", unit="picture", disable=not progress):
        image, label_map = to_arrays(example, label_set)
        inputs = processor(images=image, return_tensors="pt").to(model.device)
        [predicted] = processor.post_process_semantic_segmentation(model(**inputs), target_sizes=[label_map.shape])
        confusion.update(predicted.cpu(), torch.from_numpy(label_map.astype(np.int64)))
    if not confusion.counts.sum():
        raise ValueError("no pixel of the validation pictures has a label: there is nothing to measure.")
    iou = confusion.iou().tolist()
    return {
        "mean_iou": confusion.mean_iou(),
        "pixel_accuracy": float(confusion.counts.diagonal().sum() / confusion.counts.sum()),
        "per_class_iou": {
            name: None if value != value else value  # noqa: PLR0124 - NaN is the one value unequal to itself
            for name, value in zip(labels, iou, strict=True)
        },
    }


def _set_short_side(processor: SANProcessor, short_side: int | None) -> int:
    """Working size of the pictures, kept in the processor so that the saved model is used as it was trained."""
    size = dict(processor.image_processor.size)
    if short_side is not None:
        size = {"shortest_edge": short_side, "longest_edge": 4 * short_side}
        processor.image_processor.size = size
    return int(size["shortest_edge"])


def _crop_size(pictures: Dataset, label_set: LabelSet, short_side: int, divisor: int) -> tuple[int, int]:
    """A crop of the first picture's shape at the working size, in multiples of `divisor`."""
    image, _ = to_arrays(pictures[0], label_set)
    scale = short_side / min(image.size)
    height, width = (max(divisor, round(side * scale / divisor) * divisor) for side in image.size[::-1])
    return height, width


__all__ = ["TRAIN_CLIP", "evaluate", "fine_tune"]
