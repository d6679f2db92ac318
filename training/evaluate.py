"""Evaluation on labelled images: streamed, shared between processes, continued where it was cut."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
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
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from modeling_san.modeling_san import SANForOpenVocabSegmentation
from modeling_san.processing import SANProcessor, normalize_labels
from modeling_san.processing.drawing import overlay
from modeling_san.processing.files import remove_unfinished, replacing_file, write_json, write_text
from modeling_san.processing.segmenter import Segmenter, Vocabulary
from modeling_san.processing.wording_san import listed, one_line
from modeling_san.training.data import read_examples
from modeling_san.training.label_sets import LabelSet
from modeling_san.training.metrics import RESULTS_FILE, ConfusionMatrix
from modeling_san.training.plots import plot_class_iou

PER_CLASS_FILE = "per_class.csv"
CONFUSION_FILE = "confusion_matrix.npz"
PLOT_FILE = "per_class_iou.png"
MODEL_INDEX_FILE = "model-index.yml"
OVERLAYS_FOLDER = "overlays"
PROGRESS_FOLDER = ".evaluation-in-progress"

MEASURES = {
    "mean_iou": "Mean IoU",
    "mean_accuracy": "Mean accuracy",
    "overall_accuracy": "Overall accuracy",
    "frequency_weighted_iou": "Frequency-weighted IoU",
}
"""Figures of all classes together, and how they are called."""

_PROGRESS_FILE = re.compile(r"\d{5}-of-\d{5}\.npz")
_OVERLAY_FILE = re.compile(r"(best|worst)_\d+_image_\d+\.png")
_MARGIN = 16

_logger = logging.getLogger(__name__)


def evaluate(
    model: SANForOpenVocabSegmentation,
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
            `model-index.yml` and overlays of the best and worst images. What is done is kept in a hidden folder there
            while the evaluation runs, and a run that was cut goes on from it: same model, data, options and processes
            only. All processes have to see the folder.
        tta: average the scores of six sizes, each with its mirror image.
        limit: evaluate the first images only.
        subsets: class names that get means of their own, by the name of the subset.
        progress: whether to show a progress bar.
        accelerator: shares the images between its processes: process r of P takes images r, r + P, ...
        class_embeds: `(classes, projection_dim)` of the names; by default those stored with the model where they are
            of the same names, else the names are encoded.
        overlays: how many of the best and how many of the worst images to draw into `output_dir`; so many are held in
            memory.
        save_every: seconds between saves of what is done.
        about: `model`, `dataset` and `split` as they are to be called in the results.

    Returns:
        `mean_iou`, `mean_accuracy`, `overall_accuracy`, `frequency_weighted_iou`, `images`, `unlabelled_images`
        (no pixel of theirs has a label), `per_class_iou` and `per_class_accuracy` by name (None for a class that does
        not occur), and the means of each subset in `subsets`; in every process the same.

    Raises:
        ValueError: an image cannot be used, a subset names unknown classes, or no pixel has a label.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}: pass at least 1, or None for all images.")
    members = find_subsets(subsets or {}, label_set.names)
    rank, processes = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    folder = None if output_dir is None else Path(output_dir)
    about = {"model": getattr(model, "name_or_path", "") or "model", **(about or {})}
    source = f"{about['dataset']}, " if about.get("dataset") else ""
    tally, save = _Tally(_no_counts(label_set)), None
    segmenter = Segmenter(model, processor)
    with _evaluating(model):
        vocabulary = _choose_vocabulary(segmenter, label_set, class_embeds)
        if folder is not None:
            file = folder / PROGRESS_FOLDER / f"{rank:05d}-of-{processes:05d}.npz"
            fingerprint = _fingerprint(segmenter, vocabulary, label_set, images, tta, limit, processes)
            tally, save = _Tally.load(file, fingerprint) or tally, partial(_Tally.save, path=file, mark=fingerprint)
        first = rank + tally.done * processes
        examples = tqdm(
            read_examples(images, label_set, first=first, step=processes, stop=limit, source=source),
            total=_share_length(images, limit, rank, processes),
            initial=tally.done,
            desc="evaluating",
            unit="image",
            disable=not progress or rank > 0,
        )
        tally = _count(
            tally,
            examples,
            lambda image: segmenter(image, vocabulary, tta=tta)[0].label_map,
            overlays=overlays if folder is not None else 0,
            save=save,
            save_every=save_every,
        )

    parts = [(tally.confusion.table, tally.done, tally.unlabelled, tally.scores())]
    parts = parts if accelerator is None else gather_object(parts)
    confusion = _no_counts(label_set)
    confusion.table = torch.stack([table for table, *_ in parts]).sum(0)
    if not confusion.counts.sum():
        raise ValueError("no pixel of the images has a label: there is nothing to measure.")
    results = {
        **{name: getattr(confusion, name)() for name in MEASURES},
        "images": sum(done for _, done, _, _ in parts),
        "unlabelled_images": sum(unlabelled for _, _, unlabelled, _ in parts),
        "per_class_iou": _by_name(label_set, confusion.iou()),
        "per_class_accuracy": _by_name(label_set, confusion.accuracy()),
        "subsets": {
            name: {
                "mean_iou": _number(confusion.mean_iou(indices)),
                "mean_accuracy": _number(confusion.mean_accuracy(indices)),
                "classes": len(indices),
            }
            for name, indices in members.items()
        },
    }
    if folder is not None:
        wait = accelerator.wait_for_everyone if accelerator is not None else lambda: None
        if rank == 0:
            _write_results(folder, results, confusion, label_set, {**about, "tta": tta, "limit": limit}, members)
            _remove(folder / OVERLAYS_FOLDER, _OVERLAY_FILE)
        wait()
        scores = {index: score for *_, scores in parts for index, score in scores.items()}
        _draw_extremes(folder / OVERLAYS_FOLDER, choose_extremes(scores, overlays), tally, label_set)
        wait()
        if rank == 0:
            remove_unfinished(folder / PROGRESS_FOLDER)
            _remove(folder / PROGRESS_FOLDER, _PROGRESS_FILE)
    return results


def save_overlays(
    model: SANForOpenVocabSegmentation,
    processor: SANProcessor,
    images: Any,
    label_set: LabelSet,
    folder: str | os.PathLike,
    *,
    count: int = 4,
    class_embeds: Tensor | None = None,
) -> list[Path]:
    """
    Draw the first images with their label maps and what the model makes of them.

    Args:
        model: any model; what it has stored is left alone.
        processor: its processor.
        images: examples with `image` and `annotation`.
        label_set: the classes, and how label maps store them.
        folder: made if missing; one PNG for each image goes there.
        count: how many images.
        class_embeds: as for `evaluate`.

    Returns:
        the files.
    """
    paths = []
    segmenter = Segmenter(model, processor)
    with _evaluating(model):
        vocabulary = _choose_vocabulary(segmenter, label_set, class_embeds)
        for index, image, true in read_examples(images, label_set, stop=count):
            [segmentation] = segmenter(image, vocabulary)
            paths.append(Path(folder) / f"image_{index:06d}.png")
            _Example(0.0, np.asarray(image), true, segmentation.label_map.numpy()).draw(paths[-1], label_set)
    return paths


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
    confusion = _no_counts(label_set)
    confusion.update(torch.from_numpy(predicted.astype(np.int64)), torch.from_numpy(true.astype(np.int64)))
    title = "prediction"
    if confusion.counts.any():
        title += f", mean IoU {confusion.mean_iou():.2f}, {confusion.overall_accuracy():.0%} of the pixels right"
    panels = {
        "image": overlay(image, np.full(true.shape, unpainted), names, opacity=0, legend=False),
        "truth": overlay(image, np.where(ignored, unpainted, true), names, opacity=0.7),
        title: overlay(image, np.where(ignored, unpainted, predicted), names, opacity=0.7),
    }
    size = max(14, max(panels["image"].size) // 36)
    width = sum(panel.width + _MARGIN for panel in panels.values()) + _MARGIN
    height = max(panel.height for panel in panels.values()) + 2 * size + 2 * _MARGIN
    sheet = Image.new("RGB", (width, height), "white")
    pen, left = ImageDraw.Draw(sheet), _MARGIN
    for name, panel in panels.items():
        pen.text((left, _MARGIN), name, fill=(32, 33, 36), font=ImageFont.load_default(size))
        sheet.paste(panel, (left, _MARGIN + 2 * size))
        left += panel.width + _MARGIN
    return sheet


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
    """The best and the worst, `count` of each at most and none twice; ties go to the smaller index."""
    best_first = sorted(scores, key=lambda index: (-scores[index], index))
    worst_first = sorted(best_first[count:], key=lambda index: (scores[index], index))
    return best_first[:count], worst_first[:count]


def format_table(results: Mapping[str, Any]) -> str:
    """What `evaluate` returned, as an aligned table: a line for each class, then the means."""
    iou, accuracy = results["per_class_iou"], results["per_class_accuracy"]
    rows = [(name, _cell(iou[name]), _cell(accuracy[name])) for name in iou]
    means = [("mean", _cell(results["mean_iou"]), _cell(results["mean_accuracy"]))]
    for name, subset in results["subsets"].items():
        classes = f"{subset['classes']} class{'' if subset['classes'] == 1 else 'es'}"
        means.append((f"mean of {name} ({classes})", _cell(subset["mean_iou"]), _cell(subset["mean_accuracy"])))
    means.append(("frequency-weighted IoU", _cell(results["frequency_weighted_iou"]), ""))
    means.append(("overall accuracy", "", _cell(results["overall_accuracy"])))
    width = max(len(name) for name, *_ in [*rows, *means]) + 2
    lines = [f"{name:<{width}}{one:>9}{two:>9}".rstrip() for name, one, two in [("class", "IoU", "accuracy"), *rows]]
    lines.insert(1, "-" * (width + 18))
    lines += [lines[1], *(f"{name:<{width}}{one:>9}{two:>9}".rstrip() for name, one, two in means)]
    return "\n".join(lines)


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


# Segmenting


@contextmanager
def _evaluating(model: SANForOpenVocabSegmentation) -> Iterator[None]:
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


def _no_counts(label_set: LabelSet) -> ConfusionMatrix:
    return ConfusionMatrix(len(label_set), label_set.ignore_index)


def _share_length(images: Any, limit: int | None, rank: int, processes: int) -> int | None:
    """How many images a process has, if that is known."""
    lengths = [limit, len(images) if hasattr(images, "__len__") else None]
    known = [length for length in lengths if length is not None]
    return len(range(rank, min(known), processes)) if known else None


# What is done


@dataclass(frozen=True)
class _Example:
    """An image that is kept to be drawn, because it is among the best or the worst by its mean IoU."""

    score: float
    image: np.ndarray
    true: np.ndarray
    predicted: np.ndarray

    def draw(self, path: Path, label_set: LabelSet) -> None:
        """Write the comparison as a PNG."""
        drawing = draw_comparison(Image.fromarray(self.image), self.true, self.predicted, label_set)
        with replacing_file(path) as beside:
            drawing.save(beside, format="PNG")


@dataclass(frozen=True)
class _Tally:
    """
    What one process has counted. An image's part is added at once, so that being stopped never counts half of it.

    Attributes:
        confusion: pixels of each class.
        done: images counted.
        unlabelled: those of them without any label.
        extremes: the best and worst by their index.
    """

    confusion: ConfusionMatrix
    done: int = 0
    unlabelled: int = 0
    extremes: Mapping[int, _Example] = field(default_factory=dict)

    def plus(self, index: int, image: Image.Image, true: np.ndarray, predicted: Tensor, overlays: int) -> _Tally:
        """With one image more; at most twice `overlays` are kept to be drawn."""
        confusion = ConfusionMatrix(self.confusion.num_labels, self.confusion.ignore_index)
        confusion.update(predicted, torch.from_numpy(true))
        is_labelled = bool(confusion.counts.any())
        extremes = self.extremes
        if overlays and is_labelled:
            maps = true.astype(np.uint16), predicted.numpy().astype(np.uint16)
            extremes = {**extremes, index: _Example(confusion.mean_iou(), np.asarray(image), *maps)}
            best, worst = choose_extremes({key: one.score for key, one in extremes.items()}, overlays)
            extremes = {key: extremes[key] for key in (*best, *worst)}
        confusion.merge(self.confusion)
        return _Tally(confusion, self.done + 1, self.unlabelled + (not is_labelled), extremes)

    def scores(self) -> dict[int, float]:
        """Mean IoU of the images that are kept, by index."""
        return {index: one.score for index, one in self.extremes.items()}

    def save(self, path: Path, mark: str) -> None:
        """Write everything into one file, which `load` takes for a run of the same mark alone."""
        about = {"mark": mark, "done": self.done, "unlabelled": self.unlabelled}
        about |= {"ignore_index": self.confusion.ignore_index, "scores": self.scores()}
        arrays = {
            f"{name}_{index}": getattr(one, name)
            for index, one in self.extremes.items()
            for name in ("image", "true", "predicted")
        }
        with replacing_file(path) as beside, beside.open("wb") as file:
            np.savez(file, about=np.array(json.dumps(about)), table=self.confusion.table.numpy(), **arrays)

    @classmethod
    def load(cls, path: Path, mark: str) -> _Tally | None:
        """What a run of the same mark has saved; None where there is nothing of use."""
        try:
            with np.load(path, allow_pickle=False) as saved:
                about = json.loads(str(saved["about"]))
                if about["mark"] != mark:
                    return None
                table = torch.from_numpy(saved["table"])
                confusion = ConfusionMatrix(len(table) - 1, about["ignore_index"])
                confusion.table = table
                extremes = {
                    int(index): _Example(score, *(saved[f"{name}_{index}"] for name in ("image", "true", "predicted")))
                    for index, score in about["scores"].items()
                }
                return cls(confusion, about["done"], about["unlabelled"], extremes)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            _logger.warning("%s cannot be read (%s): the evaluation begins anew.", path, one_line(error))
            return None


def _count(
    tally: _Tally,
    examples: Iterable[tuple[int, Image.Image, np.ndarray]],
    segment: Callable[[Image.Image], Tensor],
    *,
    overlays: int,
    save: Callable[[_Tally], None] | None,
    save_every: float,
) -> _Tally:
    """Add examples to what is done, and save it from time to time and at the end, whatever ends it."""
    saved = monotonic()
    try:
        for index, image, true in examples:
            tally = tally.plus(index, image, true, segment(image), overlays)
            if save is not None and monotonic() - saved >= save_every:
                save(tally)
                saved = monotonic()
    finally:
        if save is not None:
            save(tally)
    return tally


def _fingerprint(
    segmenter: Segmenter,
    vocabulary: Vocabulary,
    label_set: LabelSet,
    images: Any,
    tta: bool,
    limit: int | None,
    processes: int,
) -> str:
    """Says whether two runs would count the same: hash of the model, the data set and the options."""
    model, digest = segmenter.model, hashlib.blake2b(digest_size=16)
    for name, tensor in {**model.state_dict(), "class_embeds": vocabulary.class_embeds}.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    options = {
        "config": model.config.to_json_string(use_diff=False),
        "device": model.device.type,
        "processor": segmenter.processor.image_processor.to_json_string(),
        "labels": repr(label_set),
        "tta": tta,
        "limit": limit,
        "processes": processes,
        "images": len(images) if hasattr(images, "__len__") else None,
        "data": getattr(images, "_fingerprint", None),
    }
    digest.update(json.dumps(options, sort_keys=True, default=str).encode())
    for _, image, label_map in read_examples(images, label_set, stop=1):
        digest.update(image.tobytes() + label_map.tobytes())
    return digest.hexdigest()


def _remove(folder: Path, names: re.Pattern[str]) -> None:
    """Delete files that a run has made, and their folder if nothing of anybody else's is in it."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if names.fullmatch(path.name):
            path.unlink()
    with suppress(OSError):
        folder.rmdir()


# Results


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
    write_text(folder / MODEL_INDEX_FILE, index)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["index", "class", "iou", "accuracy", "pixels", "predicted_pixels", *members])
    columns = [results["per_class_iou"].values(), results["per_class_accuracy"].values()]
    columns += [confusion.counts.sum(1).tolist(), confusion.counts.sum(0).tolist()]
    for row, (name, *figures) in enumerate(zip(label_set.names, *columns, strict=True)):
        writer.writerow([row, name, *figures, *(int(row in indices) for indices in members.values())])
    write_text(folder / PER_CLASS_FILE, table.getvalue())
    with replacing_file(folder / CONFUSION_FILE) as path, path.open("wb") as file:
        np.savez_compressed(file, names=np.array(label_set.names), counts=confusion.counts.numpy())
    where = f" on {Path(about['dataset']).stem}" if about.get("dataset") else ""
    title = f"{Path(about['model']).name}{where}: mean IoU {results['mean_iou']:.3f} ({results['images']} images)"
    try:
        plot_class_iou(results["per_class_iou"], folder / PLOT_FILE, title=title)
    except ImportError as error:
        _logger.warning("%s was not drawn: %s", PLOT_FILE, error)


def _draw_extremes(
    folder: Path, chosen: tuple[Sequence[int], Sequence[int]], tally: _Tally, label_set: LabelSet
) -> None:
    """Draw those of the best and worst images that this process has."""
    for kind, indices in zip(("best", "worst"), chosen, strict=True):
        for place, index in enumerate(indices, start=1):
            if index in tally.extremes:
                tally.extremes[index].draw(folder / f"{kind}_{place}_image_{index:06d}.png", label_set)


def _by_name(label_set: LabelSet, values: Tensor) -> dict[str, float | None]:
    return dict(zip(label_set.names, map(_number, values.tolist()), strict=True))


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
