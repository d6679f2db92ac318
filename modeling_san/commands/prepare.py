# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""`san prepare`: turn an official benchmark folder into parquet files."""

from __future__ import annotations

import argparse
import textwrap
from typing import Any

from modeling_san.training.presets import PRESETS, Preset

from .errors import say, warn
from .parser import positive_integer

_DESCRIPTION = """\
Turn the folder into which a benchmark's official archives were unpacked into parquet files for `datasets`: images as
they are, label maps as class indices, in the order and with the ignore label of the preset. Run the same command again
after an interruption: it goes on where it stopped. Nothing is downloaded.

presets and what SOURCE holds:
{presets}

SOURCE may also be the folder that holds the named one (ADEChallengeData2016, VOCdevkit, ...).
"""
_EXAMPLE = """\
example:
  san prepare ade20k_150 ADEChallengeData2016 ade20k
  san prepare coco_stuff_171 coco coco-stuff --split validation
"""


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser of `san`."""
    parser = subparsers.add_parser(
        "prepare",
        help="turn an official benchmark folder into parquet files",
        description=_DESCRIPTION.format(presets="\n".join(map(_describe, PRESETS.values()))),
        epilog=_EXAMPLE,
    )
    parser.add_argument("preset", metavar="PRESET", help="one of the presets above")
    parser.add_argument("source", metavar="SOURCE", help="folder of the unpacked archives")
    parser.add_argument("output", metavar="OUT", help="folder to write, about as large as the images")
    parser.add_argument(
        "--split",
        default="all",
        metavar="train|validation|all",
        help="which part, or train_aug of pascal_voc_20 (default: %(default)s, train and validation)",
    )
    parser.add_argument(
        "--workers", type=positive_integer, metavar="N", help="threads (default: one per core, at most 8)"
    )
    parser.add_argument(
        "--shard-size",
        type=positive_integer,
        default=2000,
        metavar="IMAGES",
        help="images in a parquet file (default: %(default)s, about 400 MB)",
    )
    parser.add_argument(
        "--allow-incomplete",
        action="store_true",
        help="go on where the number of images is not the official one, or a split is missing",
    )
    parser.add_argument(
        "--skip-unreadable",
        action="store_true",
        help="leave out, and count, damaged files and label maps of another size than their image",
    )


def _describe(preset: Preset) -> str:
    """A preset's name and what its archives hold, as lines of the help."""
    return textwrap.fill(
        f"{preset.name:<18}  {preset.expected}",
        width=100,
        initial_indent="  ",
        subsequent_indent=" " * 22,
        break_long_words=False,
        break_on_hyphens=False,
    )


def run(args: argparse.Namespace) -> int:
    """Prepare the data set; returns the exit code."""
    from modeling_san.training.prepare import prepare

    prepared = prepare(
        args.preset,
        args.source,
        args.output,
        split=args.split,
        workers=args.workers,
        images_per_shard=args.shard_size,
        allow_incomplete=args.allow_incomplete,
        skip_unreadable=args.skip_unreadable,
        warn=warn,
    )
    for name, split in prepared.items():
        left_out = f", {split.skipped} left out" if split.skipped else ""
        say(f"{name}: {split.images} images in {split.shards} {'file' if split.shards == 1 else 'files'}{left_out}")
    say(f"wrote {args.output} (its labels: --labels {args.preset})")
    return 0
