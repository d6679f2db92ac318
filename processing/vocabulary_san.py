# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""Class lists of the evaluation sets, prompt templates, and the names that a user's labels can be extended by."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .labels_san import normalize_labels, split_synonyms

_FOLDER = Path(__file__).parent / "vocabularies"
_TEMPLATES_FILE = "prompt_templates"
_COCO_STUFF = "coco_stuff_171"

EXTENSIONS = ("none", "coco-stuff", "coco-all")
"""Ways to extend a user's labels, see `extend_labels`."""

OTHER_LABEL = "other"
"""What a pixel is called that an added name won, see `extend_labels`."""


@dataclass(frozen=True)
class ClassList:
    """The classes of one label set, in the order of their indices.

    Attributes:
        name: what `load_vocabulary` calls the set.
        classes: class names exactly as they go into the prompts.
        ignore_index: value of label maps that stands for "no class", 255 or 65535.
        source_ids: id of each class in the label files of the original data set; None where those are the indices.
        is_thing: whether each class is a countable thing (true) or stuff (false); None where the set does not say.
    """

    name: str
    classes: tuple[str, ...]
    ignore_index: int
    source_ids: tuple[int, ...] | None = None
    is_thing: tuple[bool, ...] | None = None

    def __len__(self) -> int:
        """Number of classes."""
        return len(self.classes)


def vocabulary_names() -> tuple[str, ...]:
    """Names that `load_vocabulary` knows."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.json") if path.stem != _TEMPLATES_FILE))


@cache
def load_vocabulary(name: str) -> ClassList:
    """Load a label set that ships with the package.

    Args:
        name: such as "coco_stuff_171" or "ade20k_847"; `vocabulary_names` lists all.

    Raises:
        ValueError: there is no such set; the message lists those there are.
    """
    if name not in vocabulary_names():
        raise ValueError(f"there is no vocabulary {name!r}: choose one of {_listed(vocabulary_names())}")
    data = _read(name)
    source_ids, is_thing = data.get("source_ids"), data.get("is_thing")
    return ClassList(
        name=name,
        classes=tuple(data["classes"]),
        ignore_index=data["ignore_index"],
        source_ids=None if source_ids is None else tuple(source_ids),
        is_thing=None if is_thing is None else tuple(map(bool, is_thing)),
    )


def template_names() -> tuple[str, ...]:
    """Names that `prompt_templates` knows."""
    return tuple(sorted(_read(_TEMPLATES_FILE))) if (_FOLDER / f"{_TEMPLATES_FILE}.json").is_file() else ()


def prompt_templates(name: str) -> tuple[str, ...]:
    """Prompt templates by name, each with one `{}` for the label.

    Args:
        name: "vild", the 14 templates of the released SAN models, or "imagenet", the 80 of CLIP.

    Raises:
        ValueError: there is no such set; the message lists those there are.
    """
    if name not in template_names():
        raise ValueError(
            f"there are no prompt templates called {name!r}: choose one of {_listed(template_names())} "
            'or pass a list such as ["a photo of a {}."]'
        )
    return tuple(_read(_TEMPLATES_FILE)[name])


def extend_labels(labels: str | Iterable[str], how: str) -> list[str]:
    """Add common names that the labels may compete with.

    Given few labels, a model has to paint every pixel with one of them. With COCO-Stuff's names added, pixels that
    show something else go to an added name; the caller turns indices >= the number of labels into `OTHER_LABEL`.
    This is what the authors' demonstration of SAN does.

    Args:
        labels: the user's labels, normalised here with `normalize_labels`.
        how: "coco-stuff" adds the 91 stuff names of COCO-Stuff, "coco-all" all 171 names, "none" nothing.

    Returns:
        The user's labels in their order, then the added names that are not among them or their synonyms.

    Raises:
        ValueError: `how` is none of the three, or the labels are refused.
    """
    if how not in EXTENSIONS:
        raise ValueError(f"labels cannot be extended by {how!r}: choose one of {_listed(EXTENSIONS)}")
    own = normalize_labels(labels)
    if how == "none":
        return own
    taken = {name for label in own for name in split_synonyms(label)}
    return own + [name for name in _coco_names(things=how == "coco-all") if name not in taken]


def _coco_names(things: bool) -> list[str]:
    """COCO-Stuff's stuff names, or all of its names."""
    coco = load_vocabulary(_COCO_STUFF)
    if coco.is_thing is None:
        raise ValueError(f"vocabulary {_COCO_STUFF} does not say which of its classes are things")
    return [name for name, is_thing in zip(coco.classes, coco.is_thing, strict=True) if things or not is_thing]


def _read(name: str) -> Any:
    """Content of one data file."""
    return json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def _listed(names: Iterable[str]) -> str:
    """Names for an error message."""
    return ", ".join(repr(name) for name in names) or "none (the data files of the package are not installed)"
