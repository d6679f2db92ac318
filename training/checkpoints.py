"""Checkpoints of a training run: complete or absent, the last few and the best kept."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from modeling_san.processing.files import new_folder, remove_unfinished, write_json
from modeling_san.processing.wording_san import one_line

_STATE_FILE = "training_state.pt"
_PROGRESS_FILE = "progress.json"
_STEP = re.compile(r"step-(\d+)")


class Checkpoints:
    """
    The folder that a run keeps its checkpoints in.

    Each is a folder `step-00001000` that `from_pretrained` loads, with the optimizer's state beside the weights.

    Args:
        folder: made with the first checkpoint.
        keep: how many of the latest stay; the one with the best validation stays as well.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def save(
        self, step: int, write_model: Callable[[Path], None], state: dict[str, Any], progress: dict[str, Any]
    ) -> Path:
        """
        Write a checkpoint beside its place, move it there, then delete those that are no longer kept.

        Args:
            step: optimisation steps done.
            write_model: writes model and processor into the folder that it is given.
            state: tensors, numbers, lists and dictionaries of them.
            progress: what a person may want to read, as JSON; `best_step` names the checkpoint not to delete.

        Raises:
            OSError, RuntimeError: where it cannot be written; the older ones are all still there.
        """
        path = self.folder / f"step-{step:08d}"
        if path.exists():
            return path
        with new_folder(path) as beside:
            write_model(beside)
            torch.save(state, beside / _STATE_FILE)
            write_json(beside / _PROGRESS_FILE, {"step": step, **progress})
        self._remove_old(progress.get("best_step"))
        return path

    def latest(self) -> Path | None:
        """The checkpoint with the most steps."""
        return max(self._all(), key=_step_of, default=None)

    def clean(self, step: int) -> list[Path]:
        """
        Make the folder ready for a run that begins at `step`; call it while no other process writes here.

        What a killed run left unfinished is deleted. Checkpoints of later steps, which belong to another course of the
        run, are renamed to `abandoned-step-...`.

        Returns:
            the renamed folders.
        """
        remove_unfinished(self.folder)
        abandoned = []
        for path in self._all():
            if _step_of(path) > step:
                target = path.with_name(f"abandoned-{path.name}")
                shutil.rmtree(target, ignore_errors=True)
                abandoned.append(path.rename(target))
        return abandoned

    def _all(self) -> list[Path]:
        return sorted((path for path in self.folder.glob("step-*") if _STEP.fullmatch(path.name)), key=_step_of)

    def _remove_old(self, best_step: int | None) -> None:
        for path in self._all()[: -self.keep]:
            if _step_of(path) != best_step:
                # Under another name first: a folder called step-... is never half deleted.
                doomed = path.with_name(f".{path.name}.unfinished-old")
                path.rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)


def load_training_state(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    What `Checkpoints.save` wrote beside the model.

    Args:
        path: a checkpoint's folder.

    Returns:
        state and progress. Nothing but tensors and plain values is ever unpickled.

    Raises:
        ValueError: where it is no checkpoint of a training run, or a damaged one.
    """
    try:
        state = torch.load(path / _STATE_FILE, map_location="cpu", weights_only=True)
        progress = json.loads((path / _PROGRESS_FILE).read_text(encoding="utf-8"))
        progress["step"] = int(progress["step"])
    except Exception as error:
        # torch.load raises what its parts raise: unpickling, zip, end of file, ...
        raise ValueError(
            f"{path} cannot be resumed from ({one_line(error)}): pass a "
            "checkpoint folder that training wrote, such as OUTPUT/checkpoints/step-00001000."
        ) from error
    return state, progress


def _step_of(path: Path) -> int:
    match = _STEP.fullmatch(path.name)
    return int(match[1]) if match else -1


__all__ = ["Checkpoints", "load_training_state"]
