"""`san contact-sheet`: augmented images of a data set with their labels drawn over, to check by eye."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from .datasets import add_dataset_options, open_dataset
from .errors import CommandError, say
from .parser import integer_between

_DESCRIPTION = """\
Look at a data set before training on it: one PNG with random views of its images as training sees them (scale, crop,
colours, flip), each beside the same view with its labels painted over and named. What has no label stays unpainted.
"""
_EXAMPLE = """\
example:
  san contact-sheet --dataset train.parquet --labels classes.json
  san contact-sheet --dataset ./coco --labels coco_stuff_171 --split validation --count 24 --output coco.png
"""


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser of `san`."""
    parser = subparsers.add_parser(
        "contact-sheet", help="check a data set by eye before training", description=_DESCRIPTION, epilog=_EXAMPLE
    )
    add_dataset_options(parser, split="train")
    parser.add_argument(
        "--crop-size",
        type=integer_between(1, 4096),
        default=640,
        metavar="PIXELS",
        help="of the views (default: %(default)s)",
    )
    parser.add_argument(
        "--short-sides",
        type=_lengths,
        metavar="PIXELS,...",
        help="lengths one of which is drawn for the short side (default: 320,384,...,960)",
    )
    # Nobody looks at more
    parser.add_argument("--count", type=integer_between(1, 256), default=16, help="views (default: %(default)s)")
    parser.add_argument(
        "--seed", type=integer_between(0), default=0, help="of all random choices (default: %(default)s)"
    )
    parser.add_argument(
        "--output", default="contact_sheet.png", metavar="FILE", help="PNG to write (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Draw the sheet."""
    from modeling_san.processing.files import replacing_file
    from modeling_san.training.augmentation import Augmentation
    from modeling_san.training.contact_sheet import draw_contact_sheet

    output = Path(args.output)
    if output.suffix.lower() != ".png":
        raise CommandError(f"--output {output}: the sheet is a PNG, let the name end in .png")
    images, label_set = open_dataset(args)
    augmentation = Augmentation(crop_size=(args.crop_size, args.crop_size))
    if args.short_sides is not None:
        augmentation = replace(augmentation, short_sides=args.short_sides)
    try:
        sheet = draw_contact_sheet(images, label_set, augmentation, count=args.count, seed=args.seed)
    except ValueError as error:
        raise CommandError(f"{args.dataset}, {error}") from error
    with replacing_file(output) as beside:
        sheet.image.save(beside, format="png")
    for line in sheet.lines():
        say(line)
    say(f"wrote {output}")
    return 0


def _lengths(text: str) -> tuple[int, ...]:
    """Lengths separated by commas, as an argument's type."""
    try:
        lengths = tuple(int(part) for part in text.split(","))
    except ValueError:
        lengths = ()
    if not lengths or min(lengths) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of lengths such as 320,640")
    return lengths
