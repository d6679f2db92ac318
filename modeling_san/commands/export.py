# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""`san export`: a model with its labels as one ONNX file."""

from __future__ import annotations

import argparse
import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modeling_san.processing.wording_san import one_line

from .errors import CommandError, say
from .labels import add_label_options, read_labels, read_templates
from .parser import add_templates_option, integer_between, make_folder, positive_integer

if TYPE_CHECKING:
    import numpy as np

    from modeling_san.processing import Vocabulary

    from .models import LoadedModel

_DESCRIPTION = """\
Write a model as an ONNX file that needs neither PyTorch nor this package, and check it in onnxruntime before it is put
in place.
  input    images        (batch, 3, height, width) uint8: red, green, blue; any batch, height and width
           class_embeds  (classes, width of the joint space) float32, with --class-embeds-input only
  output   labels        (batch, height, width) int64: position of each pixel's label, counted from 0
           scores        (batch, height, width) float32: the score it won with
           all_scores    (batch, classes, height, width) float32, with --all-scores only
Normalisation, padding and post-processing are inside; resizing is not: images come upright and at the size they are
to be segmented at, which the file's metadata `size` recommends. The metadata `labels` is the JSON list of the names.
"""
_EXAMPLE = """\
example:
  san export san-vit-b-16 street.onnx --labels "sky, road, building, car|automobile"
  san export built-in demo.onnx --int8
  python -c "import numpy, onnxruntime; s = onnxruntime.InferenceSession('demo.onnx'); \\
      print(s.run(None, {'images': numpy.zeros((1, 3, 128, 192), 'uint8')})[0].shape)"

Without --labels the labels stored in the model are taken. Embeddings for --class-embeds-input come from
model.get_class_embeds(**processor(text=["sky", "road"], return_tensors="pt")).
"""

BUILT_IN = "built-in"
TOLERANCE = 1e-3
"""Scores may differ by this much, and labels where two scores are as close."""

_ENDING = ".onnx"
_OPSETS = (18, 25)


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser of `san`."""
    parser = subparsers.add_parser(
        "export", help="write a model as an ONNX file", description=_DESCRIPTION, epilog=_EXAMPLE
    )
    parser.add_argument(
        "model", metavar="MODEL", help=f"folder of a model, or name of a Hub repository, or {BUILT_IN}"
    )
    parser.add_argument("output", metavar="OUT.onnx", help="file to write; an older export there is replaced")
    add_label_options(parser)
    add_templates_option(parser)
    parser.add_argument(
        "--class-embeds-input", action="store_true", help="take the labels' embeddings as a second input"
    )
    parser.add_argument("--all-scores", action="store_true", help="also return the scores of all labels")
    parser.add_argument(
        "--int8", action="store_true", help="also write OUT.int8.onnx, with weights in 8 bits, and say how it agrees"
    )
    parser.add_argument(
        "--size",
        type=positive_integer,
        metavar="PIXELS",
        help="short side that images should be resized to, for the metadata and the check (default: the model's)",
    )
    parser.add_argument(
        "--opset",
        type=integer_between(*_OPSETS),
        metavar="N",
        help="version of ONNX's operators, {} ... {} (default: PyTorch's choice)".format(*_OPSETS),
    )


def run(args: argparse.Namespace) -> int:
    """Export, check, and put the file in place."""
    output = Path(args.output)
    if output.suffix != _ENDING:
        raise CommandError(f"output {output}: the file's name has to end with {_ENDING}")
    if output.is_dir():
        raise CommandError(f"output {output} is a folder: pass a file")
    if args.class_embeds_input and (args.labels or args.labels_file):
        raise CommandError("--class-embeds-input takes the labels with each image: leave --labels out")
    make_folder(output.parent, "pass another OUT.onnx")
    _check_libraries()
    smaller = output.with_suffix(f".int8{_ENDING}")
    for path in (output, smaller) if args.int8 else (output,):
        _refuse_other_files(path)
    import torch
    from tqdm import tqdm

    from modeling_san.export import export_program, quantize_onnx, write_onnx
    from modeling_san.processing.files import replacing_file

    from .models import load_model, quiet_libraries

    quiet_libraries()
    labels, templates = read_labels(args), read_templates(args.templates)
    loaded = load_model(None if args.model == BUILT_IN else args.model, torch.device("cpu"))
    processor = loaded.processor.image_processor
    if args.class_embeds_input:
        vocabulary, embeds, what = _any_vocabulary(loaded), None, "labels as an input"
    else:
        vocabulary = loaded.vocabulary(labels, templates=templates)
        embeds, what = vocabulary.class_embeds.clone(), f"{len(vocabulary.labels)} labels"
    size = _recommended_size(processor, args.size)

    say(f"tracing {loaded.name}, which takes a minute or more")
    program = export_program(
        loaded.model,
        embeds,
        image_mean=processor.image_mean,
        image_std=processor.image_std,
        all_scores=args.all_scores,
    )
    metadata = {
        "model": loaded.name,
        "size": size,
        "input": "upright RGB images, uint8, resized to about `size` (bilinear, antialiased); nothing else",
        **({} if embeds is None else {"labels": list(vocabulary.labels)}),
    }
    divisor = loaded.model.config.size_divisor
    short = size.get("shortest_edge") or min(size["height"], size["width"])
    # The size and batch that were traced, and the size that the model works at
    batches = [draw_batch(2, 5 * divisor - 3, 7 * divisor - 5), draw_batch(1, short, short * 4 // 3)]

    def check(path: Path) -> list[Agreement]:
        return [compare(path, images, loaded, vocabulary, args.class_embeds_input) for images in batches]

    with replacing_file(output) as partial:
        say("writing it as ONNX")
        opset = write_onnx(program, partial, metadata, args.opset)
        say("running it in onnxruntime beside PyTorch")
        agreements = check(partial)
        for agreement in agreements:
            agreement.require()
    say(
        f"wrote {output}: {tqdm.format_sizeof(output.stat().st_size, 'B')}, opset {opset}, {what}; in onnxruntime, "
        f"against PyTorch: {'; '.join(map(str, agreements))}"
    )
    if args.int8:
        say("making the weights 8 bits small")
        with replacing_file(smaller) as partial:
            quantize_onnx(output, partial)
        int8_size = smaller.stat().st_size
        say(
            f"wrote {smaller}: {tqdm.format_sizeof(int8_size, 'B')} ({int8_size / output.stat().st_size:.0%}); "
            f"against PyTorch in float: {'; '.join(map(str, check(smaller)))}"
        )
    return 0


@dataclass(frozen=True)
class Agreement:
    """How an exported file compares with the model on a batch of images.

    Attributes:
        shape: of the images, `(batch, 3, height, width)`.
        largest: difference of any score.
        mean: difference of the winning scores.
        equal: share of the pixels that have the same label.
        worst: by how much a label of the file falls short of the model's best, in the model's own scores.
    """

    shape: tuple[int, ...]
    largest: float
    mean: float
    equal: float
    worst: float

    def require(self) -> None:
        """Raise a `CommandError` where the file does not compute what the model does."""
        # Written so that differences which are not numbers count as too large
        if not (self.largest <= TOLERANCE and self.worst <= TOLERANCE):
            raise CommandError(
                f"the exported file does not do what the model does: {self}; a label falls short by {self.worst:.1g}; "
                f"{TOLERANCE:g} is allowed. Nothing was written"
            )

    def __str__(self) -> str:
        """The figures in a line."""
        batch, _, height, width = self.shape
        return (
            f"scores differ by {self.largest:.1e} at most ({self.mean:.1e} on average) and {self.equal:.2%} of the "
            f"labels are equal on {batch} x {height} x {width}"
        )


def compare(
    path: Path, images: np.ndarray, loaded: LoadedModel, vocabulary: Vocabulary, embeds_are_input: bool
) -> Agreement:
    """
    Run a file in onnxruntime beside the model.

    Args:
        path: of the file.
        images: `(batch, 3, height, width)` uint8.
        loaded: the model.
        vocabulary: what to look for.
        embeds_are_input: whether the file takes its embeddings.

    Raises:
        CommandError: onnxruntime cannot run the file, or it returns no labels of the images' pixels.
    """
    import onnxruntime
    import torch

    feed = {"images": images} | ({"class_embeds": vocabulary.class_embeds.numpy()} if embeds_are_input else {})
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        labels, scores, *all_scores = map(torch.from_numpy, session.run(None, feed))
    except Exception as error:
        # onnxruntime has many exceptions, and they share no base class of its own
        raise CommandError(f"onnxruntime cannot run the exported file: {one_line(error)}") from error
    segmenter, classes = loaded.segmenter, len(vocabulary.labels)
    expected = segmenter.segment(segmenter.prepare(list(images.transpose(0, 2, 3, 1)), do_resize=False), vocabulary)
    label_maps, best_scores = (
        torch.stack([getattr(each, name) for each in expected]) for name in ("label_map", "scores")
    )
    if labels.shape != label_maps.shape or labels.max() >= classes or labels.min() < 0:
        raise CommandError(
            f"the exported file does not do what the model does: for images of {images.shape} and {classes} labels it "
            f"returns labels from {labels.min()} to {labels.max()} of {tuple(labels.shape)}. Nothing was written"
        )
    differences, wrong = (scores - best_scores).abs(), labels != label_maps
    largest, shortfalls = [differences.max()], [torch.zeros(1)]
    for index, segmentation in enumerate(expected):
        for label in range(classes) if all_scores else labels[index][wrong[index]].unique().tolist():
            heat = segmentation.heat_map(label)
            # In the model's own scores, how much worse the file's label is than the best
            shortfalls.append((segmentation.scores - heat)[wrong[index] & (labels[index] == label)])
            largest += [(scores[index, label] - heat).abs().max() for scores in all_scores]
    return Agreement(
        images.shape,
        largest=torch.stack(largest).max().item(),
        mean=differences.mean().item(),
        equal=1 - wrong.double().mean().item(),
        worst=torch.cat(shortfalls).max().item(),
    )


def draw_batch(batch: int, height: int, width: int) -> np.ndarray:
    """Images to check with, `(batch, 3, height, width)` uint8."""
    import numpy as np

    from modeling_san.builtin import load_examples

    examples = load_examples()
    images: list[Any] = [examples[index % len(examples)].image.resize((width, height)) for index in range(batch)]
    return np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2))


def _check_libraries() -> None:
    """The exporter asks for its libraries in the middle of its work."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise CommandError(f'{error.name or "onnx"} is not installed: pip install "modeling-san[onnx]"') from error
    onnxruntime.set_default_logger_severity(3)


def _refuse_other_files(path: Path) -> None:
    """Only what the command wrote itself may be replaced; the metadata tells."""
    if not path.exists():
        return
    import onnx

    # Damaged files raise many kinds
    with suppress(Exception):
        if any(entry.key == "model" for entry in onnx.load(path, load_external_data=False).metadata_props):
            return
    raise CommandError(f"{path} is there already and was not written by this command: pass another OUT.onnx")


def _any_vocabulary(loaded: LoadedModel) -> Vocabulary:
    """Embeddings to check with: those stored in the model, or some directions."""
    import torch

    from modeling_san.processing import Vocabulary

    class_embeds = loaded.model.stored_class_embeds
    if class_embeds is None:
        class_embeds = torch.eye(7, loaded.model.config.projection_dim)
    names = tuple(f"class {index}" for index in range(len(class_embeds)))
    return Vocabulary(names, class_embeds.float(), len(names))


def _recommended_size(processor: Any, short_side: int | None) -> dict[str, int]:
    """The processor's size, or another one of its form, as the metadata has it."""
    size = {name: int(value) for name, value in dict(processor.size).items() if value}
    if short_side is None:
        return size
    ratio = size["longest_edge"] / size["shortest_edge"] if {"longest_edge", "shortest_edge"} <= size.keys() else 4
    return {"shortest_edge": short_side, "longest_edge": math.ceil(short_side * ratio)}
