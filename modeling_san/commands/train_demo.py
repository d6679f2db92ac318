"""`san train-demo`: make the built-in model from nothing."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .errors import CommandError, say
from .parser import add_device_option, positive_integer

_DESCRIPTION = """\
Train the built-in model from nothing on images that the project draws itself: a tiny CLIP first, then SAN beside it.
Takes at most 90 minutes on two processor cores, and ends with the mean IoU on fresh images. A second call with the
same OUT goes on from the trained CLIP in OUT/clip.
"""
_EXAMPLE = """\
example:
  san train-demo demo-model
  san segment image.png --model demo-model --labels "red striped, grass"
"""


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser of `san`."""
    parser = subparsers.add_parser(
        "train-demo", help="train the built-in model from nothing", description=_DESCRIPTION, epilog=_EXAMPLE
    )
    parser.add_argument("output", metavar="OUT", help="folder to write")
    usual = "(default: as for the model that ships)"
    parser.add_argument(
        "--clip-steps", type=positive_integer, metavar="N", help=f"steps of CLIP's pre-training {usual}"
    )
    parser.add_argument("--san-steps", type=positive_integer, metavar="N", help=f"steps of SAN's training {usual}")
    parser.add_argument("--seed", type=int, help=f"of all random choices {usual}")
    add_device_option(parser)


def run(args: argparse.Namespace) -> int:
    """
    Train the model.

    Returns:
        exit code.
    """
    from modeling_san.processing.device import pick_device
    from modeling_san.training.train_demo import UndertrainedError, train_demo

    from .models import quiet_libraries
    from .parser import make_folder

    quiet_libraries()
    output = Path(args.output)
    device = None if args.device is None else pick_device(args.device)
    make_folder(output)
    options = {name: getattr(args, name) for name in ("clip_steps", "san_steps", "seed")}
    try:
        train_demo(output, device=device, **{name: value for name, value in options.items() if value is not None})
    except UndertrainedError as error:
        raise CommandError(str(error)) from error
    say(f"wrote {output}")
    return 0
