# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""What users of transformers' `Trainer` may add to it: parameter groups, seeds, a metric that keeps no images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from modeling_san.modeling_san import SANOutput
from modeling_san.processing import SANProcessor
from modeling_san.training.build import is_decayed
from modeling_san.training.metrics import ConfusionMatrix
from modeling_san.training.train import seed_step


class SANTrainer(Trainer):
    """`Trainer` with the paper's parameter groups: no weight decay on norms and on position and query embeddings."""

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Names of the parameters that weight decay applies to."""
        return [name for name, _ in model.named_parameters() if is_decayed(name)]


class SeedEachStep(TrainerCallback):
    """Draws the random points of each step as `san train` does, so that both give the same losses on the same data."""

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Seed PyTorch from the run's seed and the step."""
        seed_step(args.seed, state.global_step, args.process_index)


class StreamingMeanIoU:
    """
    `compute_metrics` of a `Trainer` with `batch_eval_metrics=True`: no image is kept.

    Pass `preprocess_logits_for_metrics=metrics.to_label_map` as well: it turns the outputs into label maps on the
    device, so that nothing larger is gathered.

    Args:
        processor: the model's.
        num_labels: C, the number of classes.
        ignore_index: value of `labels` for pixels that do not count.
    """

    def __init__(self, processor: SANProcessor, num_labels: int, ignore_index: int = 255) -> None:
        self.processor = processor
        self.num_labels = num_labels
        self.ignore_index = ignore_index
        self.confusion = ConfusionMatrix(num_labels, ignore_index)

    def to_label_map(self, logits: Tensor | tuple[Any, ...], labels: Tensor) -> Tensor:
        """
        Segment a batch.

        Args:
            logits: mask logits `(batch, queries, h, w)` and class logits `(batch, queries, C + 1)`, as the model's
                output begins; or, of [`SANForSemanticSegmentation`], `(batch, C, h, w)`.
            labels: `(batch, height, width)`.

        Returns:
            label maps of the shape of `labels`.
        """
        if isinstance(logits, Tensor):
            upsampled = torch.nn.functional.interpolate(
                logits, labels.shape[-2:], mode="bilinear", align_corners=False
            )
            return upsampled.argmax(1)
        masks, classes = logits[:2]
        outputs = SANOutput(masks_queries_logits=masks, class_queries_logits=classes)
        size = tuple(labels.shape[-2:])
        maps = self.processor.post_process_semantic_segmentation(outputs, target_sizes=[size] * len(labels))
        return torch.stack(maps)

    def __call__(self, prediction: EvalPrediction, compute_result: bool = False) -> dict[str, float]:
        """
        Count a batch.

        Args:
            prediction: label maps and labels.
            compute_result: true with the last batch.

        Returns:
            `mean_iou` and `overall_accuracy` with the last batch, otherwise nothing.
        """
        self.confusion.update(torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids))
        if not compute_result:
            return {}
        confusion, self.confusion = self.confusion, ConfusionMatrix(self.num_labels, self.ignore_index)
        return {"mean_iou": confusion.mean_iou(), "overall_accuracy": confusion.overall_accuracy()}


__all__ = ["SANTrainer", "SeedEachStep", "StreamingMeanIoU"]
