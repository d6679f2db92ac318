# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""A training run: the parts that it is made of, what it keeps in its folder, and how it goes on from there."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

import modeling_san
from modeling_san import processing
from modeling_san.open_vocabulary import OpenVocabularyModel
from modeling_san.processing import SANProcessor
from modeling_san.processing.files import (
    locked_folder,
    new_folder,
    refuse_foreign_files,
    remove_folder,
    remove_unfinished,
    write_json,
    write_text,
)
from modeling_san.processing.wording_san import one_line
from modeling_san.training.build import (
    load_model,
    make_accelerator,
    make_batches,
    make_optimizer,
    make_schedule,
    prepare_model,
)
from modeling_san.training.callbacks import CURVES_FILE, METRICS_FILE, JsonLinesTracker, say, warn
from modeling_san.training.data import check_first_images, describe_missing_classes, load_images
from modeling_san.training.label_sets import LabelSet, load_label_set, parse_map
from modeling_san.training.metrics import RESULTS_FILE
from modeling_san.training.recipe import Recipe

RECIPE_FILE = "recipe.yaml"
CHECKPOINTS = "checkpoints"
PROGRESS_FILE = "progress.json"
NON_FINITE_FILE = "non_finite.json"

_STEP = re.compile(r"step-\d{8,}")
_RECIPE_HEAD = "# The recipe of the run in this folder; `san train --config` reads it.\n"
_FILES = (
    *(CHECKPOINTS, RECIPE_FILE, RESULTS_FILE, METRICS_FILE, CURVES_FILE, NON_FINITE_FILE, "overlays"),
    *("config.json", "model*.safetensors*", "processor_config.json", "preprocessor_config.json"),
    *("tokenizer*.json", "special_tokens_map.json", "vocab.json", "merges.txt"),
    # The code that travels with a model
    *(file.name for part in (modeling_san, processing) for file in Path(*part.__path__).glob("[a-z]*.py")),
)
"""What a run leaves in its folder, as patterns."""


@dataclass
class Progress:
    """
    Where a run stands: what a checkpoint holds, as JSON, beside the state that Accelerate saves. `files` are the names
    of all that was written there.
    """

    step: int = 0
    best_step: int | None = None
    best_mean_iou: float = -1.0
    processes: int = 1
    results: dict[str, Any] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)


@dataclass
class Run:
    """
    A training run.

    Attributes:
        recipe: what to do.
        accelerator: devices and processes.
        model: as Accelerate wraps it.
        processor: of the model.
        label_set: the classes, and what label maps mean.
        validation: labelled images, or None.
        optimizer: of the parameters that train.
        schedule: of the learning rate.
        batches: of this process, without end, from where the run stands.
        progress: where it stands.
        scalars: names of parameters that are vectors of one number while FSDP spreads them.
    """

    recipe: Recipe
    accelerator: Accelerator
    model: Any
    processor: SANProcessor
    label_set: LabelSet
    validation: Any
    optimizer: Any
    schedule: Any
    batches: Iterator[dict[str, Tensor]]
    progress: Progress
    scalars: list[str]

    @property
    def folder(self) -> Path:
        """What the run leaves lies here."""
        return Path(str(self.recipe.output_dir))

    @property
    def unwrapped(self) -> Any:
        """The model itself."""
        return self.accelerator.unwrap_model(self.model)


@contextmanager
def run_folder(recipe: Recipe) -> Iterator[Path]:
    """
    The folder of a run, held by its main process for the block.

    Raises:
        ValueError: the recipe names none, another run holds it, or it has files that no run left there.
    """
    for name in ("output_dir", "dataset"):
        if not getattr(recipe, name):
            raise ValueError(f"{name} is missing: a run needs it.")
    folder = Path(str(recipe.output_dir))
    # Before Accelerate knows of processes, launchers do
    with locked_folder(folder) if os.environ.get("RANK", "0") == "0" else nullcontext(folder):
        if not _checkpoints(folder) and not _is_recipe_of_run(folder / RECIPE_FILE):
            refuse_foreign_files(folder, _FILES, f"{RECIPE_FILE} of a run")
        yield folder


def _is_recipe_of_run(path: Path) -> bool:
    try:
        return path.read_text(encoding="utf-8").startswith(_RECIPE_HEAD)
    except (OSError, UnicodeDecodeError):
        return False


def prepare_run(recipe: Recipe) -> Run:
    """
    Make or resume all that a run needs, in the folder that `run_folder` holds.

    Raises:
        ValueError: where recipe, data and model do not fit together; the sentence says what to change.
    """
    folder = Path(str(recipe.output_dir))
    checkpoint = _find_checkpoint(recipe, folder)
    progress = Progress() if checkpoint is None else _read_progress(checkpoint)
    if progress.step > recipe.steps:
        raise ValueError(f"{checkpoint} has {progress.step} steps already: give more than these {recipe.steps}.")
    accelerator = make_accelerator(recipe, JsonLinesTracker(folder, progress.step))
    model, processor = load_model(recipe, checkpoint)
    images = _load_images(recipe, str(recipe.dataset), recipe.split)
    label_set = load_label_set(
        recipe.labels,
        dataset=images,
        source=recipe.dataset,
        ignore_index=recipe.ignore_index,
        reduce_labels=recipe.reduce_labels,
        value_map=parse_map(recipe.map),
    )
    looked_at = 64
    counts = check_first_images(images, label_set, recipe.dataset, count=looked_at, skip_damaged=recipe.skip_damaged)
    missing = describe_missing_classes(counts, label_set.names, f"the first {looked_at} images of {recipe.dataset}")
    if missing and accelerator.is_main_process:
        warn(f"{missing}.")
    validation = None
    if recipe.validation is not None:
        validation = _load_images(recipe, recipe.validation, recipe.validation_split)
        check_first_images(validation, label_set, recipe.validation, skip_damaged=recipe.skip_damaged)
    else:
        progress.results = {}
    prepare_model(recipe, model, processor, label_set)
    batches = make_batches(recipe, accelerator, images, label_set, model, processor, progress.step)
    scalars = _make_vectors_of_scalars(model) if accelerator.is_fsdp2 else []
    optimizer = make_optimizer(model.to(accelerator.device), recipe)
    schedule = make_schedule(optimizer, recipe, progress.step)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    parts = (recipe, accelerator, wrapped, processor, label_set, validation, optimizer, schedule, batches)
    run = Run(*parts, progress, scalars)
    # Weights are written as `from_pretrained` reads them, and are loaded already
    accelerator.register_save_state_pre_hook(lambda models, weights, path: weights.clear())
    accelerator.register_load_state_pre_hook(lambda models, path: models.clear())
    if checkpoint is not None:
        _restore(run, checkpoint)
    progress.processes = accelerator.num_processes
    if accelerator.is_main_process:
        _prepare_folder(run)
    accelerator.wait_for_everyone()
    # Trackers accept plain values
    plain = {name: value if isinstance(value, (int, float)) else str(value) for name, value in vars(recipe).items()}
    accelerator.init_trackers("san", plain)
    return run


def _load_images(recipe: Recipe, source: str, split: str) -> Any:
    return load_images(
        source,
        split,
        streaming=recipe.streaming,
        image_column=recipe.image_column,
        label_column=recipe.label_column,
    )


def _make_vectors_of_scalars(model: OpenVocabularyModel) -> list[str]:
    """FSDP cuts parameters along their first dimension, which scalars lack; returns the names of those changed."""
    names = [name for name, parameter in model.named_parameters() if parameter.dim() == 0]
    for name in names:
        parent, _, last = name.rpartition(".")
        scalar = model.get_parameter(name)
        vector = Parameter(scalar.detach().reshape(1), requires_grad=scalar.requires_grad)
        setattr(model.get_submodule(parent), last, vector)
    return names


def _prepare_folder(run: Run) -> None:
    """Leave what belongs to another course of the run behind, and say what begins."""
    recipe, step, accelerator = run.recipe, run.progress.step, run.accelerator
    remove_unfinished(run.folder)
    remove_unfinished(run.folder / CHECKPOINTS)
    for path in _checkpoints(run.folder):
        if _step_of(path) > step:
            target = path.with_name(f"abandoned-{path.name}")
            for number in count(2):
                if not target.exists():
                    break
                target = path.with_name(f"abandoned-{path.name}-{number}")
            path.rename(target)
            warn(f"the run begins anew at step {step}; a later checkpoint is now called {target}.")
    if step and (changes := _changes(run.folder / RECIPE_FILE, recipe)):
        warn(f"the run continues with another recipe: {'; '.join(changes)}")
    write_text(run.folder / RECIPE_FILE, _RECIPE_HEAD + recipe.to_yaml())
    sizes: dict[bool, int] = {True: 0, False: 0}
    parts: dict[str, set[bool]] = {}
    for name, parameter in run.unwrapped.named_parameters():
        sizes[parameter.requires_grad] += parameter.numel()
        parts.setdefault(name.partition(".")[0], set()).add(parameter.requires_grad)
    trained = [name if trains == {True} else f"part of {name}" for name, trains in parts.items() if True in trains]
    processes = f"{accelerator.num_processes} process{'es' if accelerator.num_processes > 1 else ''}"
    say(
        f"training {sizes[True] / 1e6:.2f} of {sum(sizes.values()) / 1e6:.2f} M parameters, {', '.join(trained)}, "
        f"from step {step} to {recipe.steps}: {processes}, {accelerator.device.type}, mixed precision "
        f"{accelerator.mixed_precision}"
    )


def _changes(path: Path, recipe: Recipe) -> list[str]:
    """What differs from the recipe in a file that the run was started with."""
    try:
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return []
    return [
        f"{name} {before[name]} -> {value}"
        for name, value in asdict(recipe).items()
        if isinstance(before, dict) and before.get(name, value) != value and name != "resume"
    ]


# ---------------------------------------------------------------------------------------------------- checkpoints


def write_checkpoint(run: Run) -> str:
    """
    Accelerate's state of the run beside a model that loads, complete or not at all; says where it is.

    All processes take part where FSDP spreads the parameters, otherwise the main one writes alone.
    """
    path = run.folder / CHECKPOINTS / f"step-{run.progress.step:08d}"
    is_main, is_spread = run.accelerator.is_main_process, run.accelerator.distributed_type == DistributedType.FSDP
    if not path.exists() and (is_main or is_spread):
        # Other processes only send their part
        with new_folder(path) if is_main else TemporaryDirectory() as beside:
            run.accelerator.save_state(str(beside))
            write_model(run, Path(beside))
            written = sorted(str(file.relative_to(beside)) for file in Path(beside).rglob("*") if file.is_file())
            write_json(Path(beside, PROGRESS_FILE), asdict(run.progress) | {"files": [*written, PROGRESS_FILE]})
        if is_main:
            _remove_old_checkpoints(run)
    return f"The state after step {run.progress.step} is in {path}."


def write_model(run: Run, folder: Path) -> None:
    """Write what `from_pretrained` loads; all processes take part where FSDP spreads the parameters."""
    model = run.unwrapped
    if model.trains_text_encoder():
        with as_saved(model):
            model.set_labels(run.label_set.names, run.processor)
    weights = run.accelerator.get_state_dict(run.model)
    weights = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in weights.items()}
    weights.update({name: weights[name].reshape(()) for name in run.scalars if name in weights})
    if run.accelerator.is_main_process:
        model.save_pretrained(folder, state_dict=weights)
        run.processor.save_pretrained(folder)
        for file in folder.iterdir():
            # Weights are written readable for their owner alone; the folder's other files follow the umask
            shutil.copymode(folder / "config.json", file)


@contextmanager
def as_saved(model: OpenVocabularyModel) -> Iterator[None]:
    """
    The model as it will be loaded: what is measured is what is saved.

    Without the autocast that Accelerate wraps around `forward`, and with all parameters where FSDP has spread them.
    """
    wrapped = model.__dict__.pop("forward", None)
    spread = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in spread:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in spread:
            module.set_reshard_after_forward(module is not model, recurse=False)
            module.reshard()
        if wrapped is not None:
            model.forward = wrapped  # type: ignore[method-assign]


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the most steps of the run in `folder`."""
    return max(_checkpoints(folder), key=_step_of, default=None)


def _checkpoints(folder: Path) -> list[Path]:
    found = (folder / CHECKPOINTS).glob(f"step-*/{PROGRESS_FILE}")
    return sorted((path.parent for path in found if _STEP.fullmatch(path.parent.name)), key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _remove_old_checkpoints(run: Run) -> None:
    """The latest stay, the best, and those that somebody put files of their own into."""
    for path in _checkpoints(run.folder)[: -run.recipe.keep_checkpoints]:
        if _step_of(path) != run.progress.best_step and _holds_only_its_own(path):
            remove_folder(path)


def _holds_only_its_own(checkpoint: Path) -> bool:
    try:
        own = set(_read_progress(checkpoint).files)
    except ValueError:
        return False
    return own >= {str(file.relative_to(checkpoint)) for file in checkpoint.rglob("*") if file.is_file()}


def _find_checkpoint(recipe: Recipe, folder: Path) -> Path | None:
    if recipe.resume == "auto":
        return latest_checkpoint(folder)
    if recipe.resume != "never":
        return Path(recipe.resume)
    if any((folder / trace).exists() for trace in (CHECKPOINTS, "model.safetensors")):
        raise ValueError(f"{folder} already holds a run: continue it with resume: auto, or choose another output_dir.")
    return None


def _read_progress(checkpoint: Path) -> Progress:
    try:
        progress = Progress(**json.loads((checkpoint / PROGRESS_FILE).read_text(encoding="utf-8")))
        progress.step = int(progress.step)
    except (OSError, ValueError, TypeError) as error:
        raise _cannot_be_resumed(checkpoint, error) from error
    return progress


def _restore(run: Run, checkpoint: Path) -> None:
    """The optimizer's state from a checkpoint; rates and decay follow from the recipe, which may have changed."""
    progress, processes = run.progress, run.accelerator.num_processes
    if run.recipe.streaming and progress.step:
        if run.accelerator.is_main_process:
            say(f"reading past the images of {progress.step} steps: a stream has no other way to its middle")
        if progress.processes != processes:
            warn(
                f"the stream was shared between {progress.processes} processes and is now between {processes}: some "
                "images of this epoch come twice, others not at all."
            )
    groups = run.optimizer.param_groups
    settings = [{name: group[name] for name in ("lr", "initial_lr", "weight_decay")} for group in groups]
    try:
        run.accelerator.load_state(str(checkpoint))
    except Exception as error:
        if "parameter group" in str(error):
            raise ValueError(
                f"{checkpoint} trained other parameters: resume with the `trainable` it was started with."
            ) from error
        # What loads it raises what its parts raise: unpickling, zip, end of file, ...
        raise _cannot_be_resumed(checkpoint, error) from error
    for group, own in zip(run.optimizer.param_groups, settings, strict=True):
        group.update(own)


def _cannot_be_resumed(checkpoint: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{checkpoint} cannot be resumed from ({one_line(error)}): pass a checkpoint folder that training wrote, such "
        f"as OUTPUT/{CHECKPOINTS}/step-00001000."
    )


__all__ = [
    "CHECKPOINTS",
    "NON_FINITE_FILE",
    "RECIPE_FILE",
    "Progress",
    "Run",
    "as_saved",
    "latest_checkpoint",
    "prepare_run",
    "run_folder",
    "write_checkpoint",
    "write_model",
]
