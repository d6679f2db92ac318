# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""`san demo`: what the built-in model does, on a drawn image."""

import argparse
import json
from contextlib import suppress
from itertools import chain, count
from pathlib import Path
from typing import Any

from modeling_san import BUILTIN_MODEL

from .errors import say
from .parser import add_device_option, add_model_option, add_output_option, make_folder

_DESCRIPTION = """\
Segment a drawn image with the built-in model, and print how well that model does on fresh images.
Works offline and takes seconds.
"""
_EXAMPLE = """\
example:
  san demo
  san demo --output /tmp/demo
"""

_DISTRACTORS = ("red plain", "green dotted", "yellow striped", "blue checkered", "brick", "grass", "water")
"""Names that the model may fall for; those that are in the image are no distractors."""


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser of `san`."""
    parser = subparsers.add_parser("demo", help="segment an example image", description=_DESCRIPTION, epilog=_EXAMPLE)
    add_output_option(parser)
    add_model_option(parser)
    add_device_option(parser)


def run(args: argparse.Namespace) -> int:
    """Segment the example image."""
    import numpy as np

    from modeling_san.builtin import format_results, load_examples, words
    from modeling_san.processing.device import pick_device
    from modeling_san.processing.files import replacing_file
    from modeling_san.processing.results import replaces_results_only, write_results
    from modeling_san.training.metrics import RESULTS_FILE

    from .models import load_model, quiet_libraries
    from .segment import main_labels

    quiet_libraries()
    loaded = load_model(args.model, pick_device(args.device))
    folder = make_folder(args.output)
    example = load_examples(enlargement=4)[0]
    names = example.labels
    candidates = chain(["demo"], (f"demo-{number}" for number in count(2)))
    name = next(name for name in candidates if replaces_results_only(folder, name, f"{name}.png"))
    image_path = folder / f"{name}.png"
    with replacing_file(image_path) as beside:
        example.image.save(beside, format="PNG")

    vocabulary = loaded.vocabulary([*names, *(name for name in _DISTRACTORS if name not in names)])
    [segmentation] = loaded.segmenter(example.image, vocabulary)
    overlay = write_results(segmentation, example.image, folder, name, source=str(image_path), model=loaded.name)
    right = (segmentation.label_map.numpy() == np.asarray(example.label_map)).mean()
    say(f"image: {image_path}, drawn with {', '.join(names)}")
    say(f"labels:  {', '.join(segmentation.labels)}")
    say(f"found:   {main_labels(segmentation)} ({right:.0%} of the pixels are right)")
    if unseen := [name for name in names if name in words()["never seen"]]:
        say(f"         without ever having had a mask of: {', '.join(unseen)}")
    say(f"overlay: {overlay}")
    # Other models than the built-in one have no such file, or another of that name
    with suppress(OSError, ValueError, KeyError, TypeError):
        results = (Path(args.model or BUILTIN_MODEL) / RESULTS_FILE).read_text(encoding="utf-8")
        say(f"\nstored with the model, measured when it was trained:\n{format_results(json.loads(results))}")
    return 0
