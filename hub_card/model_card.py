"""The model card: filled from what lies in a model's folder, so that it says nothing that has no source."""

from __future__ import annotations

import json
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from modeling_san.builtin import describe_groups, is_drawn_world, words
from modeling_san.configuration_san import SANConfig
from modeling_san.conversion import RELEASED_CONFIGS
from modeling_san.modeling_san import SANForOpenVocabSegmentation
from modeling_san.training.callbacks import METRICS_FILE, read_metrics
from modeling_san.training.evaluate import MEASURES, model_index
from modeling_san.training.metrics import RESULTS_FILE
from modeling_san.training.recipe import read_recipe
from modeling_san.training.train import RECIPE_FILE

CARD_FILE = "README.md"
EXAMPLE_FILES = ("example.jpg", "example.jpeg", "example.png")
"""Names by which a folder may bring an image for the Hub's widget."""

_HERE = Path(__file__).parent
_TEMPLATE = _HERE / "model_card_template.md"
_DRAWN_EXAMPLE = _HERE / "assets" / "demo.png"
_DRAWN_WORDS = ("wood", "yellow plain", "purple checkered", "pink striped")

# An image that the Hub keeps for examples like this one
_HUB_EXAMPLE = ("https://huggingface.co/datasets/mishig/sample_images/resolve/main/tiger.jpg", "Tiger")
_HUB_EXAMPLE_WORDS = ("tiger", "grass")

_TAGS = ("san", "open-vocabulary", "semantic-segmentation", "clip", "arxiv:2302.12242")
_KEPT_METADATA = ("license", "license_name", "license_link", "base_model", "datasets", "language")
"""What a person may have written into the metadata of an older card, and what no other file says."""

_RECIPE_ROWS = {
    "dataset": "data set",
    "split": "part of it",
    "labels": "label set",
    "trainable": "what trains",
    "templates": "prompt templates",
    "steps": "steps",
    "batch_size": "images a step",
    "learning_rate": "learning rate",
    "weight_decay": "weight decay",
    "warmup_steps": "warm-up steps",
    "short_side": "short side in pixels",
    "crop_size": "crop",
    "mixed_precision": "mixed precision",
    "seed": "seed",
}
_MAY_BE_FILES = ("dataset", "labels", "templates")
_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_LISTED_LABELS = 24
_LISTED_CLASSES = 5
_LONGEST_NAME = 80

_DRAWN_GROUPS = describe_groups()

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
        results: further measurements: what `san evaluate` wrote, folders or `results.json` files.
        license: of the weights, as the Hub writes it, "apache-2.0" for example; by default what the folder's README.md
            says, else the card says that it is not stated.
        base_model: Hub id of the model that these weights were made from.
        datasets: Hub ids of the data sets that it was trained on.

    Returns:
        the card; `str(card)` is a README.md.

    Raises:
        ValueError: where the folder holds no SAN model, or one of the files cannot be read.
    """
    folder = Path(folder)
    if repo_id is not None:
        validate_repo_id(repo_id)
    config, sizes = read_config(folder), _count_weights(folder)
    name = _title((repo_id or folder.resolve().name).split("/")[-1])
    recipe = _read_recipe(folder)
    names = (name, folder.resolve().name)
    measurements = [_read_measurement(path, names, recipe) for path in _find_results(folder, results)]
    example = _Example.of(folder, config, repo_id)
    kept = read_kept_metadata(folder)
    given = {"license": license, "base_model": base_model, "datasets": list(datasets) or None}
    kept.update({key: value for key, value in given.items() if value})
    entries = [entry for measurement in measurements for entry in measurement.entries]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-segmentation",
        tags=list(_TAGS),
        model_name=name,
        eval_results=entries or None,
        metrics=sorted({entry.metric_type for entry in entries}) or None,
        widget=[example.widget()],
        **kept,
    )
    if not entries:
        # Without results there is no model-index for the name to stand in
        data.model_name = None
    card = ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        name=name,
        source=json.dumps(repo_id or folder.resolve().name),
        words=example.words,
        facts=_facts(config, sizes, folder),
        stored_labels=_stored_labels(config),
        num_words=len(config.training_labels or ()),
        from_drawn_world=any(measurement.of_drawn_world for measurement in measurements),
        num_drawn=len(words()["seen"]) + len(words()["never seen"]),
        num_masked=len(words()["seen"]),
        training=_training_rows(recipe),
        record=_training_record(folder),
        measurements=measurements,
        published=_published(config),
        benchmarks=PUBLISHED_BENCHMARKS,
        limits=_limits(config),
        weights_license=_code(kept["license"]) if isinstance(kept.get("license"), str) else None,
    )
    # What the template's conditions leave of empty lines
    card.text = re.sub(r"\n{3,}", "\n\n", card.text).rstrip("\n") + "\n"
    return card


def find_example(folder: Path, config: SANConfig) -> Path | None:
    """The image that goes to the Hub for the widget: the folder's own, or a drawn one for a model of that world."""
    own = next((folder / name for name in EXAMPLE_FILES if (folder / name).is_file()), None)
    if own is None and is_drawn_world(config.training_labels):
        return _DRAWN_EXAMPLE
    return own


def example_name(image: Path) -> str:
    """What the example image is called where it is published."""
    return f"{Path(EXAMPLE_FILES[0]).stem}{image.suffix}"


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
    names = set(mapping.values()) if isinstance(mapping, dict) else set()
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise ValueError(f"{index} names {name!r}, which is no file of weights: save the model once more.")
        if not (folder / name).is_file():
            raise ValueError(f"{index} names {name}, which is not there: save the model once more.")
    if not names:
        raise ValueError(f"{index} names no files: save the model once more.")
    return [*sorted(names), SAFE_WEIGHTS_INDEX_NAME]


# Facts


@dataclass(frozen=True)
class _Sizes:
    """What the headers of the weights' files say."""

    parameters: int
    types: tuple[str, ...]
    bytes: int


def read_config(folder: Path) -> SANConfig:
    """
    The configuration of a SAN model.

    Raises:
        ValueError: where there is none, it is another model's, or it makes no sense.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no model (config.json): pass a folder that save_pretrained wrote.")
    content = read_json(path)
    if content.get("model_type") != SANConfig.model_type:
        raise ValueError(f"{path} is not of a SAN model: pass a folder that save_pretrained wrote.")
    try:
        return SANConfig.from_dict(content)
    except Exception as error:
        # The strict classes and those of CLIP raise several kinds
        raise ValueError(f"{path} cannot be used: {_one_line(error, 300)}") from error


def read_json(path: Path) -> dict[str, Any]:
    """
    The JSON object in a file.

    Raises:
        ValueError: where it cannot be read as one.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {_one_line(error, 200)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object.")
    return content


def _count_weights(folder: Path) -> _Sizes:
    """Count the weights without reading them."""
    parameters, types, size = 0, set(), 0
    for name in weight_files(folder):
        if not name.endswith(".safetensors"):
            continue
        try:
            with safe_open(folder / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - the reader is no dictionary
                    tensor = file.get_slice(key)
                    types.add(str(tensor.get_dtype()))
                    # Label embeddings are stored beside the parameters and are none
                    parameters += 0 if key == "stored_class_embeds" else math.prod(tensor.get_shape())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder / name} cannot be read: {_one_line(error, 200)}") from error
        size += (folder / name).stat().st_size
    return _Sizes(parameters, tuple(sorted(types)), size)


def _count_trainable(config: SANConfig) -> int:
    """Parameters that train in a model of this configuration."""
    with torch.device("meta"):
        model = SANForOpenVocabSegmentation(config)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _facts(config: SANConfig, sizes: _Sizes, folder: Path) -> dict[str, str]:
    """What the configuration and the files say, as rows of a table."""
    vision, text = config.vision_config, config.text_config
    trainable = _count_trainable(config)
    patterns = ", ".join(_cell(pattern) for pattern in config.trainable_clip_parameters)
    of_clip = f", and of CLIP what is named {patterns}" if patterns else "; all of CLIP is frozen"
    facts = {
        "CLIP's image encoder": f"{vision.num_hidden_layers} layers, width {vision.hidden_size}, patches of "
        f"{vision.patch_size} x {vision.patch_size}",
        "CLIP's text encoder": f"{text.num_hidden_layers} layers, width {text.hidden_size}, "
        f"{text.max_position_embeddings} tokens",
        "side adapter": f"{config.side_num_layers} layers, width {config.side_hidden_size}, "
        f"{config.num_queries} mask proposals",
        "parameters": f"{_millions(sizes.parameters)} million",
        "trainable in this configuration": f"{_millions(trainable)} million: the side adapter{of_clip}",
        "weights": f"{', '.join(_TYPES.get(kind, kind) for kind in sizes.types)}, {sizes.bytes / 1e6:.1f} MB",
    }
    processor_file = folder / "processor_config.json"
    if processor_file.is_file():
        facts.update(_processor_facts(read_json(processor_file)))
    return facts


def _processor_facts(processor: Mapping[str, Any]) -> dict[str, str]:
    facts = {}
    images, templates = processor.get("image_processor"), processor.get("templates")
    size = images.get("size") if isinstance(images, dict) else None
    if isinstance(size, dict):
        named = {"shortest_edge": "short side", "longest_edge": "long side at most"}
        sides = [f"{title} {size[key]}" for key, title in named.items() if isinstance(size.get(key), int)]
        facts["images are resized to"] = ", ".join(sides) or "not recorded"
    prompts = templates.get("prompts") if isinstance(templates, dict) else None
    if isinstance(prompts, list) and prompts:
        shown = ", ".join(_cell(prompt) for prompt in prompts[:3])
        facts["prompt templates"] = f"{len(prompts)}: {shown}{', ...' if len(prompts) > 3 else ''}"
    return facts


def _stored_labels(config: SANConfig) -> str | None:
    """The stored vocabulary as a sentence's list."""
    return _listed(dict(config.id2label or {}).values()) if config.has_stored_labels else None


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _LISTED_LABELS} more" if len(names) > _LISTED_LABELS else ""
    return f"{len(names)}: " + ", ".join(map(_code, names[:_LISTED_LABELS])) + more


def _limits(config: SANConfig) -> list[str]:
    """What follows from how the model is built; each is a property of the configuration or of the method."""
    limits = [
        "Every pixel gets one of the names that are given, also where none fits. Give names for what else is in the "
        "image, or a name such as `other`.",
        "What CLIP does not know it cannot name, and what CLIP got wrong in its training (biases about people "
        "included) comes out in the segmentation.",
        f"There are {config.num_queries} mask proposals an image, with one value for each {config.side_patch_size} x "
        f"{config.side_patch_size} pixels of the resized image: small and thin things get lost, and borders are "
        "soft.",
        "It tells kinds of things apart and not one thing from the next of its kind.",
        f"A label's prompt may have {config.text_config.max_position_embeddings} tokens at most.",
    ]
    if config.training_labels:
        limits.insert(
            0,
            f"**It knows {len(config.training_labels)} words only**, those it was trained on. What it says of others "
            "means nothing.",
        )
    return limits


def _published(config: SANConfig) -> list[tuple[str, list[str]]]:
    """Rows of what the authors published for this architecture; none where it is another."""
    width = config.vision_config.hidden_size
    if width not in PUBLISHED_RESULTS:
        return []
    defaults, changes = SANConfig(), RELEASED_CONFIGS[width]
    shape = ("num_queries", "side_hidden_size", "side_num_layers", "sls_start_layer", "clip_input_scale", "fusion_map")
    if any(getattr(config, key) != changes.get(key, getattr(defaults, key)) for key in shape):
        return []
    return [
        (title, ["" if value is None else str(value) for value in values])
        for title, values in PUBLISHED_RESULTS[width].items()
    ]


# Training


def _read_recipe(folder: Path) -> dict[str, Any]:
    path = folder / RECIPE_FILE
    return read_recipe(path) if path.is_file() else {}


def _training_rows(recipe: Mapping[str, Any]) -> dict[str, str]:
    """The recipe's settings as rows of a table."""
    if not recipe:
        return {}
    start = recipe.get("clip") or recipe.get("model")
    kind = "a new side adapter beside CLIP" if recipe.get("clip") else "SAN"
    rows = {"started from": f"{kind} {_cell(public_name(start))}" if start else "the built-in model of the package"}
    for key, title in _RECIPE_ROWS.items():
        value = recipe.get(key)
        if value is None or value == []:
            continue
        values = value if isinstance(value, list) else [value]
        if key in _MAY_BE_FILES:
            values = [one if "{}" in str(one) else public_name(one) for one in values]
        rows[title] = ", ".join(_cell(one) for one in values[:_LISTED_LABELS])
    return rows


def _training_record(folder: Path) -> str | None:
    """What the run's own figures say of its end."""
    path = folder / METRICS_FILE
    lines = [line for line in read_metrics(path) if _is_number(line.get("loss"))] if path.is_file() else []
    if not lines:
        return None
    last = lines[-1]
    return f"The run's record ends at step {last['step']} with a loss of {last['loss']:.4g}."


# Measurements


@dataclass(frozen=True)
class _Measurement:
    """
    Figures with their source.

    Attributes:
        dataset: its name.
        about: what was measured on, and by what.
        rows: figures by name.
        columns: names of the figures' columns.
        entries: the same for the metadata.
        worst: classes with the lowest IoU.
        missed: how many of the classes have an IoU of 0, and of how many.
        of_drawn_world: whether `san train-demo` made the weights and measured them.
    """

    dataset: str
    about: str
    rows: list[tuple[str, list[str]]]
    columns: tuple[str, ...]
    entries: list[EvalResult]
    worst: list[tuple[str, str]] = field(default_factory=list)
    missed: str | None = None
    of_drawn_world: bool = False


def _find_results(folder: Path, given: Iterable[str | os.PathLike]) -> list[Path]:
    paths = [folder / RESULTS_FILE] if (folder / RESULTS_FILE).is_file() else []
    for one in map(Path, given):
        path = one / RESULTS_FILE if one.is_dir() else one
        if not path.is_file():
            raise ValueError(f"{path} is not there: pass what `san evaluate` wrote, the folder or its {RESULTS_FILE}.")
        if path.resolve() not in [known.resolve() for known in paths]:
            paths.append(path)
    return paths


def _read_measurement(path: Path, names: Sequence[str], recipe: Mapping[str, Any]) -> _Measurement:
    """Figures from a file; `names` are those of the model, the published one first."""
    results = read_json(path)
    try:
        if "bias on" in results:
            return _of_the_drawn_world(results)
        return _of_images(results, names, recipe)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} holds no results of `san evaluate` or training ({_one_line(repr(error), 120)}): give those, or "
            "move the file elsewhere."
        ) from error


def _of_images(results: Mapping[str, Any], names: Sequence[str], recipe: Mapping[str, Any]) -> _Measurement:
    """Results of an evaluation; without a data set's name they are those at the end of training."""
    about = {key: results.get(key) for key in ("dataset", "split", "limit", "tta")}
    by = "`san evaluate`"
    if not about["dataset"]:
        by = "the evaluation at the end of training"
        keys = {"dataset": "validation", "split": "validation_split", "limit": "validation_limit"}
        about.update({key: recipe.get(source) for key, source in keys.items()})
    dataset = public_name(about["dataset"]) if about["dataset"] else "validation data"
    split = _one_line(about["split"]) if about["split"] else None
    limit = about["limit"] if isinstance(about["limit"], int) else None
    figures = {key: _share(results[key]) for key in MEASURES}
    per_class = {str(label): None if iou is None else _share(iou) for label, iou in results["per_class_iou"].items()}
    subsets = {
        _one_line(subset): {"mean_iou": None if one["mean_iou"] is None else _share(one["mean_iou"])}
        for subset, one in results["subsets"].items()
    }
    index = model_index(
        {**figures, "subsets": subsets},
        {"model": names[0], "dataset": dataset, "split": split, "limit": limit, "tta": bool(about["tta"])},
    )
    rows = [(title, figures[key]) for key, title in MEASURES.items()]
    rows += [
        (f"{MEASURES['mean_iou']} of {_cell(subset)}", one["mean_iou"])
        for subset, one in subsets.items()
        if one["mean_iou"] is not None
    ]
    images = int(results["images"])
    measured = public_name(results.get("model") or names[0])
    details = [
        # Nobody can see from a file whose figures it holds; a reader is to know what it calls them
        *([f"of a model called {_code(measured)}"] if measured.split("/")[-1] not in names else []),
        f"data set {_code(dataset)}",
        *([f"part {_code(split)}"] if split else []),
        f"{images} image{'' if images == 1 else 's'}{' (the first ones only)' if limit else ''}",
        f"{len(per_class)} classes",
        *(["scores averaged over six sizes and their mirror images"] if about["tta"] else []),
    ]
    present = sorted((iou, label) for label, iou in per_class.items() if iou is not None)
    missed = sum(iou == 0 for iou, _ in present)
    return _Measurement(
        dataset=_code(dataset),
        about=f"By {by}: {', '.join(details)}.",
        rows=[(title, [f"{value:.4f}"]) for title, value in rows],
        columns=("value",),
        entries=model_index_to_eval_results(index)[1],
        worst=[(_code(label), f"{iou:.3f}") for iou, label in present[:_LISTED_CLASSES]],
        missed=f"{missed} of {len(present)}" if missed else None,
    )


def _of_the_drawn_world(results: Mapping[str, Any]) -> _Measurement:
    """Results that `san train-demo` wrote."""
    table = {group: [_share(results[column][group]) for column in ("bias on", "bias off")] for group in _DRAWN_GROUPS}
    entries = [
        EvalResult(
            task_type="image-segmentation",
            task_name="Semantic segmentation",
            dataset_type="drawn-world",
            dataset_name="Drawn world, fresh images",
            metric_type="mean_iou",
            metric_name=f"{MEASURES['mean_iou']} of {_DRAWN_GROUPS[group]}",
            metric_value=round(with_bias, 6),
        )
        for group, (with_bias, _) in table.items()
    ]
    return _Measurement(
        dataset="the drawn world",
        about="By `san train-demo`, which made the weights: mean IoU on freshly drawn images of the world that it "
        "was trained on, among all its words.",
        rows=[(_DRAWN_GROUPS[group], [f"{value:.3f}" for value in values]) for group, values in table.items()],
        columns=("mean IoU", "with the attention bias switched off"),
        entries=entries,
        of_drawn_world=True,
    )


def _share(value: Any) -> float:
    """A figure from 0 to 1; NaN, text and the like are no measurement."""
    if not _is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"{value!r} is not a number from 0 to 1")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# The example


@dataclass(frozen=True)
class _Example:
    """An image and words for it."""

    source: str
    title: str
    words: list[str]

    @classmethod
    def of(cls, folder: Path, config: SANConfig, repo_id: str | None) -> _Example:
        """An image that is published with the model, or one of the Hub's."""
        image = find_example(folder, config)
        stored = dict(config.id2label or {}).values() if config.has_stored_labels else ()
        # Words that can stand in Python, YAML and Markdown alike
        words = [word for word in stored if re.fullmatch(r"[A-Za-z][A-Za-z0-9 -]{0,30}", word)][:4]
        if image is None:
            source, title = _HUB_EXAMPLE
            return cls(source, title, words if len(words) > 1 else list(_HUB_EXAMPLE_WORDS))
        words = list(_DRAWN_WORDS) if image == _DRAWN_EXAMPLE else words
        place = f"https://huggingface.co/{repo_id}/resolve/main/" if repo_id else ""
        return cls(place + example_name(image), "An example", words or list(_HUB_EXAMPLE_WORDS))

    def widget(self) -> dict[str, str]:
        """The entry under `widget` in the metadata."""
        words = {"candidate_labels": ", ".join(self.words)} if self.words else {}
        return {"src": self.source, "example_title": self.title, **words}


# Text that others wrote


def _code(text: Any) -> str:
    """Text from a file as inline code, in which Markdown and HTML mean nothing."""
    shown = _one_line(text).replace("`", "'")
    return f"`{shown or ' '}`"


def _cell(text: Any) -> str:
    """The same for a cell of a table, where a bar would end the cell."""
    return _code(text).replace("|", r"\|")


def _one_line(text: Any, longest: int = _LONGEST_NAME) -> str:
    """Printable text without line breaks, shortened."""
    shown = "".join(" " if unicodedata.category(letter)[0] in "CZ" else letter for letter in str(text))
    shown = " ".join(shown.split())
    return shown if len(shown) <= longest else f"{shown[: longest - 3]}..."


def _title(name: str) -> str:
    """A folder's name as a heading."""
    return re.sub(r"[^\w. -]+", "-", _one_line(name)).strip("-_ ") or "SAN"


def public_name(name: Any) -> str:
    """A data set's or model's name as others know it: without the folders where it lay on somebody's disk."""
    text = _one_line(name, 300).replace("\\", "/")
    is_path = text.startswith(("/", ".", "~")) or text.count("/") > 1 or ":" in text or Path(text).exists()
    return text.rstrip("/").rsplit("/", 1)[-1] if is_path else text


def read_kept_metadata(folder: Path) -> dict[str, Any]:
    """
    What the folder's own card says of licence and origin.

    Raises:
        ValueError: where its metadata cannot be read.
    """
    path = folder / CARD_FILE
    if not path.is_file():
        return {}
    try:
        data = ModelCard(path.read_text(encoding="utf-8-sig"), ignore_metadata_errors=True).data.to_dict()
    except Exception as error:
        # YAML raises its own kinds
        raise ValueError(f"the metadata of {path} cannot be read: {_one_line(error, 200)}") from error
    return {key: data[key] for key in _KEPT_METADATA if data.get(key)}


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f}"


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
