# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""`san segment-dataset`: label every pixel of a whole data set."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import time
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from .datasets import add_source_options, quiet_datasets
from .errors import CommandError, say, warn
from .labels import add_label_options, read_labels, read_templates
from .parser import (
    add_device_option,
    add_extension_option,
    add_model_option,
    add_output_option,
    add_templates_option,
    make_folder,
    positive_integer,
)

if TYPE_CHECKING:
    from modeling_san.processing import Segmenter, Vocabulary

_DESCRIPTION = """\
Label all images of a data set, and write parquet files into DIR with the columns
  row         number of the image in the data set
  annotation  a label for each pixel, as a PNG without loss, of 8 bits (16 for more than 255 labels)
  segments    labels present: name, index, area (share of the image) and mean score
  error       why an image could not be read; its annotation is missing then
and, if asked for, image, scores and columns of the data set.

Killed at any moment, the same command goes on where it was: each file appears complete or not at all. SIGTERM ends it
between two files with exit code 143. The batch size and --ray may change between runs; model, labels, data set and
columns may not.
"""
_EXAMPLE = """\
example:
  san segment-dataset --dataset photos.parquet --labels "sky, road, car|automobile" --output labelled
  san segment-dataset --dataset photos.parquet --labels ade20k_150 --model ./san-vit-b-16 --output labelled

all GPUs of this machine, or of a cluster (pip install "modeling-san[ray]"; `ray start` on each machine first):
  san segment-dataset --dataset photos.parquet --labels ade20k_150 --output labelled --ray
  san segment-dataset --dataset /disk/photos --labels ade20k_150 --output /disk/labelled --ray HOST:6379

All machines of a cluster have to see data set, model and DIR under the same path (or Hub id).

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
    add_output_option(parser, default=None)
    add_label_options(parser)
    add_model_option(parser)
    add_templates_option(parser)
    add_extension_option(parser)
    parser.add_argument("--keep-columns", default="", metavar="NAME,...", help="columns of the data set to store too")
    parser.add_argument("--with-images", action="store_true", help="store the images as well, encoded as they came")
    parser.add_argument(
        "--scores", action="store_true", help="store each pixel's winning score, in thousandths, as a PNG of 16 bits"
    )
    for name, default, text in (
        ("--shard-size", 256, "images in a file; what is lost at most when a process is killed"),
        ("--batch-size", 8, "images that the model sees at once"),
    ):
        parser.add_argument(
            name, type=positive_integer, default=default, metavar="N", help=f"{text} (default: %(default)s)"
        )
    parser.add_argument(
        "--workers", type=positive_integer, metavar="N", help="threads that decode (default: one for each core)"
    )
    parser.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="share the work out with Ray: to a cluster at this address, else to one at hand or to this machine",
    )
    parser.add_argument(
        "--ray-actors",
        type=positive_integer,
        metavar="N",
        help="models at work at a time with --ray (default: one for each GPU, or for each machine if there are none)",
    )
    parser.add_argument("--strict", action="store_true", help="stop at the first image that cannot be read")
    add_device_option(parser)


def run(args: argparse.Namespace) -> int:
    """Label the data set. SIGTERM ends it as an exception does, so that what is open is closed."""
    from modeling_san.processing.processing_san import resolve_templates
    from modeling_san.processing.segment_dataset import Options, segment_dataset, segment_dataset_with_ray
    from modeling_san.training.sources import load_images

    if args.ray is None and args.ray_actors is not None:
        raise CommandError("--ray-actors says how --ray shares the work out: pass --ray as well")
    quiet_datasets()
    labels, templates = read_labels(args), read_templates(args.templates)
    options = Options(
        keep_columns=tuple(name.strip() for name in args.keep_columns.split(",") if name.strip()),
        with_images=args.with_images,
        with_scores=args.scores,
        shard_size=args.shard_size,
        batch_size=args.batch_size,
        strict=args.strict,
        workers=args.workers,
        settings={} if templates is None else {"templates": resolve_templates(templates)[1]},
        about={"model": args.model or "built-in", "dataset": args.dataset, "split": args.split},
    )
    open_rows = partial(
        load_images,
        str(_absolute(args.dataset)),
        args.split,
        streaming=args.streaming,
        image_column=args.image_column,
        labelled=False,
        keep_columns=options.keep_columns,
    )
    load = partial(load_segmenter, _absolute(args.model), labels, templates, args.extend_labels, args.device)
    start = time.perf_counter()
    with ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGTERM, signal.getsignal(signal.SIGTERM))
        if args.ray is not None:
            stack.callback(_connect(args.ray or None).shutdown)
        # After Ray, which handles it in its own way
        signal.signal(signal.SIGTERM, _terminate)
        if args.ray is None:
            rows = open_rows()
            report = segment_dataset(*load(), rows, make_folder(args.output), options)
        else:
            folder = make_folder(args.output)
            report = segment_dataset_with_ray(load, open_rows, folder, options, actors=args.ray_actors)
    seconds = time.perf_counter() - start

    rate = f", {report.images / seconds:.1f} images a second" if report.images else ""
    say(f"{report.images:,} images in {seconds / 60:.1f} minutes{rate}")
    if report.failures:
        warn(
            f"{report.failures:,} of {report.total:,} images could not be read, the first is {report.first_error}; "
            "the column `error` says why"
        )
    if report.total and report.failures == report.total:
        raise CommandError(f"no image could be read: choose another folder than {args.output} for the next run")
    say(f"{args.output} holds {report.parts:,} files with {report.total:,} images; load them with")
    say(f'  datasets.load_dataset("parquet", data_files="{args.output}/part-*.parquet", split="train")')
    return 0


def load_segmenter(
    model: str | None, labels: Any, templates: Any, extend: str, chosen: str | None, device: str | None = None
) -> tuple[Segmenter, Vocabulary]:
    """What labels images, here or in another process; `device` goes before the one that was chosen."""
    import torch

    from modeling_san.processing import Segmenter
    from modeling_san.processing.device import pick_device, pick_dtype

    from .models import load_model, quiet_libraries

    quiet_libraries()
    place = pick_device(device or chosen)
    loaded = load_model(model, place)
    # CPUs gain little from the rounding
    is_fast = place.type == "cuda" and pick_dtype(place) == torch.bfloat16
    segmenter = Segmenter(loaded.model, loaded.processor, dtype=torch.bfloat16 if is_fast else None)
    return segmenter, loaded.vocabulary(labels, templates=templates, extend=extend)


def _connect(address: str | None) -> Any:
    """Ray, as the driver of a cluster."""
    try:
        import ray
    except ImportError as error:
        raise CommandError('--ray needs Ray: pip install "modeling-san[ray]"') from error
    ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    return ray


def _terminate(signal_number: int, frame: Any) -> None:
    raise SystemExit(EXIT_TERMINATED)


def _absolute(source: str | None) -> str | None:
    """A path that holds in other processes, too; Hub ids and addresses stay."""
    return os.path.abspath(source) if source is not None and os.path.exists(source) else source
