"""One training run on transformers' `Trainer`, shared by the demo model and fine-tuning."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from modeling_san.modeling_san import SANForOpenVocabSegmentation
from modeling_san.training.data import Collator
from modeling_san.training.device import pick_device_and_dtype

_NO_DECAY = ("norm", "position_embedding", "query_embedding")


class SANTrainer(Trainer):
    """`Trainer` with the paper's parameter groups: no weight decay on norms and on position and query embeddings."""

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Names of the parameters that weight decay applies to."""
        return [name for name, _ in model.named_parameters() if not any(part in name for part in _NO_DECAY)]


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
        batch_size: pictures a step on each device.
        learning_rate: AdamW's after the warm-up; decays to 0 as a polynomial of power 0.9.
        warmup_steps: steps of linear warm-up; by default 50, but at most a tenth of all.
        weight_decay: AdamW's.
        max_grad_norm: gradients are scaled down to this norm.
        seed: of the order of pictures and of the points on which masks are compared.
        device: `"cpu"` keeps the run off a GPU; by default the first GPU is used if there is one.
        workers: processes that prepare pictures.
        progress: whether to show a progress bar.
        training_arguments: further fields of `TrainingArguments`.

    Raises:
        ValueError: for a GPU other than the first.
    """
    device, dtype = pick_device_and_dtype(device)
    if device.index:
        raise ValueError(f"training runs on the first GPU, not {device}: set CUDA_VISIBLE_DEVICES={device.index}.")
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


__all__ = ["SANTrainer", "run_training"]
