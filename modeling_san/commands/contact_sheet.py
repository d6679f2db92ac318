# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""`san contact-sheet`: augmented images of a data set with their labels drawn over, to check by eye."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .datasets import add_dataset_options, open_dataset
from .errors import CommandError, say
from .parser import add_model_option, integer_between

_DESCRIPTION = """\
Look at a data set before training on it: one PNG with random views of its images as training sees them (scale, crop,
colours, flip), each beside the same view with its labels painted over and named. What has no label stays unpainted.
"""
_EXAMPLE = """\
example:
  san contact-sheet --dataset train.parquet --labels classes.json
  san contact-sheet --dataset train.parquet --labels classes.json --config fine_tune --model san-vit-b-16
  san contact-sheet --dataset ./coco --labels coco_stuff_171 --split validation --count 24 --output coco.png
"""


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser of `san`."""
    parser = subparsers.add_parser(
        "contact-sheet", help="check a data set by eye before training", description=_DESCRIPTION, epilog=_EXAMPLE
    )
    add_dataset_options(parser, split="train")
    parser.add_argument("--config", metavar="RECIPE", help="of the training, as for `san train`")
    add_model_option(parser)
    parser.add_argument(
        "--crop-size", type=integer_between(1, 4096), metavar="PIXELS", help="of the views (default: training's)"
    )
    parser.add_argument(
        "--short-sides",
        type=_lengths,
        metavar="PIXELS,...",
        help="lengths one of which is drawn for the short side (default: training's)",
    )
    # Nobody looks at more
    parser.add_argument("--count", type=integer_between(1, 256), default=16, help="views (default: %(default)s)")
    parser.add_argument(
        "--seed", type=integer_between(0), default=0, help="of all random choices (default: %(default)s)"
    )
    parser.add_argument(
        "--output", default="outputs/contact_sheet.png", metavar="FILE", help="PNG to write (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Draw the sheet."""
    from modeling_san.processing.files import replacing_file
    from modeling_san.training.build import load_setting, make_augmentation
    from modeling_san.training.contact_sheet import MARK, draw_contact_sheet, is_contact_sheet
    from modeling_san.training.recipe import Recipe, read_recipe

    output = Path(args.output)
    if output.suffix.lower() != ".png":
        raise CommandError(f"--output {output}: the sheet is a PNG, let the name end in .png")
    if output.exists() and not is_contact_sheet(output):
        raise CommandError(f"--output {output} is there already, and no contact sheet: choose another name")
    given = {
        "model": args.model,
        "crop_size": None if args.crop_size is None else [args.crop_size],
        "short_sides": None if args.short_sides is None else list(args.short_sides),
        "skip_damaged": args.skip_damaged or None,
    }
    given = {name: value for name, value in given.items() if value is not None}
    recipe = Recipe(**((read_recipe(args.config) if args.config else {}) | given))
    images, label_set = open_dataset(args)
    try:
        augmentation = make_augmentation(recipe, images, label_set, *load_setting(recipe))
        sheet = draw_contact_sheet(
            images, label_set, augmentation, count=args.count, seed=args.seed, skip_damaged=recipe.skip_damaged
        )
    except ValueError as error:
        raise CommandError(f"{args.dataset}, {error}") from error
    with replacing_file(output) as beside:
        sheet.image.save(beside, format="png", pnginfo=MARK)
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
