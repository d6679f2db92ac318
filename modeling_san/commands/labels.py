"""Labels and prompt templates as they are given on the command line."""

import argparse
import os
from pathlib import Path

from .errors import CommandError

_FILE_FORMS = 'a JSON list ["sky", "road"], an object {"classes": ["sky", "road"]}, or one name per line'


def add_label_options(parser: argparse.ArgumentParser) -> None:
    """Add `--labels` and `--labels-file`, of which at most one may be given."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--labels",
        metavar="NAMES",
        help='names separated by commas, such as "sky, road, car|automobile" (| joins synonyms; a name that holds a '
        "comma goes in double quotes)",
    )
    group.add_argument("--labels-file", metavar="FILE", help=f"file with names: {_FILE_FORMS}")


def read_labels(args: argparse.Namespace) -> list[str] | None:
    """
    The labels that `add_label_options` let the user give.

    Returns:
        normalised labels; None where neither option was used.

    Raises:
        CommandError: the labels or their file cannot be used.
    """
    from modeling_san.processing import normalize_labels

    if args.labels_file is not None:
        return read_labels_file(args.labels_file)
    if args.labels is None:
        return None
    if not args.labels.strip():
        raise CommandError('--labels is empty: name what to look for, for example --labels "sky, road"')
    try:
        # Where the locale is not UTF-8 Python keeps the bytes of other letters aside; those are what was typed
        return normalize_labels(os.fsencode(args.labels).decode("utf-8"))
    except ValueError as error:
        raise CommandError(f"--labels: {error}") from error


def read_labels_file(path: str | Path) -> list[str]:
    """
    Read class names from a JSON or a text file.

    Args:
        path: of a file in one of the forms that `processing.label_files` knows.

    Returns:
        normalised labels, in the file's order.

    Raises:
        CommandError: the file cannot be read or has another shape, or a label is refused.
    """
    from modeling_san.processing.label_files import read_label_file

    try:
        return list(read_label_file(path).names)
    except ValueError as error:
        raise CommandError(str(error)) from error


def read_templates(given: str | None) -> str | list[str] | None:
    """
    What `--templates` stands for.

    Args:
        given: name of a set that ships with the package, or a file of templates, each with one `{}`.

    Returns:
        the name, the templates of the file, or None where nothing was given.

    Raises:
        CommandError: there is neither a set nor a file of that name, or its templates cannot be used.
    """
    from modeling_san.processing import template_names
    from modeling_san.processing.label_files import describe_json, read_json_or_lines
    from modeling_san.processing.processing_san import resolve_templates

    if given is None or given in template_names():
        return given
    path = Path(given)
    if not path.is_file():
        raise CommandError(
            f"--templates {given}: there is no set of prompt templates and no file of that name: choose "
            f"{' or '.join(template_names())}, or pass a file with one template per line, such as: a photo of a {{}}."
        )
    forms = 'a JSON list ["a photo of a {}."], or one template per line'
    try:
        templates = read_json_or_lines(path, "templates file", forms)
    except ValueError as error:
        raise CommandError(str(error)) from error
    if not isinstance(templates, list):
        raise CommandError(f"templates file {path} holds {describe_json(templates)}: expected {forms}")
    try:
        return resolve_templates(templates)[1]
    except ValueError as error:
        raise CommandError(f"templates file {path}: {error}") from error
