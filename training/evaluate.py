"""Evaluation on labelled images: streamed, shared between processes, continued where it was cut."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import math
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from modeling_san.modeling_san import SANForOpenVocabSegmentation
from modeling_san.processing import SANProcessor, normalize_labels
from modeling_san.processing.drawing import overlay
from modeling_san.processing.files import replacing_file, write_json, write_text
from modeling_san.processing.post_processing_san import resize_matrix
from modeling_san.training.data import to_arrays
from modeling_san.training.label_sets import LabelSet
from modeling_san.training.metrics import RESULTS_FILE, ConfusionMatrix
from modeling_san.training.plots import plot_class_iou
from modeling_san.training.processes import gather_objects

PER_CLASS_FILE = "per_class.csv"
CONFUSION_FILE = "confusion_matrix.npz"
PLOT_FILE = "per_class_iou.png"
MODEL_INDEX_FILE = "model-index.yml"
OVERLAYS_FOLDER = "overlays"
PROGRESS_FOLDER = "progress"

TTA_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
"""Working sizes of test-time augmentation: short sides 320 ... 1120 for a model that works at 640."""

MEASURES = {
    "mean_iou": "Mean IoU",
    "mean_accuracy": "Mean accuracy",
    "overall_accuracy": "Overall accuracy",
    "frequency_weighted_iou": "Frequency-weighted IoU",
}
"""Figures of all classes together, and how they are called."""

_BLOCK_FLOATS = 8 * 2**20
"""Numbers in one block of scores and masks, 32 MB."""

_STATE_FILE = "state.npz"
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
            `model-index.yml` and overlays of the best and worst images. What is done is kept there while the
            evaluation runs, and a run that was cut goes on from it: same model, data, options and processes only. All
            processes have to see the folder.
        tta: average the scores of six sizes, each with its mirror image.
        limit: evaluate the first images only.
        subsets: class names that get means of their own, by the name of the subset.
        progress: whether to show a progress bar.
        accelerator: shares the images between its processes: process r of P takes images r, r + P, ...
        class_embeds: `(classes, projection_dim)` of the names; by default those stored with the model where they are
            of the same names, else the names are encoded.
        overlays: how many of the best and how many of the worst images to draw into `output_dir`.
        save_every: seconds between saves of what is done.
        about: `model`, `dataset` and `split` as they are to be called in the results.

    Returns:
        `mean_iou`, `mean_accuracy`, `overall_accuracy`, `frequency_weighted_iou`, `images`, `unlabelled_images`
        (no pixel of theirs has a label), `per_class_iou` and `per_class_accuracy` by name (None for a class that does
        not occur), and the means of each subset in `subsets`; in every process the same.

    Raises:
        ValueError: where an image cannot be used, a subset names unknown classes, or no pixel has a label.
    """
    subset_indices = find_subsets(subsets or {}, label_set.names)
    rank, world_size = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    folder = None if output_dir is None else Path(output_dir)
    with _evaluating(model):
        segmenter = _Segmenter(model, processor, label_set, class_embeds, tta)
        run = _Run(label_set, images, rank, world_size, limit)
        if folder is not None:
            fingerprint = _fingerprint(segmenter, run)
            run.continue_in(_progress_folder(folder, rank, world_size), fingerprint, overlays, save_every)
        run.finish(segmenter, progress and rank == 0)
    confusion = run.state.confusion
    confusion.all_reduce()
    counted = gather_objects((run.state.done, run.state.unlabelled))
    extremes = [one for part in gather_objects(run.state.extremes) for one in part]
    if not confusion.counts.sum():
        raise ValueError("no pixel of the images has a label: there is nothing to measure.")
    results = {
        **{name: getattr(confusion, name)() for name in MEASURES},
        "images": sum(done for done, _ in counted),
        "unlabelled_images": sum(unlabelled for _, unlabelled in counted),
        "per_class_iou": _by_name(label_set.names, confusion.iou()),
        "per_class_accuracy": _by_name(label_set.names, confusion.accuracy()),
        "subsets": {
            name: {
                "mean_iou": _number(confusion.mean_iou(indices)),
                "mean_accuracy": _number(confusion.mean_accuracy(indices)),
                "classes": len(indices),
            }
            for name, indices in subset_indices.items()
        },
    }
    if folder is not None and rank == 0:
        about = {"model": getattr(model, "name_or_path", "") or "model", **(about or {})}
        _write_results(folder, results, confusion, label_set, {**about, "tta": tta, "limit": limit}, subset_indices)
        _draw_extremes(folder, extremes, overlays, label_set, world_size)
    if folder is not None and accelerator is not None:
        accelerator.wait_for_everyone()
    if folder is not None and rank == 0:
        shutil.rmtree(folder / PROGRESS_FOLDER, ignore_errors=True)
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
    with _evaluating(model):
        segmenter = _Segmenter(model, processor, label_set, class_embeds, tta=False)
        for index, example in enumerate(islice(iter(images), count)):
            image, label_map = _decode(example, label_set, index)
            drawing = draw_comparison(image, label_map, segmenter(image).cpu().numpy(), label_set)
            paths.append(_save_png(drawing, Path(folder) / f"image_{index:06d}.png"))
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
    ignored = true == label_set.ignore_index
    unpainted = len(names)
    shown = [np.where(ignored, unpainted, label_map) for label_map in (true, predicted)]
    nothing = np.full(true.shape, unpainted)
    score = _score(true, predicted, label_set)
    panels = {
        "image": overlay(image, nothing, names, opacity=0, legend=False),
        "truth": overlay(image, shown[0], names, opacity=0.7),
        f"prediction{score}": overlay(image, shown[1], names, opacity=0.7),
    }
    size = max(14, max(panels["image"].size) // 36)
    title = 2 * size
    width = sum(panel.width for panel in panels.values()) + _MARGIN * (len(panels) + 1)
    height = max(panel.height for panel in panels.values()) + title + 2 * _MARGIN
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    left = _MARGIN
    for name, panel in panels.items():
        pen.text((left, _MARGIN), name, fill=(32, 33, 36), font=ImageFont.load_default(size))
        sheet.paste(panel, (left, _MARGIN + title))
        left += panel.width + _MARGIN
    return sheet


def find_subsets(subsets: Mapping[str, Sequence[str]], names: Sequence[str]) -> dict[str, list[int]]:
    """
    Indices of the classes of each subset.

    Args:
        subsets: class names by the name of the subset.
        names: of all classes.

    Raises:
        ValueError: where a subset is empty, or names a class that there is not.
    """
    known = {normalize_labels([name])[0]: index for index, name in enumerate(names)}
    found = {}
    for subset, members in subsets.items():
        if not members:
            raise ValueError(f"subset {subset!r} is empty: name its classes.")
        wanted = normalize_labels(members)
        unknown = [name for name in wanted if name not in known]
        if unknown:
            more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            raise ValueError(
                f"subset {subset!r} names {', '.join(map(repr, unknown[:5]))}{more}, which the {len(names)} classes "
                "of the data set do not hold: write names as the label set does."
            )
        found[subset] = [known[name] for name in wanted]
    return found


def format_table(results: Mapping[str, Any]) -> str:
    """What `evaluate` returned, as an aligned table: a line for each class, then the means."""
    iou, accuracy = results["per_class_iou"], results["per_class_accuracy"]
    rows = [(name, iou[name], accuracy[name]) for name in iou]
    means = [("mean", results["mean_iou"], results["mean_accuracy"])]
    means += [
        (
            f"mean of {name} ({subset['classes']} class{'' if subset['classes'] == 1 else 'es'})",
            subset["mean_iou"],
            subset["mean_accuracy"],
        )
        for name, subset in results["subsets"].items()
    ]
    width = max(len(name) for name, *_ in [*rows, *means, ("frequency-weighted IoU",)]) + 2
    line = "-" * (width + 18)
    table = [f"{'class':<{width}}{'IoU':>9}{'accuracy':>9}", line]
    table += [f"{name:<{width}}{_cell(one)}{_cell(two)}" for name, one, two in rows]
    table += [line, *(f"{name:<{width}}{_cell(one)}{_cell(two)}" for name, one, two in means)]
    table.append(f"{'frequency-weighted IoU':<{width}}{_cell(results['frequency_weighted_iou'])}")
    table.append(f"{'overall accuracy':<{width}}{'':>9}{_cell(results['overall_accuracy'])}")
    return "\n".join(table)


# Segmenting


class _Segmenter:
    """Labels every pixel of an image with one of the classes."""

    def __init__(
        self,
        model: SANForOpenVocabSegmentation,
        processor: SANProcessor,
        label_set: LabelSet,
        class_embeds: Tensor | None,
        tta: bool,
    ) -> None:
        self.model = model
        self.processor = processor
        self.names = list(label_set.names)
        self.tta = tta
        self.class_embeds = self._stored_or_encoded() if class_embeds is None else class_embeds.to(model.device)
        if len(self.class_embeds) != len(self.names):
            raise ValueError(f"class_embeds are of {len(self.class_embeds)} classes and there are {len(self.names)}.")

    def __call__(self, image: Image.Image) -> Tensor:
        """Class of every pixel, `(height, width)` on the model's device."""
        if self.tta:
            return self._average_views(image)
        inputs = self.processor(images=image, return_tensors="pt").to(self.model.device)
        outputs = self.model(**inputs, class_embeds=self.class_embeds)
        [predicted] = self.processor.post_process_semantic_segmentation(outputs, target_sizes=[image.size[::-1]])
        return predicted

    def _stored_or_encoded(self) -> Tensor:
        stored: dict[Any, str] = dict(self.model.config.id2label or {})
        if self.model.config.has_stored_labels and stored == dict(enumerate(self.names)):
            return self.model.stored_class_embeds
        prompts = self.processor(text=self.names, return_tensors="pt").to(self.model.device)
        return self.model.get_class_embeds(prompts["input_ids"], prompts["attention_mask"])

    def _average_views(self, image: Image.Image) -> Tensor:
        """The best class by the mean score of several sizes and their mirror images."""
        mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        views = []
        for size in tta_sizes(dict(self.processor.image_processor.size)):
            inputs = self.processor(images=[image, mirrored], size=size, return_tensors="pt").to(self.model.device)
            outputs = self.model(**inputs, class_embeds=self.class_embeds)
            [height, width] = inputs["image_sizes"][0].tolist()
            padded_height, padded_width = inputs["pixel_values"].shape[-2:]
            rows, columns = outputs.masks_queries_logits.shape[-2:]
            for flip in (0, 1):
                across = resize_matrix(columns, padded_width, width, image.width)
                views.append(
                    _View(
                        masks=outputs.masks_queries_logits[flip].float(),
                        probabilities=outputs.class_queries_logits[flip].float().softmax(-1)[:, :-1].T.contiguous(),
                        down=resize_matrix(rows, padded_height, height, image.height).to(self.model.device),
                        across=(across.flip(0) if flip else across).T.to(self.model.device),
                    )
                )
        return _best_of_mean(views, (image.height, image.width))


@dataclass(frozen=True)
class _View:
    """
    What the model makes of one view of an image.

    Attributes:
        masks: mask logits `(queries, h, w)`.
        probabilities: of the classes, `(classes, queries)`.
        down: brings the masks' rows to the image's, `(height, h)`.
        across: brings the masks' columns to the image's, `(w, width)`, mirrored where the view is.
    """

    masks: Tensor
    probabilities: Tensor
    down: Tensor
    across: Tensor


def tta_sizes(size: Mapping[str, int]) -> list[dict[str, int]]:
    """Sizes of the views of test-time augmentation (paper, section 4.1), in proportion to the model's own `size`."""
    return [{name: max(1, round(length * scale)) for name, length in size.items() if length} for scale in TTA_SCALES]


def _best_of_mean(views: Sequence[_View], target: tuple[int, int]) -> Tensor:
    """
    The class of every pixel with the best mean score, `target` in size.

    The scores of all classes at all pixels never exist at once: rows of pixels are done a block at a time.
    """
    height, width = target
    classes, queries = views[0].probabilities.shape
    best = torch.empty(target, dtype=torch.int64, device=views[0].masks.device)
    step = max(1, _BLOCK_FLOATS // ((classes + queries) * width))
    with torch.autocast(best.device.type, enabled=False):
        for start in range(0, height, step):
            block = best[start : start + step]
            scores = torch.zeros(classes, block.numel(), device=best.device)
            for view in views:
                down = view.down[start : start + step]
                used = down.any(0).nonzero()
                rows = slice(int(used[0]), int(used[-1]) + 1)
                masks = (down[:, rows] @ (view.masks[:, rows] @ view.across)).sigmoid_()
                scores.addmm_(view.probabilities, masks.flatten(1))
            block.copy_(scores.argmax(0).view_as(block))
    return best


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


# Going through the images


@dataclass(frozen=True)
class _Extreme:
    """An image that is kept to be drawn, because it is among the best or the worst: its mean IoU and its file."""

    score: float
    index: int
    path: str


@dataclass(frozen=True)
class _State:
    """What is done. An image's part is added at once, so that being stopped never counts half of it."""

    confusion: ConfusionMatrix
    done: int = 0
    unlabelled: int = 0
    extremes: tuple[_Extreme, ...] = ()


class _Run:
    """One process's share of the images."""

    def __init__(self, label_set: LabelSet, images: Any, rank: int, world_size: int, limit: int | None) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"limit is {limit}: pass at least 1, or None for all images.")
        self.label_set = label_set
        self.images = images
        self.rank = rank
        self.world_size = world_size
        self.limit = limit
        self.state = _State(self._no_counts())
        self.folder: Path | None = None
        self.fingerprint = ""
        self.overlays = 0
        self.save_every = math.inf

    def continue_in(self, folder: Path, fingerprint: str, overlays: int, save_every: float) -> None:
        """Keep what is done in `folder`, and go on from what the same run has left there."""
        self.folder, self.fingerprint, self.overlays, self.save_every = folder, fingerprint, overlays, save_every
        folder.mkdir(parents=True, exist_ok=True)
        self._load()
        # What was written, or half written, after the last save
        self._remove_unused()

    def finish(self, segmenter: _Segmenter, progress: bool) -> None:
        """Go through the images that are left."""
        saved = monotonic()
        bar = tqdm(
            total=self._length(), initial=self.state.done, desc="evaluating", unit="image", disable=not progress
        )
        try:
            for index, example in self._examples():
                self._count(segmenter, example, index)
                bar.update()
                if monotonic() - saved >= self.save_every:
                    self._save()
                    saved = monotonic()
        finally:
            bar.close()
            self._save()

    def _examples(self) -> Iterator[tuple[int, Any]]:
        """Index and example of each image of this process that is not done."""
        first = self.rank + self.state.done * self.world_size
        left = None if self.limit is None else len(range(first, self.limit, self.world_size))
        for place, example in enumerate(islice(_examples_from(self.images, first, self.world_size), left)):
            yield first + place * self.world_size, example

    def _length(self) -> int | None:
        """How many images this process has, if that is known."""
        if not hasattr(self.images, "__len__"):
            return None
        length = len(self.images) if self.limit is None else min(self.limit, len(self.images))
        return len(range(self.rank, length, self.world_size))

    def _count(self, segmenter: _Segmenter, example: Any, index: int) -> None:
        image, label_map = _decode(example, self.label_set, index)
        predicted = segmenter(image)
        confusion = self._no_counts()
        confusion.update(predicted.cpu(), torch.from_numpy(label_map))
        extremes = self.state.extremes
        is_labelled = bool(confusion.counts.any())
        if self.overlays and is_labelled:
            extremes = self._choose(confusion.mean_iou(), index, image, label_map, predicted)
        confusion.merge(self.state.confusion)
        self.state = _State(confusion, self.state.done + 1, self.state.unlabelled + (not is_labelled), extremes)

    def _choose(
        self, score: float, index: int, image: Image.Image, label_map: np.ndarray, predicted: Tensor
    ) -> tuple[_Extreme, ...]:
        """Keep the image if it is among the best or worst so far, and forget those that no longer are."""
        assert self.folder is not None
        new = _Extreme(score, index, f"{index:06d}.npz")
        best, worst = choose_extremes([*self.state.extremes, new], self.overlays)
        kept = {*best, *worst}
        if new in kept:
            # Drawn at the end: most of those kept now will not be
            with replacing_file(self.folder / new.path) as path, path.open("wb") as file:
                true, best_classes = label_map.astype(np.uint16), predicted.cpu().numpy().astype(np.uint16)
                np.savez(file, image=np.asarray(image), true=true, predicted=best_classes)
        return tuple(one for one in (*self.state.extremes, new) if one in kept)

    def _no_counts(self) -> ConfusionMatrix:
        return ConfusionMatrix(len(self.label_set.names), self.label_set.ignore_index)

    def _save(self) -> None:
        if self.folder is None:
            return
        about = {
            "fingerprint": self.fingerprint,
            "done": self.state.done,
            "unlabelled": self.state.unlabelled,
            "extremes": [[one.score, one.index, one.path] for one in self.state.extremes],
        }
        with replacing_file(self.folder / _STATE_FILE) as path, path.open("wb") as file:
            np.savez(file, about=np.array(json.dumps(about)), table=self.state.confusion.table.numpy())
        # Not before: until then the older state named them
        self._remove_unused()

    def _remove_unused(self) -> None:
        """Delete images that are no longer among the best and worst."""
        assert self.folder is not None
        kept = {one.path for one in self.state.extremes} | {_STATE_FILE}
        for path in self.folder.iterdir():
            if path.name not in kept:
                path.unlink()

    def _load(self) -> None:
        assert self.folder is not None
        try:
            with np.load(self.folder / _STATE_FILE, allow_pickle=False) as saved:
                about, table = json.loads(str(saved["about"])), torch.from_numpy(saved["table"])
                fingerprint = about["fingerprint"]
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            _logger.warning("%s cannot be read (%s): the evaluation begins anew.", self.folder / _STATE_FILE, error)
            return
        if fingerprint != self.fingerprint:
            return
        confusion = self._no_counts()
        confusion.table = table
        extremes = tuple(_Extreme(*fields) for fields in about["extremes"])
        self.state = _State(confusion, about["done"], about["unlabelled"], extremes)


def choose_extremes(images: Sequence[_Extreme], count: int) -> tuple[list[_Extreme], list[_Extreme]]:
    """The best and the worst, `count` of each at most and none twice; ties go to the earlier image."""
    by_score = sorted(images, key=lambda one: (-one.score, one.index))
    worst = sorted(by_score[count:], key=lambda one: (one.score, one.index))
    return by_score[:count], worst[:count]


def _examples_from(images: Any, first: int, step: int = 1) -> Iterator[Any]:
    """Every `step`-th example from the `first` on."""
    if hasattr(images, "__len__"):
        return (images[index] for index in range(first, len(images), step))
    # Data sets skip examples without decoding them where they can
    rest = images.skip(first) if first and hasattr(images, "skip") else islice(iter(images), first, None)
    return islice(iter(rest), 0, None, step)


def _decode(example: Mapping[str, Any], label_set: LabelSet, index: int) -> tuple[Image.Image, np.ndarray]:
    try:
        return to_arrays(example, label_set)
    except (OSError, ValueError) as error:
        raise ValueError(f"example {index}: {error}") from error


# Fingerprint of a run


def _progress_folder(folder: Path, rank: int, world_size: int) -> Path:
    return folder / PROGRESS_FOLDER / f"{rank:05d}-of-{world_size:05d}"


def _fingerprint(segmenter: _Segmenter, run: _Run) -> str:
    """Says whether two runs would count the same: hash of the model, the data set and the options."""
    processor = segmenter.processor
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in segmenter.model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes_of(tensor))
    digest.update(_bytes_of(segmenter.class_embeds))
    options = {
        "config": segmenter.model.config.to_json_string(use_diff=False),
        "device": segmenter.model.device.type,
        "processor": processor.image_processor.to_json_string(),
        "labels": repr(run.label_set),
        "tta": segmenter.tta,
        "limit": run.limit,
        "processes": run.world_size,
        "images": len(run.images) if hasattr(run.images, "__len__") else None,
        "data": getattr(run.images, "_fingerprint", None),
    }
    digest.update(json.dumps(options, sort_keys=True, default=str).encode())
    for example in islice(_examples_from(run.images, 0), 1):
        image, label_map = _decode(example, run.label_set, 0)
        digest.update(image.tobytes())
        digest.update(label_map.tobytes())
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


# Results


def _write_results(
    folder: Path,
    results: Mapping[str, Any],
    confusion: ConfusionMatrix,
    label_set: LabelSet,
    about: Mapping[str, Any],
    subsets: Mapping[str, Sequence[int]],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RESULTS_FILE, {**results, **about})
    write_text(folder / PER_CLASS_FILE, _per_class_csv(results, confusion, subsets))
    write_text(
        folder / MODEL_INDEX_FILE, yaml.safe_dump({"model-index": model_index(results, about)}, sort_keys=False)
    )
    with replacing_file(folder / CONFUSION_FILE) as path, path.open("wb") as file:
        np.savez_compressed(file, names=np.array(label_set.names), counts=confusion.counts.numpy())
    try:
        plot_class_iou(results["per_class_iou"], folder / PLOT_FILE, title=_plot_title(results, about))
    except ImportError as error:
        _logger.warning("%s was not drawn: %s", PLOT_FILE, error)


def _per_class_csv(
    results: Mapping[str, Any], confusion: ConfusionMatrix, subsets: Mapping[str, Sequence[int]]
) -> str:
    iou, accuracy = results["per_class_iou"], results["per_class_accuracy"]
    pixels, predicted = confusion.counts.sum(1).tolist(), confusion.counts.sum(0).tolist()
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["index", "class", "iou", "accuracy", "pixels", "predicted_pixels", *subsets])
    for index, name in enumerate(iou):
        membership = [int(index in members) for members in subsets.values()]
        writer.writerow([index, name, iou[name], accuracy[name], pixels[index], predicted[index], *membership])
    return file.getvalue()


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
    args = {name: about[name] for name in ("limit", "tta") if about.get(name)}
    return eval_results_to_model_index(
        Path(str(about.get("model") or "model")).name,
        [
            EvalResult(
                task_type="image-segmentation",
                task_name="Semantic segmentation",
                dataset_type=dataset_type,
                dataset_name=Path(dataset).stem,
                dataset_split=about.get("split"),
                dataset_args=args or None,
                metric_type=name,
                metric_name=title,
                metric_value=round(value, 6),
            )
            for name, title, value in measures
            if value is not None
        ],
    )


def _plot_title(results: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    where = f" on {Path(about['dataset']).stem}" if about.get("dataset") else ""
    return f"{Path(about['model']).name}{where}: mean IoU {results['mean_iou']:.3f} ({results['images']} images)"


def _draw_extremes(
    folder: Path, extremes: Sequence[_Extreme], count: int, label_set: LabelSet, world_size: int
) -> None:
    """Draw the best and worst images of all processes."""
    target = folder / OVERLAYS_FOLDER
    for kind in ("best", "worst"):
        for path in target.glob(f"{kind}_*.png"):
            path.unlink()
    # Runs on another number of processes may have left folders beside
    kept = (folder / PROGRESS_FOLDER).glob(f"*-of-{world_size:05d}/*.npz")
    files = {path.name: path for path in kept}
    for kind, chosen in zip(("best", "worst"), choose_extremes(extremes, count), strict=True):
        for place, one in enumerate(chosen, start=1):
            with np.load(files[one.path], allow_pickle=False) as saved:
                image, true, predicted = (saved[name] for name in ("image", "true", "predicted"))
            drawing = draw_comparison(Image.fromarray(image), true, predicted, label_set)
            _save_png(drawing, target / f"{kind}_{place}_image_{one.index:06d}.png")


def _score(true: np.ndarray, predicted: np.ndarray, label_set: LabelSet) -> str:
    """How good one image's prediction is, for its title."""
    confusion = ConfusionMatrix(len(label_set.names), label_set.ignore_index)
    confusion.update(torch.from_numpy(predicted.astype(np.int64)), torch.from_numpy(true.astype(np.int64)))
    if not confusion.counts.any():
        return ""
    return f", mean IoU {confusion.mean_iou():.2f}, {confusion.overall_accuracy():.0%} of the pixels right"


def _save_png(image: Image.Image, path: Path) -> Path:
    with replacing_file(path) as beside:
        image.save(beside, format="PNG")
    return path


def _by_name(names: Sequence[str], values: Tensor) -> dict[str, float | None]:
    return {name: _number(value) for name, value in zip(names, values.tolist(), strict=True)}


def _number(value: float) -> float | None:
    """None for NaN, which JSON does not know."""
    return None if math.isnan(value) else value


def _cell(value: float | None) -> str:
    return f"{'-' if value is None else format(value, '.4f'):>9}"


__all__ = [
    "MEASURES",
    "TTA_SCALES",
    "draw_comparison",
    "evaluate",
    "find_subsets",
    "format_table",
    "model_index",
    "save_overlays",
    "tta_sizes",
]
