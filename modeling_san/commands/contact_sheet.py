"""`san contact-sheet`: augmented pictures of a data set with their labels drawn over, to check by eye."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from .errors import CommandError, say
from .parser import positive_integer

_DESCRIPTION = """\
Look at a data set before training on it: one PNG with random views of its pictures as training sees them (scale, crop,
colours, flip), each beside the same view with its labels painted over and named. What has no label stays unpainted.
"""
_EXAMPLE = """\
example:
  san contact-sheet --dataset train.parquet --labels classes.json
  san contact-sheet --dataset ./coco --labels coco_stuff_171 --split validation --count 24 --output coco.png
"""
_MAX_COUNT = 256
_MAX_CROP = 4096


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser of `san`."""
    parser = subparsers.add_parser(
        "contact-sheet", help="check a data set by eye before training", description=_DESCRIPTION, epilog=_EXAMPLE
    )
    parser.add_argument(
        "--dataset",
        required=True,
        metavar="PATH_OR_HUB_ID",
        help="parquet or arrow file, a pattern of these, a folder, or a Hub id",
    )
    parser.add_argument(
        "--labels",
        metavar="PRESET_OR_FILE",
        help="a label set such as coco_stuff_171, or a file with class names (default: the names that the data set "
        "brings)",
    )
    parser.add_argument("--split", default="train", help="part of the data set (default: %(default)s)")
    parser.add_argument("--image-column", metavar="NAME", help="where the pictures are (default: recognised)")
    parser.add_argument("--label-column", metavar="NAME", help="where the label maps are (default: recognised)")
    parser.add_argument(
        "--reduce-labels", action="store_true", help="label maps count classes from 1 and keep 0 for no label"
    )
    parser.add_argument(
        "--ignore-index", type=int, metavar="VALUE", help="value for no label (default: the labels' own, or 255)"
    )
    parser.add_argument("--streaming", action="store_true", help="read the first pictures only, copy nothing")
    parser.add_argument(
        "--crop-size", type=positive_integer, default=640, metavar="PIXELS", help="of the views (default: %(default)s)"
    )
    parser.add_argument(
        "--short-sides",
        type=_lengths,
        metavar="PIXELS,...",
        help="lengths one of which is drawn for the short side (default: 320,384,...,960)",
    )
    parser.add_argument(
        "--count", type=positive_integer, default=16, help=f"views, at most {_MAX_COUNT} (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of all random choices (default: %(default)s)")
    parser.add_argument(
        "--output", default="contact_sheet.png", metavar="FILE", help="PNG to write (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """
    Draw the sheet.

    Returns:
        exit code.
    """
    from datasets.utils import logging as datasets_logging

    from modeling_san.training.augmentation import Augmentation
    from modeling_san.training.contact_sheet import draw_contact_sheet
    from modeling_san.training.data import load_pictures
    from modeling_san.training.files import replacing_file
    from modeling_san.training.label_sets import load_label_set

    # What cannot be read is said once, by this command
    datasets_logging.set_verbosity(datasets_logging.CRITICAL)
    output = Path(args.output)
    if args.crop_size > _MAX_CROP:
        raise CommandError(f"--crop-size {args.crop_size}: take at most {_MAX_CROP}")
    if args.seed < 0:
        raise CommandError(f"--seed {args.seed}: pass a whole number from 0 on")
    if output.suffix.lower() != ".png":
        raise CommandError(f"--output {output}: the sheet is a PNG, let the name end in .png")
    if args.count > _MAX_COUNT:
        raise CommandError(f"--count {args.count}: nobody looks at so many, take at most {_MAX_COUNT}")
    pictures = load_pictures(
        args.dataset,
        args.split,
        streaming=args.streaming,
        image_column=args.image_column,
        label_column=args.label_column,
    )
    label_set = load_label_set(
        args.labels,
        dataset=pictures,
        source=args.dataset,
        ignore_index=args.ignore_index,
        reduce_labels=args.reduce_labels,
    )
    augmentation = Augmentation(crop_size=(args.crop_size, args.crop_size))
    if args.short_sides is not None:
        augmentation = replace(augmentation, short_sides=args.short_sides)
    try:
        sheet = draw_contact_sheet(pictures, label_set, augmentation, count=args.count, seed=args.seed)
    except ValueError as error:
        raise CommandError(f"{args.dataset}, {error}") from error
    with replacing_file(output) as beside:
        sheet.picture.save(beside, format="png")
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
