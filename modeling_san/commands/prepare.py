"""`san prepare`: turn an official benchmark folder into parquet files."""

from __future__ import annotations

import argparse
from typing import Any

from .errors import say, warn
from .parser import positive_integer

_DESCRIPTION = """\
Turn the folder into which a benchmark's official archives were unpacked into parquet files for `datasets`: images as
they are, label maps as class indices, in the order and with the ignore label of the preset. Run the same command again
after an interruption: it goes on where it stopped. Nothing is downloaded.

presets and what SOURCE holds:
  coco_stuff_171      train2017/*.jpg, val2017/*.jpg (or images/...) and stuffthingmaps/train2017/*.png,
                      stuffthingmaps/val2017/*.png (or annotations/...)
  ade20k_150          ADEChallengeData2016: images/training, images/validation, annotations/training, ...
  ade20k_847          ADE20K_2021_17_01: images/ADE/training/**/NAME.jpg with NAME_seg.png, images/ADE/validation/**
  pascal_context_59   VOC2010: JPEGImages, trainval/*.mat (or SegmentationClassContext/*.png, or
                      59_context_labels/*.png) and the lists ImageSets/SegmentationContext/train.txt, val.txt (or
                      pascalcontext_train.txt, pascalcontext_val.txt, or VOC2010's own ImageSets/Main)
  pascal_context_459  VOC2010: JPEGImages, trainval/*.mat and the same lists
  pascal_voc_20       VOC2012: JPEGImages, SegmentationClass, ImageSets/Segmentation/train.txt, val.txt; for
                      --split train_aug SegmentationClassAug and ImageSets/Segmentation/train_aug.txt

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
        description=_DESCRIPTION,
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
        metavar="IMAGES",
        help="images in a parquet file (default: 2000, about 400 MB)",
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


def run(args: argparse.Namespace) -> int:
    """
    Prepare the data set.

    Returns:
        exit code.
    """
    from modeling_san.training.prepare import IMAGES_PER_SHARD, prepare

    prepared = prepare(
        args.preset,
        args.source,
        args.output,
        split=args.split,
        workers=args.workers,
        images_per_shard=args.shard_size or IMAGES_PER_SHARD,
        allow_incomplete=args.allow_incomplete,
        skip_unreadable=args.skip_unreadable,
        warn=warn,
    )
    for name, split in prepared.items():
        say(f"{name}: {split.images} images in {split.shards} {'file' if split.shards == 1 else 'files'}")
    say(f"wrote {args.output} (its labels: --labels {args.preset})")
    return 0
