"""`san demo`: what the built-in model does, on an image drawn for it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modeling_san import BUILTIN_MODEL

from .errors import say
from .parser import add_device_option, add_model_option, add_output_option, make_folder

if TYPE_CHECKING:
    import numpy as np

_DESCRIPTION = """\
Draw an example image, segment it with the built-in model, and print how well that model does on fresh images.
Works offline and takes seconds.
"""
_EXAMPLE = """\
example:
  san demo
  san demo --output /tmp/demo
"""

_WORLD, _IMAGE, _SIZE = 5, 12, (128, 192)
"""The image that is drawn: numbers of the world and of the image in it, and height and width."""
_ENLARGEMENT = 4
_DISTRACTORS = ("red plain", "green dotted", "yellow striped", "blue checkered", "brick", "grass", "water")
"""Names that the model may fall for; those that are in the image are no distractors."""


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser of `san`."""
    parser = subparsers.add_parser("demo", help="segment an example image", description=_DESCRIPTION, epilog=_EXAMPLE)
    add_output_option(parser)
    add_model_option(parser)
    add_device_option(parser)


def run(args: argparse.Namespace) -> int:
    """
    Segment the example image.

    Returns:
        exit code.
    """
    from PIL import Image

    from modeling_san.processing.device import pick_device
    from modeling_san.training.world import NEVER_SEEN_COMBINATIONS

    from .models import load_model, quiet_libraries
    from .segment import main_labels, write_results

    quiet_libraries()
    loaded = load_model(args.model, pick_device(args.device))
    folder = make_folder(args.output)
    image, truth, names = draw_example()
    image_path = folder / "demo.png"
    Image.fromarray(image).save(image_path)

    vocabulary = loaded.vocabulary([*names, *(name for name in _DISTRACTORS if name not in names)])
    [segmentation] = loaded.segmenter(image, vocabulary)
    overlay = write_results(segmentation, image, folder, "demo", source=str(image_path), model=loaded.name)
    right = (segmentation.label_map.numpy() == truth).mean()
    say(f"image: {image_path}, drawn with {', '.join(names)}")
    say(f"labels:  {', '.join(segmentation.labels)}")
    say(f"found:   {main_labels(segmentation)} ({right:.0%} of the pixels are right)")
    if unseen := [name for name in names if name in NEVER_SEEN_COMBINATIONS]:
        say(f"         without ever having had a mask of: {', '.join(unseen)}")
    say(f"overlay: {overlay}")
    if table := _results_table(BUILTIN_MODEL if args.model is None else Path(args.model)):
        say(f"\n{table}")
    return 0


def draw_example() -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """
    The example image, enlarged so that it looks good; the processor shrinks it again.

    Returns:
        `(height, width, 3)` bytes, `(height, width)` true indices into the names, and the names in it.
    """
    import numpy as np
    from PIL import Image

    from modeling_san.training.world import CLASS_NAMES, draw_scene

    scene = draw_scene(_WORLD, _IMAGE, size=_SIZE, min_regions=3, max_regions=3)
    height, width = (side * _ENLARGEMENT for side in _SIZE)
    image = Image.fromarray(scene.image).resize((width, height), Image.Resampling.LANCZOS)
    truth = np.zeros_like(scene.label_map)
    for index, name in enumerate(scene.names):
        truth[scene.label_map == CLASS_NAMES.index(name)] = index
    enlarged = Image.fromarray(truth).resize((width, height), Image.Resampling.NEAREST)
    return np.asarray(image), np.asarray(enlarged), scene.names


def _results_table(folder: Path) -> str | None:
    """The mean IoU that was measured when a model was trained; None where it was not."""
    from modeling_san.training.train_demo import RESULTS_FILE, format_results

    try:
        return format_results(json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        # Other models than the built-in one have no such file, or another of that name
        return None
