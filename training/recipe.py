# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""What a training run is made of: a recipe, as a YAML file and options that change it."""
# ruff: noqa: RUF009 - `_option` makes a field, which the linter cannot see

from __future__ import annotations

import difflib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

_FOLDER = Path(__file__).parent / "recipes"

TRAINABLE: dict[str, list[str]] = {
    "paper": ["vision_model.embeddings.position_embedding"],
    "side-adapter": [],
    "own": [],
    "prompts": [],
    "everything": ["vision_model", "visual_projection", "text_model", "text_projection", "logit_scale"],
}
"""Which parameters of CLIP train beside the side adapter, by name; `prompts` adds learned tokens instead."""

MIXED_PRECISION = ("auto", "no", "bf16", "fp16")


_AT_LEAST = {
    0: "cached_views weight_decay warmup_steps power workers overlays seed flip",
    1: "num_clip_prompts shuffle_buffer validation_limit crop_size short_sides max_long_side short_side steps "
    "batch_size gradient_accumulation_steps log_every evaluate_every checkpoint_every keep_checkpoints",
}
"""Numbers, and numbers in lists, that must not be smaller."""


def _option(default: Any, help: str, alias: str | None = None) -> Any:
    """A field, with what `HfArgumentParser` makes an option of."""
    metadata: dict[str, Any] = {"help": help if default in (None, []) else f"{help} (default: %(default)s)"}
    if alias is not None:
        metadata["aliases"] = [alias]
    if not isinstance(default, bool):
        metadata["metavar"] = {float: "X", int: "N"}.get(type(default), "VALUE")
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Recipe:
    """
    A training run. The defaults are the paper's (section 4.1), but for sizes, which are the model's and the data's.

    Each field is a key of the YAML file and an option of `san train`; `san train --help` says what they mean.

    Raises:
        ValueError: where a value makes no sense; the sentence names the field.
    """

    model: str | None = _option(None, "model to start from: folder or Hub id (default: the built-in model)")
    clip: str | None = _option(None, "start a new model around this CLIP instead: folder or Hub id")
    model_type: str = _option("san", "kind of the new model")
    backbone: str | None = _option(None, "start a new lightweight model from this backbone and text_encoder instead")
    text_encoder: str | None = _option(None, "all-MiniLM-L6-v2, or folder or Hub id of a text model of transformers")
    config_overrides: str = _option("{}", "fields of its config that differ from the defaults, as JSON")
    trainable: str = _option(
        "paper",
        "paper (side adapter and CLIP's position embedding), side-adapter, own (what is new beside pretrained parts), "
        "prompts (side adapter, and learned prompt tokens in CLIP's last layers), everything, or parts of parameter "
        "names of CLIP, separated by commas",
    )
    num_clip_prompts: int = _option(16, "prompt tokens in each layer where trainable is prompts")
    templates: list[str] = _option([], "prompt templates: vild, imagenet, a file, or templates (default: the model's)")

    dataset: str | None = _option(None, "images with label maps: parquet file, folder or Hub id")
    split: str = _option("train", "part of the data set")
    labels: str | None = _option(None, "label set: name of a preset or a file (default: what the data set says)")
    image_column: str | None = _option(None, "column of the images (default: recognised)")
    label_column: str | None = _option(None, "column of the label maps (default: recognised)")
    reduce_labels: bool = _option(False, "0 in the label maps means no label, and all others move down by one")
    ignore_index: int | None = _option(None, "value in the label maps for no label (default: the label set's)")
    map: list[str] = _option([], "values of the label maps that mean another one, as OLD=NEW, such as 255=1")
    skip_damaged: bool = _option(False, "leave out images that cannot be read, instead of ending at the first")
    streaming: bool = _option(False, "read the data set as it comes, without downloading or indexing it first")
    shuffle_buffer: int = _option(1000, "images to shuffle among where the data set is streamed")
    validation: str | None = _option(None, "data set to evaluate on (default: none)")
    validation_split: str = _option("validation", "part of it")
    validation_limit: int | None = _option(None, "evaluate on its first images only, while training and at the end")

    short_side: int | None = _option(None, "short side in use, kept in the processor (default: the model's)")
    short_sides: list[int] = _option([], "short sides to draw from in training (default: 0.75 to 1.5 of short_side)")
    max_long_side: int | None = _option(None, "longest side of scaled images in pixels (default: 4 short sides)")
    crop_size: list[int] = _option([], "crops' height and width, or side (default: the first image at short_side)")
    cached_views: int = _option(0, "views of each image, whose features are kept; 0: always new ones")
    photometric: bool = _option(True, "whether brightness, contrast, saturation and hue vary")
    flip: float = _option(0.5, "share of images that are mirrored")

    output_dir: str | None = _option(None, "folder for the model, checkpoints and figures", alias="--output")
    resume: str = _option(
        "never", "never, auto (the latest checkpoint in output_dir if there is one), or a checkpoint"
    )
    steps: int = _option(60_000, "optimisation steps")
    batch_size: int = _option(32, "images a step, over all processes and accumulated batches")
    gradient_accumulation_steps: int = _option(1, "parts that a step's images are computed in")
    learning_rate: float = _option(1e-4, "AdamW's")
    weight_decay: float = _option(1e-4, "AdamW's; 0 for norms and position, query and prompt embeddings")
    warmup_steps: int = _option(0, "steps of linear warm-up")
    power: float = _option(0.9, "of the polynomial that the learning rate falls by")
    max_grad_norm: float = _option(0.01, "gradients are scaled down to this norm over all trained parameters")
    mixed_precision: str = _option("auto", "no, bf16, fp16, or auto (bf16 where the hardware computes in it)")
    gradient_checkpointing: bool = _option(False, "recompute activations: less memory, more time")
    seed: int = _option(0, "of all random choices")
    cpu: bool = _option(False, "keep off GPUs")
    workers: int = _option(4, "processes that prepare images, for each process that trains")

    log_every: int = _option(50, "steps between lines of metrics.jsonl")
    evaluate_every: int = _option(5000, "steps between evaluations; the end has one, too")
    checkpoint_every: int = _option(1000, "steps between checkpoints; the end has one, too")
    keep_checkpoints: int = _option(2, "latest checkpoints to keep; the best stays as well")
    overlays: int = _option(4, "images of the validation data that each evaluation draws")
    trackers: list[str] = _option([], "where Accelerate reports to as well: tensorboard, wandb, ...")

    def __post_init__(self) -> None:
        """Check what can be checked without data or model."""
        if isinstance(self.config_overrides, dict):
            self.config_overrides = json.dumps(self.config_overrides)
        if len(self.crop_size) == 1:
            self.crop_size = self.crop_size * 2
        for least, name in ((least, name) for least, names in _AT_LEAST.items() for name in names.split()):
            given = getattr(self, name)
            for value in given if isinstance(given, list) else [given]:
                if value is not None and not least <= value < float("inf"):
                    raise ValueError(f"{name} is {value}: it must be at least {least}.")
        for name in ("learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}: it must be above 0.")
        for is_wrong, message in (
            (len(self.crop_size) > 2, f"crop_size is {self.crop_size}: give one side, or height and width."),
            (self.flip > 1, f"flip is {self.flip}: it must lie from 0 to 1."),
            (
                self.mixed_precision not in MIXED_PRECISION,
                f"mixed_precision is {self.mixed_precision!r}: choose {', '.join(MIXED_PRECISION)}.",
            ),
            (
                bool(self.batch_size % self.gradient_accumulation_steps),
                f"batch_size {self.batch_size} does not divide into {self.gradient_accumulation_steps} accumulated "
                "batches: change one of the two.",
            ),
            (
                self.warmup_steps >= self.steps,
                f"warmup_steps {self.warmup_steps} leave none of the {self.steps} steps.",
            ),
            (
                self.model is not None and self.clip is not None,
                "both model and clip are given: start from a model or from a CLIP.",
            ),
            (
                bool(self.new_config) and self.clip is None and self.backbone is None,
                "config_overrides describe a new model: give the clip that it goes around, or its backbone.",
            ),
            (
                (self.backbone is None) != (self.text_encoder is None),
                "of backbone and text_encoder one is given: a new model has both.",
            ),
            (
                self.backbone is not None and not (self.model is None and self.clip is None),
                "backbone is given with model or clip: start from one of them.",
            ),
            (
                bool(self.cached_views) and self.streaming,
                "cached_views keep the features of images, of which a stream has too many: leave one out.",
            ),
        ):
            if is_wrong:
                raise ValueError(message)

    @property
    def new_config(self) -> dict[str, Any]:
        """Fields of a new model's config, from the JSON in `config_overrides`."""
        example = """'{"num_queries": 100}'"""
        try:
            value = json.loads(self.config_overrides or "{}")
        except ValueError as error:
            raise ValueError(f"config_overrides is not valid JSON ({error}): write it as {example}.") from error
        if not isinstance(value, dict):
            raise ValueError(f"config_overrides is {self.config_overrides}: expected a JSON object such as {example}.")
        return value

    def to_yaml(self) -> str:
        """The recipe as a YAML file, whole."""
        return yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)


def recipe_names() -> tuple[str, ...]:
    """Recipes that ship with the package."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))


def read_recipe(source: str | Path) -> dict[str, Any]:
    """
    Fields of a recipe file, or of one of `recipe_names()`.

    Raises:
        ValueError: where there is no such recipe, it is not YAML, or a key is none of `Recipe`'s.
    """
    path = _FOLDER / f"{source}.yaml" if str(source) in recipe_names() else Path(source)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"recipe {source} cannot be read ({error.strerror or error}): pass a YAML file, or one of "
            f"{', '.join(recipe_names())}."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {source} is not valid YAML: {' '.join(str(error).split())}.") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"recipe {source} holds no `key: value` lines: see {', '.join(recipe_names())}.")
    if "san" in content:
        # What version 0.1 called it
        content["config_overrides"] = content.pop("san")
    known = [option.name for option in fields(Recipe)]
    for key in content:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]}?" if close else "`san train --help` lists them."
            raise ValueError(f"recipe {source}: there is no field {key!r}: {hint}")
    return content


def as_arguments(values: dict[str, Any]) -> list[str]:
    """Fields as command-line arguments, so that a file's values are read and checked as those of the command line."""
    arguments: list[str] = []
    for key, value in values.items():
        if isinstance(value, list):
            arguments += [f"--{key}", *map(str, value)] if value else []
        elif value is not None:
            # One word, as an empty object or a leading minus would otherwise be taken for something else
            arguments.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return arguments


__all__ = ["MIXED_PRECISION", "TRAINABLE", "Recipe", "as_arguments", "read_recipe", "recipe_names"]
