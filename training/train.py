"""
Training with Accelerate: devices, processes, mixed precision and accumulation are its; the recipe is the paper's.

`accelerate launch -m modeling_san.training.train --config recipe.yaml` is `san train --config recipe.yaml` on many
processes.
"""

from __future__ import annotations

import logging
import math
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DynamoBackend, ProjectConfiguration, TorchDynamoPlugin
from datasets import IterableDataset
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from modeling_san import BUILTIN_MODEL
from modeling_san.modeling_san import SANForOpenVocabSegmentation
from modeling_san.processing import SANProcessor
from modeling_san.processing.device import pick_device_and_dtype
from modeling_san.processing.files import filling_folder, remove_unfinished, write_json, write_text
from modeling_san.processing.wording_san import one_line
from modeling_san.training.augmentation import Augmentation
from modeling_san.training.checkpoints import Checkpoints, load_training_state
from modeling_san.training.data import (
    Collator,
    EndlessOrder,
    StreamedImages,
    TrainingImages,
    check_first_images,
    load_images,
    to_arrays,
)
from modeling_san.training.evaluate import evaluate, save_overlays
from modeling_san.training.label_sets import load_label_set
from modeling_san.training.metrics import RESULTS_FILE
from modeling_san.training.optimization import make_optimizer, make_schedule
from modeling_san.training.plots import plot_curves
from modeling_san.training.processes import gather_objects, ignore_stop_signals
from modeling_san.training.recipe import TRAINABLE, Recipe
from modeling_san.training.tracking import METRICS_FILE, MetricsLog, peak_memory, significant

RECIPE_FILE = "recipe.yaml"
CHECKPOINTS = "checkpoints"
OVERLAYS = "overlays"

_logger = logging.getLogger(__name__)


class NonFiniteLossError(ValueError):
    """The loss is infinite or not a number; the message names the step, the terms and the images."""


def train(recipe: Recipe, *, progress: bool = True) -> dict[str, Any]:
    """
    Train a model as a recipe says.

    Args:
        recipe: what to do; `output_dir` and `dataset` have to be given.
        progress: whether the main process shows a progress bar.

    Returns:
        `steps` done, `finished` (false where SIGTERM or Ctrl-C ended the run early; a checkpoint was saved then),
        `minutes`, and the last evaluation's results if there was one.

    Raises:
        ValueError: where recipe, data and model do not fit together; the sentence says what to change.
        NonFiniteLossError: after saving the state before the step.
        OSError: where the final model cannot be saved.
    """
    for name in ("output_dir", "dataset"):
        if not getattr(recipe, name):
            raise ValueError(f"{name} is missing: a run needs it.")
    return _Run(recipe, progress).train()


class _Run:
    """One training run: what it is made of, and where it stands."""

    def __init__(self, recipe: Recipe, progress: bool) -> None:
        self.recipe = recipe
        self.folder = Path(str(recipe.output_dir))
        self.checkpoints = Checkpoints(self.folder / CHECKPOINTS, recipe.keep_checkpoints)
        self.accelerator = _make_accelerator(recipe)
        self.is_main = self.accelerator.is_main_process
        self.progress = progress and self.is_main

        resumed = _find_checkpoint(recipe, self.folder, self.checkpoints)
        self.model, self.processor = _load_model(recipe, resumed)
        images = _load_images(recipe, str(recipe.dataset), recipe.split)
        self.label_set = load_label_set(
            recipe.labels,
            dataset=images,
            source=recipe.dataset,
            ignore_index=recipe.ignore_index,
            reduce_labels=recipe.reduce_labels,
        )
        check_first_images(images, self.label_set, recipe.dataset)
        self.validation = self._load_validation()
        self._prepare_model()
        self.optimizer: Any = make_optimizer(self.model, recipe.learning_rate, recipe.weight_decay)
        self.schedule = make_schedule(self.optimizer, recipe.steps, recipe.warmup_steps, recipe.power)
        self.step = 0
        self.between_steps = True
        self.skipped = 0
        self.best: dict[str, Any] = {}
        self.results: dict[str, Any] = {}
        self.scaler_state: dict[str, Any] | None = None
        if resumed is not None:
            self._restore(resumed)
        self.batches = self._load_batches(images)
        self.trained, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        if self.accelerator.scaler is not None and self.scaler_state:
            self.accelerator.scaler.load_state_dict(self.scaler_state)

    # ------------------------------------------------------------------------------------------------ the loop

    def train(self) -> dict[str, Any]:
        recipe, start, began = self.recipe, self.step, time.monotonic()
        if self.is_main:
            self._prepare_folder()
        self.accelerator.wait_for_everyone()
        self.accelerator.init_trackers("san", config=_flat(asdict(recipe)))
        interval = _Interval(self.accelerator.device)
        self.model.train()
        with _stop_signals() as stop, self._bar() as bar, self._rescuing():
            while self.step < recipe.steps:
                terms, indices, grad_norm = self._forward_and_backward()
                must_stop, broken = self._agree(stop.is_set(), self._is_broken(terms, grad_norm))
                if broken:
                    self._report_non_finite({**terms, "grad_norm": grad_norm}, indices)
                self._update()
                interval.add(terms, grad_norm, recipe.batch_size)
                bar.update()
                last = self.step == recipe.steps
                if self.step % recipe.log_every == 0 or last:
                    self._write_figures(interval, bar)
                if self.validation is not None and (self.step % recipe.evaluate_every == 0 or last):
                    with interval.paused():
                        self._evaluate()
                is_best = self.best.get("step") == self.step
                if must_stop or last or is_best or self.step % recipe.checkpoint_every == 0:
                    self._save_checkpoint(must_succeed=must_stop)
                if must_stop:
                    break
        finished = self.step == recipe.steps
        if finished:
            self._save_final()
        self.accelerator.end_training()
        return {
            **self.results,
            "steps": self.step,
            "finished": finished,
            "minutes": (time.monotonic() - began) / 60,
            "images_per_second": (self.step - start) * recipe.batch_size / (time.monotonic() - began),
        }

    def _update(self) -> None:
        """One optimisation step with the gradients that there are."""
        self.between_steps = False
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.between_steps = True
        self.skipped = self.skipped + 1 if self.optimizer.step_was_skipped else 0

    def _is_broken(self, terms: dict[str, float], grad_norm: float) -> bool:
        """
        Whether going on would spoil the weights, or change nothing.

        In fp16 the scaler leaves out steps whose gradients overflow, and lowers its scale; all of them it must not.
        """
        if self.accelerator.scaler is not None:
            return not all(map(math.isfinite, terms.values())) or self.skipped >= _MOST_SKIPPED
        return not all(map(math.isfinite, (*terms.values(), grad_norm)))

    def _forward_and_backward(self) -> tuple[dict[str, float], list[int], float]:
        """Gradients of one step: the loss terms of this process, the images they are of, the gradient's norm."""
        recipe, accelerator = self.recipe, self.accelerator
        seed_step(recipe.seed, self.step, accelerator.process_index)
        parts = recipe.gradient_accumulation_steps
        terms: dict[str, Tensor] = {}
        indices: list[int] = []
        for part in range(parts):
            batch = next(self.batches)
            indices += batch.pop("index").tolist()
            batch = {name: value.to(accelerator.device, non_blocking=True) for name, value in batch.items()}
            # Processes exchange gradients once a step, with its last part.
            with nullcontext() if part == parts - 1 else accelerator.no_sync(self.trained):
                output = self.trained(**batch)
                for name, term in (*output.loss_dict.items(), ("loss", output.loss)):
                    terms[name] = terms.get(name, 0.0) + term.detach() / parts
                self._backward(output.loss / parts)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        grad_norm = accelerator.clip_grad_norm_(trained, recipe.max_grad_norm)
        values = torch.stack([*terms.values(), grad_norm.to(output.loss.device)]).tolist()
        return dict(zip(terms, values, strict=False)), indices, values[-1]

    def _backward(self, loss: Tensor) -> None:
        # Not `accelerator.backward`, which divides by its own count of accumulated batches.
        (loss if self.accelerator.scaler is None else self.accelerator.scaler.scale(loss)).backward()

    def _agree(self, *flags: bool) -> list[bool]:
        """Flags that are up in any process."""
        if self.accelerator.num_processes == 1:
            return list(flags)
        counts = torch.tensor(flags, dtype=torch.int32, device=self.accelerator.device)
        return [bool(count) for count in self.accelerator.reduce(counts, "sum").tolist()]

    def _report_non_finite(self, terms: dict[str, float], indices: list[int]) -> None:
        everyones = gather_objects({"terms": terms, "images": indices})
        # The gradient is everybody's; the process whose loss broke it is the one to name
        losses = [[value for name, value in one["terms"].items() if name != "grad_norm"] for one in everyones]
        broken = [one for one, values in zip(everyones, losses, strict=True) if not all(map(math.isfinite, values))]
        terms, images = (broken or everyones)[0]["terms"], (broken or everyones)[0]["images"]
        named = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
        saved = self._save_checkpoint(must_succeed=False)
        if self.is_main:
            write_json(
                self.folder / "non_finite.json",
                {"step": self.step + 1, "terms": {name: str(value) for name, value in terms.items()},
                 "images": images},
            )  # fmt: skip
        raise NonFiniteLossError(
            f"the loss or its gradient in step {self.step + 1} is not finite ({named}), on the images with indices "
            f"{images}. "
            f"{saved} Look at these images, or lower learning_rate, and go on with resume: auto."
        )

    # ------------------------------------------------------------------------------------------------ saving

    def _save_checkpoint(self, must_succeed: bool) -> str:
        """Save the state after `self.step` steps; says what became of it in a sentence."""
        said, error = self._write_checkpoint() if self.is_main else ("", None)
        if error is not None:
            _warn(said + ("" if must_succeed else " Training goes on and tries again at the next checkpoint."))
        if self._agree(error is not None)[0] and must_succeed:
            raise OSError(f"{said} Free some space." if said else "The main process could not save a checkpoint.")
        return said

    def _write_checkpoint(self) -> tuple[str, Exception | None]:
        """What became of the checkpoint, in a sentence, and the error if there was one; for the main process."""
        scaler = self.accelerator.scaler
        state = {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        progress = {
            "best_step": self.best.get("step"),
            "best_mean_iou": self.best.get("mean_iou"),
            "processes": self.accelerator.num_processes,
            "results": self.results,
        }
        try:
            path = self.checkpoints.save(self.step, self._write_model, state, progress)
        except Exception as error:
            # safetensors, torch and the system name a full disk in three ways; none may cost days of training
            older = self.checkpoints.latest()
            latest = f"the latest is {older}." if older else "there is no older one."
            return f"The checkpoint of step {self.step} cannot be written ({one_line(error)}); {latest}", error
        return f"The state after step {self.step} is in {path}.", None

    def _write_model(self, folder: Path) -> None:
        if self.model.text_trains():
            self.model.set_labels(self.label_set.names, self.processor)
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        for file in folder.iterdir():
            # Weights are written readable for their owner alone; the folder's other files follow the umask
            shutil.copymode(folder / "config.json", file)

    def _save_final(self) -> None:
        if self.is_main:
            try:
                with filling_folder(self.folder) as beside:
                    self._write_model(beside)
            except Exception as error:
                latest = self.checkpoints.latest() or "the beginning, as there is no checkpoint"
                raise OSError(
                    f"the model cannot be saved to {self.folder} ({one_line(error)}); free some space and go on "
                    f"with resume: auto, from {latest}."
                ) from error
            if self.results:
                write_json(self.folder / RESULTS_FILE, self.results)
            self._draw_curves()
        self.accelerator.wait_for_everyone()

    def _prepare_folder(self) -> None:
        remove_unfinished(self.folder)
        for path in self.checkpoints.clean(self.step):
            _warn(f"the run begins anew at step {self.step}; a later checkpoint is now called {path}.")
        write_text(self.folder / RECIPE_FILE, self.recipe.to_yaml())
        self.log = MetricsLog(self.folder, self.accelerator, self.step)
        trained = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        total = sum(parameter.numel() for parameter in self.model.parameters())
        processes = self.accelerator.num_processes
        _say(
            f"training {trained / 1e6:.2f} of {total / 1e6:.2f} M parameters from step {self.step} to "
            f"{self.recipe.steps}: {processes} process{'es' if processes > 1 else ''}, "
            f"{self.accelerator.device.type}, mixed precision {self.accelerator.mixed_precision}"
        )

    @contextmanager
    def _rescuing(self) -> Iterator[None]:
        """Save what an error in the middle of a run would cost: a damaged image, memory that runs out."""
        try:
            yield
        except NonFiniteLossError:
            raise
        except Exception:
            # No collectives here, as the other processes may have failed elsewhere
            if self.is_main and self.between_steps and self.step:
                _warn(self._write_checkpoint()[0])
            raise

    # ------------------------------------------------------------------------------------------------ figures

    def _write_figures(self, interval: _Interval, bar: tqdm) -> None:
        figures = interval.figures()
        names = [name for name in figures if name.startswith("loss")]
        means = torch.tensor([figures[name] for name in names], device=self.accelerator.device)
        averages: Any = self.accelerator.reduce(means, "mean")
        figures.update(zip(names, averages.tolist(), strict=True))
        figures["learning_rate"] = float(self.schedule.get_last_lr()[0])
        if self.is_main:
            self.log.write(self.step, significant(figures))
            bar.set_postfix(loss=f"{figures['loss']:.3f}", lr=f"{figures['learning_rate']:.1e}")
        interval.restart()

    @torch.no_grad()
    def _evaluate(self) -> None:
        recipe = self.recipe
        if self.model.text_trains():
            self.model.set_labels(self.label_set.names, self.processor)
        self.model.eval()
        with _original_forward(self.model):
            self.results = evaluate(
                self.model,
                self.processor,
                self.validation,
                self.label_set,
                limit=recipe.validation_limit,
                progress=self.progress,
                accelerator=self.accelerator,
            )
            if self.is_main and recipe.overlays:
                folder = self.folder / OVERLAYS / f"step-{self.step:08d}"
                self._try(
                    "overlays",
                    lambda: save_overlays(
                        self.model, self.processor, self.validation, self.label_set, folder, count=recipe.overlays
                    ),
                )
        self.model.train()
        mean_iou = self.results["mean_iou"]
        if mean_iou > self.best.get("mean_iou", -1.0):
            self.best = {"step": self.step, "mean_iou": mean_iou}
        if self.is_main:
            self.log.write(
                self.step,
                significant({f"validation_{name}": self.results[name] for name in _LOGGED_RESULTS}),
            )
            self._draw_curves()

    def _draw_curves(self) -> None:
        self._try("curves", lambda: plot_curves(self.folder / METRICS_FILE, self.folder / "curves.png"))

    def _try(self, what: str, draw: Callable[[], object]) -> None:
        """Images are not worth a run."""
        try:
            draw()
        except (OSError, ImportError, ValueError) as error:
            _warn(f"the {what} cannot be drawn: {one_line(error)}")

    @contextmanager
    def _bar(self) -> Iterator[tqdm]:
        with tqdm(
            total=self.recipe.steps,
            initial=self.step,
            desc="training",
            unit="step",
            disable=not self.progress,
            dynamic_ncols=True,
        ) as bar:
            yield bar

    # ------------------------------------------------------------------------------------------------ making

    def _load_validation(self) -> Any:
        recipe = self.recipe
        if recipe.validation is None:
            return None
        images = _load_images(recipe, recipe.validation, recipe.validation_split)
        check_first_images(images, self.label_set, recipe.validation)
        return images

    def _prepare_model(self) -> None:
        recipe, model = self.recipe, self.model
        config = model.config
        config.trainable_clip_parameters = TRAINABLE.get(
            recipe.trainable, [name.strip() for name in recipe.trainable.split(",") if name.strip()]
        )
        if recipe.trainable == "prompts" and model.prompt_embedding is None:
            torch.manual_seed(recipe.seed)
            model.add_clip_prompts(recipe.num_clip_prompts)
        model.freeze_clip()
        config.semantic_loss_ignore_index = self.label_set.ignore_index
        names = list(self.label_set.names)
        # A small model says which words it knows; those are the ones it is trained on last.
        config.training_labels = None if config.training_labels is None else names
        if recipe.short_side is not None:
            self.processor.image_processor.size = {
                "shortest_edge": recipe.short_side,
                "longest_edge": 4 * recipe.short_side,
            }
        model.set_labels(names, self.processor)
        if recipe.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        model.to(self.accelerator.device)

    def _restore(self, checkpoint: Path) -> None:
        state, progress = load_training_state(checkpoint)
        self.step = progress["step"]
        if self.step > self.recipe.steps:
            raise ValueError(f"{checkpoint} has {self.step} steps already: give more than these {self.recipe.steps}.")
        if self.validation is not None:
            self.results = progress.get("results") or {}
        if self.recipe.streaming and self.step and self.is_main:
            _say(f"reading past the images of {self.step} steps: a stream has no other way to its middle")
        processes = self.accelerator.num_processes
        if self.recipe.streaming and progress.get("processes", processes) != processes:
            _warn(
                f"the stream was shared between {progress['processes']} processes and is now between {processes}: "
                "some images of this epoch come twice, others not at all."
            )
        if progress.get("best_step") is not None:
            self.best = {"step": progress["best_step"], "mean_iou": progress["best_mean_iou"]}
        self.scaler_state = state["scaler"]
        decays = [group["weight_decay"] for group in self.optimizer.param_groups]
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except ValueError as error:
            raise ValueError(
                f"{checkpoint} trained other parameters: resume with the `trainable` it was started with."
            ) from error
        _tell_changes(self.folder / RECIPE_FILE, self.recipe)
        # The schedule follows from the recipe and the step, so that a run may be resumed with more steps.
        self.schedule.load_state_dict({**state["schedule"], "base_lrs": self.schedule.base_lrs})
        for group, rate, decay in zip(self.optimizer.param_groups, self._rates(), decays, strict=True):
            group.update(lr=rate, weight_decay=decay)

    def _rates(self) -> list[float]:
        schedule: Any = self.schedule
        return [
            base * factor(schedule.last_epoch)
            for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]

    def _make_augmentation(self, images: Any) -> Augmentation:
        """The recipe's; what it leaves out follows from the working size and the first image's shape."""
        recipe = self.recipe
        divisor, patch_size = self.model.config.size_divisor, self.model.config.side_patch_size
        short_side = int(self.processor.image_processor.size["shortest_edge"])
        crop_size = recipe.crop_size
        if not crop_size:
            image, _ = to_arrays(next(iter(images)), self.label_set)
            scale = short_side / min(image.size)
            crop_size = [max(divisor, round(side * scale / divisor) * divisor) for side in image.size[::-1]]
        if any(side % patch_size for side in crop_size):
            raise ValueError(
                f"crop_size is {crop_size}: its sides must be multiples of {patch_size}, the side adapter's patch."
            )
        short_sides = recipe.short_sides or Augmentation.for_size(short_side, (divisor, divisor)).short_sides
        return Augmentation(
            short_sides=tuple(short_sides),
            max_long_side=recipe.max_long_side or 4 * max(short_sides),
            crop_size=(crop_size[0], crop_size[1]),
            photometric=recipe.photometric,
            flip=recipe.flip,
        )

    def _load_batches(self, images: Any) -> Iterator[dict[str, Tensor]]:
        recipe, accelerator = self.recipe, self.accelerator
        parts = accelerator.num_processes * recipe.gradient_accumulation_steps
        if recipe.batch_size % parts:
            raise ValueError(
                f"batch_size {recipe.batch_size} does not divide over {accelerator.num_processes} processes with "
                f"{recipe.gradient_accumulation_steps} accumulated batches each: make it a multiple of {parts}."
            )
        batch_size = recipe.batch_size // parts
        augmentation = self._make_augmentation(images)
        image_processor = self.processor.image_processor
        rank, world_size = accelerator.process_index, accelerator.num_processes
        order = None
        dataset: torch.utils.data.Dataset
        if isinstance(images, IterableDataset):
            dataset = StreamedImages(
                images,
                self.label_set,
                image_processor,
                augmentation,
                seed=recipe.seed,
                batch_size=batch_size,
                rank=rank,
                world_size=world_size,
                buffer_size=recipe.shuffle_buffer,
                skip=self.step * recipe.gradient_accumulation_steps,
            )
        else:
            dataset = TrainingImages(images, self.label_set, image_processor, augmentation, seed=recipe.seed)
            order = EndlessOrder(
                len(dataset),
                seed=recipe.seed,
                start=self.step * recipe.batch_size,
                rank=rank,
                world_size=world_size,
                batch_size=batch_size,
            )
        prompts = {}
        if self.model.text_trains():
            encoded = self.processor(text=list(self.label_set.names), return_tensors="pt")
            prompts = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        loader = DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=order,
            num_workers=recipe.workers,
            collate_fn=Collator(prompts),
            pin_memory=accelerator.device.type == "cuda",
            persistent_workers=recipe.workers > 0,
            worker_init_fn=ignore_stop_signals,
        )
        return iter(loader)


_MOST_SKIPPED = 50
"""Steps in a row that an fp16 scaler may leave out; it halves its scale with each."""

_LOGGED_RESULTS = ("mean_iou", "mean_accuracy", "overall_accuracy")


class _Interval:
    """Means over the steps since the last line of figures."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.restart()

    def restart(self) -> None:
        self.sums: dict[str, float] = {}
        self.steps = self.images = 0
        self.began = time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that does not count."""
        began = time.monotonic()
        yield
        self.began += time.monotonic() - began

    def add(self, terms: dict[str, float], grad_norm: float, images: int) -> None:
        for name, value in (*terms.items(), ("grad_norm", grad_norm)):
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.steps += 1
        self.images += images

    def figures(self) -> dict[str, float]:
        means = {name: total / max(self.steps, 1) for name, total in self.sums.items()}
        seconds = max(time.monotonic() - self.began, 1e-9)
        return {**means, "images_per_second": self.images / seconds, "peak_memory_gb": peak_memory(self.device)}


def seed_step(seed: int, step: int, rank: int) -> None:
    """
    Draw the random points of a step from the seed and the step alone.

    Then nothing of the generators' state has to be saved: a run continues exactly wherever it stopped.

    Args:
        seed: of the run.
        step: optimisation steps done before.
        rank: of this process.
    """
    # Odd multipliers keep the three apart within the 63 bits that a seed may have
    torch.manual_seed((seed * 1_000_003 + step * 8_191 + rank) % 2**63)


def _make_accelerator(recipe: Recipe) -> Accelerator:
    precision = recipe.mixed_precision
    if precision == "auto":
        _, dtype = pick_device_and_dtype("cpu" if recipe.cpu else None)
        precision = "bf16" if dtype == torch.bfloat16 else "no"
    # An earlier run in this process may have had another precision
    AcceleratorState._reset_state()
    try:
        trackers: Any = recipe.trackers or None
        accelerator = Accelerator(
            mixed_precision=precision,
            cpu=recipe.cpu,
            log_with=trackers,
            project_config=ProjectConfiguration(str(recipe.output_dir), str(Path(str(recipe.output_dir), "logs"))),
            dynamo_plugin=TorchDynamoPlugin(backend=DynamoBackend.NO),
            step_scheduler_with_optimizer=False,
        )
    except (ValueError, ImportError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"this run cannot be set up on this machine: {one_line(error)}") from error
    # Accelerate leaves out what is not installed
    usable = {str(getattr(kind, "value", kind)) for kind in accelerator.log_with}
    missing = [name for name in recipe.trackers if name not in usable and name != "all"]
    if missing:
        raise ValueError(f"trackers {', '.join(missing)} cannot be used: install the package, or leave it out.")
    return accelerator


def _find_checkpoint(recipe: Recipe, folder: Path, checkpoints: Checkpoints) -> Path | None:
    if recipe.resume == "auto":
        return checkpoints.latest()
    if recipe.resume != "never":
        return Path(recipe.resume)
    for trace in (CHECKPOINTS, "model.safetensors"):
        if (folder / trace).exists():
            raise ValueError(
                f"{folder} already holds a run: continue it with resume: auto, or choose another output_dir."
            )
    return None


def _load_model(recipe: Recipe, checkpoint: Path | None) -> tuple[SANForOpenVocabSegmentation, SANProcessor]:
    """The model to train in float32, from a checkpoint, a SAN model, or a CLIP with a new side adapter."""
    source = str(checkpoint or recipe.clip or recipe.model or BUILTIN_MODEL)
    templates = _templates(recipe)
    try:
        if checkpoint is None and recipe.clip is not None:
            return _new_model(recipe, templates)
        model = SANForOpenVocabSegmentation.from_pretrained(source, dtype=torch.float32, use_safetensors=True)
        processor = SANProcessor.from_pretrained(source)
    except Exception as error:
        # Damaged files and missing networks raise many kinds
        raise ValueError(f"{source} cannot be loaded as a model to train: {one_line(error)}") from error
    if templates is not None:
        processor = SANProcessor(processor.image_processor, processor.tokenizer, templates=templates)
    return model, processor


def _new_model(recipe: Recipe, templates: str | list[str] | None) -> tuple[SANForOpenVocabSegmentation, SANProcessor]:
    from transformers import CLIPModel, CLIPTokenizer

    from modeling_san.processing import SANImageProcessor

    clip = CLIPModel.from_pretrained(str(recipe.clip), dtype=torch.float32, use_safetensors=True)
    torch.manual_seed(recipe.seed)
    model = SANForOpenVocabSegmentation.from_clip(clip, **recipe.san_options)
    tokenizer = CLIPTokenizer.from_pretrained(str(recipe.clip))
    image_processor = SANImageProcessor(
        size_divisor=model.config.size_divisor, mask_stride=model.config.side_patch_size
    )
    return model, SANProcessor(image_processor, tokenizer, templates=templates or "vild")


def _templates(recipe: Recipe) -> str | list[str] | None:
    from modeling_san.processing import template_names

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


@contextmanager
def _stop_signals() -> Iterator[Any]:
    """An event that SIGTERM or a first Ctrl-C sets; a second Ctrl-C ends the run at once."""
    import threading

    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask_to_stop(number: int, frame: object) -> None:
        if number == signal.SIGINT and stop.is_set():
            raise KeyboardInterrupt
        _warn("stopping after this step; a checkpoint is saved.")
        stop.set()

    before = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _original_forward(model: SANForOpenVocabSegmentation) -> Iterator[None]:
    """The model without the autocast that Accelerate wraps around `forward`: what is measured is what is saved."""
    wrapped = model.__dict__.pop("forward", None)
    try:
        yield
    finally:
        if wrapped is not None:
            model.forward = wrapped  # type: ignore[method-assign]


def _tell_changes(path: Path, recipe: Recipe) -> None:
    """Say in a line what differs from the recipe that the run was started with."""
    try:
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return
    if isinstance(before, dict):
        changes = [
            f"{name} {before[name]} -> {value}"
            for name, value in asdict(recipe).items()
            if name in before and before[name] != value and name != "resume"
        ]
        if changes:
            _warn(f"the run continues with another recipe: {'; '.join(changes)}")


def _load_images(recipe: Recipe, source: str, split: str) -> Any:
    return load_images(
        source,
        split,
        streaming=recipe.streaming,
        image_column=recipe.image_column,
        label_column=recipe.label_column,
    )


def _flat(recipe: dict[str, Any]) -> dict[str, Any]:
    """What trackers accept as hyperparameters: plain values."""
    return {
        name: value if isinstance(value, (int, float, str, bool)) else str(value) for name, value in recipe.items()
    }


def _say(message: str) -> None:
    tqdm.write(f"san: {message}", file=sys.stderr)


def _warn(message: str) -> None:
    _say(f"warning: {message}")


if __name__ == "__main__":
    from modeling_san.commands.main import main

    sys.exit(main(["train", *sys.argv[1:]]))


__all__ = ["NonFiniteLossError", "seed_step", "train"]
