# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""What people type as labels, made uniform: one string per label, synonyms joined by `|`."""

import csv
import html
import itertools
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import cache

SYNONYM_SEPARATOR = "|"
"""Between names of one label, as in "car|automobile"."""

MAX_LABELS = 50_000
"""More would be a mistake, or an iterator that does not end."""

_EXAMPLE = '["sky", "road"]'


def list_labels(labels: str | Iterable[str]) -> list[str]:
    """
    What a user gives as labels, as a list; the labels themselves stay as they were given.

    Args:
        labels: an iterable of class names, or one string of them, separated by commas or line breaks as in
            `red striped, blue dotted, "road, route"`: a label that holds a comma goes in double quotes, and a double
            quote inside quotes is doubled, as in a CSV file.

    Raises:
        ValueError: there are none or more than `MAX_LABELS`, one is not a string, or quotes do not match.
    """
    if isinstance(labels, str):
        return _split_line(labels)
    if isinstance(labels, (Mapping, bytes)) or not isinstance(labels, Iterable):
        raise ValueError(f"labels are a {type(labels).__name__}: pass a list of class names, for example {_EXAMPLE}")
    given = list(itertools.islice(labels, MAX_LABELS + 1))
    if len(given) > MAX_LABELS:
        raise ValueError(f"there are more than {MAX_LABELS} labels: pass fewer of them")
    if not given:
        raise ValueError(f"there are no labels: pass at least one class name, for example {_EXAMPLE}")
    for position, label in enumerate(given):
        if not isinstance(label, str):
            raise ValueError(
                f"label {position} is {label!r} ({type(label).__name__}) and not a string: pass a flat list of class "
                f"names, for example {_EXAMPLE}"
            )
    return given


def normalize_labels(labels: str | Iterable[str]) -> list[str]:
    """
    Lower-case labels, strip them and fold their inner white space.

    Args:
        labels: what `list_labels` takes, in any order. Names inside a label that are joined by `|`
            ("car|automobile") are synonyms and stay in one label.

    Returns:
        one string per label, in the order given.

    Raises:
        ValueError: `list_labels` refuses them, one is empty, or one is given twice.
    """
    normalized = [_normalize_label(label, position) for position, label in enumerate(list_labels(labels))]
    _refuse_duplicates(normalized)
    return normalized


def _split_line(text: str) -> list[str]:
    """A line of labels, see `list_labels`."""
    try:
        rows = list(csv.reader(text.splitlines(), skipinitialspace=True, strict=True))
    except csv.Error as error:
        raise ValueError(
            f"labels cannot be split ({error}): separate them by commas and put a label that holds a comma "
            "between double quotes, for example 'sky, \"road, route\"'"
        ) from error
    return list_labels([cell for row in rows for cell in row])


def split_synonyms(label: str) -> list[str]:
    """Names that share one label: "car|automobile" -> ["car", "automobile"]."""
    return label.split(SYNONYM_SEPARATOR)


def repair_prompt(prompt: str) -> str:
    """
    A prompt as CLIP's original tokenizer reads it, which transformers' does not: "men\u2019s room" as "men's room".

    Typographic quotes, ligatures, full-width letters and broken encodings are repaired by ftfy, HTML entities are
    resolved, and white space is folded. Labels themselves stay as they were written: people look for those, and names
    must not depend on what is installed.

    Args:
        prompt: a label in its template.
    """
    # Nearly all are, and this is a thousand times faster
    if prompt.isascii() and prompt.isprintable() and "&" not in prompt:
        return prompt
    return " ".join(html.unescape(html.unescape(_ftfy()(prompt))).split())


@cache
def _ftfy() -> Callable[[str], str]:
    """What repairs a text; the text as it is where ftfy is not installed, as beside a model with its own code."""
    try:
        from ftfy import fix_text
    except ImportError:
        warnings.warn(
            "labels with letters beyond ASCII may be read in another way than CLIP learned them: pip install ftfy",
            stacklevel=2,
        )
        return str
    return fix_text


def _normalize_label(label: str, position: int) -> str:
    """One label in its uniform form; `position` counts from 0 and is for the error alone."""
    # One spelling of accented letters, as CLIP's tokenizer has it: "é" typed in two ways is one label.
    lowered = unicodedata.normalize("NFC", label).lower()
    names = [" ".join(name.split()) for name in split_synonyms(lowered)]
    if not all(names):
        what = "is empty" if names == [""] else "has an empty synonym"
        raise ValueError(f"label {position} ({label!r}) {what}: remove it or write a class name")
    repeated = _first_repeated(names)
    if repeated is not None:
        raise ValueError(f"label {position} ({label!r}) names {repeated!r} twice: write each synonym once")
    return SYNONYM_SEPARATOR.join(names)


def _refuse_duplicates(labels: list[str]) -> None:
    """Two equal labels, or two with a synonym in common, would share their pixels by chance."""
    repeated = _first_repeated(labels)
    if repeated is not None:
        positions = [position for position, label in enumerate(labels) if label == repeated]
        raise ValueError(
            f"label {repeated!r} is given {len(positions)} times (positions {', '.join(map(str, positions))}; upper "
            "and lower case and white space do not count): pass every label once"
        )
    shared = _first_repeated([name for label in labels for name in split_synonyms(label)])
    if shared is not None:
        owners = " and ".join(repr(label) for label in labels if shared in split_synonyms(label))
        raise ValueError(f"{shared!r} belongs to the labels {owners}: leave it in one of them")


def _first_repeated(items: list[str]) -> str | None:
    """The first item that was there before, or None."""
    seen: set[str] = set()
    for item in items:
        if item in seen:
            return item
        seen.add(item)
    return None
