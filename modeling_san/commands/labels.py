# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""Labels and prompt templates as they are given on the command line."""

import argparse
import os
from difflib import get_close_matches
from pathlib import Path

from modeling_san.processing.label_files import FILE_FORMS, describe_json, read_json_or_lines, read_label_file
from modeling_san.processing.labels_san import normalize_labels
from modeling_san.processing.vocabulary_san import load_vocabulary, template_names, vocabulary_names

from .errors import CommandError

_TEMPLATE_FORMS = 'a JSON list ["a photo of a {}."], or one template per line'


def add_label_options(parser: argparse.ArgumentParser) -> None:
    """Add `--labels` and `--labels-file`, of which at most one may be given, for `read_labels`."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--labels",
        metavar="NAMES_OR_SET",
        help='names separated by commas, such as "sky, road, car|automobile" (| joins synonyms; a name that holds a '
        "comma goes in double quotes), a label set that ships with the package (ade20k_150, coco_stuff_171, ...), or "
        "a file with names (default: those that come with the model or the data set)",
    )
    group.add_argument("--labels-file", metavar="FILE", help=f"file with names: {FILE_FORMS}")


def find_labels(args: argparse.Namespace) -> str | list[str] | None:
    """
    What `add_label_options` let the user give: the name of a label set or of a file, which also say how label maps
    store the classes, or normalised names; None where neither option was used.

    Raises:
        ValueError, CommandError: the labels cannot be used.
    """
    return args.labels_file if args.labels is None else _recognise(args.labels)


def read_labels(args: argparse.Namespace) -> list[str] | None:
    """
    The labels that `add_label_options` let the user give, normalised; None where neither option was used.

    Raises:
        ValueError, CommandError: the labels or their file cannot be used.
    """
    if args.labels_file is not None:
        return read_labels_file(args.labels_file)
    return None if args.labels is None else parse_labels(args.labels)


def parse_labels(text: str) -> list[str]:
    """
    Normalised labels from the name of a set that ships with the package, a label file, or names between commas.

    Raises:
        ValueError, CommandError: there are none, or they cannot be used.
    """
    found = _recognise(text)
    if not isinstance(found, str):
        return found
    return list(load_vocabulary(found).classes) if found in vocabulary_names() else read_labels_file(found)


def _recognise(text: str) -> str | list[str]:
    """
    A label set or a file as it was named, or names between commas, normalised.

    A file is known by its ending or its folder: the label "sky" is not read from a file that happens to be called so.
    """
    if not text.strip():
        raise CommandError('--labels is empty: name what to look for, for example --labels "sky, road"')
    # Unlike `Path.is_file`, this takes a text that is too long for a path
    if text in vocabulary_names() or ((Path(text).suffix or os.path.dirname(text)) and os.path.isfile(text)):
        return text
    try:
        # Where the locale is not UTF-8 Python keeps the bytes of other letters aside; those are what was typed
        labels = normalize_labels(os.fsencode(text).decode("utf-8"))
    except ValueError as error:
        raise CommandError(f"--labels: {error}") from error
    if len(labels) == 1 and (
        Path(text).suffix in (".json", ".txt", ".csv", ".tsv") or get_close_matches(text, vocabulary_names())
    ):
        raise CommandError(
            f"--labels {text}: there is no such file and no such label set: check the spelling; the sets are "
            f"{', '.join(vocabulary_names())}"
        )
    return labels


def read_labels_file(path: str | Path) -> list[str]:
    """
    Read class names from a file in one of the forms that `processing.label_files` knows.

    Returns:
        normalised labels, in the file's order.

    Raises:
        ValueError: the file cannot be read or has another shape, or a label is refused.
    """
    return list(read_label_file(path)["classes"])


def read_templates(given: str | None) -> str | list[str] | None:
    """
    What `--templates` stands for: the name of a set that ships with the package, or the templates in a file, each
    with one `{}`; None where nothing was given.

    Raises:
        ValueError, CommandError: there is neither a set nor a file of that name, or its templates cannot be used.
    """
    from modeling_san.processing.processing_san import resolve_templates

    if given is None or given in template_names():
        return given
    if not os.path.isfile(given):
        raise CommandError(
            f"--templates {given}: there is no set of prompt templates and no file of that name: choose "
            f"{' or '.join(template_names())}, or pass a file with one template per line, such as: a photo of a {{}}."
        )
    templates = read_json_or_lines(given, "templates file", _TEMPLATE_FORMS)
    if not isinstance(templates, list):
        raise CommandError(f"templates file {given} holds {describe_json(templates)}: expected {_TEMPLATE_FORMS}")
    try:
        return resolve_templates(templates)[1]
    except ValueError as error:
        raise CommandError(f"templates file {given}: {error}") from error
