"""`san export`: a model with its labels as one ONNX file."""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modeling_san.processing.wording_san import one_line

from .errors import CommandError, say
from .labels import add_label_options, read_labels, read_templates
from .parser import add_templates_option, positive_integer

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
_LOWEST_OPSET, _HIGHEST_OPSET = 18, 25


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser of `san`."""
    parser = subparsers.add_parser(
        "export", help="write a model as an ONNX file", description=_DESCRIPTION, epilog=_EXAMPLE
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help=f"folder that `san convert`, `san train` or save_pretrained wrote, name of a Hub repository, or "
        f"{BUILT_IN}",
    )
    parser.add_argument("output", metavar="OUT.onnx", help="file to write; an existing one is replaced")
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
        type=_opset,
        metavar="N",
        help=f"version of ONNX's operators, {_LOWEST_OPSET} ... {_HIGHEST_OPSET} (default: PyTorch's choice)",
    )


def run(args: argparse.Namespace) -> int:
    """
    Export, check, and put the file in place.

    Returns:
        exit code.
    """
    output = _output_file(args.output)
    if args.class_embeds_input and (args.labels or args.labels_file):
        raise CommandError("--class-embeds-input takes the labels with each image: leave --labels out")
    _check_libraries()
    import torch

    from modeling_san.export import export_program, quantize_onnx, write_onnx
    from modeling_san.processing.files import replacing_file

    from .models import load_model, quiet_libraries

    quiet_libraries()
    labels, templates = read_labels(args), read_templates(args.templates)
    loaded = load_model(None if args.model == BUILT_IN else args.model, torch.device("cpu"))
    processor = loaded.processor.image_processor
    vocabulary = _any_vocabulary(loaded) if args.class_embeds_input else loaded.vocabulary(labels, templates=templates)
    size = _recommended_size(processor, args.size)

    say(f"exporting {loaded.name}; this takes a minute or more")
    program = export_program(
        loaded.model,
        None if args.class_embeds_input else vocabulary.class_embeds.clone(),
        image_mean=processor.image_mean,
        image_std=processor.image_std,
        all_scores=args.all_scores,
    )
    metadata: dict[str, Any] = {
        "model": loaded.name,
        "size": size,
        "input": "upright RGB images, uint8, resized to about `size` (bilinear, antialiased); nothing else",
    }
    if not args.class_embeds_input:
        metadata["labels"] = list(vocabulary.labels)
    check = _Check(loaded, vocabulary, args.class_embeds_input, args.all_scores)
    divisor = loaded.model.config.size_divisor
    short = size.get("shortest_edge") or min(size["height"], size["width"])
    # The size and batch that were traced, and the size that the model works at
    batches = [draw_batch(2, 5 * divisor - 3, 7 * divisor - 5), draw_batch(1, short, short * 4 // 3)]
    with replacing_file(output) as partial:
        opset = write_onnx(program, partial, metadata, args.opset)
        agreements = [check(partial, images) for images in batches]
        for agreement in agreements:
            agreement.require()
        float_size = partial.stat().st_size
    what = "labels as an input" if args.class_embeds_input else f"{len(vocabulary.labels)} labels"
    say(
        f"wrote {output}: {_megabytes(float_size)}, opset {opset}, {what}; in onnxruntime, against PyTorch: "
        f"{_join(agreements)}"
    )
    if args.int8:
        smaller = output.with_suffix(f".int8{_ENDING}")
        with replacing_file(smaller) as partial:
            quantize_onnx(output, partial)
        agreements = [check(smaller, images) for images in batches]
        int8_size = smaller.stat().st_size
        say(
            f"wrote {smaller}: {_megabytes(int8_size)} ({int8_size / float_size:.0%}); against PyTorch in float: "
            f"{_join(agreements)}"
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


@dataclass(frozen=True)
class _Check:
    """Runs files in onnxruntime beside the model.

    Attributes:
        loaded: the model.
        vocabulary: what to look for.
        embeds_are_input: whether the file takes its embeddings.
        all_scores: whether the file returns the scores of all classes.
    """

    loaded: LoadedModel
    vocabulary: Vocabulary
    embeds_are_input: bool
    all_scores: bool

    def __call__(self, path: Path, images: np.ndarray) -> Agreement:
        """Compare on `images` (batch, 3, height, width) uint8."""
        import torch

        feed = {"images": images}
        if self.embeds_are_input:
            feed["class_embeds"] = self.vocabulary.class_embeds.numpy()
        labels, scores, *others = (torch.from_numpy(output) for output in _run_onnx(path, feed))
        segmenter, classes = self.loaded.segmenter, len(self.vocabulary.labels)
        prepared = segmenter.prepare(list(images.transpose(0, 2, 3, 1)), do_resize=False)
        expected = segmenter.segment(prepared, self.vocabulary)
        if labels.shape != scores.shape or labels.shape != (len(images), *images.shape[2:]):
            raise CommandError(
                f"the exported file returns labels of {tuple(labels.shape)} for images of {images.shape}: nothing was "
                "written"
            )
        if labels.max() >= classes or labels.min() < 0:
            raise CommandError(
                f"the exported file does not do what the model does: it returns labels beyond the {classes} asked "
                "for. Nothing was written"
            )
        differences = torch.stack([(ours - each.scores).abs() for ours, each in zip(scores, expected, strict=True)])
        largest, shortfalls = [differences.max()], [torch.zeros(1)]
        for index, segmentation in enumerate(expected):
            wrong = labels[index] != segmentation.label_map
            for label in range(classes) if self.all_scores else labels[index][wrong].unique().tolist():
                heat = segmentation.heat_map(label)
                pixels = wrong & (labels[index] == label)
                # In the model's own scores, how much worse the file's label is than the best
                shortfalls.append((segmentation.scores - heat)[pixels])
                largest += [(others[0][index, label] - heat).abs().max()] if self.all_scores else []
        equal = torch.stack([ours == each.label_map for ours, each in zip(labels, expected, strict=True)])
        return Agreement(
            images.shape,
            largest=torch.stack(largest).max().item(),
            mean=differences.mean().item(),
            equal=equal.double().mean().item(),
            worst=torch.cat(shortfalls).max().item(),
        )


def draw_batch(batch: int, height: int, width: int) -> np.ndarray:
    """Images to check with, `(batch, 3, height, width)` uint8."""
    import numpy as np

    from modeling_san.builtin import load_examples

    examples = load_examples()
    images = [examples[index % len(examples)].image.resize((width, height)) for index in range(batch)]
    return np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2))


def _run_onnx(path: Path, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    """What onnxruntime makes of a file."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return [np.asarray(value) for value in session.run(None, feed)]
    except Exception as error:
        # onnxruntime has many exceptions, and they share no base class of its own
        raise CommandError(f"onnxruntime cannot run the exported file: {one_line(error)}") from error


def _check_libraries() -> None:
    """The exporter asks for its libraries in the middle of its work."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise CommandError(f'{error.name or "onnx"} is not installed: pip install ".[onnx]"') from error
    onnxruntime.set_default_logger_severity(3)


def _output_file(given: str) -> Path:
    """Where to write, found out before the work is done."""
    output = Path(given)
    if output.suffix != _ENDING or not output.stem:
        raise CommandError(f"output {given}: the file's name has to end with {_ENDING}")
    if output.is_dir():
        raise CommandError(f"output {given} is a folder: pass a file")
    probe = output.with_name(f".{output.name}.{os.getpid()}.probe")
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CommandError(f"output {given} cannot be written to ({error.strerror or error}): pass another") from error
    return output


def _any_vocabulary(loaded: LoadedModel) -> Vocabulary:
    """Embeddings to check with: those stored in the model, or random directions."""
    import torch

    from modeling_san.processing import Vocabulary

    class_embeds = loaded.model.stored_class_embeds
    if class_embeds is None:
        class_embeds = torch.randn(7, loaded.model.config.projection_dim, generator=torch.Generator().manual_seed(0))
        class_embeds = torch.nn.functional.normalize(class_embeds, dim=-1)
    names = tuple(f"class {index}" for index in range(len(class_embeds)))
    return Vocabulary(names, class_embeds.float(), len(names))


def _recommended_size(processor: Any, short_side: int | None) -> dict[str, int]:
    """The processor's size, as the metadata has it."""
    size = {name: int(value) for name, value in dict(processor.size).items() if value}
    if short_side is None:
        return size
    ratio = size["longest_edge"] / size["shortest_edge"] if {"longest_edge", "shortest_edge"} <= size.keys() else 4
    return {"shortest_edge": short_side, "longest_edge": math.ceil(short_side * ratio)}


def _opset(text: str) -> int:
    """A version of ONNX's operators, as an argument's type."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not _LOWEST_OPSET <= value <= _HIGHEST_OPSET:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {_LOWEST_OPSET} to {_HIGHEST_OPSET}")
    return value


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _join(agreements: list[Agreement]) -> str:
    return "; ".join(map(str, agreements))
