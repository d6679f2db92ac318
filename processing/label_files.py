# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""Files with class names: a JSON list, a JSON object, a table, or one name per line."""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from .labels_san import list_labels, normalize_labels
from .wording_san import listed

FILE_FORMS = (
    'a JSON list ["sky", "road"], an object {"classes": ["sky", "road"]} or {"0": "sky", "1": "road"}, a CSV or TSV '
    "table with a column `name`, or one name per line"
)

_OPTIONS = {
    "ignore_index": (int, "a whole number"),
    "reduce_labels": (bool, "true or false"),
    "colors": (list, "a list with a colour for each of the classes"),
    "map": (dict, 'an object from stored value to the one that it means, such as {"255": 1}'),
}

_MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
"""Encodings by what a file begins with; UTF-32 does as UTF-16 does, and comes first."""

_TABLES = (".csv", ".tsv")
_NAME_COLUMNS = ("name", "class_name", "label_name", "category_name", "class", "category", "label")
_INDEX_COLUMNS = (
    "id",
    "index",
    "idx",
    "class_id",
    "label_id",
    "category_id",
    "class_index",
    "value",
    "label",
    "class",
)
_COLOR_COLUMNS = (("r", "g", "b"), ("red", "green", "blue"))
_NUMBERED_LINE = re.compile(r"([0-9]+)(?:\s*:\s*|\s+)(\S.*)")
"""Such as "0: sky"."""

_Item = TypeVar("_Item")


def read_label_file(path: str | Path) -> dict[str, Any]:
    """Read class names, and what else a label file says.

    A text may be a table, too, the first line of which says what is in its columns: `name` (or `class` ...), and if
    wanted `id` (`index` ...) and `r`, `g`, `b` (`red` ...). Lines such as "0: sky" or "0,sky" are numbered names, and
    one line alone is names between commas.

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
    read_names = partial(_read_names, is_table=Path(path).suffix.lower() in _TABLES)
    data = read_json_or_lines(path, "labels file", FILE_FORMS, read_names)
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


def read_json_or_lines(path: str | Path, what: str, forms: str, read_lines: Callable[[list[str]], Any] = list) -> Any:
    """The content of a JSON file, or the lines of a text file that are not blank.

    Args:
        path: of the file, in UTF-8, or in UTF-16 or UTF-32 with the mark of these.
        what: what an error calls it, for example "labels file".
        forms: what an error says was expected.
        read_lines: what to make of the lines; may raise ValueError.

    Raises:
        ValueError: the file cannot be read, is empty, or is no valid JSON.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        encoding = next((encoding for mark, encoding in _MARKS.items() if content.startswith(mark)), "utf-8-sig")
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} {path} is not text in UTF-8: save it in that encoding, as {forms}") from error
    except OSError as error:
        raise ValueError(f"{what} {path} cannot be read ({error.strerror or error}): check the path") from error
    if "\0" in text:
        raise ValueError(f"{what} {path} is not text in UTF-8: save it in that encoding, as {forms}")
    if not text.strip():
        raise ValueError(f"{what} {path} is empty: expected {forms}")
    if path.suffix.lower() != ".json" and text.lstrip()[0] not in "[{":
        try:
            return read_lines([line for line in text.splitlines() if line.strip()])
        except ValueError as error:
            raise ValueError(f"{what} {path}: {error}") from error
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} {path} is not valid JSON ({error}): expected {forms}") from error


def describe_json(value: Any) -> str:
    """What a JSON value is, for an error message."""
    if isinstance(value, dict):
        return f"a JSON object with the keys {listed(map(repr, value), 3) or 'none'}"
    return f"the single value {str(value)[:40]!r}"


def _read_names(lines: list[str], is_table: bool) -> Any:
    """Names in the lines of a text, in one of the forms that JSON files have."""
    delimiter = max("\t;,", key=lines[0].count)
    try:
        rows = list(csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=is_table))
    except csv.Error as error:
        raise ValueError(f"the lines cannot be split into columns ({error})") from error
    rows = [[cell.strip() for cell in row] for row in rows]
    columns = {re.sub(r"\W+", "_", cell.casefold()): place for place, cell in enumerate(rows[0])}
    name = next((column for column in _NAME_COLUMNS if column in columns), None)
    index = next((column for column in _INDEX_COLUMNS if column in columns and column != name), None)
    color = next((triple for triple in _COLOR_COLUMNS if columns.keys() >= set(triple)), ())
    if name is not None and (is_table or index or color):
        return _read_table(rows[1:], columns, name, index, color)
    pairs = [(row[0], row[1]) for row in rows if len(row) == 2 and row[0].isdecimal()]
    if len(pairs) < len(rows):
        numbered = map(_NUMBERED_LINE.fullmatch, map(str.strip, lines))
        pairs = [(found[1], found[2]) for found in numbered if found]
    if len(pairs) == len(rows):
        return _in_order([(int(number), name) for number, name in pairs], "the text")
    if max(map(len, rows)) > 1 and (is_table or all(row[0].isdecimal() for row in rows)):
        raise ValueError("the table names none of its columns `name`: write what they are into the first line")
    # Of one class there would be nothing to choose
    return list_labels(lines[0]) if len(lines) == 1 else [row[0] for row in rows] if is_table else lines


def _read_table(
    rows: list[list[str]], columns: dict[str, int], name: str, index: str | None, color: Sequence[str]
) -> dict[str, Any]:
    """Names and colours in the columns called so, in the order of the indices if there are any."""
    needed = [columns[column] for column in (name, index, *color) if column is not None]
    if short := next((row for row in rows if len(row) <= max(needed)), None):
        raise ValueError(f"the row {', '.join(short)!r} has fewer columns than the first line names")
    if index is not None:
        place = columns[index]
        if wrong := next((row[place] for row in rows if not row[place].isdecimal()), None):
            raise ValueError(f"the column `{index}` holds {wrong!r}: expected whole numbers from 0 on")
        rows = _in_order([(int(row[place]), row) for row in rows], "the table")
    table: dict[str, Any] = {"classes": [row[columns[name]] for row in rows]}
    if color:
        cells = [[row[columns[part]] for part in color] for row in rows]
        table["colors"] = [[int(cell) if cell.isdecimal() else cell for cell in row] for row in cells]
    return table


def _names_by_index(data: dict[str, Any], what: str) -> list[Any]:
    """The names of {"0": "sky", "1": "road"} in the order of their indices."""
    if not data or not all(key.isascii() and key.isdigit() for key in data):
        raise ValueError(f"{what} holds {describe_json(data)}: expected {FILE_FORMS}")
    return _in_order([(int(key), name) for key, name in data.items()], what)


def _in_order(items: list[tuple[int, _Item]], what: str) -> list[_Item]:
    """Items by their indices, which have to be 0, 1, 2 ..."""
    by_index = dict(items)
    missing = next((index for index in range(len(items)) if index not in by_index), None)
    if missing is not None:
        raise ValueError(
            f"{what} names {len(items)} classes but none of index {missing}: number them from 0 on, each once"
        )
    return [by_index[index] for index in range(len(items))]


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
