# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""Argument parsing that all commands share."""

import argparse
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from modeling_san.processing.vocabulary_san import EXTENSIONS

from .errors import CommandError, report_error

_Number = TypeVar("_Number", int, float)


class CommandParser(argparse.ArgumentParser):
    """Keeps the layout of examples in the help, and says what is wrong in one line without the whole usage."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(**kwargs)

    def error(self, message: str) -> NoReturn:
        """End with exit code 2."""
        report_error(f"{message} (see {self.prog} --help)")
        raise SystemExit(2)


def add_model_option(parser: argparse.ArgumentParser) -> None:
    """Add `--model`; None stands for the built-in model."""
    parser.add_argument(
        "--model",
        metavar="PATH_OR_HUB_ID",
        help="folder that `san convert`, `san train` or save_pretrained wrote, or the name of a Hub repository "
        "(default: the built-in model)",
    )


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Add `--device`, for `pick_device`; None stands for a GPU if there is one."""
    parser.add_argument("--device", help='"cpu", "cuda" or "cuda:1" (default: a GPU if there is one)')


def add_output_option(parser: argparse.ArgumentParser, default: str | None = "outputs") -> None:
    """Add `--output`, for `make_folder`; it has to be given where there is no default."""
    where = "" if default is None else f" (default: ./{default})"
    parser.add_argument(
        "--output",
        metavar="DIR",
        default=default,
        required=default is None,
        help=f"folder to write to, made if missing{where}",
    )


def make_folder(path: str | Path, remedy: str = "pass another --output") -> Path:
    """
    Make the folder that results go to; `remedy` is what an error says to do.

    Raises:
        CommandError: it cannot be made or written to.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Whether a folder can be written to depends on more than its mode: on the user, the mount, the quota
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise CommandError(f"output folder {folder} cannot be written to ({reason}): {remedy}") from error
    return folder


def add_templates_option(parser: argparse.ArgumentParser) -> None:
    """Add `--templates`, for `labels.read_templates`; None stands for those saved with the model."""
    parser.add_argument(
        "--templates",
        metavar="SET_OR_FILE",
        help="prompts that names are put into: vild, imagenet, or a file with one template per line, each with one {} "
        "(default: those saved with the model)",
    )


def add_extension_option(parser: argparse.ArgumentParser) -> None:
    """Add `--extend-labels`, see `modeling_san.processing.extend_labels`."""
    parser.add_argument(
        "--extend-labels",
        default="none",
        choices=EXTENSIONS,
        help='let your names compete with those of COCO-Stuff; what an added name wins becomes "other" '
        "(default: none, every pixel gets one of your names)",
    )


def share(text: str) -> float:
    """A number from 0 to 1, as an argument's type."""
    return _number(text, float, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def positive_number(text: str) -> float:
    """A finite number above 0, as an argument's type."""
    return _number(text, float, lambda value: 0 < value < float("inf"), "a number above 0")


def positive_integer(text: str) -> int:
    """A whole number from 1, as an argument's type."""
    return integer_between(1)(text)


def integer_between(lowest: int, highest: float = float("inf")) -> Callable[[str], int]:
    """An argument's type: a whole number from `lowest` to `highest`, both included."""
    expected = f"of at least {lowest}" if highest == float("inf") else f"from {lowest} to {highest}"
    return lambda text: _number(text, int, lambda value: lowest <= value <= highest, f"a whole number {expected}")


def _number(text: str, convert: Callable[[str], _Number], fits: Callable[[_Number], bool], expected: str) -> _Number:
    with suppress(ValueError):
        if fits(value := convert(text)):
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
