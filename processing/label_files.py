"""Files with class names: a JSON list, a JSON object, or one name per line."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from .labels_san import normalize_labels
from .wording_san import listed

FILE_FORMS = (
    'a JSON list ["sky", "road"], an object {"classes": ["sky", "road"]} or {"0": "sky", "1": "road"}, or one name '
    "per line"
)

_OPTIONS = {
    "ignore_index": (int, "a whole number"),
    "reduce_labels": (bool, "true or false"),
    "colors": (list, "a list with a colour for each of the classes"),
    "map": (dict, 'an object from stored value to the one that it means, such as {"255": 1}'),
}


def read_label_file(path: str | Path) -> dict[str, Any]:
    """Read class names, and what else a label file says.

    Args:
        path: of a JSON list, a JSON object with the key `classes` (and, if wanted, `ignore_index`, `reduce_labels`,
            `colors`, `ignore_color` and `map`), an object from index to name as the Hub's `id2label.json`, or a text
            with one name per line. A colour is `[red, green, blue]` or "#rrggbb".

    Returns:
        `classes`, normalised names, and of the other keys those that the file has; colours as (red, green, blue).

    Raises:
        ValueError: the file cannot be read or has another shape, or a label is refused.
    """
    what = f"labels file {path}"
    data = read_json_or_lines(path, "labels file", FILE_FORMS)
    options: dict[str, Any] = {}
    if isinstance(data, dict):
        options = {key: data[key] for key in (*_OPTIONS, "ignore_color") if data.get(key) is not None}
        data = data["classes"] if "classes" in data else _names_by_index(data, what)
    if not isinstance(data, list):
        raise ValueError(f"{what} holds {describe_json(data)}: expected {FILE_FORMS}")
    for key, (kind, expected) in _OPTIONS.items():
        # Not isinstance: true and false are no numbers
        if key in options and type(options[key]) is not kind:
            raise ValueError(f"{what}: `{key}` is {options[key]!r}, expected {expected}")
    try:
        if "colors" in options:
            options["colors"] = tuple(map(_color, options["colors"]))
        if "ignore_color" in options:
            options["ignore_color"] = _color(options["ignore_color"])
        if "map" in options:
            options["map"] = {_whole_number(old): _whole_number(new) for old, new in options["map"].items()}
        return {"classes": tuple(normalize_labels(data)), **options}
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def read_json_or_lines(path: str | Path, what: str, forms: str) -> Any:
    """The content of a JSON file, or the lines of a text file that are not blank.

    Args:
        path: of the file.
        what: what an error calls it, for example "labels file".
        forms: what an error says was expected.

    Raises:
        ValueError: the file cannot be read, is empty, or is no valid JSON.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} {path} is not text in UTF-8: expected {forms}") from error
    except OSError as error:
        raise ValueError(f"{what} {path} cannot be read ({error.strerror or error}): check the path") from error
    if not text.strip():
        raise ValueError(f"{what} {path} is empty: expected {forms}")
    if path.suffix.lower() != ".json" and text.lstrip()[0] not in "[{":
        return [line for line in text.splitlines() if line.strip()]
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} {path} is not valid JSON ({error}): expected {forms}") from error


def describe_json(value: Any) -> str:
    """What a JSON value is, for an error message."""
    if isinstance(value, dict):
        return f"a JSON object with the keys {listed(map(repr, value), 3) or 'none'}"
    return f"the single value {str(value)[:40]!r}"


def _names_by_index(data: dict[str, Any], what: str) -> list[Any]:
    """The names of {"0": "sky", "1": "road"} in the order of their indices."""
    if not data or not all(key.isascii() and key.isdigit() for key in data):
        raise ValueError(f"{what} holds {describe_json(data)}: expected {FILE_FORMS}")
    by_index = {int(key): name for key, name in data.items()}
    missing = next((index for index in range(len(data)) if index not in by_index), None)
    if missing is not None:
        raise ValueError(f"{what} names {len(data)} classes but none of index {missing}: number them from 0 on")
    return [by_index[index] for index in range(len(data))]


def _whole_number(value: Any) -> int:
    """A value of a label map; the keys of JSON objects are texts."""
    if isinstance(value, bool) or not re.fullmatch(r"-?\d{1,5}", str(value)):
        raise ValueError(f"the value {value!r} in `map` is no whole number that a label map may hold")
    return int(value)


def _color(value: Any) -> tuple[int, int, int]:
    """Red, green and blue, 0 ... 255."""
    if isinstance(value, str) and len(value) == 7 and value.startswith("#"):
        with suppress(ValueError):
            value = list(bytes.fromhex(value[1:]))
    is_color = isinstance(value, list) and len(value) == 3
    if not is_color or not all(type(part) is int and 0 <= part <= 255 for part in value):
        raise ValueError(
            f'the colour {value!r} cannot be used: write [red, green, blue], each 0 ... 255, or "#rrggbb"'
        )
    return (value[0], value[1], value[2])


__all__ = ["FILE_FORMS", "describe_json", "read_json_or_lines", "read_label_file"]
