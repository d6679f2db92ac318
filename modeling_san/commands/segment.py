# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""`san segment`: label every pixel of images with any words."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CommandError, report_error, say
from .images import list_images, load_image, output_names
from .labels import add_label_options, read_labels, read_templates
from .parser import (
    add_device_option,
    add_extension_option,
    add_model_option,
    add_output_option,
    add_templates_option,
    make_folder,
    positive_integer,
    share,
)

if TYPE_CHECKING:
    from modeling_san.processing import Segmentation, Vocabulary

    from .models import LoadedModel

_DESCRIPTION = """\
Label every pixel of images with the best of the given words. For each image NAME three files are written:
  NAME_overlay.png  the image, painted over, with a legend
  NAME_labels.png   an indexed image: each pixel is the position of its label, counted from 0
  NAME.json         labels, their areas and mean scores
"""
_EXAMPLE = """\
example:
  san segment pattern.png --labels "red striped, blue dotted, grass"
  san segment street.jpg --model ./san-vit-b-16 --labels "road, car|automobile" --extend-labels coco-all
  san segment aerial.tif --labels "roof, street, tree, car" --window 640
  find photos -name "*.jpg" | san segment - --labels-file classes.json --output results

Exit code 0 if every image was segmented, 2 if one was not; the others are written all the same.
"""


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser of `san`."""
    parser = subparsers.add_parser(
        "segment", help="label every pixel of images", description=_DESCRIPTION, epilog=_EXAMPLE
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files; - reads paths from standard input")
    add_label_options(parser)
    add_model_option(parser)
    add_output_option(parser)
    add_templates_option(parser)
    add_extension_option(parser)
    parser.add_argument(
        "--threshold",
        type=share,
        default=0.0,
        metavar="SCORE",
        help='pixels whose best label scores less become "other", 0 ... 1 (default: 0, none do)',
    )
    parser.add_argument(
        "--window",
        type=positive_integer,
        metavar="PIXELS",
        help="see larger images in overlapping square windows of this side, which finds small things; 640 shows the "
        "network every pixel (default: the whole image at once)",
    )
    parser.add_argument(
        "--opacity", type=share, default=0.5, help="of the colours in the overlay, 0 ... 1 (default: 0.5)"
    )
    add_device_option(parser)


def run(args: argparse.Namespace) -> int:
    """Segment the images; 2 if one could not be."""
    from tqdm import tqdm

    from modeling_san.processing.device import pick_device
    from modeling_san.processing.segmenter import check_window

    from .models import load_model, quiet_libraries

    check_window(args.window)
    quiet_libraries()
    paths = list_images(args.images)
    labels, templates = read_labels(args), read_templates(args.templates)
    loaded = load_model(args.model, pick_device(args.device))
    vocabulary = loaded.vocabulary(labels, templates=templates, extend=args.extend_labels)
    folder = make_folder(args.output)

    failures = 0
    # One image needs no bar
    bar = tqdm(paths, desc="segmenting", unit="image", file=sys.stderr, disable=len(paths) < 2, leave=False)
    for path, name in zip(bar, output_names(paths, folder), strict=True):
        try:
            line = _segment_file(path, loaded, vocabulary, folder, name, args)
        except (CommandError, ValueError) as error:
            report_error(error)
            failures += 1
        else:
            say(line.replace("\n", r"\n"))
    return 2 if failures else 0


def _segment_file(
    path: Path, loaded: LoadedModel, vocabulary: Vocabulary, folder: Path, name: str, args: argparse.Namespace
) -> str:
    """Segment one file, write the results, and say so in a line."""
    import torch

    from modeling_san.processing.results import write_results

    start = time.perf_counter()
    image = load_image(path)
    try:
        [segmentation] = loaded.segmenter(image, vocabulary, threshold=args.threshold, window=args.window)
        overlay = write_results(
            segmentation, image, folder, name, source=str(path), model=loaded.name, opacity=args.opacity
        )
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise CommandError(f"{path} does not fit into memory: shrink it, or pass --device cpu") from error
    except OSError as error:
        raise CommandError(f"{path}: its results cannot be written to {folder}: {error.strerror or error}") from error
    return f"{path}: {main_labels(segmentation)} -> {overlay} ({time.perf_counter() - start:.1f} s)"


def main_labels(segmentation: Segmentation) -> str:
    """The largest labels with their shares of the image, in a line."""
    from modeling_san.processing.wording_san import listed

    return listed(f"{segment.label} {segment.area:.0%}" for segment in segmentation.segments())
