"""`san segment-dataset`: label every pixel of a whole data set."""

from __future__ import annotations

import argparse
import re
import signal
from pathlib import Path
from typing import Any

from .datasets import add_source_options, quiet_datasets
from .errors import CommandError, say, warn
from .labels import read_templates
from .parser import (
    add_device_option,
    add_extension_option,
    add_model_option,
    add_templates_option,
    positive_integer,
)

_DESCRIPTION = """\
Label all images of a data set, on one process or many, and write parquet files into DIR with the columns
  row         number of the image in the data set
  annotation  a label for each pixel, as a PNG without loss, of 8 bits (16 for more than 255 labels)
  segments    labels present: name, index, area (share of the image) and mean score
  error       why an image could not be read; its annotation is missing then
and, if asked for, image, scores and columns of the data set.

Killed at any moment, the same command goes on where it was, also with another number of processes: each file appears
complete or not at all. SIGTERM ends it between two files with exit code 143. Batch size and number of processes may
change between runs; model, labels, data set and columns may not.
"""
_EXAMPLE = """\
example:
  san segment-dataset --dataset photos.parquet --labels "sky, road, car|automobile" --output labelled
  san segment-dataset --dataset photos.parquet --labels ade20k_150 --model ./san-vit-b-16 --output labelled

several GPUs, and several machines (each runs this with its own --machine_rank):
  accelerate launch --num_processes 8 -m modeling_san.commands.main segment-dataset --dataset ... --output labelled
  accelerate launch --num_machines 4 --machine_rank 0 --num_processes 32 --main_process_ip HOST \\
      --main_process_port 29500 -m modeling_san.commands.main segment-dataset --dataset ... --output labelled

The processes do not talk to each other, so that an array of jobs does as well; every process writes files of its own
into DIR, which may lie on a disk that all share:
  san segment-dataset --dataset ... --output labelled --part 3/16

the result:
  datasets.load_dataset("parquet", data_files="labelled/part-*.parquet", split="train")

Exit code 0 also where some images could not be read (with --strict 2), 2 if none could.
"""

EXIT_TERMINATED = 143


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser of `san`."""
    parser = subparsers.add_parser(
        "segment-dataset", help="label a whole data set, on many GPUs", description=_DESCRIPTION, epilog=_EXAMPLE
    )
    add_source_options(parser, split="train")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the part files")
    parser.add_argument(
        "--labels",
        metavar="SET_OR_FILE_OR_NAMES",
        help="a label set that ships with the package (ade20k_150, coco_stuff_171, ...), a file with names, or names "
        "separated by commas (default: those stored with the model)",
    )
    add_model_option(parser)
    add_templates_option(parser)
    add_extension_option(parser)
    parser.add_argument("--keep-columns", metavar="NAME,...", help="columns of the data set to store as well")
    parser.add_argument("--with-images", action="store_true", help="store the images as well, encoded as they came")
    parser.add_argument(
        "--scores",
        action="store_true",
        help="store the winning score of each pixel, in thousandths, as a PNG of 16 bits",
    )
    parser.add_argument(
        "--shard-size",
        type=positive_integer,
        default=256,
        metavar="N",
        help="images in a file; what is lost at most when a process is killed (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=positive_integer,
        default=8,
        metavar="N",
        help="images that the model sees at once (default: %(default)s)",
    )
    parser.add_argument(
        "--workers", type=positive_integer, metavar="N", help="threads that decode (default: one for each core)"
    )
    parser.add_argument(
        "--part",
        metavar="I/N",
        help="label the I-th of N parts only, counted from 1: for arrays of jobs without a launcher",
    )
    parser.add_argument("--strict", action="store_true", help="stop at the first image that cannot be read")
    add_device_option(parser)


def run(args: argparse.Namespace) -> int:
    """
    Label the data set.

    Returns:
        exit code, 2 if no image could be read.
    """
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        return _segment(args)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _segment(args: argparse.Namespace) -> int:
    from accelerate import PartialState

    from modeling_san.processing.processing_san import resolve_templates
    from modeling_san.training.segment_dataset import Labeler, Options, Part, open_rows, segment_dataset

    from .models import load_model, quiet_libraries
    from .results import make_folder, make_segmenter, untrained_words
    from .segment import _check_extension

    share = _read_part(args.part)
    quiet_libraries()
    quiet_datasets()
    state: Any = PartialState(cpu=args.device == "cpu")
    # A job of an array may itself be launched as several processes
    part = Part(share[0] * state.num_processes + state.process_index, share[1] * state.num_processes)
    _check_extension(args.extend_labels)
    labels, templates = _read_labels(args.labels, args.extend_labels), read_templates(args.templates)
    rows = open_rows(
        args.dataset,
        args.split,
        streaming=args.streaming,
        image_column=args.image_column,
        keep_columns=_names(args.keep_columns),
    )
    folder = make_folder(Path(args.output))
    loaded = load_model(args.model, _device(args.device, state))
    segmenter = make_segmenter(loaded, labels, templates=templates, added=args.extend_labels)
    unknown, trained = untrained_words(loaded, labels or [])
    if unknown and state.is_main_process:
        warn(
            f"model {loaded.name} was not trained on {_listed(unknown)}; expect poor results for them. It was trained "
            f"on {_listed(trained)}"
        )
    labeler = Labeler(
        model=loaded.model,
        processor=loaded.processor,
        labels=tuple(segmenter.labels),
        class_embeds=segmenter.class_embeds,
        own_labels=segmenter.own_labels,
        templates=tuple(loaded.processor.templates if templates is None else resolve_templates(templates)[1]),
    )
    report = segment_dataset(
        labeler,
        rows,
        folder,
        Options(
            shard_size=args.shard_size,
            batch_size=args.batch_size,
            with_images=args.with_images,
            with_scores=args.scores,
            keep_columns=_names(args.keep_columns),
            strict=args.strict,
            workers=args.workers,
        ),
        part=part,
        about={"model": loaded.name, "dataset": args.dataset, "split": args.split, "extended_by": args.extend_labels},
        progress=state.is_main_process,
    )
    state.destroy_process_group()
    return _say_report(report, folder, f"process {part.index + 1} of {part.count}: " if part.count > 1 else "")


def _say_report(report: Any, folder: Path, who: str) -> int:
    """Say what was done, and return the exit code."""
    rate = f", {report.images / report.seconds:.1f} images a second" if report.images else ""
    say(f"{who}{report.images:,} images in {report.seconds / 60:.1f} minutes{rate}")
    if report.first_error is not None:
        warn(f"{who}{report.failures:,} of them could not be read, the first is {report.first_error}")
    if report.total and report.total_failures == report.total:
        raise CommandError(
            f"none of the {report.total:,} images could be read: the column `error` in {folder} says why; choose "
            "another folder for the next run"
        )
    files = f"{report.parts:,}" if report.expected_parts is None else f"{report.parts:,} of {report.expected_parts:,}"
    unread = f", {report.total_failures:,} of them unreadable (column `error`)" if report.total_failures else ""
    say(f"{folder} holds {files} files with {report.total:,} images{unread}; load them with")
    say(f'  datasets.load_dataset("parquet", data_files="{folder}/part-*.parquet", split="train")')
    return 0


def _terminate(signal_number: int, frame: Any) -> None:
    raise SystemExit(EXIT_TERMINATED)


def _read_part(text: str | None) -> tuple[int, int]:
    """The 3/16 of `--part`, counted from 0: (2, 16)."""
    if text is None:
        return 0, 1
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text.strip())
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise CommandError(f"--part {text}: expected I/N with I from 1 to N, for example --part 3/16")
    return int(match[1]) - 1, int(match[2])


def _read_labels(text: str | None, extended: str) -> list[str] | None:
    """What `--labels` stands for; None where nothing was given."""
    from modeling_san.processing import normalize_labels, vocabulary_names
    from modeling_san.training.label_sets import load_label_set

    if text is None:
        return None
    if not text.strip():
        raise CommandError('--labels is empty: name what to look for, for example --labels "sky, road"')
    if text in vocabulary_names() or Path(text).is_file():
        return list(load_label_set(text).names)
    try:
        labels = normalize_labels(text)
    except ValueError as error:
        raise CommandError(f"--labels: {error}") from error
    # More likely a name mistyped than a wish to give every pixel the same label
    if len(labels) == 1 and extended == "none":
        raise CommandError(
            f"--labels {text}: there is no such file and no such label set ({', '.join(vocabulary_names())}), and one "
            "name alone would be the label of every pixel: check the spelling, or pass --extend-labels coco-all"
        )
    return labels


def _names(text: str | None) -> tuple[str, ...]:
    """Names between commas."""
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def _listed(names: list[str], most: int = 10) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _device(name: str | None, state: Any) -> Any:
    """The device of this process; those of one machine share its GPUs out among them."""
    import torch

    from .models import pick_device

    device = pick_device(name)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", state.local_process_index % torch.cuda.device_count())
    return device
