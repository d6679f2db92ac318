"""
Training with Accelerate: devices, processes, mixed precision and accumulation are its; the recipe is the paper's.

`accelerate launch -m modeling_san.commands.main train --config recipe.yaml` is `san train --config recipe.yaml` on
many processes.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object, send_to_device
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from modeling_san.modeling_san import SANForOpenVocabSegmentation
from modeling_san.processing import SANProcessor
from modeling_san.processing.files import filling_folder, new_folder, remove_unfinished, write_json, write_text
from modeling_san.processing.wording_san import one_line
from modeling_san.training.build import (
    load_model,
    make_accelerator,
    make_batches,
    make_optimizer,
    make_schedule,
    prepare_model,
)
from modeling_san.training.callbacks import (
    CURVES_FILE,
    METRICS_FILE,
    Interval,
    JsonLinesTracker,
    say,
    stop_signals,
    warn,
)
from modeling_san.training.data import check_first_images, load_images
from modeling_san.training.evaluate import evaluate, save_overlays
from modeling_san.training.label_sets import LabelSet, load_label_set
from modeling_san.training.metrics import RESULTS_FILE
from modeling_san.training.plots import plot_curves
from modeling_san.training.recipe import Recipe

RECIPE_FILE = "recipe.yaml"
CHECKPOINTS = "checkpoints"
OVERLAYS = "overlays"
PROGRESS_FILE = "progress.json"

_STEP = re.compile(r"step-(\d+)")
_LOGGED_RESULTS = ("mean_iou", "mean_accuracy", "overall_accuracy")
_MOST_SKIPPED = 50
"""Steps in a row that an fp16 scaler may leave out; it halves its scale with each."""


class NonFiniteLossError(ValueError):
    """The loss is infinite or not a number; the message names the step, the terms and the images."""


@dataclass
class Progress:
    """Where a run stands: what a checkpoint holds, as JSON, beside the state that Accelerate saves."""

    step: int = 0
    best_step: int | None = None
    best_mean_iou: float = -1.0
    processes: int = 1
    results: dict[str, Any] = field(default_factory=dict)


@dataclass
class Run:
    """A training run: what it is made of, and where it stands. `model` is as Accelerate wraps it."""

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
    scalars: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """What the run leaves lies here."""
        return Path(str(self.recipe.output_dir))

    @property
    def san(self) -> SANForOpenVocabSegmentation:
        """The model itself."""
        return self.accelerator.unwrap_model(self.model)


# ---------------------------------------------------------------------------------------------------- the loop


def train(recipe: Recipe, *, progress: bool = True) -> dict[str, Any]:
    """
    Train a model as a recipe says.

    Args:
        recipe: what to do; `output_dir` and `dataset` have to be given.
        progress: whether the main process shows a progress bar.

    Returns:
        `steps` done, `finished` (false where SIGTERM or Ctrl-C ended the run early; a checkpoint was saved then),
        `minutes`, `images_per_second`, and the last evaluation's results if there was one.

    Raises:
        ValueError: where recipe, data and model do not fit together; the sentence says what to change.
        NonFiniteLossError: after saving the state before the step.
        OSError: where the final model cannot be saved.
    """
    run = prepare_run(recipe)
    accelerator, state = run.accelerator, run.progress
    start, began, skipped = state.step, time.monotonic(), 0
    show = progress and accelerator.is_main_process
    bar = tqdm(total=recipe.steps, initial=start, desc="training", unit="step", disable=not show, dynamic_ncols=True)
    interval = Interval(accelerator.device)
    run.model.train()
    with stop_signals() as stop, bar, _saving_what_an_error_would_cost(run):
        while state.step < recipe.steps:
            terms, indices = compute_gradients(run)
            broken = not is_finite(terms, scaled=accelerator.scaler is not None) or skipped >= _MOST_SKIPPED
            must_stop, broken = _in_any_process(accelerator, stop.is_set(), broken)
            if broken:
                raise _non_finite_loss(run, terms, indices)
            _update_weights(run)
            skipped = skipped + 1 if run.optimizer.step_was_skipped else 0
            interval.add(terms, recipe.batch_size)
            bar.update()

            last = state.step == recipe.steps
            if last or state.step % recipe.log_every == 0:
                figures = _log_figures(run, interval)
                bar.set_postfix(loss=f"{figures['loss']:.3f}", lr=f"{figures['learning_rate']:.1e}")
            if run.validation is not None and (last or state.step % recipe.evaluate_every == 0):
                with interval.paused():
                    _evaluate(run, show)
            is_best = state.best_step == state.step
            if must_stop or last or is_best or state.step % recipe.checkpoint_every == 0:
                _save_checkpoint(run, must_succeed=must_stop)
            if must_stop:
                break
    finished = state.step == recipe.steps
    if finished:
        _save_final_model(run)
    accelerator.end_training()
    seconds = time.monotonic() - began
    return {
        **state.results,
        "steps": state.step,
        "finished": finished,
        "minutes": seconds / 60,
        "images_per_second": (state.step - start) * recipe.batch_size / seconds,
    }


def compute_gradients(run: Run) -> tuple[dict[str, float], list[int]]:
    """
    Gradients of the next step, scaled down to the recipe's norm.

    Returns:
        the loss terms of this process and `grad_norm`, and the indices of the images that they are of.
    """
    accelerator, parts = run.accelerator, run.recipe.gradient_accumulation_steps
    seed_step(run.recipe.seed, run.progress.step, accelerator.process_index)
    terms: dict[str, Tensor] = {}
    indices: list[int] = []
    for _ in range(parts):
        batch = next(run.batches)
        indices += batch.pop("index").tolist()
        with accelerator.accumulate(run.model):
            output = run.model(**send_to_device(batch, accelerator.device, non_blocking=True))
            accelerator.backward(output.loss)
        for name, term in (*output.loss_dict.items(), ("loss", output.loss)):
            terms[name] = terms.get(name, 0.0) + term.detach() / parts
    norm = accelerator.clip_grad_norm_(run.model.parameters(), run.recipe.max_grad_norm)
    terms["grad_norm"] = norm.full_tensor() if isinstance(norm, DTensor) else norm
    values = torch.stack([term.to(accelerator.device) for term in terms.values()]).tolist()
    return dict(zip(terms, values, strict=True)), indices


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


def is_finite(terms: dict[str, float], scaled: bool) -> bool:
    """
    Whether loss terms and gradient may reach the weights.

    Args:
        terms: loss terms and `grad_norm`.
        scaled: whether an fp16 scaler leaves out steps whose gradients overflow; then only the loss counts.
    """
    return all(math.isfinite(value) for name, value in terms.items() if not (scaled and name == "grad_norm"))


def _update_weights(run: Run) -> None:
    """One optimisation step with the gradients that there are."""
    # In the middle there is no state that is worth saving
    step, run.progress.step = run.progress.step, -1
    run.optimizer.step()
    run.schedule.step()
    run.optimizer.zero_grad()
    run.progress.step = step + 1


def _in_any_process(accelerator: Accelerator, *flags: bool) -> list[bool]:
    """Flags that are up in any process."""
    counts: Any = accelerator.reduce(torch.tensor(flags, dtype=torch.int32, device=accelerator.device), "sum")
    return [bool(count) for count in counts.tolist()]


def _non_finite_loss(run: Run, terms: dict[str, float], indices: list[int]) -> NonFiniteLossError:
    """Save the state before the step, and name the images of the process whose loss broke the gradient of all."""
    everyones = gather_object([{"terms": terms, "images": indices}])
    broken = [one for one in everyones if not is_finite(one["terms"], scaled=True)]
    terms, images = (broken or everyones)[0]["terms"], (broken or everyones)[0]["images"]
    saved = _save_checkpoint(run, must_succeed=False)
    step = run.progress.step + 1
    if run.accelerator.is_main_process:
        report = {"step": step, "terms": {name: str(value) for name, value in terms.items()}, "images": images}
        write_json(run.folder / "non_finite.json", report)
    named = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
    return NonFiniteLossError(
        f"the loss or its gradient in step {step} is not finite ({named}), on the images with indices {images}. "
        f"{saved} Look at these images, or lower learning_rate, and go on with resume: auto."
    )


def _log_figures(run: Run, interval: Interval) -> dict[str, float]:
    """Means since the last time, over all processes, to the trackers."""
    figures = interval.figures()
    names = [name for name in figures if name.startswith("loss")]
    means = torch.tensor([figures[name] for name in names], device=run.accelerator.device)
    averages: Any = run.accelerator.reduce(means, "mean")
    figures.update(zip(names, averages.tolist(), strict=True))
    figures["learning_rate"] = float(run.schedule.get_last_lr()[0])
    run.accelerator.log(figures, step=run.progress.step)
    interval.restart()
    return figures


@torch.no_grad()
def _evaluate(run: Run, show: bool) -> None:
    """Measure the model on the validation data and draw what it does there."""
    recipe, state, model = run.recipe, run.progress, run.san
    is_main = run.accelerator.is_main_process
    run.model.eval()
    with _as_saved(model):
        if model.trains_text_encoder():
            model.set_labels(run.label_set.names, run.processor)
        what = (model, run.processor, run.validation, run.label_set)
        state.results = evaluate(*what, limit=recipe.validation_limit, progress=show, accelerator=run.accelerator)
        if is_main and recipe.overlays:
            folder = run.folder / OVERLAYS / f"step-{state.step:08d}"
            _draw("overlays", lambda: save_overlays(*what, folder, count=recipe.overlays))
    run.model.train()
    if state.results["mean_iou"] > state.best_mean_iou:
        state.best_step, state.best_mean_iou = state.step, state.results["mean_iou"]
    run.accelerator.log({f"validation_{name}": state.results[name] for name in _LOGGED_RESULTS}, step=state.step)
    if is_main:
        _draw_curves(run.folder)


def _draw_curves(folder: Path) -> None:
    _draw("curves", lambda: plot_curves(folder / METRICS_FILE, folder / CURVES_FILE))


def _draw(what: str, draw: Callable[[], object]) -> None:
    """Drawings are not worth a run."""
    try:
        draw()
    except (OSError, ImportError, ValueError) as error:
        warn(f"the {what} cannot be drawn: {one_line(error)}.")


@contextmanager
def _as_saved(model: SANForOpenVocabSegmentation) -> Iterator[None]:
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


# ---------------------------------------------------------------------------------------------------- checkpoints


def _save_checkpoint(run: Run, must_succeed: bool) -> str:
    """Save the state in all processes; says what became of it in a sentence."""
    error = None
    try:
        said = _write_checkpoint(run)
    except Exception as caught:
        # safetensors, torch and the system name a full disk in three ways; none may cost days of training
        older = latest_checkpoint(run.folder)
        error, latest = caught, f"the latest is {older}." if older else "there is no older one."
        said = f"The checkpoint of step {run.progress.step} cannot be written ({one_line(error)}); {latest}"
        warn(said + ("" if must_succeed else " Training goes on and tries again at the next checkpoint."))
    [failed] = _in_any_process(run.accelerator, error is not None)
    if failed and must_succeed:
        raise OSError(f"{said} Free some space." if error else "Another process could not save a checkpoint.")
    return said


def _write_checkpoint(run: Run) -> str:
    """Accelerate's `save_state`, written beside its place, moved there, then those deleted that are not kept."""
    path = run.folder / CHECKPOINTS / f"step-{run.progress.step:08d}"
    is_main, is_spread = run.accelerator.is_main_process, run.accelerator.distributed_type == DistributedType.FSDP
    if not path.exists() and (is_main or is_spread):
        beside = path.with_name(f"{path.name}.unfinished-state")
        try:
            run.accelerator.save_state(str(beside))
            if is_spread:
                run.accelerator.wait_for_everyone()
            if is_main:
                with new_folder(path) as empty:
                    empty.rmdir()
                    beside.rename(empty)
                _remove_old_checkpoints(run)
        finally:
            if is_main:
                shutil.rmtree(beside, ignore_errors=True)
    return f"The state after step {run.progress.step} is in {path}."


def _write_model(run: Run, folder: Path) -> None:
    """What `from_pretrained` loads; all processes take part where parameters are spread."""
    model = run.san
    if model.trains_text_encoder():
        with _as_saved(model):
            model.set_labels(run.label_set.names, run.processor)
    weights = run.accelerator.get_state_dict(run.model)
    weights = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in weights.items()}
    weights.update({name: weights[name].reshape(()) for name in run.scalars if name in weights})
    if not run.accelerator.is_main_process:
        return
    model.save_pretrained(folder, state_dict=weights)
    run.processor.save_pretrained(folder)
    for file in folder.iterdir():
        # Weights are written readable for their owner alone; the folder's other files follow the umask
        shutil.copymode(folder / "config.json", file)


def _save_final_model(run: Run) -> None:
    if not run.accelerator.is_main_process:
        _write_model(run, run.folder)
    else:
        try:
            with filling_folder(run.folder) as beside:
                _write_model(run, beside)
        except Exception as error:
            latest = latest_checkpoint(run.folder) or "the beginning, as there is no checkpoint"
            raise OSError(
                f"the model cannot be saved to {run.folder} ({one_line(error)}); free some space and go on with "
                f"resume: auto, from {latest}."
            ) from error
        if run.progress.results:
            write_json(run.folder / RESULTS_FILE, run.progress.results)
        _draw_curves(run.folder)
    run.accelerator.wait_for_everyone()


@contextmanager
def _saving_what_an_error_would_cost(run: Run) -> Iterator[None]:
    """A checkpoint where a damaged image or lack of memory ends a run in the middle."""
    try:
        yield
    except NonFiniteLossError:
        raise
    except Exception:
        # No collectives here, as the other processes may have failed elsewhere
        alone = run.accelerator.distributed_type != DistributedType.FSDP
        if alone and run.accelerator.is_main_process and run.progress.step > 0:
            try:
                warn(_write_checkpoint(run))
            except Exception as error:
                warn(f"no checkpoint can be written: {one_line(error)}.")
        raise


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the most steps of the run in `folder`."""
    return max(_checkpoints(folder), key=_step_of, default=None)


def _checkpoints(folder: Path) -> list[Path]:
    found = [path for path in (folder / CHECKPOINTS).glob("step-*") if _STEP.fullmatch(path.name)]
    return sorted(found, key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _remove_old_checkpoints(run: Run) -> None:
    """The latest stay, and the best."""
    for path in _checkpoints(run.folder)[: -run.recipe.keep_checkpoints]:
        if _step_of(path) != run.progress.best_step:
            # Under another name first: a folder called step-... is never half deleted.
            doomed = path.with_name(f"{path.name}.unfinished-old")
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------- beginning


def prepare_run(recipe: Recipe) -> Run:
    """
    Make or resume all that a run needs.

    Raises:
        ValueError: where recipe, data and model do not fit together; the sentence says what to change.
    """
    for name in ("output_dir", "dataset"):
        if not getattr(recipe, name):
            raise ValueError(f"{name} is missing: a run needs it.")
    folder = Path(str(recipe.output_dir))
    checkpoint = _find_checkpoint(recipe, folder)
    state = Progress() if checkpoint is None else _read_progress(checkpoint)
    if state.step > recipe.steps:
        raise ValueError(f"{checkpoint} has {state.step} steps already: give more than these {recipe.steps}.")
    accelerator = make_accelerator(recipe, JsonLinesTracker(folder, state.step))
    model, processor = load_model(recipe, checkpoint)
    images = _load_images(recipe, str(recipe.dataset), recipe.split)
    label_set = load_label_set(
        recipe.labels,
        dataset=images,
        source=recipe.dataset,
        ignore_index=recipe.ignore_index,
        reduce_labels=recipe.reduce_labels,
    )
    check_first_images(images, label_set, recipe.dataset)
    validation = None
    if recipe.validation is not None:
        validation = _load_images(recipe, recipe.validation, recipe.validation_split)
        check_first_images(validation, label_set, recipe.validation)
    else:
        state.results = {}
    prepare_model(recipe, model, processor, label_set)
    batches = make_batches(recipe, accelerator, images, label_set, model, processor, state.step)
    scalars = _make_vectors_of_scalars(model) if accelerator.is_fsdp2 else []
    optimizer = make_optimizer(model.to(accelerator.device), recipe)
    schedule = make_schedule(optimizer, recipe, state.step)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    run = Run(
        recipe, accelerator, wrapped, processor, label_set, validation, optimizer, schedule, batches, state, scalars
    )
    # Not the run itself: in a circle of references it, and the processes that prepare images, would outlive its end
    own = weakref.proxy(run)
    accelerator.register_save_state_pre_hook(lambda models, weights, path: _write_own_state(own, weights, Path(path)))
    # They are loaded already
    accelerator.register_load_state_pre_hook(lambda models, path: models.clear())
    if checkpoint is not None:
        _restore(run, checkpoint)
    state.processes = accelerator.num_processes
    if accelerator.is_main_process:
        _prepare_folder(run)
    accelerator.wait_for_everyone()
    # Trackers accept plain values
    plain = {name: value if isinstance(value, (int, float)) else str(value) for name, value in vars(recipe).items()}
    accelerator.init_trackers("san", plain)
    return run


def _make_vectors_of_scalars(model: SANForOpenVocabSegmentation) -> list[str]:
    """FSDP cuts parameters along their first dimension, which scalars lack; returns the names of those changed."""
    names = [name for name, parameter in model.named_parameters() if parameter.dim() == 0]
    for name in names:
        parent, _, last = name.rpartition(".")
        scalar = model.get_parameter(name)
        vector = torch.nn.Parameter(scalar.detach().reshape(1), requires_grad=scalar.requires_grad)
        setattr(model.get_submodule(parent), last, vector)
    return names


def _find_checkpoint(recipe: Recipe, folder: Path) -> Path | None:
    if recipe.resume == "auto":
        return latest_checkpoint(folder)
    if recipe.resume != "never":
        return Path(recipe.resume)
    for trace in (CHECKPOINTS, "model.safetensors"):
        if (folder / trace).exists():
            raise ValueError(
                f"{folder} already holds a run: continue it with resume: auto, or choose another output_dir."
            )
    return None


def _write_own_state(run: Run, weights: list[Any], folder: Path) -> None:
    """Called by `save_state` in place of its own way to write weights."""
    weights.clear()
    _write_model(run, folder)
    if run.accelerator.is_main_process:
        write_json(folder / PROGRESS_FILE, asdict(run.progress))


def _read_progress(checkpoint: Path) -> Progress:
    try:
        progress = Progress(**json.loads((checkpoint / PROGRESS_FILE).read_text(encoding="utf-8")))
        progress.step = int(progress.step)
    except (OSError, ValueError, TypeError) as error:
        raise _cannot_be_resumed(checkpoint, error) from error
    return progress


def _cannot_be_resumed(checkpoint: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{checkpoint} cannot be resumed from ({one_line(error)}): pass a checkpoint folder that training wrote, such "
        f"as OUTPUT/{CHECKPOINTS}/step-00001000."
    )


def _restore(run: Run, checkpoint: Path) -> None:
    """The optimizer's state from a checkpoint; rates and decay follow from the recipe, which may have changed."""
    recipe, state, processes = run.recipe, run.progress, run.accelerator.num_processes
    if recipe.streaming and state.step:
        if run.accelerator.is_main_process:
            say(f"reading past the images of {state.step} steps: a stream has no other way to its middle")
        if state.processes != processes:
            warn(
                f"the stream was shared between {state.processes} processes and is now between {processes}: some "
                "images of this epoch come twice, others not at all."
            )
    settings = [
        {name: group[name] for name in ("lr", "initial_lr", "weight_decay")} for group in run.optimizer.param_groups
    ]
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


def _prepare_folder(run: Run) -> None:
    """Leave what belongs to another course of the run behind, and say what begins."""
    recipe, model, step = run.recipe, run.san, run.progress.step
    remove_unfinished(run.folder)
    remove_unfinished(run.folder / CHECKPOINTS)
    for path in _checkpoints(run.folder):
        if _step_of(path) > step:
            target = path.with_name(f"abandoned-{path.name}")
            shutil.rmtree(target, ignore_errors=True)
            path.rename(target)
            warn(f"the run begins anew at step {step}; a later checkpoint is now called {target}.")
    if step:
        _tell_changes(run.folder / RECIPE_FILE, recipe)
    write_text(run.folder / RECIPE_FILE, recipe.to_yaml())
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    trained, total = sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)
    processes = run.accelerator.num_processes
    say(
        f"training {trained / 1e6:.2f} of {total / 1e6:.2f} M parameters from step {step} to {recipe.steps}: "
        f"{processes} process{'es' if processes > 1 else ''}, {run.accelerator.device.type}, mixed precision "
        f"{run.accelerator.mixed_precision}"
    )


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
            warn(f"the run continues with another recipe: {'; '.join(changes)}")


def _load_images(recipe: Recipe, source: str, split: str) -> Any:
    return load_images(
        source,
        split,
        streaming=recipe.streaming,
        image_column=recipe.image_column,
        label_column=recipe.label_column,
    )


__all__ = ["NonFiniteLossError", "Progress", "Run", "compute_gradients", "prepare_run", "seed_step", "train"]
