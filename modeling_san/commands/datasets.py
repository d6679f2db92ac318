# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""Data sets as they are given on the command line."""

from __future__ import annotations

import argparse
from typing import Any

from .labels import add_label_options, find_labels


def add_source_options(parser: argparse.ArgumentParser, split: str) -> None:
    """Add where images come from: `--dataset`, `--split`, `--streaming` and `--image-column`."""
    parser.add_argument(
        "--dataset",
        required=True,
        metavar="PATH_OR_HUB_ID",
        help="parquet or arrow file, a pattern of these, a folder, or a Hub id",
    )
    parser.add_argument("--split", default=split, help="part of the data set (default: %(default)s)")
    parser.add_argument("--streaming", action="store_true", help="read the data set as it passes by, without a copy")
    parser.add_argument("--image-column", metavar="NAME", help="where the images are (default: found by its name)")


def add_dataset_options(parser: argparse.ArgumentParser, split: str) -> None:
    """Add the options of labelled images, which `open_dataset` reads."""
    add_source_options(parser, split)
    parser.add_argument("--label-column", metavar="NAME", help="where the label maps are (default: found by its name)")
    add_label_options(parser)
    parser.add_argument(
        "--reduce-labels", action="store_true", help="label maps count classes from 1, and 0 stands for no label"
    )
    parser.add_argument(
        "--ignore-index", type=int, metavar="VALUE", help="stands for no label (default: the label set's, else 255)"
    )
    parser.add_argument(
        "--map",
        action="append",
        default=[],
        metavar="OLD=NEW",
        help="a value in the label maps that means another one, such as 255=1; may be given several times",
    )
    parser.add_argument(
        "--skip-damaged", action="store_true", help="leave out images that cannot be read, instead of ending at one"
    )


def open_dataset(args: argparse.Namespace) -> tuple[Any, Any]:
    """
    Images and label set of the data set that `add_dataset_options` let the user name.

    Raises:
        ValueError: it cannot be read, or its labels cannot.
    """
    from modeling_san.training.data import load_images
    from modeling_san.training.label_sets import load_label_set, parse_map

    quiet_datasets()
    images = load_images(
        args.dataset,
        args.split,
        streaming=args.streaming,
        image_column=args.image_column,
        label_column=args.label_column,
    )
    label_set = load_label_set(
        find_labels(args),
        dataset=images,
        source=args.dataset,
        ignore_index=args.ignore_index,
        reduce_labels=args.reduce_labels,
        value_map=parse_map(args.map),
    )
    return images, label_set


def quiet_datasets() -> None:
    """Keep `datasets`' own log and bars off the terminal: what cannot be read is said once, by the command."""
    from datasets.utils import logging

    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
