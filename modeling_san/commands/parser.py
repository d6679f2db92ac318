"""Argument parsing that all commands share."""

import argparse
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from .errors import one_line

_Number = TypeVar("_Number", int, float)


class CommandParser(argparse.ArgumentParser):
    """Keeps the layout of examples in the help, and says what is wrong in one line without the whole usage."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(**kwargs)

    def error(self, message: str) -> NoReturn:
        """End with exit code 2."""
        print(f"san: error: {one_line(message)} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def add_model_option(parser: argparse.ArgumentParser) -> None:
    """Add `--model`; None stands for the built-in model."""
    parser.add_argument(
        "--model",
        metavar="PATH_OR_HUB_ID",
        help="folder that `san convert`, `san train` or save_pretrained wrote, or the name of a Hub repository "
        "(default: the built-in model)",
    )


def add_output_option(parser: argparse.ArgumentParser) -> None:
    """Add `--output`, the folder for what a command writes."""
    parser.add_argument(
        "--output", metavar="DIR", default="outputs", help="folder to write to, made if missing (default: ./outputs)"
    )


def add_templates_option(parser: argparse.ArgumentParser) -> None:
    """Add `--templates`; None stands for those saved with the model."""
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
        metavar="none|coco-stuff|coco-all",
        help='let your names compete with those of COCO-Stuff; what an added name wins becomes "other" '
        "(default: none, every pixel gets one of your names)",
    )


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Add `--device`; None stands for a GPU if there is one."""
    parser.add_argument("--device", help='"cpu", "cuda" or "cuda:1" (default: a GPU if there is one)')


def share(text: str) -> float:
    """A number from 0 to 1, as an argument's type."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def positive_number(text: str) -> float:
    """A finite number above 0, as an argument's type."""
    return _positive(text, float, "a number above 0")


def positive_integer(text: str) -> int:
    """A whole number from 1, as an argument's type."""
    return _positive(text, int, "a whole number of at least 1")


def _positive(text: str, convert: Callable[[str], _Number], expected: str) -> _Number:
    try:
        value = convert(text)
    except ValueError:
        value = convert("0")
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
    return value
