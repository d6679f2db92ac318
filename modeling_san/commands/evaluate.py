# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""`san evaluate`: measure how well a model segments a labelled data set."""

from __future__ import annotations

import argparse
from typing import Any

from .datasets import add_dataset_options, open_dataset
from .errors import CommandError, say
from .labels import parse_labels, read_templates
from .parser import (
    add_device_option,
    add_model_option,
    add_output_option,
    add_templates_option,
    integer_between,
    make_folder,
    positive_integer,
)

_DESCRIPTION = """\
Segment a labelled data set and compare: a table with the IoU and accuracy of each class, and in DIR
  results.json          all figures
  per_class.csv         a line for each class
  per_class_iou.png     the classes from best to worst
  confusion_matrix.npz  pixels of each true class that were given to each class
  model-index.yml       the results as the metadata of a model card has them
  overlays/             the best and worst images: image, truth, prediction
A run that was cut goes on where it stopped when the same command is given again.
"""
_EXAMPLE = """\
example:
  san evaluate --model my-model --dataset val.parquet --labels classes.json
  san evaluate --model san-vit-b-16 --dataset ade20k --split validation --labels ade20k_150 --tta --output ade-150
  san evaluate --dataset masks --labels "background, lesion" --map 255=1 --skip-damaged
  san evaluate --dataset val.parquet --labels classes.json --subset base=base.txt --subset novel="car, bicyclist"
  accelerate launch --num_processes 8 -m modeling_san.commands.main evaluate --model san-vit-b-16 \\
      --dataset ade20k --labels ade20k_847
"""


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser of `san`."""
    parser = subparsers.add_parser(
        "evaluate", help="measure a model on a labelled data set", description=_DESCRIPTION, epilog=_EXAMPLE
    )
    add_model_option(parser)
    add_dataset_options(parser, split="validation")
    parser.add_argument(
        "--tta",
        action="store_true",
        help="average the scores of six sizes, each with its mirror image: 20 times the work",
    )
    parser.add_argument("--limit", type=positive_integer, metavar="N", help="evaluate the first N images only")
    parser.add_argument(
        "--subset",
        action="append",
        default=[],
        metavar="NAME=FILE_OR_NAMES",
        help="classes that get means of their own: a file, or names with commas between; may be given several times",
    )
    add_output_option(parser, default="outputs/evaluation")
    parser.add_argument(
        "--overlays",
        type=integer_between(0),
        default=4,
        metavar="N",
        help="how many of the best and of the worst images to draw (default: %(default)s)",
    )
    add_templates_option(parser)
    add_device_option(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate, on one process or on those that `accelerate launch` started; the first one prints and writes."""
    from accelerate import Accelerator

    from modeling_san.processing.device import pick_device
    from modeling_san.training.evaluate import evaluate, find_subsets, format_table

    from .models import load_model, quiet_libraries

    quiet_libraries()
    templates = read_templates(args.templates)
    images, label_set = open_dataset(args)
    subsets = _read_subsets(args.subset)
    find_subsets(subsets, label_set.names)
    folder = make_folder(args.output)
    accelerator = Accelerator(cpu=args.device == "cpu")
    # Each process has a GPU of its own
    device = accelerator.device if accelerator.num_processes > 1 else pick_device(args.device)
    loaded = load_model(args.model, device)
    class_embeds = None
    if templates is not None:
        class_embeds = loaded.segmenter.vocabulary(label_set.names, templates=templates).class_embeds
    results = evaluate(
        loaded.model,
        loaded.processor,
        images,
        label_set,
        output_dir=folder,
        tta=args.tta,
        limit=args.limit,
        subsets=subsets,
        accelerator=accelerator,
        class_embeds=class_embeds,
        overlays=args.overlays,
        skip_damaged=args.skip_damaged,
        about={"model": loaded.name, "dataset": args.dataset, "split": args.split},
    )
    if accelerator.is_main_process:
        say(format_table(results))
        without, damaged = results["unlabelled_images"], results["damaged_images"]
        notes = f", {without} of them without any label" if without else ""
        notes += f", {damaged} left out as they cannot be read" if damaged else ""
        say(f"{results['images']} images{notes}; results in {folder}")
    accelerator.end_training()
    return 0


def _read_subsets(given: list[str]) -> dict[str, list[str]]:
    """Class names of `--subset NAME=FILE_OR_NAMES`."""
    subsets: dict[str, list[str]] = {}
    for text in given:
        name, separator, members = (part.strip() for part in text.partition("="))
        if not separator or not name or not members:
            raise CommandError(f'--subset {text}: write NAME=FILE or NAME="sky, road", for example base=base.txt')
        if name in subsets:
            raise CommandError(f"--subset {name} is given twice: name each subset once")
        subsets[name] = parse_labels(members)
    return subsets
