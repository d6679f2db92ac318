# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""
Labels a whole data set: images in, parquet files with label maps out.

The data set is cut into shards of `shard_size` consecutive rows. Shard 7 becomes `part-000007.parquet`, which appears
complete or not at all, and a shard whose file is there is done: a run that was killed goes on where it was. Images
share a batch with others of their shard only, so it does not matter who labels a shard: this process, or one of the
actors that Ray Data spreads over GPUs and machines.

The result is a data set: `datasets.load_dataset(folder)` reads it, and so do training and evaluation if the images
are stored with it.
"""

from __future__ import annotations

import io
import json
import os
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import fsspec
import numpy as np
import pyarrow.parquet as pq
import torch
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset, Features, IterableDataset, Value
from datasets import Image as ImageFeature
from datasets.table import embed_table_storage
from PIL import Image
from tqdm import tqdm

from .files import (
    locked_folder,
    refuse_foreign_files,
    remove_unfinished,
    replacing_file,
    write_json,
    write_text,
)
from .fingerprints import digest_json, digest_weights
from .images_san import load_image, open_image
from .wording_san import one_line

if TYPE_CHECKING:
    from .segmenter import PreparedImages, Segmentation, Segmenter, Vocabulary

RUN_FILE, LABELS_FILE, CARD_FILE = "run.json", "id2label.json", "README.md"
"""Beside the part files: what they hold the results of, their labels, and how `datasets` and the Hub read them."""

COLUMNS = ("row", "image", "annotation", "scores", "segments", "error")
"""Of the part files, beside those kept of the data set; `image` and `scores` are there if asked for."""

_BATCHES_AT_ONCE = 4
"""Images of so many batches are sorted by their padded size."""

_VOLATILE = {"_name_or_path", "architectures", "auto_map", "custom_pipelines", "dtype", "transformers_version"}
"""Entries of a config that say nothing about what the model computes."""

_Shard = tuple[int, Sequence[Mapping[str, Any]]]
_Row = dict[str, Any]
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Options:
    """
    What goes into the part files, and how.

    Attributes:
        keep_columns: of the data set, to store as well.
        with_images: store the images, encoded as they came.
        with_scores: store a map of the winning scores in thousandths, of 16 bits.
        shard_size: rows of a part file.
        batch_size: images that the model sees at once.
        strict: end at the first image that cannot be read.
        workers: threads that read and decode images and encode label maps; by default one for each core, 16 at most.
        progress: whether to show a bar.
        settings: what else decides the results, such as prompt templates: a folder begun with others is refused.
        about: what else `run.json` should say, for people.
    """

    keep_columns: tuple[str, ...] = ()
    with_images: bool = False
    with_scores: bool = False
    shard_size: int = 256
    batch_size: int = 8
    strict: bool = False
    workers: int | None = None
    progress: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense, and columns that would sit on those of the result."""
        for name in ("shard_size", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: pass a whole number of at least 1")
        if taken := set(COLUMNS).intersection(self.keep_columns):
            raise ValueError(f"column {min(taken)!r} cannot be kept: the result has one of that name, rename it")


@dataclass(frozen=True)
class Report:
    """
    What a run did, and what its folder holds.

    Attributes:
        images: rows labelled in this run.
        parts: part files in the folder, of all runs.
        total: rows in them.
        failures: those among them whose image could not be read.
        first_error: why the first of these could not.
    """

    images: int
    parts: int
    total: int
    failures: int
    first_error: str | None


def segment_dataset(
    segmenter: Segmenter,
    vocabulary: Vocabulary,
    rows: Dataset | IterableDataset,
    output: str | os.PathLike,
    options: Options | None = None,
) -> Report:
    """
    Label a data set in this process, or what of it is not labelled yet.

    Args:
        segmenter: labels the images.
        vocabulary: that it chooses from.
        rows: a data set with the column `image`; of a stream two shards are in memory at most.
        output: folder for the part files; one that holds a part of the same run is continued.
        options: what to write.

    Raises:
        ValueError: the folder holds something else, there is no such column, or (strict) an image cannot be read.
        OSError: a file cannot be written. What was written stays, and the next run goes on from there.
    """
    options, output = options or Options(), Path(output)
    rows = _encoded(rows, options)
    with locked_folder(output):
        _claim(output, segmenter, vocabulary, rows, options)
        labeler = _ShardLabeler(segmenter, vocabulary, rows.features, output, options)
        return _follow(labeler.run(_shards(rows, output, options)), rows, output, options)


def segment_dataset_with_ray(
    load: Callable[[str | None], tuple[Segmenter, Vocabulary]],
    open_rows: Callable[[], Dataset | IterableDataset],
    output: str | os.PathLike,
    options: Options | None = None,
    *,
    actors: int | None = None,
) -> Report:
    """
    Label a data set with the GPUs of a Ray cluster, or its CPUs where it has none: the same files as without Ray.

    The cluster is the one that `ray.init` was called for, else one of this machine. Every actor holds one model and
    writes part files of its own; a shard whose actor died is labelled by another one.

    Args:
        load: makes the segmenter and its vocabulary on a device, None standing for the best there is. It is called
            with "cpu" here, and with None in every actor.
        open_rows: opens the data set, here and in every actor; a stream is read by one task for all of them.
        output: folder for the part files, which all machines see under this path, as they do the data set.
        options: what to write.
        actors: how many models; by default one for each GPU, or one for each machine.

    Raises:
        ImportError: Ray is not installed.
        ValueError: as for `segment_dataset`.
        OSError: an actor cannot go on, for any of those reasons, or the machines do not share the folder.
    """
    import ray

    options, output = options or Options(), Path(output).absolute()
    rows = _encoded(open_rows(), options)
    with locked_folder(output):
        _claim(output, *load("cpu"), rows, options)
        if not ray.is_initialized():
            ray.init()
        labelled = _run_actors(_Actor(load, open_rows, output, options), rows, actors)
        report = _follow(labelled, rows, output, options)
    if isinstance(rows, Dataset) and (missing := len(_unfinished(rows, output, options))):
        raise OSError(f"{missing:,} part files are not in {output}: pass a folder that all machines share")
    return report


def _follow(labelled: Iterable[int], rows: Any, output: Path, options: Options) -> Report:
    """Show a bar of numbers of images as they come, and say at the end what there is."""
    total, images = None, 0
    if isinstance(rows, Dataset):
        total = sum(_size(rows, number, options) for number in _unfinished(rows, output, options))
    with tqdm(desc="segmenting", total=total, unit="image", disable=not options.progress) as bar:
        for more in labelled:
            images += more
            bar.update(more)
    parts = [pq.read_table(path, columns=["row", "error"]) for path in sorted(output.glob("part-*.parquet"))]
    errors = [
        f"row {row['row']}: {row['error']}" for part in parts for row in part.to_pylist() if row["error"] is not None
    ]
    return Report(images, len(parts), sum(map(len, parts)), len(errors), errors[0] if errors else None)


# The data set


def _encoded(rows: Any, options: Options) -> Any:
    """The columns that are needed, with images encoded, so that what is passed over costs nothing."""
    columns = ["image", *dict.fromkeys(options.keep_columns)]
    if missing := [name for name in columns if name not in (rows.features or {"image": None})]:
        raise ValueError(f"the data set has no column {missing[0]!r}, but {', '.join(rows.features or [])}")
    if rows.features is None:
        return rows
    rows = rows.select_columns(columns)
    for name, feature in rows.features.items():
        if isinstance(feature, ImageFeature):
            rows = rows.cast_column(name, ImageFeature(decode=False))
    return rows


def _size(rows: Dataset, number: int, options: Options) -> int:
    """How many rows a shard has."""
    return min(options.shard_size, len(rows) - number * options.shard_size)


def _unfinished(rows: Dataset, output: Path, options: Options) -> list[int]:
    """The shards without a part file; a damaged one does not count."""
    numbers = range(-(-len(rows) // options.shard_size))
    return [number for number in numbers if _rows_done(output, number) != _size(rows, number, options)]


def _read_shard(rows: Dataset, number: int, options: Options) -> _Shard:
    first = number * options.shard_size
    return number, rows.select(range(first, first + _size(rows, number, options))).to_list()


def _shards(rows: Any, output: Path, options: Options) -> Iterator[_Shard]:
    """The shards without a part file, with their rows; of a stream the others pass by."""
    if isinstance(rows, Dataset):
        yield from (_read_shard(rows, number, options) for number in _unfinished(rows, output, options))
        return
    stream = iter(rows)
    for number in count():
        if not (shard := list(islice(stream, options.shard_size))):
            return
        if _rows_done(output, number) != len(shard):
            yield number, shard


def _open(value: Any) -> tuple[bytes | None, Any]:
    """A column's entry as the file it came as, if it came as one, and as an upright image."""
    if isinstance(value, Mapping):
        content = value.get("bytes")
        if content is None and value.get("path"):
            with fsspec.open(value["path"], "rb") as file:
                content = file.read()
        value = content
    if value is None:
        raise ValueError("the image is missing")
    if not isinstance(value, bytes):
        return None, load_image(value, "the image")
    with open_image(value) as image:
        return value, load_image(image, "the image")


# Labelling


class _ShardLabeler:
    """Labels shards and writes their part files. The model computes in the caller's thread, all else in others."""

    def __init__(
        self,
        segmenter: Segmenter,
        vocabulary: Vocabulary,
        features: Mapping[str, Any] | None,
        output: Path,
        options: Options,
    ) -> None:
        self.segmenter, self.vocabulary = segmenter, vocabulary
        self.output, self.options = output, options
        self.features = _result_features(features, options)
        # 255 stays free for "no label"
        self.map_type = np.uint8 if len(vocabulary.shown_labels) <= 255 else np.uint16

    def run(self, shards: Iterator[_Shard]) -> Iterator[int]:
        """Label shards, and say how many images were; what is complete reaches the disk whatever ends the run."""
        # Threads take tasks in turn: one that waits for others was submitted after them
        with ThreadPoolExecutor(self.options.workers or min(16, os.cpu_count() or 1)) as pool:
            writing: list[Future[None]] = []
            for number, values in _one_ahead(shards, pool):
                rows, encoding = yield from self._label_shard(number, values, pool)
                _wait(writing)
                writing = [pool.submit(self._write, number, rows, encoding)]
            _wait(writing)

    def _label_shard(
        self, number: int, values: Sequence[Mapping[str, Any]], pool: ThreadPoolExecutor
    ) -> Generator[int, None, tuple[list[_Row], list[Future[None]]]]:
        """
        The rows of a part file, and the tasks that complete the last of them.

        The next images are read and decoded, and the last ones encoded, while the model computes.
        """
        numbered = enumerate(values, number * self.options.shard_size)
        at_once = _BATCHES_AT_ONCE * self.options.batch_size
        windows = iter(lambda: [pool.submit(self._read, *row) for row in islice(numbered, at_once)], [])
        rows: list[_Row] = []
        encoding: list[Future[None]] = []
        for window in _one_ahead(windows, pool):
            images = [reading.result() for reading in window]
            labelled = [pool.submit(self._complete, *one) for one in self._label(images)]
            _wait(encoding)
            encoding = labelled
            rows += [row for row, _ in images]
            yield len(images)
        return rows, encoding

    def _read(self, number: int, values: Mapping[str, Any]) -> tuple[_Row, PreparedImages | None]:
        """A row as far as it is known before the image is labelled, and the image if it can be read."""
        row: _Row = dict.fromkeys(self.features) | {"row": number, "segments": []}
        row |= {name: values[name] for name in self.options.keep_columns}
        try:
            encoded, image = _open(values.get("image"))
            prepared = self.segmenter.prepare(image)
        except Exception as error:
            # Decoders of damaged files raise what they please
            return row | {"error": one_line(error)[:300]}, None
        if self.options.with_images:
            row["image"] = _png(np.asarray(image)) if encoded is None else {"bytes": encoded, "path": None}
        return row, prepared

    def _label(self, images: Sequence[tuple[_Row, PreparedImages | None]]) -> Iterator[tuple[_Row, Segmentation]]:
        """Label the images that could be read, those of one padded size together."""
        alike = defaultdict(list)
        for row, prepared in images:
            if prepared is not None:
                alike[prepared.pixel_values.shape].append((row, prepared))
            elif self.options.strict:
                raise ValueError(f"row {row['row']}: {row['error']}")
        for group in alike.values():
            for start in range(0, len(group), self.options.batch_size):
                rows, batch = zip(*group[start : start + self.options.batch_size], strict=True)
                yield from zip(rows, self._segment(rows, batch), strict=True)

    def _segment(self, rows: Sequence[_Row], batch: Sequence[PreparedImages]) -> list[Segmentation]:
        """Label images of one padded size; one by one where the memory does not hold them all."""
        try:
            return self.segmenter.segment(batch, self.vocabulary)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            if len(batch) == 1:
                raise ValueError(
                    f"row {rows[0]['row']}: the image does not fit into the memory of {self.segmenter.model.device}: "
                    "free some of it, or compute on the CPU"
                ) from error
        torch.cuda.empty_cache()
        return [self._segment([row], [image])[0] for row, image in zip(rows, batch, strict=True)]

    def _complete(self, row: _Row, segmentation: Segmentation) -> None:
        row["annotation"] = _png(segmentation.label_map.numpy().astype(self.map_type))
        row["segments"] = [
            {"label": part.label, "index": part.index, "area": part.area, "score": part.score}
            for part in segmentation.segments()
        ]
        if self.options.with_scores:
            # A score sums what all masks say of a pixel, and may be above 1
            row["scores"] = _png(np.rint(segmentation.scores.numpy() * 1000).clip(0, 65535).astype(np.uint16))

    def _write(self, shard: int, rows: Sequence[_Row], encoding: Iterable[Future[None]]) -> None:
        _wait(encoding)
        path = _part_file(self.output, shard)
        try:
            with replacing_file(path) as beside:
                _write_rows(rows, self.features, beside)
        except OSError as error:
            raise OSError(
                f"{path} cannot be written ({one_line(error)}): what is done stays; make room or choose another disk, "
                "and run the same command again to go on"
            ) from error


def _one_ahead(items: Iterator[_Item], pool: ThreadPoolExecutor) -> Iterator[_Item]:
    """Items, none of which is None; a thread makes the next one while one is used."""
    upcoming = pool.submit(next, items, None)
    while (item := upcoming.result()) is not None:
        upcoming = pool.submit(next, items, None)
        yield item


def _wait(futures: Iterable[Future[None]]) -> None:
    """Wait for tasks, and raise what one of them raised."""
    for future in futures:
        future.result()


def _result_features(features: Mapping[str, Any] | None, options: Options) -> Features:
    """Columns of the part files; `features` are those of the data set."""
    segment = {"label": Value("string"), "index": Value("int32"), "area": Value("float32"), "score": Value("float32")}
    kept = {name: (features or {})[name] for name in options.keep_columns}
    columns: Any = {
        "row": Value("int64"),
        # Images were not to be decoded here, but whoever loads the result wants them
        **{name: ImageFeature() if isinstance(kind, ImageFeature) else kind for name, kind in kept.items()},
        **({"image": ImageFeature()} if options.with_images else {}),
        "annotation": ImageFeature(),
        **({"scores": ImageFeature()} if options.with_scores else {}),
        "segments": [segment],
        "error": Value("string"),
    }
    return Features(columns)


def _png(pixels: np.ndarray) -> dict[str, Any]:
    """An array of 8 or 16 bits as a PNG file, without loss, in the form of a column of images."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def _write_rows(rows: Sequence[Mapping[str, Any]], features: Features | None, place: Any) -> None:
    """Write a parquet file that holds its images itself, where `datasets` has kept paths."""
    table = Dataset.from_list([dict(row) for row in rows], features=features).data.table
    pq.write_table(embed_table_storage(table), place)


# Ray


class _Actor:
    """What works in a process of its own: there it opens the data set, and loads the model with its first shard."""

    def __init__(self, load: Callable, open_rows: Callable, output: Path, options: Options) -> None:
        self.arguments = load, open_rows, output, options
        self.labeler: _ShardLabeler | None = None

    def read_stream(self, batch: Any) -> Iterator[dict[str, Any]]:
        """The shards of a stream without a part file, each in one value, which no block cuts."""
        _, open_rows, output, options = self.arguments
        rows = _encoded(open_rows(), options)
        for number, shard in _shards(rows, output, options):
            _write_rows(shard, rows.features, content := io.BytesIO())
            yield {"number": [number], "rows": np.array([content.getvalue()], dtype=object)}

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Label one shard. What the user has to mend comes back as a sentence, in place of Ray's pages."""
        load, open_rows, output, options = self.arguments
        try:
            if self.labeler is None:
                self.rows = _encoded(open_rows(), options)
                segmenter, vocabulary = load(None)
                self.labeler = _ShardLabeler(segmenter, vocabulary, self.rows.features, output, options)
            number = int(batch["number"][0])
            if "rows" in batch:
                shard = number, pq.read_table(io.BytesIO(batch["rows"][0])).to_pylist()
            else:
                shard = _read_shard(self.rows, number, options)
            # Ray asks again where an actor died before it could say that it was done
            is_done = _rows_done(output, number) == len(shard[1])
            return {"images": [0 if is_done else sum(self.labeler.run(iter([shard])))], "stopped": [""]}
        except (OSError, ValueError) as error:
            return {"images": [0], "stopped": [str(error)]}


def _run_actors(actor: _Actor, rows: Any, actors: int | None) -> Iterator[int]:
    """Let a pool of actors label what has no part file yet; the number of images of each shard."""
    import ray
    import ray.data

    shards: Any
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    actors = actors or gpus or len(nodes)
    # Ray gives an actor as many threads as CPUs
    cpus = min(*(node["CPU"] for node in nodes), sum(node["CPU"] for node in nodes) // actors)
    if isinstance(rows, Dataset):
        _, _, output, options = actor.arguments
        items = [{"number": number} for number in _unfinished(rows, output, options)]
        shards = ray.data.from_items(items, override_num_blocks=max(1, min(len(items), 10_000)))
    else:
        # One reader, which needs no CPU of its own: with the needs of an actor Ray would let that one read
        shards = ray.data.range(1).map_batches(actor.read_stream, num_cpus=0)
    needs: dict[str, Any] = {"num_gpus": 1} if gpus else {"num_cpus": max(1, int(cpus))}
    labelled = shards.map_batches(
        _Actor,
        fn_constructor_args=actor.arguments,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=actors),
        **needs,
    )
    labelled.context.enable_progress_bars = False
    # One shard is one block, which goes to whichever actor is free
    labelled.context.target_max_block_size = 1
    for outcome in labelled.iter_rows():
        if outcome["stopped"]:
            raise OSError(outcome["stopped"])
        yield outcome["images"]


# The folder


def _part_file(output: Path, number: int) -> Path:
    return output / f"part-{number:06d}.parquet"


def _rows_done(output: Path, number: int) -> int:
    """How many rows a part file holds; 0 if it is not there, or damaged."""
    try:
        return pq.read_metadata(_part_file(output, number)).num_rows
    except (OSError, ValueError):
        # pyarrow's own errors are ValueErrors
        return 0


def _claim(output: Path, segmenter: Segmenter, vocabulary: Vocabulary, rows: Any, options: Options) -> None:
    """
    Make a folder this run's own.

    Raises:
        ValueError: it is another run's, or holds files of unknown origin where this one would write.
    """
    path, labels = output / RUN_FILE, vocabulary.shown_labels
    run = _fingerprint(segmenter, vocabulary, rows, options)
    if path.exists():
        try:
            found = dict(json.loads(path.read_text(encoding="utf-8"))["compared"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} cannot be read ({one_line(error)}): choose another folder") from error
        if different := [name for name in {**run, **found} if found.get(name) != run.get(name)]:
            raise ValueError(
                f"{output} holds the results of another run (other {' and '.join(different)}): choose another folder, "
                "or run it with the options that it was begun with"
            )
        remove_unfinished(output)
    else:
        refuse_foreign_files(output, ["part-*.parquet", LABELS_FILE, CARD_FILE], RUN_FILE)
        # First: what is there besides is this run's own
        write_json(path, {**options.about, "labels": list(labels), "compared": run})
    if not (output / LABELS_FILE).exists():
        write_json(output / LABELS_FILE, {str(index): label for index, label in enumerate(labels)})
    if not (output / CARD_FILE).exists():
        write_text(output / CARD_FILE, _CARD.format(labels="\n".join(f"- {label}" for label in labels)))


_CARD = """\
---
configs:
- config_name: default
  data_files:
  - split: train
    path: part-*.parquet
task_categories:
- image-segmentation
---
Label maps that a Side Adapter Network drew. `row` is the number of the image in its data set, `annotation` the index
of a label for each pixel, `segments` the labels present with the share of the image that they cover and their mean
scores. Where an image could not be read, `error` says why and the annotation is missing.

Labels, counted from 0:

{labels}
"""


def _fingerprint(segmenter: Segmenter, vocabulary: Vocabulary, rows: Any, options: Options) -> dict[str, str]:
    """
    What makes a run this one: two runs with the same entries write the same rows.

    The batch size and the device are left out: they change nothing but rounding.
    """
    configs = [
        json.loads(config.to_json_string(), object_hook=lambda entry: {k: entry[k] for k in entry.keys() - _VOLATILE})
        for config in (segmenter.model.config, segmenter.processor.image_processor)
    ]
    if isinstance(rows, Dataset):
        length, sample = len(rows), [rows[len(rows) * eighth // 8] for eighth in range(8 if len(rows) else 0)]
    else:
        length, sample = None, list(rows.take(2))
    compared = {
        "model": [digest_weights(segmenter.model.state_dict()), configs],
        "labels": [vocabulary.labels, vocabulary.num_own, vocabulary.shown_labels],
        "dataset": [length, [_describe(row.get("image")) for row in sample]],
        "shard_size": options.shard_size,
        "columns": _result_features(rows.features, options),
        **options.settings,
    }
    return {name: digest_json(value) for name, value in compared.items()}


def _describe(value: Any) -> Any:
    """The content of an image, or its name: the same wherever the data set lies."""
    if not isinstance(value, Mapping):
        return repr(value)[:1000]
    return value.get("bytes") or Path(value.get("path") or "").name


__all__ = ["COLUMNS", "RUN_FILE", "Options", "Report", "segment_dataset", "segment_dataset_with_ray"]
