"""`san fine-tune`: train a model further on labelled pictures of one's own."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .errors import say
from .labels import read_labels_file, read_templates
from .parser import add_device_option, add_model_option, positive_integer, positive_number

_DESCRIPTION = """\
Train a model further on pictures with label maps, and save it with the labels stored. The data set holds pictures in a
column `image` and label maps in a column `annotation` (255 = no label). The labels file is a JSON list, a JSON object
with `classes`, or one name per line, in the order of the label maps' values.
"""
_EXAMPLE = """\
example:
  san fine-tune --dataset train.parquet --labels-file classes.json --output my-model
  san fine-tune --dataset train.parquet --validation val.parquet --labels-file classes.json --train-clip \\
      --short-side 192 --steps 3000 --batch-size 8 --learning-rate 5e-4 --output my-model
  san segment picture.jpg --model my-model
"""


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser of `san`."""
    parser = subparsers.add_parser(
        "fine-tune", help="train a model on your own labelled pictures", description=_DESCRIPTION, epilog=_EXAMPLE
    )
    parser.add_argument("--dataset", required=True, metavar="PATH_OR_HUB_ID", help="pictures with label maps")
    parser.add_argument("--labels-file", required=True, metavar="FILE", help="class names")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the result")
    parser.add_argument("--validation", metavar="PATH_OR_HUB_ID", help="pictures on which to report mIoU at the end")
    add_model_option(parser)
    parser.add_argument(
        "--train-clip",
        action="store_true",
        help="train CLIP as well: needed where it knows neither your pictures nor your words, as the built-in model's",
    )
    parser.add_argument(
        "--short-side",
        type=positive_integer,
        metavar="PIXELS",
        help="working size of the pictures (default: the model's)",
    )
    parser.add_argument(
        "--templates", metavar="NAME_OR_FILE", help="prompt templates to use from now on (default: the model's own)"
    )
    for name, default, meaning in (
        ("--steps", 1000, "optimisation steps"),
        ("--batch-size", 8, "pictures a step"),
    ):
        parser.add_argument(name, type=positive_integer, default=default, help=f"{meaning} (default: %(default)s)")
    parser.add_argument("--learning-rate", type=positive_number, default=1e-4, help="AdamW's (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all random choices (default: %(default)s)")
    add_device_option(parser)


def run(args: argparse.Namespace) -> int:
    """
    Train the model.

    Returns:
        exit code.
    """
    from datasets.utils import logging as datasets_logging

    from modeling_san.training.fine_tune import fine_tune

    from .models import load_model, pick_device, quiet_libraries
    from .results import make_folder

    quiet_libraries()
    # What cannot be read is said once, by this command
    datasets_logging.set_verbosity(datasets_logging.CRITICAL)
    labels = read_labels_file(args.labels_file)
    templates = read_templates(args.templates)
    device = pick_device(args.device)
    make_folder(Path(args.output))
    loaded = load_model(args.model, device)
    results = fine_tune(
        loaded.model,
        loaded.processor,
        args.dataset,
        labels,
        args.output,
        validation=args.validation,
        short_side=args.short_side,
        train_clip=args.train_clip,
        templates=templates,
        steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        seed=args.seed,
        device=device,
    )
    for label, iou in results.get("per_class_iou", {}).items():
        say(f"{label:<24}{'-' if iou is None else format(iou, '.3f'):>8}")
    if results:
        say(f"{'mean IoU':<24}{results['mean_iou']:>8.3f}")
        say(f"{'pixel accuracy':<24}{results['pixel_accuracy']:>8.3f}")
    say(f"saved to {args.output}")
    return 0
