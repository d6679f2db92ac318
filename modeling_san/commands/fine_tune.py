"""`san fine-tune`: train a model further on labelled images of one's own, with few choices to make."""

from __future__ import annotations

import argparse
from typing import Any

from .parser import add_model_option, add_templates_option, positive_integer, positive_number

_DESCRIPTION = """\
Train a model further on images with label maps, and save it with the labels stored. The data set holds images in a
column `image` and label maps in a column `annotation` (255 = no label). The labels file is a JSON list, a JSON object
with `classes`, or one name per line, in the order of the label maps' values.

This is `san train --config fine_tune` with the options that matter most; what DIR holds in the end, and how a cut run
goes on, is said in `san train --help`.
"""
_EXAMPLE = """\
example:
  san fine-tune --dataset train.parquet --labels-file classes.json --model san-vit-b-16 --output my-model
  san fine-tune --dataset train.parquet --validation val.parquet --labels-file classes.json --train-clip \\
      --short-side 192 --steps 3000 --batch-size 4 --learning-rate 6e-4 --output my-model
  san segment image.jpg --model my-model
"""


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser of `san`."""
    parser = subparsers.add_parser(
        "fine-tune", help="train a model on your own labelled images", description=_DESCRIPTION, epilog=_EXAMPLE
    )
    parser.add_argument("--dataset", required=True, metavar="PATH_OR_HUB_ID", help="images with label maps")
    parser.add_argument(
        "--labels-file", "--labels", metavar="FILE", help="class names (default: what the data set says)"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the result")
    parser.add_argument("--validation", metavar="PATH_OR_HUB_ID", help="images on which to report mIoU")
    add_model_option(parser)
    parser.add_argument(
        "--train-clip",
        action="store_true",
        help="train CLIP as well: needed where it knows neither your images nor your words, as the built-in model's",
    )
    parser.add_argument(
        "--short-side",
        type=positive_integer,
        metavar="PIXELS",
        help="working size of the images (default: the model's)",
    )
    add_templates_option(parser)
    for name, default, meaning in (
        ("--steps", 1000, "optimisation steps"),
        ("--batch-size", 8, "images a step"),
    ):
        parser.add_argument(name, type=positive_integer, default=default, help=f"{meaning} (default: %(default)s)")
    parser.add_argument("--learning-rate", type=positive_number, default=1e-4, help="AdamW's (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all random choices (default: %(default)s)")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        default="never",
        metavar="auto",
        help="go on with a run that was cut, from its latest checkpoint",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to train (default: a GPU if there is one)")


def run(args: argparse.Namespace) -> int:
    """
    Train the model.

    Returns:
        exit code.
    """
    from modeling_san.processing.device import pick_device
    from modeling_san.training.recipe import Recipe, read_recipe

    from .train import run_recipe

    if args.device is not None:
        pick_device(args.device)
    options = {
        "model": args.model,
        "dataset": args.dataset,
        "labels": args.labels_file,
        "validation": args.validation,
        "output_dir": args.output,
        "trainable": "everything" if args.train_clip else "paper",
        "short_side": args.short_side,
        "templates": [args.templates] if args.templates else [],
        "steps": args.steps,
        "batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "warmup_steps": min(50, args.steps // 10),
        "max_grad_norm": 1.0 if args.train_clip else 0.01,
        "seed": args.seed,
        "resume": args.resume,
        "cpu": args.device == "cpu",
    }
    return run_recipe(Recipe(**{**read_recipe("fine_tune"), **options}))
