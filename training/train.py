# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""
Training with Accelerate: devices, processes, mixed precision and accumulation are its; the recipe is the paper's.

`accelerate launch -m modeling_san.commands.main train --config recipe.yaml` is `san train --config recipe.yaml` on
many processes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object, send_to_device
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from modeling_san.processing.files import filling_folder, write_json
from modeling_san.processing.fingerprints import digest_weight_files
from modeling_san.processing.wording_san import one_line
from modeling_san.training.callbacks import CURVES_FILE, METRICS_FILE, Interval, stop_signals, warn
from modeling_san.training.evaluate import evaluate, save_overlays
from modeling_san.training.metrics import RESULTS_FILE
from modeling_san.training.plots import plot_curves
from modeling_san.training.recipe import Recipe
from modeling_san.training.run import (
    NON_FINITE_FILE,
    Run,
    as_saved,
    latest_checkpoint,
    prepare_run,
    run_folder,
    write_checkpoint,
    write_model,
)

_MOST_SKIPPED = 50
"""Steps in a row that an fp16 scaler may leave out; it halves its scale with each."""


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
        `minutes`, `images_per_second`, and the last evaluation's results if there was one.

    Raises:
        ValueError: where recipe, data and model do not fit together; the sentence says what to change.
        NonFiniteLossError: after saving the state before the step.
        OSError: where the final model cannot be saved.
    """
    with run_folder(recipe):
        return _train(prepare_run(recipe), progress)


def _train(run: Run, progress: bool) -> dict[str, Any]:
    recipe = run.recipe
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
        for name, term in (*(output.loss_dict or {}).items(), ("loss", output.loss)):
            terms[name] = terms.get(name, 0.0) + term.detach() / parts
    norm = accelerator.clip_grad_norm_(run.model.parameters(), run.recipe.max_grad_norm)
    terms["grad_norm"] = norm.full_tensor() if isinstance(norm, DTensor) else norm
    values = torch.stack([term.to(accelerator.device) for term in terms.values()]).tolist()
    return dict(zip(terms, values, strict=True)), indices


def seed_step(seed: int, step: int, rank: int) -> None:
    """
    Draw the random points of a step from the run's seed, the steps done before and the process's rank alone.

    Then nothing of the generators' state has to be saved: a run continues exactly wherever it stopped.
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
    everyones = gather_object([(terms, indices)])
    broken = [(terms, images) for terms, images in everyones if not is_finite(terms, scaled=True)]
    terms, images = (broken or everyones)[0]
    saved = _save_checkpoint(run, must_succeed=False)
    step = run.progress.step + 1
    if run.accelerator.is_main_process:
        report = {"step": step, "terms": {name: str(value) for name, value in terms.items()}, "images": images}
        write_json(run.folder / NON_FINITE_FILE, report)
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
    return figures


@torch.no_grad()
def _evaluate(run: Run, show: bool) -> None:
    """Measure the model on the validation data and draw what it does there."""
    recipe, state, model = run.recipe, run.progress, run.unwrapped
    is_main = run.accelerator.is_main_process
    run.model.eval()
    with as_saved(model):
        if model.trains_text_encoder():
            model.set_labels(run.label_set.names, run.processor)
        what = (model, run.processor, run.validation, run.label_set)
        state.results = evaluate(
            *what,
            limit=recipe.validation_limit,
            progress=show,
            accelerator=run.accelerator,
            skip_damaged=recipe.skip_damaged,
        )
        if is_main and recipe.overlays:
            folder = run.folder / "overlays" / f"step-{state.step:08d}"
            _draw("overlays", lambda: save_overlays(*what, folder, count=recipe.overlays))
    run.model.train()
    if state.results["mean_iou"] > state.best_mean_iou:
        state.best_step, state.best_mean_iou = state.step, state.results["mean_iou"]
    logged = ("mean_iou", "mean_accuracy", "overall_accuracy")
    run.accelerator.log({f"validation_{name}": state.results[name] for name in logged}, step=state.step)
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


def _save_checkpoint(run: Run, must_succeed: bool) -> str:
    """Save the state in all processes; says what became of it in a sentence."""
    error = None
    try:
        said = write_checkpoint(run)
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
                warn(write_checkpoint(run))
            except Exception as error:
                warn(f"no checkpoint can be written: {one_line(error)}.")
        raise
    finally:
        # The loader's processes leave SIGTERM to this one, and end with their iterator: at exit it would be too late
        run.batches = iter(())


def _save_final_model(run: Run) -> None:
    if not run.accelerator.is_main_process:
        write_model(run, run.folder)
    else:
        try:
            with filling_folder(run.folder) as beside:
                write_model(run, beside)
        except Exception as error:
            latest = latest_checkpoint(run.folder) or "the beginning, as there is no checkpoint"
            raise OSError(
                f"the model cannot be saved to {run.folder} ({one_line(error)}); free some space and go on with "
                f"resume: auto, from {latest}."
            ) from error
        if run.progress.results:
            weights = digest_weight_files(run.folder)
            write_json(run.folder / RESULTS_FILE, {**run.progress.results, "weights": weights})
        _draw_curves(run.folder)
    run.accelerator.wait_for_everyone()


__all__ = ["NonFiniteLossError", "compute_gradients", "seed_step", "train"]
