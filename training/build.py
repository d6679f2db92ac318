# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""What a training run is made of, by its recipe: Accelerate, model, batches, optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DynamoBackend, GradientAccumulationPlugin, ProjectConfiguration, TorchDynamoPlugin
from datasets import IterableDataset
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import CLIPModel, CLIPTokenizer, get_polynomial_decay_schedule_with_warmup
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from modeling_san import BUILTIN_MODEL
from modeling_san.auto import classes_of, classes_of_type
from modeling_san.open_vocabulary import OpenVocabularyModel
from modeling_san.pretrained_parts import load_backbone, load_text_encoder
from modeling_san.processing import SANImageProcessor, SANProcessor, template_names
from modeling_san.processing.device import pick_device_and_dtype
from modeling_san.processing.wording_san import one_line
from modeling_san.training.augmentation import Augmentation
from modeling_san.training.callbacks import ignore_stop_signals
from modeling_san.training.data import (
    CachedViews,
    Collator,
    EndlessOrder,
    StreamedImages,
    TrainingImages,
    read_examples,
)
from modeling_san.training.label_sets import LabelSet
from modeling_san.training.recipe import TRAINABLE, Recipe

_NO_DECAY = ("norm", "position_embedding", "query_embedding", "prompt_embedding")


def make_accelerator(recipe: Recipe, *trackers: Any) -> Accelerator:
    """
    Accelerate as a recipe wants it; what a launcher says of processes, FSDP and the like holds as well.

    Args:
        recipe: what to do.
        trackers: that get the figures beside those that the recipe names.

    Raises:
        ValueError: where this machine cannot do it.
    """
    precision = recipe.mixed_precision
    if precision == "auto":
        _, dtype = pick_device_and_dtype("cpu" if recipe.cpu else None)
        precision = "bf16" if dtype == torch.bfloat16 else "no"
    # An earlier run in this process may have had another precision
    AcceleratorState._reset_state()
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            cpu=recipe.cpu,
            log_with=[*trackers, *recipe.trackers],
            project_config=ProjectConfiguration(str(recipe.output_dir), str(Path(str(recipe.output_dir), "logs"))),
            dynamo_plugin=TorchDynamoPlugin(backend=DynamoBackend.NO),
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=recipe.gradient_accumulation_steps),
            step_scheduler_with_optimizer=False,
        )
    except (ValueError, ImportError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"this run cannot be set up on this machine: {one_line(error)}.") from error
    # Accelerate leaves out what is not installed
    usable = {str(getattr(kind, "value", kind)) for kind in accelerator.log_with}
    missing = [name for name in recipe.trackers if name not in usable and name != "all"]
    if missing:
        raise ValueError(f"trackers {', '.join(missing)} cannot be used: install the package, or leave it out.")
    return accelerator


def load_model(recipe: Recipe, checkpoint: Path | None) -> tuple[OpenVocabularyModel, SANProcessor]:
    """
    The model to train in float32, of any kind, from a checkpoint, a model, or a CLIP that a new one is put around.

    Raises:
        ValueError: where it cannot be loaded.
    """
    source = str(checkpoint or recipe.clip or recipe.backbone or recipe.model or BUILTIN_MODEL)
    templates = _templates(recipe)
    options: dict[str, Any] = {"dtype": torch.float32, "use_safetensors": True}
    try:
        if checkpoint is None and recipe.clip is not None:
            _, model_class, processor_class = classes_of_type(recipe.model_type)
            clip = CLIPModel.from_pretrained(source, **options)
            torch.manual_seed(recipe.seed)
            model = model_class.from_clip(clip, **recipe.new_config)
            processor = processor_class(tokenizer=CLIPTokenizer.from_pretrained(source), templates=templates or "vild")
            for name in ("size_divisor", "mask_stride"):
                setattr(processor.image_processor, name, getattr(model.config, name))
            return model, processor
        if checkpoint is None and recipe.backbone is not None:
            return _join_parts(recipe, templates)
        _, model_class, processor_class = classes_of(source)
        model = model_class.from_pretrained(source, **options)
        processor = processor_class.from_pretrained(source)
    except Exception as error:
        # Damaged files and missing networks raise many kinds
        raise ValueError(f"{source} cannot be loaded as a model to train: {one_line(error)}.") from error
    if templates is not None:
        processor = type(processor)(processor.image_processor, processor.tokenizer, templates=templates)
    return model, processor


def _join_parts(recipe: Recipe, templates: Any) -> tuple[OpenVocabularyModel, SANProcessor]:
    """A new model between a backbone and a text encoder, and a processor that makes ImageNet's kind of pixels."""
    _, model_class, processor_class = classes_of_type(recipe.model_type)
    backbone, (text_model, tokenizer) = (
        load_backbone(str(recipe.backbone)),
        load_text_encoder(str(recipe.text_encoder)),
    )
    torch.manual_seed(recipe.seed)
    model = model_class.from_parts(backbone, text_model, **recipe.new_config)
    sizes = {name: getattr(model.config, name) for name in ("size_divisor", "mask_stride")}
    pixels = {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD}
    return model, processor_class(SANImageProcessor(**pixels, **sizes), tokenizer, templates or "{}")


def load_setting(recipe: Recipe) -> tuple[Any, SANProcessor]:
    """
    Config and processor, at its working size, of the model that a recipe starts from; no weights are read.

    Raises:
        ValueError: where they cannot be loaded.
    """
    source = str(recipe.model or BUILTIN_MODEL)
    try:
        config_class, _, processor_class = classes_of(source)
        config, processor = config_class.from_pretrained(source), processor_class.from_pretrained(source)
    except Exception as error:
        raise ValueError(f"{source} cannot be loaded as a model to train: {one_line(error)}.") from error
    set_short_side(processor, recipe)
    return config, processor


def _templates(recipe: Recipe) -> str | list[str] | None:
    if not recipe.templates:
        return None
    if all("{}" in template for template in recipe.templates):
        return recipe.templates
    source = recipe.templates[0]
    if source in template_names():
        return source
    try:
        return [line for line in Path(source).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"templates {source!r} is neither {' nor '.join(template_names())}, nor a file of templates, nor a "
            "template with {} in it."
        ) from error


def prepare_model(recipe: Recipe, model: Any, processor: SANProcessor, label_set: LabelSet) -> None:
    """
    Make a model ready to be trained, in place: what trains, its labels, its working size.

    Raises:
        ValueError: where `trainable` names no parameter, or prompts that this kind of model does not have.
    """
    config = model.config
    config.trainable_clip_parameters = TRAINABLE.get(
        recipe.trainable, [name.strip() for name in recipe.trainable.split(",") if name.strip()]
    )
    if recipe.trainable == "prompts" and not hasattr(model, "add_clip_prompts"):
        raise ValueError(f"trainable is prompts, which a model of type {config.model_type} does not have.")
    if recipe.trainable == "prompts" and model.prompt_embedding is None:
        torch.manual_seed(recipe.seed)
        model.add_clip_prompts(recipe.num_clip_prompts)
    model.apply_trainable()
    config.semantic_loss_ignore_index = label_set.ignore_index
    # A small model says which words it knows: those that its text encoder was trained on last
    if config.training_labels is not None and model.trains_text_encoder():
        config.training_labels = list(label_set.names)
    set_short_side(processor, recipe)
    model.set_labels(label_set.names, processor)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable()


def set_short_side(processor: SANProcessor, recipe: Recipe) -> None:
    """Give a processor the working size that the recipe names, if it names one."""
    if recipe.short_side is not None:
        processor.image_processor.size = {"shortest_edge": recipe.short_side, "longest_edge": 4 * recipe.short_side}


def is_decayed(name: str) -> bool:
    """Whether weight decay applies to the parameter `name`: not to norms and position, query and prompt embeddings."""
    return not any(part in name for part in _NO_DECAY)


def make_optimizer(model: torch.nn.Module, recipe: Recipe) -> Optimizer:
    """
    AdamW over the parameters that train, with the paper's groups (section 4.1): no decay where not `is_decayed`.

    Raises:
        ValueError: where nothing trains.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("no parameter of the model trains: choose another `trainable`.")
    groups = [
        {"params": [value for name, value in trained if is_decayed(name)], "weight_decay": recipe.weight_decay},
        {"params": [value for name, value in trained if not is_decayed(name)], "weight_decay": 0.0},
    ]
    on_gpu = trained[0][1].is_cuda
    # A schedule that begins in the middle asks for `initial_lr`
    return AdamW(
        [{**group, "initial_lr": recipe.learning_rate} for group in groups if group["params"]],
        lr=recipe.learning_rate,
        fused=on_gpu or None,
    )


def make_schedule(optimizer: Optimizer, recipe: Recipe, step: int) -> LRScheduler:
    """Learning rate that rises linearly and falls to 0 at the last step as a polynomial, from `step` steps on."""
    return get_polynomial_decay_schedule_with_warmup(
        optimizer, recipe.warmup_steps, recipe.steps, lr_end=0.0, power=recipe.power, last_epoch=step - 1
    )


def make_batches(
    recipe: Recipe,
    accelerator: Accelerator,
    images: Any,
    label_set: LabelSet,
    model: OpenVocabularyModel,
    processor: SANProcessor,
    step: int,
) -> Iterator[dict[str, Tensor]]:
    """
    Batches of this process without end, as they come after `step` steps.

    All processes share out one order of the images by its positions, so that it is known at every step without having
    been stored, and two processes see together what one with batches of twice the size sees.

    Raises:
        ValueError: where the batch size does not divide, or a crop is not made of whole patches.
    """
    processes, parts = accelerator.num_processes, recipe.gradient_accumulation_steps
    if recipe.batch_size % (processes * parts):
        raise ValueError(
            f"batch_size {recipe.batch_size} does not divide over {processes} processes with {parts} accumulated "
            f"batches each: make it a multiple of {processes * parts}."
        )
    batch_size = recipe.batch_size // (processes * parts)
    shares = {"batch_size": batch_size, "rank": accelerator.process_index, "world_size": processes}
    augmentation = make_augmentation(recipe, images, label_set, model.config, processor)
    views = (images, label_set, processor.image_processor, augmentation, recipe.seed)
    order = None
    dataset: torch.utils.data.Dataset
    if isinstance(images, IterableDataset):
        dataset = StreamedImages(
            *views,
            **shares,
            buffer_size=recipe.shuffle_buffer,
            skip=step * parts,
            skip_damaged=recipe.skip_damaged,
        )
    else:
        dataset = TrainingImages(*views, skip_damaged=recipe.skip_damaged)
        if recipe.cached_views:
            dataset = CachedViews(dataset, model, recipe.cached_views)
        order = EndlessOrder(len(dataset), recipe.seed, start=step * recipe.batch_size, **shares)
    prompts = {}
    if model.trains_text_encoder():
        encoded = processor(text=list(label_set.names), return_tensors="pt")
        prompts = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=order,
        # What is cached is cached in this process
        num_workers=0 if recipe.cached_views else recipe.workers,
        collate_fn=Collator(prompts),
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=ignore_stop_signals,
    )
    return iter(loader)


def make_augmentation(
    recipe: Recipe, images: Any, label_set: LabelSet, config: Any, processor: SANProcessor
) -> Augmentation:
    """
    The recipe's; what it leaves out follows from the working size and the first image's shape.

    Args:
        recipe: what to do.
        images: labelled images.
        label_set: what the values of label maps mean.
        config: of the model that is trained.
        processor: of the model, with the size that it works at.

    Raises:
        ValueError: where a crop is not made of whole patches.
    """
    divisor, stride = config.size_divisor, config.mask_stride
    short_side = int(processor.image_processor.size["shortest_edge"])
    crop_size = recipe.crop_size
    if not crop_size:
        on_damage = (lambda index, error: None) if recipe.skip_damaged else None
        _, image, _ = next(read_examples(images, label_set, on_damage=on_damage))
        scale = short_side / min(image.size)
        crop_size = [max(divisor, round(side * scale / divisor) * divisor) for side in image.size[::-1]]
    if any(side % stride for side in crop_size):
        raise ValueError(f"crop_size is {crop_size}: its sides must be multiples of {stride}, a cell of the masks.")
    short_sides = recipe.short_sides or Augmentation.for_size(short_side, (divisor, divisor)).short_sides
    return Augmentation(
        short_sides=tuple(short_sides),
        max_long_side=recipe.max_long_side or 4 * max(short_sides),
        crop_size=(crop_size[0], crop_size[1]),
        photometric=recipe.photometric,
        flip=recipe.flip,
    )


__all__ = [
    "is_decayed",
    "load_model",
    "load_setting",
    "make_accelerator",
    "make_augmentation",
    "make_batches",
    "make_optimizer",
    "make_schedule",
    "prepare_model",
    "set_short_side",
]
