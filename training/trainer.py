"""What transformers' `Trainer` needs to train and evaluate SAN, and the built-in model's training run on it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from modeling_san.modeling_san import SANForOpenVocabSegmentation, SANOutput
from modeling_san.processing import SANProcessor
from modeling_san.processing.device import pick_device_and_dtype
from modeling_san.training.data import Collator
from modeling_san.training.metrics import ConfusionMatrix
from modeling_san.training.optimization import is_decayed
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


def run_training(
    model: SANForOpenVocabSegmentation,
    dataset: torch.utils.data.Dataset,
    *,
    steps: int,
    prompts: Mapping[str, Tensor] | None = None,
    batch_size: int,
    learning_rate: float,
    warmup_steps: int | None = None,
    weight_decay: float = 1e-4,
    max_grad_norm: float = 1.0,
    seed: int = 0,
    device: str | torch.device | None = None,
    workers: int = 1,
    progress: bool = True,
    **training_arguments: Any,
) -> None:
    """
    Train a model that has stored labels, in place.

    Args:
        model: with `set_labels` done; its trainable parameters are the ones whose gradient is on.
        dataset: items with `pixel_values` and `labels`, all of one size.
        steps: optimisation steps.
        prompts: `input_ids` and `attention_mask` of the labels, encoded anew in each step; needed where the text
            encoder trains. By default the stored label embeddings are used.
        batch_size: images a step on each device.
        learning_rate: AdamW's after the warm-up; decays to 0 as a polynomial of power 0.9.
        warmup_steps: steps of linear warm-up; by default 50, but at most a tenth of all.
        weight_decay: AdamW's.
        max_grad_norm: gradients are scaled down to this norm.
        seed: of the order of images and of the points on which masks are compared.
        device: `"cpu"` keeps the run off a GPU; by default the first GPU is used if there is one.
        workers: processes that prepare images.
        progress: whether to show a progress bar.
        training_arguments: further fields of `TrainingArguments`.

    Raises:
        ValueError: for a GPU other than the first.
    """
    device, dtype = pick_device_and_dtype(device)
    if device.index:
        raise ValueError(f"this run uses the first GPU, not {device}: set CUDA_VISIBLE_DEVICES={device.index}.")
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            lr_scheduler_type="polynomial",
            lr_scheduler_kwargs={"power": 0.9, "lr_end": 0.0},
            warmup_steps=min(50, steps // 10) if warmup_steps is None else warmup_steps,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            seed=seed,
            bf16=dtype == torch.bfloat16,
            use_cpu=device.type == "cpu",
            dataloader_num_workers=workers,
            dataloader_persistent_workers=workers > 0,
            dataloader_drop_last=True,
            remove_unused_columns=False,
            save_strategy="no",
            report_to="none",
            logging_steps=50,
            disable_tqdm=not progress,
            **training_arguments,
        )
        # Without a launcher Trainer spreads over all GPUs by cutting every tensor, the vocabulary's too, into parts.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        trainer = SANTrainer(
            model=model,
            args=arguments,
            train_dataset=dataset,
            data_collator=Collator(prompts or {}),
        )
        trainer.train()
        # Mixed precision wraps `forward`; what is evaluated has to be what is saved.
        trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    model.eval()


__all__ = ["SANTrainer", "SeedEachStep", "StreamingMeanIoU", "run_training"]
