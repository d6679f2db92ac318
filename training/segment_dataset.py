"""
Labels a whole data set: images in, parquet files with label maps out, on one process or many.

The data set is cut into blocks of `shard_size` consecutive rows. Block b belongs to process b mod P of P and becomes
one file, `part-00000b.parquet`, which appears complete or not at all. So a run that was killed goes on where it was,
with the same or another number of processes: a block whose file is there is done. Images share a batch with others
of their block only, so that cuts and numbers of processes change nothing in the result.

Processes do not talk to each other. On several GPUs of one machine, or on several machines:

    accelerate launch --num_processes 8 -m modeling_san.commands.main segment-dataset ...
    accelerate launch --num_machines 4 --machine_rank 0 --num_processes 32 --main_process_ip HOST \\
        --main_process_port 29500 -m modeling_san.commands.main segment-dataset ...

and without a launcher as a plain array of jobs, each with its own `--part`:

    san segment-dataset ... --part 3/16

The folder may be on a disk that all machines share; where each has a disk of its own, copy the part files together at
the end. A stream of unknown length is read by every process, which leaves the images of the others encoded.

SIGTERM and Ctrl-C end a run between two files; of SIGKILL or a power cut there may remain a file
`*.unfinished-*`, which the next run deletes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import torch
from datasets import Dataset, Features, IterableDataset, Value
from datasets import Image as ImageFeature
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from modeling_san.modeling_san import SANForOpenVocabSegmentation
from modeling_san.processing import OTHER_LABEL, SANProcessor, summarize
from modeling_san.processing.device import pick_device_and_dtype
from modeling_san.processing.files import replacing_file, write_json, write_text
from modeling_san.processing.images_san import read_byte_image
from modeling_san.training.data import open_encoded
from modeling_san.training.label_sets import ID2LABEL_FILE
from modeling_san.training.sources import IMAGE_COLUMNS, find_column, load_images, open_source

RUN_FILE = "run.json"
"""What a folder holds the results of."""

ROW, IMAGE, ANNOTATION, SCORES, SEGMENTS, ERROR = "row", "image", "annotation", "scores", "segments", "error"
"""Columns of the part files."""

_BYTE_LABELS = 255
"""Up to so many labels a map has 8 bits; 255 stays free for "no label"."""

_ROWS_AT_ONCE = 16
_SAMPLED_ROWS = 16
_ERROR_LENGTH = 300
_PENDING_BATCHES = 4
"""So many batches of images wait at most for others of their size."""

_VOLATILE = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "custom_pipelines",
    "dtype",
    "torch_dtype",
    "transformers_version",
)
"""Entries of a config that say nothing about what the model computes."""


# Who does what


@dataclass(frozen=True)
class Part:
    """A process among several.

    Attributes:
        index: which it is, from 0 on.
        count: how many there are.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        """Refuse a process that is none of them."""
        if not 0 <= self.index < self.count:
            raise ValueError(f"process {self.index} of {self.count}: count them from 0 to {self.count - 1}.")

    def owns(self, block: int) -> bool:
        """Whether this process labels block `block`."""
        return block % self.count == self.index


@dataclass(frozen=True)
class Labeler:
    """A model with a vocabulary, and where it computes.

    Attributes:
        model: on its device, in evaluation mode.
        processor: that belongs to it.
        labels: names by index.
        class_embeds: `(classes, projection_dim)` of the labels and of names added to them.
        own_labels: how many of the classes are the user's own; the others become "other"; None stands for all.
        templates: prompts that `class_embeds` were made with.
    """

    model: SANForOpenVocabSegmentation
    processor: SANProcessor
    labels: tuple[str, ...]
    class_embeds: Tensor
    own_labels: int | None = None
    templates: tuple[str, ...] = ()

    @property
    def map_type(self) -> type[np.unsignedinteger]:
        """Type of the numbers in label maps."""
        return np.uint8 if len(self.labels) <= _BYTE_LABELS else np.uint16

    def prepare(self, image: np.ndarray) -> tuple[Tensor, Tensor]:
        """`pixel_values` `(1, 3, height, width)` and `image_sizes` `(1, 2)` of an image of bytes."""
        inputs = self.processor.image_processor(image, return_tensors="pt")
        return inputs["pixel_values"], inputs["image_sizes"]

    @torch.inference_mode()
    def segment(
        self, pixel_values: Tensor, image_sizes: Tensor, target_sizes: Sequence[tuple[int, int]]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """
        Label images of one padded size.

        Args:
            pixel_values: `(batch, 3, height, width)`.
            image_sizes: `(batch, 2)`, sizes before padding.
            target_sizes: height and width of each label map.

        Returns:
            for each image its label map and the scores that won, both `(height, width)`.
        """
        device, dtype = pick_device_and_dtype(self.model.device)
        if device.type == "cuda":
            pixel_values = pixel_values.pin_memory().to(device, non_blocking=True)
        # Processors gain nothing from the rounding; sizes stay where they are read
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and dtype == torch.bfloat16):
            outputs = self.model(pixel_values=pixel_values, image_sizes=image_sizes, class_embeds=self.class_embeds)
        maps, scores = self.processor.post_process_semantic_segmentation(
            outputs, target_sizes=list(target_sizes), return_scores=True
        )
        if self.own_labels is not None and self.own_labels < len(self.class_embeds):
            other = self.labels.index(OTHER_LABEL)
            maps = [label_map.masked_fill(label_map >= self.own_labels, other) for label_map in maps]
        # Small numbers travel faster
        narrow = torch.uint8 if self.map_type is np.uint8 else torch.int32
        return [
            (label_map.to(narrow).cpu().numpy().astype(self.map_type, copy=False), score.cpu().numpy())
            for label_map, score in zip(maps, scores, strict=True)
        ]


@dataclass(frozen=True)
class Options:
    """What goes into the part files, and how.

    Attributes:
        shard_size: rows of a part file.
        batch_size: images that the model sees at once.
        with_images: store the images beside the label maps, encoded as they came.
        with_scores: store a map of the winning scores in thousandths, of 16 bits.
        keep_columns: columns of the data set to store as well.
        strict: end at the first image that cannot be read.
        workers: threads that read and decode images and encode label maps; by default one for each core, 16 at most.
    """

    shard_size: int = 256
    batch_size: int = 8
    with_images: bool = False
    with_scores: bool = False
    keep_columns: tuple[str, ...] = ()
    strict: bool = False
    workers: int | None = None

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense."""
        for name in ("shard_size", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: pass a whole number of at least 1.")


@dataclass(frozen=True)
class Report:
    """What a run did, and what its folder holds.

    Attributes:
        images: rows that this process wrote in this run.
        failures: those among them whose image could not be read.
        seconds: that it took.
        parts: part files in the folder, of all processes and runs.
        expected_parts: how many there will be; None for a stream.
        total: rows in them.
        total_failures: those among them whose image could not be read.
        first_error: of those that this process met.
    """

    images: int
    failures: int
    seconds: float
    parts: int
    expected_parts: int | None
    total: int
    total_failures: int
    first_error: str | None = None


def segment_dataset(
    labeler: Labeler,
    rows: Dataset | IterableDataset,
    output: str | os.PathLike,
    options: Options | None = None,
    *,
    part: Part | None = None,
    about: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Report:
    """
    Label a data set, or what of it is not labelled yet.

    Args:
        labeler: what labels an image.
        rows: from `open_rows`.
        output: folder for the part files; one that holds a part of the same run is continued.
        options: what to write.
        part: which process this is.
        about: what else `run.json` should say of the run, for people; it is not compared.
        progress: whether to show a bar.

    Returns:
        what was done.

    Raises:
        ValueError: the folder holds the results of another run; with `strict` for the first unreadable image.
        OSError: a file cannot be written. What was written stays, and the next run goes on from there.
    """
    options, part, output = options or Options(), part or Part(), Path(output)
    start = time.perf_counter()
    _claim(output, identity(labeler, rows, options), labeler, dict(about or {}))
    _remove_leftovers(output, part)
    length = len(rows) if isinstance(rows, Dataset) else None
    if isinstance(rows, Dataset):
        own = _blocks(len(rows), options.shard_size, part)
        todo = {block: count for block, count in own.items() if _rows_in(output, block) != count}
        total, done = sum(own.values()), sum(own.values()) - sum(todo.values())
        items = _stored_items(rows, todo, options.shard_size)
    else:
        total, done = None, 0
        items = _stream_items(rows, output, options.shard_size, part)
    bar = tqdm(
        desc="segmenting" if part.count == 1 else f"segmenting, process {part.index + 1} of {part.count}",
        total=total,
        initial=done,
        unit="image",
        disable=not progress,
        smoothing=0.05,
    )
    with bar:
        writer = _Run(labeler, rows.features, output, options, bar)
        writer.run(items)
    seconds = time.perf_counter() - start
    _remove_leftovers(output, part)
    counts = [count for count in map(_counts, _part_files(output)) if count is not None]
    return Report(
        images=writer.images,
        failures=writer.failures,
        seconds=seconds,
        parts=len(counts),
        expected_parts=None if length is None else -(-length // options.shard_size),
        total=sum(total for total, _ in counts),
        total_failures=sum(failures for _, failures in counts),
        first_error=writer.first_error,
    )


# The data set


def open_rows(
    source: str | os.PathLike,
    split: str = "train",
    *,
    streaming: bool = False,
    image_column: str | None = None,
    keep_columns: Sequence[str] = (),
) -> Dataset | IterableDataset:
    """
    Open a data set of images, with or without label maps, and leave the images encoded.

    Args:
        source: what `load_images` takes.
        split: which part of it.
        streaming: read it as it passes by.
        image_column: where the images are; recognised by its name by default.
        keep_columns: further columns to keep.

    Returns:
        a data set with the column `image` and the kept ones.

    Raises:
        ValueError: the source cannot be read, or has no such columns.
    """
    rows: Any = load_images(source, split, streaming=streaming, image_column=image_column, labelled=False)
    if keep_columns:
        # load_images has met all that can be wrong with the source; it drops what is no image and no label map
        rows = open_source(os.fspath(source), split, streaming, False)
        rows = _with_kept(rows, _image_column(rows, image_column, source), keep_columns, source)
    else:
        rows = rows.select_columns([IMAGE])
    for name, feature in rows.features.items():
        if isinstance(feature, ImageFeature):
            rows = rows.cast_column(name, ImageFeature(decode=False))
    return rows


def _image_column(rows: Any, chosen: str | None, source: object) -> str:
    return find_column(dict(rows.features), chosen, IMAGE_COLUMNS, "images", source)


def _with_kept(rows: Any, image: str, keep: Sequence[str], source: object) -> Any:
    """The images as `image`, and the kept columns."""
    missing = [name for name in keep if name not in rows.features]
    if missing:
        raise ValueError(f"{source} has no column {missing[0]!r} to keep, but {', '.join(rows.features)}.")
    reserved = [name for name in keep if name in (ROW, IMAGE, ANNOTATION, SCORES, SEGMENTS, ERROR) or name == image]
    if reserved:
        raise ValueError(
            f"column {reserved[0]!r} cannot be kept: the result has a column of that name, or it holds the images; "
            "rename it, or store the images with the results."
        )
    if isinstance(rows.features[image], Value):
        rows = rows.cast_column(image, ImageFeature())
    rows = rows.select_columns([image, *dict.fromkeys(keep)])
    return rows if image == IMAGE else rows.rename_column(image, IMAGE)


@dataclass(frozen=True)
class _Row:
    block: int
    number: int
    values: dict[str, Any]


@dataclass(frozen=True)
class _BlockEnd:
    block: int


def _blocks(length: int, size: int, part: Part) -> dict[int, int]:
    """The blocks of a process, each with its number of rows."""
    return {block: min(size, length - block * size) for block in range(part.index, -(-length // size), part.count)}


def _stored_items(rows: Dataset, blocks: Iterable[int], size: int) -> Iterator[_Row | _BlockEnd]:
    """The rows of some blocks, each block followed by its end."""
    for block in blocks:
        end = min((block + 1) * size, len(rows))
        for start in range(block * size, end, _ROWS_AT_ONCE):
            columns = rows[start : min(start + _ROWS_AT_ONCE, end)]
            for offset in range(len(columns[IMAGE])):
                values = {name: column[offset] for name, column in columns.items()}
                yield _Row(block, start + offset, values)
        yield _BlockEnd(block)


def _stream_items(rows: IterableDataset, output: Path, size: int, part: Part) -> Iterator[_Row | _BlockEnd]:
    """The same of a stream: blocks that are others' or done pass by."""
    stream = iter(rows)
    block = 0
    while True:
        done = _rows_in(output, block) if part.owns(block) else size
        # The last block is shorter: it is done if the stream ends where it does
        head = list(islice(stream, done + 1)) if done != size else []
        if done == size:
            passed = sum(1 for _ in islice(stream, size))
            if passed < size:
                return
        elif not head or len(head) == done:
            return
        else:
            number = block * size
            for values in head:
                yield _Row(block, number, values)
                number += 1
            for values in islice(stream, (block + 1) * size - number):
                yield _Row(block, number, values)
                number += 1
            yield _BlockEnd(block)
            if number < (block + 1) * size:
                return
        block += 1


# One image


@dataclass(frozen=True)
class _Prepared:
    """An image ready for the model."""

    row: _Row
    encoded: bytes | None
    size: tuple[int, int]
    pixel_values: Tensor
    image_sizes: Tensor


@dataclass(frozen=True)
class _Unreadable:
    """An image that is none, and why."""

    row: _Row
    error: str


def _prepare(row: _Row, labeler: Labeler, with_image: bool) -> _Prepared | _Unreadable:
    try:
        encoded, image = _read(row.values[IMAGE], with_image)
        pixel_values, image_sizes = labeler.prepare(image)
    except UnidentifiedImageError:
        return _Unreadable(row, "the file is no image of a known format")
    except Exception as error:
        # Decoders of damaged files raise what they please
        return _Unreadable(row, _one_line(error))
    height, width = image.shape[:2]
    return _Prepared(row, encoded, (height, width), pixel_values, image_sizes)


def _read(value: Any, with_image: bool) -> tuple[bytes | None, np.ndarray]:
    """A column's entry as an encoded file, where it is wanted, and as an upright image of bytes."""
    if value is None:
        raise ValueError("the image is missing")
    if isinstance(value, Mapping):
        value = value.get("bytes") or _file(value.get("path"))
    if not isinstance(value, (bytes, bytearray)):
        image = read_byte_image(value if isinstance(value, Image.Image) else np.asarray(value), "the image")
        return (_png(image) if with_image else None), image
    with open_encoded(value) as image:
        # PIL refuses images from twice as many pixels only, which take gigabytes
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and image.width * image.height > limit:
            raise ValueError(f"the image has {image.width} x {image.height} pixels, more than the {limit:,} allowed")
        pixels = read_byte_image(image, "the image")
    return (bytes(value) if with_image else None), pixels


def _file(path: str | None) -> bytes:
    if not path:
        raise ValueError("the image is missing")
    with fsspec.open(path, "rb") as file:
        return file.read()


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:_ERROR_LENGTH]


def _png(pixels: np.ndarray) -> bytes:
    """An array of 8 or 16 bits as a PNG file, without loss."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


# The run


class _Run:
    """Takes rows from reading to part files; the device works in the caller's thread, all else in others."""

    def __init__(
        self, labeler: Labeler, features: Mapping[str, Any] | None, output: Path, options: Options, bar: Any
    ) -> None:
        self.labeler = labeler
        self.output = output
        self.options = options
        self.bar = bar
        self.features = result_features(features, options)
        self.workers = options.workers or min(16, os.cpu_count() or 1)
        self.images = 0
        self.failures = 0
        self.first_error: str | None = None
        self._waiting: dict[tuple[int, ...], list[_Prepared]] = {}
        self._results: list[tuple[int, Future[dict[str, Any]] | dict[str, Any]]] = []
        self._encoding: deque[Future[dict[str, Any]]] = deque()

    def run(self, items: Iterator[_Row | _BlockEnd]) -> None:
        """
        Label all rows and write a file at each block's end.

        Raises:
            OSError: a file cannot be written.
            ValueError: with `strict`, for the first unreadable image.
        """
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="image")
        writer = ThreadPoolExecutor(1, thread_name_prefix="writer")
        written: Future[int] | None = None
        ahead = 2 * self.workers + 2 * self.options.batch_size
        try:
            with _in_background(items, lambda item: self._begin(pool, item), ahead) as begun:
                for item in begun:
                    if isinstance(item, _BlockEnd):
                        self._empty_waiting(pool)
                        # One block may be on its way to the disk while the next one is labelled
                        self._note(written)
                        written = writer.submit(self._write, item.block, self._results)
                        self._results = []
                    else:
                        self._take(pool, item.result())
            self._note(written)
        finally:
            # The block that is complete reaches the disk whatever ends the run
            writer.shutdown(wait=True)
            pool.shutdown(wait=False, cancel_futures=True)

    def _begin(self, pool: ThreadPoolExecutor, item: _Row | _BlockEnd) -> Future[_Prepared | _Unreadable] | _BlockEnd:
        if isinstance(item, _BlockEnd):
            return item
        return pool.submit(_prepare, item, self.labeler, self.options.with_images)

    def _take(self, pool: ThreadPoolExecutor, prepared: _Prepared | _Unreadable) -> None:
        """Put an image to others of its size, and run those that are enough for a batch."""
        if isinstance(prepared, _Unreadable):
            message = f"row {prepared.row.number}: {prepared.error}"
            if self.options.strict:
                raise ValueError(message)
            self.first_error = self.first_error or message
            self._results.append((prepared.row.number, _result(prepared, self.options)))
            self.bar.update()
            return
        # Decided by the block's rows alone: each run makes the same batches
        alike = self._waiting.setdefault(tuple(prepared.pixel_values.shape), [])
        alike.append(prepared)
        if len(alike) < self.options.batch_size:
            if sum(map(len, self._waiting.values())) < _PENDING_BATCHES * self.options.batch_size:
                return
            alike = max(self._waiting.values(), key=len)
        self._run_batch(pool, alike)

    def _empty_waiting(self, pool: ThreadPoolExecutor) -> None:
        for alike in list(self._waiting.values()):
            self._run_batch(pool, alike)

    def _run_batch(self, pool: ThreadPoolExecutor, batch: list[_Prepared]) -> None:
        del self._waiting[tuple(batch[0].pixel_values.shape)]
        for prepared, (label_map, scores) in zip(batch, self._segment(batch), strict=True):
            future = pool.submit(_result, prepared, self.options, label_map, scores, self.labeler.labels)
            self._results.append((prepared.row.number, future))
            self._encoding.append(future)
            self.bar.update()
        # Memory stays bounded where the device is faster than the encoders
        while len(self._encoding) > 2 * self.workers + self.options.batch_size:
            self._encoding.popleft().result()

    def _segment(self, batch: list[_Prepared]) -> list[tuple[np.ndarray, np.ndarray]]:
        pixel_values = torch.cat([prepared.pixel_values for prepared in batch])
        image_sizes = torch.cat([prepared.image_sizes for prepared in batch])
        try:
            return self.labeler.segment(pixel_values, image_sizes, [prepared.size for prepared in batch])
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            if len(batch) == 1:
                height, width = batch[0].size
                raise ValueError(
                    f"row {batch[0].row.number}, an image of {width} x {height} pixels, does not fit into the memory "
                    f"of {self.labeler.model.device}: free some of it, or use the processor (--device cpu)."
                ) from error
        if self.labeler.model.device.type == "cuda":
            torch.cuda.empty_cache()
        return [result for prepared in batch for result in self._segment([prepared])]

    def _note(self, written: Future[int] | None) -> None:
        if written is not None:
            self.failures += written.result()

    def _write(self, block: int, results: list[tuple[int, Future[dict[str, Any]] | dict[str, Any]]]) -> int:
        """Write a part file; returns how many of its images could not be read."""
        ordered = sorted(results, key=lambda result: result[0])
        rows = [result.result() if isinstance(result, Future) else result for _, result in ordered]
        table = Dataset.from_list(rows, features=self.features).data.table
        path = _part_file(self.output, block)
        try:
            with replacing_file(path) as beside:
                pq.write_table(table, beside)
        except OSError as error:
            # The reason may be a number only, or a sentence of pyarrow's that names the file beside
            reason = os.strerror(error.errno) if error.errno else _one_line(error)
            raise OSError(
                f"{path} cannot be written ({reason}): what is done stays; make room or choose another disk, and run "
                "the same command again to go on."
            ) from error
        self.images += len(rows)
        return sum(row[ERROR] is not None for row in rows)


def _is_out_of_memory(error: BaseException) -> bool:
    # On the processor PyTorch has no type of its own for it
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)


def result_features(features: Mapping[str, Any] | None, options: Options) -> Features:
    """Columns of the part files; `features` are those of the data set."""
    columns: dict[str, Any] = {ROW: Value("int64")}
    columns.update({name: (features or {})[name] for name in options.keep_columns})
    if options.with_images:
        columns[IMAGE] = ImageFeature()
    columns[ANNOTATION] = ImageFeature()
    if options.with_scores:
        columns[SCORES] = ImageFeature()
    columns[SEGMENTS] = [
        {"label": Value("string"), "index": Value("int32"), "area": Value("float32"), "mean_score": Value("float32")}
    ]
    columns[ERROR] = Value("string")
    decoded: Any = {name: _decoded(feature) for name, feature in columns.items()}
    return Features(decoded)


def _decoded(feature: Any) -> Any:
    return ImageFeature() if isinstance(feature, ImageFeature) else feature


def _result(
    prepared: _Prepared | _Unreadable,
    options: Options,
    label_map: np.ndarray | None = None,
    scores: np.ndarray | None = None,
    labels: Sequence[str] = (),
) -> dict[str, Any]:
    """A row of a part file; without a label map that of an image that cannot be read."""
    values = prepared.row.values
    row: dict[str, Any] = {ROW: prepared.row.number, **{name: _kept(values[name]) for name in options.keep_columns}}
    if options.with_images:
        row[IMAGE] = _file_entry(None if isinstance(prepared, _Unreadable) else prepared.encoded)
    row[ANNOTATION] = _file_entry(None if label_map is None else _png(label_map))
    if options.with_scores:
        row[SCORES] = _file_entry(None if scores is None else _png(_thousandths(scores)))
    row[SEGMENTS] = [] if label_map is None else _segments(label_map, scores, labels)
    row[ERROR] = prepared.error if isinstance(prepared, _Unreadable) else None
    return row


def _file_entry(encoded: bytes | None) -> dict[str, Any] | None:
    return None if encoded is None else {"bytes": encoded, "path": None}


def _kept(value: Any) -> Any:
    """A column's entry; an encoded file without its path, which `datasets` would store in place of the content."""
    is_file = isinstance(value, Mapping) and set(value) == {"bytes", "path"} and value["bytes"] is not None
    return {"bytes": value["bytes"], "path": None} if is_file else value


def _thousandths(scores: np.ndarray) -> np.ndarray:
    # A score sums what all queries say of a pixel, and may be above 1
    return np.rint(scores * 1000).clip(0, 65535).astype(np.uint16)


def _segments(label_map: np.ndarray, scores: np.ndarray | None, labels: Sequence[str]) -> list[dict[str, Any]]:
    index = {label: position for position, label in enumerate(labels)}
    return [
        {
            "label": segment["label"],
            "index": index[segment["label"]],
            "area": segment["area"],
            "mean_score": segment["mean_score"],
        }
        for segment in summarize(label_map, scores, labels)
    ]


@contextmanager
def _in_background(items: Iterator[Any], begin: Any, ahead: int) -> Iterator[Iterator[Any]]:
    """
    Read from an iterator in a thread of its own, so that a slow disk or network does not hold up the caller.

    Args:
        items: to read from.
        begin: applied to each item in that thread.
        ahead: how many items may lie ready.
    """
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(ahead)
    stop = threading.Event()

    def put(entry: tuple[str, Any]) -> bool:
        while not stop.is_set():
            try:
                ready.put(entry, timeout=0.2)
            except queue.Full:
                continue
            return True
        return False

    def read() -> None:
        try:
            for item in items:
                if not put(("item", begin(item))):
                    return
            put(("end", None))
        except BaseException as error:
            put(("error", error))

    def results() -> Iterator[Any]:
        while True:
            kind, value = ready.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value

    # A daemon: a read that hangs must not keep the process from ending
    thread = threading.Thread(target=read, name="reader", daemon=True)
    thread.start()
    try:
        yield results()
    finally:
        stop.set()


# The folder


def _part_file(output: Path, block: int) -> Path:
    return output / f"part-{block:06d}.parquet"


def _part_files(output: Path) -> list[Path]:
    return sorted(output.glob("part-*.parquet"))


def _rows_in(output: Path, block: int) -> int:
    """Rows of a block's file; 0 where there is none, or a damaged one that has to be made anew."""
    path = _part_file(output, block)
    counts = _counts(path) if path.exists() else None
    return 0 if counts is None else counts[0]


def _counts(path: Path) -> tuple[int, int] | None:
    """Rows of a part file and how many have an error, from its footer alone; None if it cannot be read."""
    try:
        with pq.ParquetFile(path) as file:
            metadata = file.metadata
    except (OSError, ValueError):
        # pyarrow's own errors are ValueErrors
        return None
    paths = [metadata.schema.column(index).path for index in range(metadata.num_columns)]
    if ERROR not in paths:
        return None
    groups = [metadata.row_group(group).column(paths.index(ERROR)) for group in range(metadata.num_row_groups)]
    return metadata.num_rows, sum(group.num_values - group.statistics.null_count for group in groups)


def _remove_leftovers(output: Path, part: Part) -> None:
    """Delete what killed runs left of this process's own blocks; the others' may be at work."""
    for path in output.glob("part-*.parquet.unfinished-*"):
        number = path.name.removeprefix("part-").partition(".")[0]
        if number.isdigit() and part.owns(int(number)):
            path.unlink(missing_ok=True)


def identity(labeler: Labeler, rows: Dataset | IterableDataset, options: Options) -> dict[str, Any]:
    """
    What makes a run this one, each entry a short text: two runs with the same entries write the same rows.

    The batch size and the number of processes are left out: they change nothing but rounding.
    """
    config = {name: value for name, value in labeler.model.config.to_dict().items() if name not in _VOLATILE}
    images = labeler.processor.image_processor.to_dict()
    return {
        "model": _digest_weights(labeler.model),
        "config": _digest(_without_volatile(config)),
        "image_processor": _digest(_without_volatile(images)),
        "templates": _digest(list(labeler.templates)),
        "labels": _digest([list(labeler.labels), labeler.own_labels, len(labeler.class_embeds)]),
        "dataset": _digest_rows(rows),
        "shard_size": str(options.shard_size),
        "columns": ", ".join(result_features(rows.features, options)),
    }


def _claim(output: Path, run: dict[str, Any], labeler: Labeler, about: dict[str, Any]) -> None:
    """
    Make a folder this run's own.

    Raises:
        ValueError: it is another run's.
    """
    path = output / RUN_FILE
    if path.is_file():
        found = _read_run(path)
        different = [name for name in run if found.get(name) != run[name]]
        if different:
            raise ValueError(
                f"{output} holds the results of another run (other {' and '.join(different)}): choose another folder, "
                "or run it with the options that it was begun with."
            )
        return
    if _part_files(output):
        raise ValueError(f"{output} holds part files but no {RUN_FILE}, which says of what: choose another folder.")
    if output.is_dir():
        for leftover in (RUN_FILE, ID2LABEL_FILE, "README.md"):
            for unfinished in output.glob(f"{leftover}.unfinished-*"):
                unfinished.unlink(missing_ok=True)
    write_json(output / ID2LABEL_FILE, {str(index): label for index, label in enumerate(labeler.labels)})
    write_text(output / "README.md", _CARD.format(labels="\n".join(f"- {label}" for label in labeler.labels)))
    write_json(path, {**about, "labels": list(labeler.labels), "compared": run})


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


def _read_run(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["compared"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({_one_line(error)}): choose another folder.") from error


def _without_volatile(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _without_volatile(entry) for name, entry in value.items() if name not in _VOLATILE}
    return [_without_volatile(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _digest_weights(model: torch.nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _digest_rows(rows: Dataset | IterableDataset) -> str:
    """Of the number of rows and of some images, which is the same wherever the data set lies."""
    if isinstance(rows, Dataset):
        length = len(rows)
        numbers = sorted({round(step * (length - 1) / (_SAMPLED_ROWS - 1)) for step in range(_SAMPLED_ROWS)})
        sample = [rows[number][IMAGE] for number in numbers]
    else:
        length, sample = -1, [row[IMAGE] for row in rows.take(2)]
    digest = hashlib.blake2b(f"{length}".encode(), digest_size=16)
    for value in sample:
        if isinstance(value, Mapping):
            # An image that cannot be read is no reason not to begin
            name = value.get("path") or ""
            digest.update(value.get("bytes") or Path(name).name.encode())
        else:
            digest.update(repr(value)[:1000].encode())
    return digest.hexdigest()


__all__ = [
    "RUN_FILE",
    "Labeler",
    "Options",
    "Part",
    "Report",
    "identity",
    "open_rows",
    "result_features",
    "segment_dataset",
]
