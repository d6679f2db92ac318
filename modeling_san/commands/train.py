# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""`san train`: train by a recipe, on one process or many."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .errors import CommandError, say

_DESCRIPTION = """\
Train a model as a recipe says: a YAML file whose keys are the options below, which change it. With `accelerate launch
-m modeling_san.commands.main train` in place of `san train` the same runs on several GPUs or machines.

OUTPUT_DIR holds in the end the model (from_pretrained loads it), metrics.jsonl, curves.png, overlays of the validation
images after each evaluation, and checkpoints. Killed at any moment, the run goes on with --resume auto; SIGTERM and
Ctrl-C save a checkpoint first.
"""
_EXAMPLE = """\
example:
  san train --config fine_tune --model san-vit-b-16 --dataset train.parquet --validation val.parquet \\
      --labels classes.json --output-dir my-model
  san train --config my-model/recipe.yaml --resume auto
  accelerate launch --num_processes 8 -m modeling_san.commands.main train --config coco_stuff_vit_b_16 \\
      --dataset coco_stuff --validation coco_stuff --output-dir san-vit-b-16
  san train --plot my-model

A look at the augmented images before: san contact-sheet --help
"""


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser of `san`; its own options are those of a recipe, which take longer to load."""
    subparsers.add_parser("train", help="train by a recipe, on one process or many", add_help=False)


def run(args: argparse.Namespace) -> int:
    """
    Train, and say what came of it; with `--plot` draw how a run goes instead.

    Returns:
        exit code, 0 also where SIGTERM or Ctrl-C ended the run after a checkpoint.

    Raises:
        CommandError: there is no run to draw, or matplotlib is missing.
    """
    from accelerate import PartialState

    from modeling_san.training.evaluate import format_table
    from modeling_san.training.train import train

    from .datasets import quiet_datasets
    from .models import quiet_libraries

    recipe, folder = parse_recipe(args.others)
    if folder is not None:
        return _plot(folder)
    quiet_libraries()
    quiet_datasets()
    results = train(recipe)
    if not PartialState().is_main_process:
        return 0
    if "mean_iou" in results:
        say(format_table(results))
    if results["finished"]:
        say(
            f"{results['steps']} steps, {results['minutes']:.1f} minutes, "
            f"{results['images_per_second']:.1f} images a second; saved to {recipe.output_dir}"
        )
    else:
        say(f"stopped after step {results['steps']} of {recipe.steps}; go on with --resume auto")
    return 0


def parse_recipe(arguments: list[str]) -> tuple[Any, Path | None]:
    """
    The recipe that a file and options make, and the folder of `--plot`.

    Args:
        arguments: those of `san train`. A file's values are put in front of them, so that both are read alike and the
            options win.

    Raises:
        ValueError: for a recipe that cannot be read or makes no sense.
        SystemExit: for options that cannot be read, after a line that says why.
    """
    from transformers import HfArgumentParser

    from modeling_san.training.recipe import Recipe, as_arguments, read_recipe, recipe_names

    from .parser import CommandParser

    class RecipeParser(CommandParser, HfArgumentParser):
        """Options from the fields of a dataclass, with the errors of our commands."""

    config_parser = CommandParser(prog="san train", add_help=False)
    config_parser.add_argument("--config", metavar="RECIPE", help=f"YAML file, or one of: {', '.join(recipe_names())}")
    config, options = config_parser.parse_known_args(arguments)
    parser = RecipeParser(
        dataclass_types=Recipe,
        parents=[config_parser],
        prog="san train",
        usage="san train --config RECIPE [--resume auto] [options]",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
    )
    parser.add_argument(
        "--plot", metavar="DIR", type=Path, help="train nothing; draw how the run in DIR goes as DIR/curves.png"
    )
    from_file = as_arguments(read_recipe(config.config)) if config.config else []
    values = vars(parser.parse_args([*from_file, *options]))
    folder, _ = values.pop("plot"), values.pop("config")
    return Recipe(**values), folder


def _plot(folder: Path) -> int:
    from modeling_san.training.callbacks import CURVES_FILE, METRICS_FILE
    from modeling_san.training.plots import plot_curves

    try:
        say(str(plot_curves(folder / METRICS_FILE, folder / CURVES_FILE)))
    except ImportError as error:
        raise CommandError(str(error)) from error
    return 0
