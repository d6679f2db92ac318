"""`san curves`: draw how a training run goes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .errors import CommandError, say

_DESCRIPTION = """\
Draw the loss, its terms, validation figures, learning rate and gradient norm of a training run, finished or
not, as OUTPUT_DIR/curves.png.
"""
_EXAMPLE = """\
example:
  san curves my-model
"""


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser of `san`."""
    parser = subparsers.add_parser(
        "curves", help="draw how a training run goes", description=_DESCRIPTION, epilog=_EXAMPLE
    )
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="what `san train` writes to")
    parser.add_argument("--output", metavar="PNG", help="image to write (default: OUTPUT_DIR/curves.png)")


def run(args: argparse.Namespace) -> int:
    """
    Draw the image.

    Raises:
        CommandError: there is no run, or matplotlib is missing.
    """
    from modeling_san.training.plots import plot_curves
    from modeling_san.training.tracking import METRICS_FILE

    folder = Path(args.output_dir)
    try:
        image = plot_curves(folder / METRICS_FILE, Path(args.output) if args.output else folder / "curves.png")
    except ImportError as error:
        raise CommandError(str(error)) from error
    say(str(image))
    return 0
