# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""The model card: filled from what lies in a model's folder, so that it says nothing that has no source."""

from __future__ import annotations

import json
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from modeling_san.auto import classes_of_type
from modeling_san.builtin import describe_groups, is_drawn_world, load_examples, words
from modeling_san.configuration_open_vocabulary import OpenVocabularyConfig
from modeling_san.configuration_san import SANConfig
from modeling_san.conversion import RELEASED_CONFIGS
from modeling_san.processing.fingerprints import digest_weight_files
from modeling_san.processing.wording_san import listed, one_line
from modeling_san.training.callbacks import METRICS_FILE, read_metrics
from modeling_san.training.evaluate import MEASURES, model_index
from modeling_san.training.metrics import RESULTS_FILE
from modeling_san.training.recipe import read_recipe
from modeling_san.training.run import RECIPE_FILE

CARD_FILE = "README.md"
EXAMPLE_FILES = ("example.jpg", "example.jpeg", "example.png")
"""Names by which a folder may bring an image for the Hub's widget."""

_TEMPLATE = Path(__file__).parent / "model_card_template.md"
_DRAWN_EXAMPLE = Path(__file__).parent / "assets" / "demo.png"
# An image that the Hub keeps for examples like this one
_HUB_EXAMPLE = "https://huggingface.co/datasets/mishig/sample_images/resolve/main/tiger.jpg"
_HUB_WORDS = ["tiger", "grass"]

_TAGS = ["open-vocabulary", "semantic-segmentation", "clip"]
_PAPERS = {"san": "arxiv:2302.12242"}
_KEPT_METADATA = ("license", "license_name", "license_link", "base_model", "datasets", "language")
"""What a person may have written into the metadata of an older card, and what no other file says."""

_RECIPE_FIELDS = (
    *("dataset", "split", "labels", "trainable", "templates", "steps", "batch_size", "learning_rate", "weight_decay"),
    *("warmup_steps", "short_side", "crop_size", "mixed_precision", "seed"),
)
_MAY_BE_FILES = ("dataset", "labels", "templates")
_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_LISTED_LABELS, _LISTED_CLASSES, _LONGEST_NAME = 24, 5, 80

PUBLISHED_BENCHMARKS = ("COCO-Stuff 171", "ADE-847", "PC-459", "ADE-150", "PC-59", "VOC-20")
PUBLISHED_RESULTS: dict[int, dict[str, tuple[float | None, ...]]] = {
    768: {
        "SAN ViT-B/16, log of the released checkpoint": (41.93, 10.21, 16.71, 27.56, 54.07, 93.95),
        "SAN ViT-B/16, paper (mean of runs)": (None, 10.1, 12.6, 27.5, 53.8, 94.0),
    },
    1024: {
        "SAN ViT-L/14, log of the released checkpoint": (45.57, 12.96, 20.83, 31.93, 57.53, 95.18),
        "SAN ViT-L/14, paper (mean of runs)": (None, 12.4, 15.7, 32.1, 57.7, 94.6),
    },
}
"""Mean IoU in percent that the authors published, by CLIP's width."""


def make_model_card(
    folder: str | os.PathLike,
    *,
    repo_id: str | None = None,
    results: Iterable[str | os.PathLike] = (),
    license: str | None = None,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
) -> ModelCard:
    """
    Describe a model by what its folder holds: configuration, weights, record of training, measurements.

    Args:
        folder: that `save_pretrained`, `san train` or `san convert` wrote; `results.json` in it is read as well.
        repo_id: where it is published, for the examples; the folder's name by default.
        results: further measurements: what `san evaluate` wrote, folders or `results.json` files. Those of other
            weights, or that name another model, are shown under its name, and stay out of the metadata.
        license: of the weights, as the Hub writes it, "apache-2.0" for example; by default what the folder's README.md
            says, else the card says that it is not stated.
        base_model: Hub id of the model that these weights were made from.
        datasets: Hub ids of the data sets that it was trained on.

    Returns:
        the card; `str(card)` is a README.md.

    Raises:
        ValueError: where the folder holds no model, or one of the files cannot be read.
    """
    folder = Path(folder)
    if repo_id is not None:
        validate_repo_id(repo_id)
    config = read_config(folder)
    source = repo_id or folder.resolve().name
    name = re.sub(r"[^\w. -]+", "-", _plain(source.split("/")[-1])).strip("-_ ") or "SAN"
    recipe = read_recipe(folder / RECIPE_FILE) if (folder / RECIPE_FILE).is_file() else {}
    found = _find_results(folder, results)
    weights = digest_weight_files(folder) if found else None
    names = {name, source, folder.resolve().name}
    measurements = [_read_measurement(path, names, weights, recipe) for path in found]
    own = [measurement for measurement in measurements if measurement.other_model is None]
    entries = [entry for measurement in own for entry in measurement.entries]
    given = {"license": license, "base_model": base_model, "datasets": list(datasets)}
    kept = read_kept_metadata(folder) | {key: value for key, value in given.items() if value}
    widget = _make_widget(folder, config, repo_id)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-segmentation",
        tags=[config.model_type, *_TAGS, *filter(None, [_PAPERS.get(config.model_type)])],
        # Without results there is no model-index for the name to stand in
        model_name=name if entries else None,
        eval_results=entries or None,
        metrics=sorted({entry.metric_type for entry in entries}) or None,
        widget=[widget],
        **kept,
    )
    stored = config.stored_labels
    metrics = read_metrics(folder / METRICS_FILE) if (folder / METRICS_FILE).is_file() else []
    losses = [line for line in metrics if _is_number(line.get("loss"))]
    card = ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        name=name,
        source=json.dumps(source),
        words=json.dumps(widget["candidate_labels"].split(", ")),
        facts=_facts(config, folder),
        stored_labels=stored and f"{len(stored)}: {listed(map(_code, stored), _LISTED_LABELS)}",
        num_words=len(config.training_labels or ()),
        drawn_words={group: len(names) for group, names in words().items()},
        training=_training_rows(recipe),
        last=losses[-1] if losses else None,
        own=own,
        others=[measurement for measurement in measurements if measurement.other_model],
        published=_published(config),
        benchmarks=PUBLISHED_BENCHMARKS,
        config=config,
        weights_license=_code(kept["license"]) if isinstance(kept.get("license"), str) else None,
    )
    # What the template's conditions leave of empty lines
    card.text = re.sub(r"\n{3,}", "\n\n", card.text).rstrip("\n") + "\n"
    return card


# Files


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; a `ValueError` where it cannot be read as one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object.")
    return content


def read_config(folder: Path) -> OpenVocabularyConfig:
    """The configuration of a model; a `ValueError` where there is none, it is another's, or makes no sense."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no model (config.json): pass a folder that save_pretrained wrote.")
    content = read_json(path)
    try:
        return classes_of_type(content.get("model_type")).config.from_dict(content)
    except Exception as error:
        # The strict classes and those of CLIP raise several kinds
        raise ValueError(f"{path} cannot be used: {one_line(error)}") from error


def read_kept_metadata(folder: Path) -> dict[str, Any]:
    """What the folder's own card says of licence and origin; a `ValueError` where it cannot be read."""
    path = folder / CARD_FILE
    if not path.is_file():
        return {}
    try:
        data = ModelCard(path.read_text(encoding="utf-8-sig"), ignore_metadata_errors=True).data.to_dict()
    except Exception as error:
        # YAML raises its own kinds
        raise ValueError(f"the metadata of {path} cannot be read: {one_line(error)}") from error
    return {key: data[key] for key in _KEPT_METADATA if data.get(key)}


def weight_files(folder: Path) -> list[str]:
    """
    Names of the files that hold the weights, and of their index if there are several.

    Raises:
        ValueError: where there are none, or the index names files that are missing or lie elsewhere.
    """
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [SAFE_WEIGHTS_NAME]
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        raise ValueError(f"{folder} holds no weights ({SAFE_WEIGHTS_NAME}): pass a folder that save_pretrained wrote.")
    mapping = read_json(index).get("weight_map")
    names = sorted(set(map(str, mapping.values()))) if isinstance(mapping, dict) else []
    for name in names or ["no files"]:
        if not re.fullmatch(r"[\w.-]+\.safetensors", name) or not (folder / name).is_file():
            raise ValueError(f"{index} names {name}, and there are no such weights beside it: save the model anew.")
    return [*names, SAFE_WEIGHTS_INDEX_NAME]


def find_example(folder: Path, config: OpenVocabularyConfig) -> Path | None:
    """The image that goes to the Hub for the widget: the folder's own, or a drawn one for a model of that world."""
    own = next((folder / name for name in EXAMPLE_FILES if (folder / name).is_file()), None)
    return _DRAWN_EXAMPLE if own is None and is_drawn_world(config.training_labels) else own


def example_name(image: Path) -> str:
    """What the example image is called where it is published."""
    return f"{Path(EXAMPLE_FILES[0]).stem}{image.suffix}"


def _make_widget(folder: Path, config: OpenVocabularyConfig, repo_id: str | None) -> dict[str, str]:
    """The entry under `widget` in the metadata: an image, published with the model or one of the Hub's, and words."""
    image = find_example(folder, config)
    # Words that can stand in Python, YAML and Markdown alike
    safe = [word for word in config.stored_labels or () if re.fullmatch(r"[A-Za-z][A-Za-z0-9 -]{0,30}", word)][:4]
    if image is None:
        source, names = _HUB_EXAMPLE, safe if len(safe) > 1 else _HUB_WORDS
    else:
        # The drawn image is the first of those that the page offers
        drawn = list(load_examples()[0].labels)
        place = f"https://huggingface.co/{repo_id}/resolve/main/" if repo_id else ""
        source, names = place + example_name(image), drawn if image == _DRAWN_EXAMPLE else safe or _HUB_WORDS
    return {"src": source, "example_title": "An example", "candidate_labels": ", ".join(names)}


# Facts


def _facts(config: Any, folder: Path) -> dict[str, str]:
    """What the configuration and the headers of the files say, as rows of a table."""
    types: set[str] = set()
    weights = [folder / name for name in weight_files(folder) if name != SAFE_WEIGHTS_INDEX_NAME]
    for path in weights:
        try:
            with safe_open(path, framework="pt") as file:
                types |= {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118 - no dictionary
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read: {one_line(error)}") from error
    size = sum(path.stat().st_size for path in weights)
    with torch.device("meta"):
        model = classes_of_type(config.model_type).model(config)
    trainable = model.num_parameters(only_trainable=True)
    patterns = ", ".join(map(_cell, config.trainable_clip_parameters))
    of_clip = f", and of CLIP what is named {patterns}" if patterns else "; all of CLIP is frozen"
    vision, text = config.vision_config, config.text_config
    facts = {
        "CLIP's image encoder": f"{vision.num_hidden_layers} layers, width {vision.hidden_size}, patches of "
        f"{vision.patch_size} x {vision.patch_size}",
        "CLIP's text encoder": f"{text.num_hidden_layers} layers, width {text.hidden_size}, "
        f"{text.max_position_embeddings} tokens",
        **_side_adapter(config),
        "parameters": f"{model.num_parameters() / 1e6:.2f} million",
        "trainable in this configuration": f"{trainable / 1e6:.2f} million: what is added to CLIP{of_clip}",
        "weights": f"{', '.join(sorted(_TYPES.get(one, one) for one in types))}, {size / 1e6:.1f} MB",
    }
    path = folder / "processor_config.json"
    processor = read_json(path) if path.is_file() else {}
    images, templates = processor.get("image_processor"), processor.get("templates")
    sides = images.get("size") if isinstance(images, dict) else None
    if isinstance(sides, dict):
        named = {"shortest_edge": "short side", "longest_edge": "long side at most"}
        shown = [f"{title} {sides[key]}" for key, title in named.items() if isinstance(sides.get(key), int)]
        facts["images are resized to"] = ", ".join(shown) or "not recorded"
    prompts = templates.get("prompts") if isinstance(templates, dict) else None
    if isinstance(prompts, list) and prompts:
        facts["prompt templates"] = f"{len(prompts)}: {listed(map(_cell, prompts), 3)}"
    return facts


def _side_adapter(config: Any) -> dict[str, str]:
    if not hasattr(config, "side_num_layers"):
        return {}
    layers, width, queries = config.side_num_layers, config.side_hidden_size, config.num_queries
    return {"side adapter": f"{layers} layers, width {width}, {queries} mask proposals"}


def _published(config: Any) -> list[tuple[str, list[str]]]:
    """Rows of what the authors published for this architecture; none where it is another."""
    if config.model_type != SANConfig.model_type:
        return []
    width = config.vision_config.hidden_size
    released = vars(SANConfig()) | RELEASED_CONFIGS.get(width, {})
    shape = ("num_queries", "side_hidden_size", "side_num_layers", "sls_start_layer", "clip_input_scale", "fusion_map")
    if any(getattr(config, key) != released[key] for key in shape):
        return []
    rows = PUBLISHED_RESULTS.get(width, {})
    return [(title, ["" if value is None else str(value) for value in values]) for title, values in rows.items()]


def _training_rows(recipe: Mapping[str, Any]) -> dict[str, str]:
    """The recipe's settings as rows of a table."""
    if not recipe:
        return {}
    start = recipe.get("clip") or recipe.get("model")
    kind = "CLIP" if recipe.get("clip") else "the model"
    rows = {"started from": f"{kind} {_cell(public_name(start))}" if start else "the built-in model of the package"}
    for key in _RECIPE_FIELDS:
        value = recipe.get(key)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if key in _MAY_BE_FILES:
            values = [one if "{}" in str(one) else public_name(one) for one in values]
        if values:
            rows[key.replace("_", " ")] = listed(map(_cell, values), _LISTED_LABELS)
    return rows


# Measurements


@dataclass(frozen=True)
class _Measurement:
    """Figures with their source."""

    about: str
    """What was measured on, and by what."""
    rows: dict[str, list[str]]
    columns: tuple[str, ...]
    entries: list[EvalResult]
    """The same for the metadata."""
    weakest: str | None = None
    """A sentence about the classes with the lowest IoU."""
    other_model: str | None = None
    """Whose figures they are, if the file names another model."""


def _find_results(folder: Path, given: Iterable[str | os.PathLike]) -> list[Path]:
    paths = [folder / RESULTS_FILE] if (folder / RESULTS_FILE).is_file() else []
    for one in map(Path, given):
        path = one / RESULTS_FILE if one.is_dir() else one
        if not path.is_file():
            raise ValueError(f"{path} is not there: pass what `san evaluate` wrote, the folder or its {RESULTS_FILE}.")
        if path.resolve() not in [known.resolve() for known in paths]:
            paths.append(path)
    return paths


def _read_measurement(path: Path, names: set[str], weights: str | None, recipe: Mapping[str, Any]) -> _Measurement:
    """Figures from a file; `names` are those that the model goes by, `weights` the digest of what it has learned."""
    results = read_json(path)
    try:
        if "bias on" in results:
            return _of_the_drawn_world(results)
        return _of_images(results, names, weights, recipe)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} holds no results of `san evaluate` or training ({_plain(repr(error))}): give those, or move the "
            "file elsewhere."
        ) from error


def _of_images(
    results: Mapping[str, Any], names: set[str], weights: str | None, recipe: Mapping[str, Any]
) -> _Measurement:
    """Results of an evaluation; without a data set's name they are those at the end of training."""
    about = {key: results.get(key) for key in ("model", "dataset", "split", "limit", "tta")}
    by = "`san evaluate`"
    if not about["dataset"]:
        by = "the evaluation at the end of training"
        keys = {"dataset": "validation", "split": "validation_split", "limit": "validation_limit"}
        about |= {key: recipe.get(source) for key, source in keys.items()}
    about |= {"dataset": public_name(about["dataset"] or "validation data"), "tta": bool(about["tta"])}
    about["split"] = _plain(about["split"]) if about["split"] else None
    about["limit"] = about["limit"] if isinstance(about["limit"], int) else None
    per_class = {str(label): None if iou is None else _share(iou) for label, iou in results["per_class_iou"].items()}
    figures: dict[str, Any] = {key: _share(results[key]) for key in MEASURES}
    figures["subsets"] = {
        _plain(subset): {"mean_iou": _share(one["mean_iou"])}
        for subset, one in results["subsets"].items()
        if one["mean_iou"] is not None
    }
    rows = {title: figures[key] for key, title in MEASURES.items()}
    rows |= {f"{MEASURES['mean_iou']} of {_cell(name)}": one["mean_iou"] for name, one in figures["subsets"].items()}
    details = [
        f"data set {_code(about['dataset'])}",
        *([f"part {_code(about['split'])}"] if about["split"] else []),
        f"{int(results['images'])} images{' (the first ones only)' if about['limit'] else ''}",
        f"{len(per_class)} classes",
        *(["scores averaged over six sizes and their mirror images"] if about["tta"] else []),
    ]
    present = sorted((iou, label) for label, iou in per_class.items() if iou is not None)
    worst = ", ".join(f"{_code(label)} {iou:.3f}" for iou, label in present[:_LISTED_CLASSES])
    missed = sum(iou == 0 for iou, _ in present)
    measured = public_name(about["model"] or "")
    other_model = _code(measured) if measured and measured not in names else None
    if results.get("weights") is not None:
        # Names may be changed, and weights may be trained on under one name
        is_own = results["weights"] == weights
        other_model = None if is_own else f"{_code(measured or 'a model')} with other weights"
    return _Measurement(
        about=f"By {by}: {', '.join(details)}.",
        rows={title: [f"{value:.4f}"] for title, value in rows.items()},
        columns=("value",),
        entries=model_index_to_eval_results(model_index(figures, {**about, "model": "model"}))[1],
        weakest=f"On {_code(about['dataset'])} the classes with the lowest IoU are {worst}."
        + (f" Classes with an IoU of 0: {missed} of {len(present)}." if missed else ""),
        other_model=other_model,
    )


def _of_the_drawn_world(results: Mapping[str, Any]) -> _Measurement:
    """Results of the built-in model and others that are trained as it is."""
    columns = {"bias on": "mean IoU", "bias off": "with the attention bias switched off"}
    groups = describe_groups()
    table = {group: [_share(results[column][group]) for column in columns] for group in groups}
    return _Measurement(
        about="By the training that made the weights: mean IoU on freshly drawn images of the world that they were "
        "trained on, among all its words.",
        rows={groups[group]: [f"{value:.3f}" for value in values] for group, values in table.items()},
        columns=tuple(columns.values()),
        entries=[
            EvalResult(
                task_type="image-segmentation",
                task_name="Semantic segmentation",
                dataset_type="drawn-world",
                dataset_name="Drawn world, fresh images",
                metric_type="mean_iou",
                metric_name=f"{MEASURES['mean_iou']} of {groups[group]}",
                metric_value=round(values[0], 6),
            )
            for group, values in table.items()
        ],
    )


def _share(value: Any) -> float:
    """A figure from 0 to 1; NaN, text and the like are no measurement."""
    if not _is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"{value!r} is not a number from 0 to 1")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# Text that others wrote


def _plain(text: Any) -> str:
    """Printable text without line breaks, shortened."""
    shown = "".join(" " if unicodedata.category(letter)[0] in "CZ" else letter for letter in str(text)[:10_000])
    shown = " ".join(shown.split())
    return shown if len(shown) <= _LONGEST_NAME else f"{shown[: _LONGEST_NAME - 3]}..."


def _code(text: Any) -> str:
    """Text from a file as inline code, in which Markdown and HTML mean nothing."""
    return f"`{_plain(text).replace('`', chr(39)) or ' '}`"


def _cell(text: Any) -> str:
    """The same for a cell of a table, where a bar would end the cell."""
    return _code(text).replace("|", r"\|")


def public_name(name: Any) -> str:
    """A data set's or model's name as others know it: without the folders where it lay on somebody's disk."""
    text = str(name).replace("\\", "/")
    is_path = text.startswith(("/", ".", "~")) or text.count("/") > 1 or ":" in text or os.path.exists(text[:1000])
    return _plain(text.rstrip("/").rsplit("/", 1)[-1] if is_path else text)


__all__ = [
    "CARD_FILE",
    "EXAMPLE_FILES",
    "PUBLISHED_BENCHMARKS",
    "PUBLISHED_RESULTS",
    "example_name",
    "find_example",
    "make_model_card",
    "public_name",
    "read_config",
    "read_json",
    "read_kept_metadata",
    "weight_files",
]
