"""What people type as labels, made uniform: one string per label, synonyms joined by `|`."""

import csv
import unicodedata
from collections.abc import Iterable

SYNONYM_SEPARATOR = "|"
"""Between names of one label, as in "car|automobile"."""


def normalize_labels(labels: str | Iterable[str]) -> list[str]:
    """Lower-case labels, strip them and fold their inner white space.

    Args:
        labels: class names in any order; one string is one label. Names inside a label that are joined by
            `|` ("car|automobile") are synonyms and stay in one label.

    Returns:
        One string per label, in the order given.

    Raises:
        ValueError: there are no labels, one is empty or not a string, or one is given twice.
    """
    given = [labels] if isinstance(labels, str) else list(labels)
    if not given:
        raise ValueError('text holds no labels: pass at least one class name, for example text=["sky", "road"]')
    normalized = [_normalize_label(label, position) for position, label in enumerate(given)]
    _refuse_duplicates(normalized)
    return normalized


def parse_labels(text: str) -> list[str]:
    """Split a line such as `red striped, blue dotted, "road, route"` into labels.

    Labels are separated by commas or line breaks; a label that holds a comma goes in double quotes, and a double
    quote inside quotes is doubled, as in a CSV file.

    Args:
        text: what the user typed.

    Returns:
        The labels as `normalize_labels` returns them.

    Raises:
        ValueError: the quotes do not match, or `normalize_labels` refuses the labels.
    """
    try:
        rows = list(csv.reader(text.splitlines(), skipinitialspace=True, strict=True))
    except csv.Error as error:
        raise ValueError(
            f"labels cannot be split ({error}): separate them by commas and put a label that holds a comma "
            "between double quotes, for example 'sky, \"road, route\"'"
        ) from error
    return normalize_labels([cell for row in rows for cell in row])


def split_synonyms(label: str) -> list[str]:
    """Names that share one label: "car|automobile" -> ["car", "automobile"]."""
    return label.split(SYNONYM_SEPARATOR)


def _normalize_label(label: object, position: int) -> str:
    """One label in its uniform form; `position` counts from 0 and is for the error alone."""
    if not isinstance(label, str):
        raise ValueError(
            f"label {position} is {label!r} ({type(label).__name__}) and not a string: "
            'pass a flat list of class names, for example text=["sky", "road"]'
        )
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
