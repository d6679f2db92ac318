# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""Evaluation on labelled images: streamed, shared between processes, continued where it was cut."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from hashlib import blake2b
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from modeling_san.open_vocabulary import OpenVocabularyModel
from modeling_san.processing import SANProcessor, normalize_labels
from modeling_san.processing.drawing import overlay
from modeling_san.processing.files import (
    locked_folder,
    refuse_foreign_files,
    replacing_file,
    write_json,
    write_text,
)
from modeling_san.processing.fingerprints import digest_json, digest_weights
from modeling_san.processing.segmenter import Segmenter, Vocabulary
from modeling_san.processing.wording_san import listed
from modeling_san.training.contact_sheet import arrange, side_by_side
from modeling_san.training.data import ImageError, describe_missing_classes, read_examples
from modeling_san.training.label_sets import LabelSet
from modeling_san.training.metrics import RESULTS_FILE, ConfusionMatrix
from modeling_san.training.plots import plot_class_iou

MEASURES = {
    "mean_iou": "Mean IoU",
    "mean_accuracy": "Mean accuracy",
    "overall_accuracy": "Overall accuracy",
    "frequency_weighted_iou": "Frequency-weighted IoU",
}
"""Figures of all classes together, and how they are called."""

OVERLAYS_FOLDER = "overlays"

_FILES = (
    *("per_class.csv", "per_class_iou.png", "confusion_matrix.npz", "model-index.yml"),
    *(f"{OVERLAYS_FOLDER}/{kind}_[0-9]*_image_[0-9]*.png" for kind in ("best", "worst")),
)
"""What lies in a folder beside the results, as patterns."""

_PROGRESS_PREFIX = ".evaluating-"

_logger = logging.getLogger(__name__)


def evaluate(
    model: OpenVocabularyModel,
    processor: SANProcessor,
    images: Any,
    label_set: LabelSet,
    *,
    output_dir: str | os.PathLike | None = None,
    tta: bool = False,
    limit: int | None = None,
    subsets: Mapping[str, Sequence[str]] | None = None,
    progress: bool = True,
    accelerator: Accelerator | None = None,
    class_embeds: Tensor | None = None,
    overlays: int = 4,
    save_every: float = 30.0,
    skip_damaged: bool = False,
    about: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """
    Segment images at their own size and compare them with their label maps.

    Args:
        model: any model; what it has stored is left alone.
        processor: its processor.
        images: examples with `image` and `annotation`: a data set, streamed or not, or a list.
        label_set: the classes, and how label maps store them.
        output_dir: folder for `results.json`, `per_class.csv`, `per_class_iou.png`, `confusion_matrix.npz`,
            `model-index.yml` and overlays of the best and worst images. What is counted is kept there in a hidden
            file while the evaluation runs, and a run that was cut goes on from it: same model, data, options and
            processes only. All processes have to see the folder. Results of the same evaluation are replaced.
        tta: average the scores of six sizes, each with its mirror image.
        limit: evaluate the first images only.
        subsets: class names that get means of their own, by the name of the subset.
        progress: whether to show a progress bar.
        accelerator: shares the images between its processes: process r of P takes images r, r + P, ...
        class_embeds: `(classes, projection_dim)` of the names; by default those stored with the model where they are
            of the same names, else the names are encoded.
        overlays: how many of the best and how many of the worst images to draw into `output_dir`, which segments
            them once more.
        save_every: seconds between saves of what is counted.
        skip_damaged: leave out, and count, images that cannot be read, instead of ending at the first.
        about: `model`, `dataset` and `split` as they are to be called in the results.

    Returns:
        `mean_iou`, `mean_accuracy`, `overall_accuracy`, `frequency_weighted_iou`, `images`, `unlabelled_images`
        (no pixel of theirs has a label), `damaged_images` (left out), `per_class_iou` and `per_class_accuracy` by name
        (None for a class that does not occur), and the means of each subset in `subsets`; in every process the same.

    Raises:
        ValueError: an image cannot be used, a subset names unknown classes, no pixel has a label, or the folder is
            in use, holds another evaluation's results or somebody's own files of such names.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}: pass at least 1, or None for all images.")
    members = find_subsets(subsets or {}, label_set.names)
    rank, processes = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    folder = None if output_dir is None else Path(output_dir)
    about = {"model": getattr(model, "name_or_path", "") or "model", **(about or {})}
    source = f"{about['dataset']}, " if about.get("dataset") else ""
    segmenter = Segmenter(model, processor)
    end = min(limit or sys.maxsize, len(images) if hasattr(images, "__len__") else sys.maxsize)
    share = range(rank, end, processes)
    with locked_folder(folder) if folder is not None and rank == 0 else nullcontext(), _evaluating(model):
        vocabulary = _choose_vocabulary(segmenter, label_set, class_embeds)
        counted, state = _Counted(label_set), None
        if folder is not None:
            about["weights"] = digest_weights(model.state_dict())
            run = about["evaluation"] = _fingerprint(
                segmenter,
                vocabulary,
                label_set,
                images,
                source,
                weights=about["weights"],
                tta=tta,
                limit=limit,
                skip_damaged=skip_damaged,
            )
            _refuse_others(folder, run)
            state = folder / f"{_PROGRESS_PREFIX}{run}-{rank}-of-{processes}.json"
            counted.load(state)
        saved, left = monotonic(), share[counted.seen :]
        for index, image, true in tqdm(
            read_examples(
                images, label_set, left, source=source, on_damage=counted.add_damage if skip_damaged else None
            ),
            total=None if end == sys.maxsize else len(share),
            initial=counted.seen,
            desc="evaluating",
            unit="image",
            disable=not progress or rank > 0,
        ):
            counted.add(index, segmenter(image, vocabulary, tta=tta)[0].label_map, true)
            if state is not None and monotonic() - saved >= save_every:
                counted.save(state)
                saved = monotonic()
        if state is not None:
            counted.save(state)

        parts: list[Any] = [(counted.confusion.table, counted.scores, counted.damaged)]
        parts = parts if accelerator is None else gather_object(parts)
        confusion = ConfusionMatrix(len(label_set))
        confusion.table = torch.stack([table for table, *_ in parts]).sum(0)
        scores = {index: score for _, scores, _ in parts for index, score in scores.items()}
        damaged = sum(len(damaged) for *_, damaged in parts)
        if not confusion.counts.any():
            left_out = f" ({damaged} cannot be read)" if damaged else ""
            raise ValueError(f"no pixel of the images{left_out} has a label: there is nothing to measure.")
        missing = describe_missing_classes(confusion.counts.sum(1).tolist(), label_set.names, "these images")
        if missing and rank == 0:
            _logger.warning("%s.", missing)
        results = _results(confusion, scores, label_set, members, damaged)
        if folder is None:
            return results
        if rank == 0:
            _write_results(folder, results, confusion, label_set, {**about, "tta": tta, "limit": limit}, members)
        _wait(accelerator)
        paths = {
            index: folder / OVERLAYS_FOLDER / f"{kind}_{place}_image_{index:06d}.png"
            for kind, indices in zip(("best", "worst"), choose_extremes(scores, overlays), strict=True)
            for place, index in enumerate(indices, start=1)
        }
        own = {index: paths[index] for index in sorted(paths)[rank::processes]}
        _draw(segmenter, vocabulary, images, label_set, own, tta=tta)
        _wait(accelerator)
        if rank == 0:
            for path in folder.glob(f"{_PROGRESS_PREFIX}{run}-*.json"):
                path.unlink()
    return results


def save_overlays(
    model: OpenVocabularyModel,
    processor: SANProcessor,
    images: Any,
    label_set: LabelSet,
    folder: str | os.PathLike,
    *,
    count: int = 4,
) -> list[Path]:
    """
    Draw the first `count` images that can be read with their label maps and what the model makes of them; the rest as
    for `evaluate`.

    Returns:
        a PNG for each image, in `folder`.
    """
    segmenter = Segmenter(model, processor)
    paths = {index: Path(folder) / f"image_{index:06d}.png" for index in range(count)}
    with _evaluating(model):
        return _draw(segmenter, _choose_vocabulary(segmenter, label_set, None), images, label_set, paths)


def draw_comparison(image: Image.Image, true: np.ndarray, predicted: np.ndarray, label_set: LabelSet) -> Image.Image:
    """
    An image, its label map and a prediction side by side, each with a title and the maps with legends.

    Args:
        image: the image.
        true: label map `(height, width)`; what is ignored stays unpainted in both maps.
        predicted: the same size.
        label_set: the classes.
    """
    names = list(label_set.names)
    ignored, unpainted = true == label_set.ignore_index, len(names)
    confusion = ConfusionMatrix(len(label_set), label_set.ignore_index)
    confusion.update(predicted, true)
    title = "prediction"
    if confusion.counts.any():
        title += f", mean IoU {confusion.mean_iou():.2f}, {confusion.overall_accuracy():.0%} of the pixels right"
    panels = {
        "image": overlay(image, np.full(true.shape, unpainted), names, opacity=0, legend=False),
        "truth": overlay(image, np.where(ignored, unpainted, true), names, opacity=0.7),
        title: overlay(image, np.where(ignored, unpainted, predicted), names, opacity=0.7),
    }
    return arrange([side_by_side(panels, title_size=max(14, max(panels["image"].size) // 36))])


def find_subsets(subsets: Mapping[str, Sequence[str]], names: Sequence[str]) -> dict[str, list[int]]:
    """
    Indices of the classes of each subset.

    Args:
        subsets: class names by the name of the subset.
        names: of all classes.

    Raises:
        ValueError: a subset is empty, or names a class that there is not.
    """
    known = {normalize_labels([name])[0]: index for index, name in enumerate(names)}
    found = {}
    for subset, members in subsets.items():
        if not members:
            raise ValueError(f"subset {subset!r} is empty: name its classes.")
        wanted = normalize_labels(members)
        if unknown := [repr(name) for name in wanted if name not in known]:
            raise ValueError(
                f"subset {subset!r} names {listed(unknown)}, which the {len(names)} classes of the data set do not "
                "hold: write names as the label set does."
            )
        found[subset] = [known[name] for name in wanted]
    return found


def choose_extremes(scores: Mapping[int, float], count: int) -> tuple[list[int], list[int]]:
    """The best and the worst, `count` of each at most and none twice, NaN left out; ties go to the smaller index."""
    best_first = sorted((-score, index) for index, score in scores.items() if not math.isnan(score))
    worst_first = sorted((-score, index) for score, index in best_first[count:])
    return [index for _, index in best_first[:count]], [index for _, index in worst_first[:count]]


def format_table(results: Mapping[str, Any]) -> str:
    """What `evaluate` returned, as an aligned table: a line for each class, then the means."""
    iou, accuracy = results["per_class_iou"], results["per_class_accuracy"]
    rows = [("class", "IoU", "accuracy"), *((name, _cell(iou[name]), _cell(accuracy[name])) for name in iou)]
    means = [("mean", _cell(results["mean_iou"]), _cell(results["mean_accuracy"]))]
    for name, subset in results["subsets"].items():
        classes = f"{subset['classes']} class{'' if subset['classes'] == 1 else 'es'}"
        means.append((f"mean of {name} ({classes})", _cell(subset["mean_iou"]), _cell(subset["mean_accuracy"])))
    means.append(("frequency-weighted IoU", _cell(results["frequency_weighted_iou"]), ""))
    means.append(("overall accuracy", "", _cell(results["overall_accuracy"])))
    width = max(len(name) for name, *_ in [*rows, *means]) + 2
    header, *body = (f"{name:<{width}}{one:>9}{two:>9}".rstrip() for name, one, two in [*rows, *means])
    rule = "-" * (width + 18)
    return "\n".join([header, rule, *body[: len(iou)], rule, *body[len(iou) :]])


def model_index(results: Mapping[str, Any], about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """
    Results in the form that the metadata of a model card has under `model-index`.

    Args:
        results: what `evaluate` returned.
        about: `model`, `dataset`, `split` and `tta`, each as far as it is known.
    """
    dataset = str(about.get("dataset") or "dataset")
    # A card says nothing of where files lay on somebody's disk
    dataset_type = Path(dataset).stem if Path(dataset).exists() else dataset
    measures = [(name, title, results[name]) for name, title in MEASURES.items()]
    measures += [
        ("mean_iou", f"{MEASURES['mean_iou']} of {name}", subset["mean_iou"])
        for name, subset in results["subsets"].items()
    ]
    return eval_results_to_model_index(
        Path(str(about.get("model") or "model")).name,
        [
            EvalResult(
                task_type="image-segmentation",
                task_name="Semantic segmentation",
                dataset_type=dataset_type,
                dataset_name=Path(dataset).stem,
                dataset_split=about.get("split"),
                dataset_args={name: about[name] for name in ("limit", "tta") if about.get(name)} or None,
                metric_type=name,
                metric_name=title,
                metric_value=round(value, 6),
            )
            for name, title, value in measures
            if value is not None
        ],
    )


# What is done


@contextmanager
def _evaluating(model: OpenVocabularyModel) -> Iterator[None]:
    """Evaluation mode without gradients; the model is given back as it was."""
    was_training = model.training
    model.eval()
    try:
        # Not inference mode: what a model may keep has to serve in training, too
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _choose_vocabulary(segmenter: Segmenter, label_set: LabelSet, class_embeds: Tensor | None) -> Vocabulary:
    if class_embeds is None:
        # Stored vectors may be of other templates, or trained: they are taken for their own names alone
        is_stored = segmenter.model.config.stored_labels == label_set.names
        return segmenter.vocabulary(None if is_stored else label_set.names)
    if len(class_embeds) != len(label_set):
        raise ValueError(f"class_embeds are of {len(class_embeds)} classes and there are {len(label_set)}.")
    return Vocabulary(label_set.names, class_embeds.to(segmenter.model.device), len(label_set))


class _Counted:
    """
    What a process has counted: pixels of each class, the mean IoU of each image by its index, NaN without any label,
    and the indices of images that cannot be read.
    """

    def __init__(self, label_set: LabelSet) -> None:
        self.confusion = ConfusionMatrix(len(label_set), label_set.ignore_index)
        self.scores: dict[int, float] = {}
        self.damaged: list[int] = []

    @property
    def seen(self) -> int:
        return len(self.scores) + len(self.damaged)

    def add(self, index: int, predicted: Tensor, true: np.ndarray) -> None:
        image = ConfusionMatrix(self.confusion.num_labels, self.confusion.ignore_index)
        image.update(predicted, true)
        self.confusion.merge(image)
        self.scores[index] = image.mean_iou()

    def add_damage(self, index: int, error: ImageError) -> None:
        if not self.damaged:
            _logger.warning("left out: %s Others like it are counted, but not named.", error)
        self.damaged.append(index)

    def save(self, path: Path) -> None:
        state = {
            "table": self.confusion.table.tolist(),
            "scores": [*map(list, self.scores.items())],
            "damaged": self.damaged,
        }
        write_text(path, json.dumps(state))

    def load(self, path: Path) -> None:
        """Go on from what the same run has saved, if it has."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            state = json.loads(path.read_text(encoding="utf-8"))
            table, scores, damaged = torch.tensor(state["table"]), dict(state["scores"]), list(state["damaged"])
            self.confusion.table, self.scores, self.damaged = table, scores, damaged


def _refuse_others(folder: Path, run: str) -> None:
    """
    Refuse a folder in which this evaluation has nothing to replace.

    Raises:
        ValueError: there are another evaluation's results, or files of unknown origin.
    """
    path = folder / RESULTS_FILE
    if not path.exists():
        return refuse_foreign_files(folder, _FILES, RESULTS_FILE)
    found = None
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(path.read_text(encoding="utf-8"))["evaluation"]
    if found != run:
        raise ValueError(
            f"{path} holds other results than those of this model, data and options: choose another folder."
        )


def _fingerprint(
    segmenter: Segmenter, vocabulary: Vocabulary, label_set: LabelSet, images: Any, source: str, **options: Any
) -> str:
    """Says whether two runs would count the same: hash of the model, the data set and the options."""
    on_damage = (lambda index, error: None) if options["skip_damaged"] else None
    examples = read_examples(images, label_set, range(1), source=source, on_damage=on_damage)
    first = [blake2b(image.tobytes() + label_map.tobytes()).hexdigest() for _, image, label_map in examples]
    return digest_json(
        {
            "config": segmenter.model.config.to_json_string(use_diff=False),
            "dtype": segmenter.model.dtype,
            "class_embeds": digest_weights({"class_embeds": vocabulary.class_embeds}),
            "processor": segmenter.processor.image_processor.to_json_string(),
            "labels": label_set,
            "images": len(images) if hasattr(images, "__len__") else None,
            "data": getattr(images, "_fingerprint", None),
            "first": first,
            **options,
        }
    )


def _draw(
    segmenter: Segmenter,
    vocabulary: Vocabulary,
    images: Any,
    label_set: LabelSet,
    paths: Mapping[int, Path],
    *,
    tta: bool = False,
) -> list[Path]:
    """Draw comparisons of the images of some indices; those that there are not are left out."""
    drawn = []
    for index, image, true in read_examples(images, label_set, list(paths), on_damage=lambda index, error: None):
        [segmentation] = segmenter(image, vocabulary, tta=tta)
        with replacing_file(paths[index]) as beside:
            draw_comparison(image, true, segmentation.label_map.numpy(), label_set).save(beside, format="PNG")
        drawn.append(paths[index])
    return drawn


def _wait(accelerator: Accelerator | None) -> None:
    if accelerator is not None:
        accelerator.wait_for_everyone()


# Results


def _results(
    confusion: ConfusionMatrix,
    scores: Mapping[int, float],
    label_set: LabelSet,
    members: Mapping[str, Sequence[int]],
    damaged: int,
) -> dict[str, Any]:
    return {
        **{name: getattr(confusion, name)() for name in MEASURES},
        "images": len(scores),
        "unlabelled_images": sum(map(math.isnan, scores.values())),
        "damaged_images": damaged,
        "per_class_iou": dict(zip(label_set.names, map(_number, confusion.iou().tolist()), strict=True)),
        "per_class_accuracy": dict(zip(label_set.names, map(_number, confusion.accuracy().tolist()), strict=True)),
        "subsets": {
            name: {
                "mean_iou": _number(confusion.mean_iou(indices)),
                "mean_accuracy": _number(confusion.mean_accuracy(indices)),
                "classes": len(indices),
            }
            for name, indices in members.items()
        },
    }


def _write_results(
    folder: Path,
    results: Mapping[str, Any],
    confusion: ConfusionMatrix,
    label_set: LabelSet,
    about: Mapping[str, Any],
    members: Mapping[str, Sequence[int]],
) -> None:
    write_json(folder / RESULTS_FILE, {**results, **about})
    index = yaml.safe_dump({"model-index": model_index(results, about)}, sort_keys=False)
    write_text(folder / "model-index.yml", index)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["index", "class", "iou", "accuracy", "pixels", "predicted_pixels", *members])
    columns = [results["per_class_iou"].values(), results["per_class_accuracy"].values()]
    columns += [confusion.counts.sum(1).tolist(), confusion.counts.sum(0).tolist()]
    for row, (name, *figures) in enumerate(zip(label_set.names, *columns, strict=True)):
        writer.writerow([row, name, *figures, *(int(row in indices) for indices in members.values())])
    write_text(folder / "per_class.csv", table.getvalue())
    with replacing_file(folder / "confusion_matrix.npz") as path, path.open("wb") as file:
        np.savez_compressed(file, names=np.array(label_set.names), counts=confusion.counts.numpy())
    where = f" on {Path(about['dataset']).stem}" if about.get("dataset") else ""
    title = f"{Path(about['model']).name}{where}: mean IoU {results['mean_iou']:.3f} ({results['images']} images)"
    try:
        plot_class_iou(results["per_class_iou"], folder / "per_class_iou.png", title=title)
    except ImportError as error:
        _logger.warning("per_class_iou.png was not drawn: %s", error)


def _number(value: float) -> float | None:
    """None for NaN, which JSON does not know."""
    return None if math.isnan(value) else value


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


__all__ = [
    "MEASURES",
    "choose_extremes",
    "draw_comparison",
    "evaluate",
    "find_subsets",
    "format_table",
    "model_index",
    "save_overlays",
]
