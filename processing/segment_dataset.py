"""
Labels a whole data set: images in, parquet files with label maps out.

The data set is cut into shards of `shard_size` consecutive rows. Shard 7 becomes the file `part-000007.parquet`, which
appears complete or not at all, and a shard whose file is there is done. So a run that was killed at any moment goes on
where it was. Images share a batch with others of their shard only: who labels a shard changes nothing in the result.

One process labels the shards in turn, with what `datasets` opens:

    segmenter = Segmenter(model, processor)
    segment_dataset(segmenter, segmenter.vocabulary("sky, road"), rows, "labelled")

Several GPUs or machines share them out with Ray Data, see `segment_dataset_with_ray`. Every actor of a pool holds one
model, opens the data set itself, and writes part files of its own, as the one process does. So a shard whose actor
died is labelled by another one, and after the death of everything the same call goes on. The source of the images and
the output folder have to be the same path (or Hub id) on all machines.

The result is a data set: `datasets.load_dataset(folder)` reads it, and so do training and evaluation if the images
are stored with it.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset, Features, IterableDataset, Value
from datasets import Image as ImageFeature
from PIL import Image
from tqdm import tqdm

from .files import replacing_file, write_json, write_text
from .images_san import load_image, open_image
from .wording_san import one_line

if TYPE_CHECKING:
    from .segmenter import PreparedImages, Segmentation, Segmenter, Vocabulary

RUN_FILE = "run.json"
"""What a folder holds the results of."""

ID2LABEL_FILE = "id2label.json"
CARD_FILE = "README.md"

ROW, IMAGE, ANNOTATION, SCORES, SEGMENTS, ERROR = "row", "image", "annotation", "scores", "segments", "error"
"""Columns of the part files."""

_BYTE_LABELS = 255
"""Up to so many labels a map has 8 bits; 255 stays free for "no label"."""

_BATCHES_AT_ONCE = 4
"""Images of so many batches are sorted by their padded size."""

_RAY_TASKS = 10_000
_OUR_UNFINISHED = re.compile(r"(part-\d{6,}\.parquet|run\.json|id2label\.json|README\.md)\.unfinished-[0-9a-f]{8}")
_VOLATILE = {"_name_or_path", "architectures", "auto_map", "custom_pipelines", "dtype", "transformers_version"}
"""Entries of a config that say nothing about what the model computes."""


@dataclass(frozen=True)
class Options:
    """
    What goes into the part files, and how.

    Attributes:
        image_column: of the data set, where the images are: encoded files, paths, or what `datasets` decodes.
        keep_columns: of the data set, to store as well.
        with_images: store the images, encoded as they came.
        with_scores: store a map of the winning scores in thousandths, of 16 bits.
        shard_size: rows of a part file.
        batch_size: images that the model sees at once.
        strict: end at the first image that cannot be read.
        workers: threads that read and decode images and encode label maps; by default one for each core, 16 at most.
    """

    image_column: str = IMAGE
    keep_columns: tuple[str, ...] = ()
    with_images: bool = False
    with_scores: bool = False
    shard_size: int = 256
    batch_size: int = 8
    strict: bool = False
    workers: int | None = None

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense, and columns that would sit on those of the result."""
        for name in ("shard_size", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: pass a whole number of at least 1")
        taken = {ROW, IMAGE, ANNOTATION, SCORES, SEGMENTS, ERROR, self.image_column}
        if reserved := [name for name in self.keep_columns if name in taken]:
            raise ValueError(
                f"column {reserved[0]!r} cannot be kept: it holds the images (store them with the results), or the "
                "result has a column of that name (rename it)"
            )


@dataclass(frozen=True)
class Report:
    """
    What a run did, and what its folder holds.

    Attributes:
        images: rows written in this run.
        failures: those among them whose image could not be read.
        first_error: of these.
        seconds: that the run took.
        parts: part files in the folder, of all runs.
        expected_parts: how many there have to be; None for a stream.
        total: rows in them.
        total_failures: those among them whose image could not be read.
    """

    images: int
    failures: int
    first_error: str | None
    seconds: float
    parts: int
    expected_parts: int | None
    total: int
    total_failures: int


def segment_dataset(
    segmenter: Segmenter,
    vocabulary: Vocabulary,
    rows: Dataset | IterableDataset,
    output: str | os.PathLike,
    options: Options | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Report:
    """
    Label a data set in this process, or what of it is not labelled yet.

    Args:
        segmenter: labels the images.
        vocabulary: that it chooses from.
        rows: a data set with a column of images; of a stream nothing but a shard is in memory.
        output: folder for the part files; one that holds a part of the same run is continued.
        options: what to write.
        settings: what else decides the results, such as prompt templates: a folder begun with others is refused.
        about: what else `run.json` should say, for people.
        progress: whether to show a bar.

    Raises:
        ValueError: the folder holds something else, there is no such column, or (strict) an image cannot be read.
        OSError: a file cannot be written. What was written stays, and the next run goes on from there.
    """
    start, options, output = time.perf_counter(), options or Options(), Path(output)
    rows = _encoded(rows, options)
    _claim(output, vocabulary, _fingerprint(segmenter, vocabulary, rows, options, settings or {}), about or {})
    with _bar(rows, output, options, progress) as bar:
        labeler = ShardLabeler(segmenter, vocabulary, rows.features, output, options, bar.update)
        written = list(labeler.run(_open_shards(rows, output, options)))
    return _report(written, start, rows, output, options)


def segment_dataset_with_ray(
    load: Callable[[str | None], tuple[Segmenter, Vocabulary]],
    open_rows: Callable[[], Dataset | IterableDataset],
    output: str | os.PathLike,
    options: Options | None = None,
    *,
    address: str | None = None,
    actors: int | None = None,
    settings: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Report:
    """
    Label a data set with all GPUs of a Ray cluster, or its CPUs where it has none: the same files as without Ray.

    A data set of known length is opened by each actor, which reads the rows of its shards. A stream is read by one
    task, which sends shards to the actors as they take them.

    Args:
        load: makes the segmenter and its vocabulary on a device, None standing for the best there is. It is called
            with "cpu" here, and with None in every actor.
        open_rows: opens the data set.
        output: folder for the part files, which all machines share.
        options: as for `segment_dataset`.
        address: of a running cluster, as `ray.init` takes it; None takes the one at hand, or starts one of this
            machine.
        actors: how many models; by default one for each GPU, or one for each machine.
        settings: as for `segment_dataset`.
        about: as for `segment_dataset`.
        progress: whether to show a bar.

    Raises:
        ImportError: Ray is not installed.
        ValueError: as for `segment_dataset`.
        OSError: as for `segment_dataset`, or files are missing since the machines do not share the folder.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError('Ray is not installed: pip install "modeling-san[ray]"') from error
    start, options, output = time.perf_counter(), options or Options(), Path(output).absolute()
    segmenter, vocabulary = load("cpu")
    rows = _encoded(open_rows(), options)
    _claim(output, vocabulary, _fingerprint(segmenter, vocabulary, rows, options, settings or {}), about or {})
    written = []
    with ExitStack() as stack:
        if address is not None or not ray.is_initialized():
            ray.init(address, include_dashboard=False, log_to_driver=False, logging_level="warning")
            stack.callback(ray.shutdown)
        bar = stack.enter_context(_bar(rows, output, options, progress))
        for outcome in _ray_outcomes(ray, _RayLabeler(load, open_rows, output, options), rows, actors):
            if outcome["stopped"]:
                raise OSError(outcome["stopped"])
            written.append(Written(outcome["images"], outcome["failures"], outcome["first_error"]))
            bar.update(outcome["images"])
    report = _report(written, start, rows, output, options)
    if report.expected_parts is not None and report.parts < report.expected_parts:
        raise OSError(
            f"{output} holds {report.parts:,} of {report.expected_parts:,} part files: it has to be a folder that all "
            "machines of the cluster share"
        )
    return report


# Shards


@dataclass(frozen=True)
class Shard:
    """
    Rows that become one part file.

    Attributes:
        index: of the shard, from 0 on.
        rows: of the data set, images encoded.
    """

    index: int
    rows: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Written:
    """
    What a new part file holds.

    Attributes:
        images: its rows.
        failures: those among them whose image could not be read.
        first_error: of these.
    """

    images: int
    failures: int
    first_error: str | None


def _encoded(rows: Any, options: Options) -> Any:
    """The columns that are needed, with images encoded, so that what is passed over costs nothing."""
    if rows.features is None:
        return rows
    wanted = [options.image_column, *dict.fromkeys(options.keep_columns)]
    if missing := [name for name in wanted if name not in rows.features]:
        raise ValueError(f"the data set has no column {missing[0]!r}, but {', '.join(rows.features)}")
    rows = rows.select_columns(wanted)
    for name, feature in rows.features.items():
        if isinstance(feature, ImageFeature) or (name == options.image_column and isinstance(feature, Value)):
            rows = rows.cast_column(name, ImageFeature(decode=False))
    return rows


def _shard_count(rows: Any, options: Options) -> int | None:
    return -(-len(rows) // options.shard_size) if isinstance(rows, Dataset) else None


def _read_shard(rows: Dataset, index: int, size: int) -> Shard:
    columns = rows[index * size : (index + 1) * size]
    return Shard(index, [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)])


def _open_shards(rows: Any, output: Path, options: Options) -> Iterator[Shard]:
    """The shards that have no part file yet; of a stream the finished ones pass by."""
    size = options.shard_size
    if isinstance(rows, Dataset):
        yield from (_read_shard(rows, index, size) for index in _open_indices(rows, output, options))
        return
    stream = iter(rows)
    for index in itertools.count():
        shard = Shard(index, list(itertools.islice(stream, size)))
        if not shard.rows:
            return
        if _rows_in(_part_file(output, index)) != len(shard.rows):
            yield shard


def _open_indices(rows: Dataset, output: Path, options: Options) -> list[int]:
    size = options.shard_size
    shards = range(-(-len(rows) // size))
    return [i for i in shards if _rows_in(_part_file(output, i)) != min(size, len(rows) - i * size)]


@dataclass(frozen=True)
class _Image:
    """A row whose image was read: prepared for the model, or with the reason why it cannot be."""

    number: int
    values: Mapping[str, Any]
    prepared: PreparedImages | None = None
    encoded: bytes | None = None
    error: str | None = None


class ShardLabeler:
    """
    Labels shards and writes their part files. The model computes in the caller's thread, all else in others.

    Args:
        segmenter: labels the images.
        vocabulary: that it chooses from.
        features: of the data set.
        output: folder for the part files.
        options: what to write.
        progress: called with the number of images that were labelled since it was called last.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        vocabulary: Vocabulary,
        features: Mapping[str, Any] | None,
        output: Path,
        options: Options,
        progress: Callable[[int], Any] = lambda images: None,
    ) -> None:
        self.segmenter = segmenter
        self.vocabulary = vocabulary
        self.features = result_features(features, options)
        self.output = output
        self.options = options
        self.progress = progress
        self.map_type = np.uint8 if len(vocabulary.shown_labels) <= _BYTE_LABELS else np.uint16

    def run(self, shards: Iterable[Shard]) -> Iterator[Written]:
        """
        Label shards; what is complete reaches the disk whatever ends the run.

        Raises:
            OSError: a file cannot be written.
            ValueError: with `strict`, for the first unreadable image.
        """
        with ExitStack() as stack:
            # They stop in the opposite order: the writer waits for rows that the pool encodes
            pool = ThreadPoolExecutor(self.options.workers or min(16, os.cpu_count() or 1), "image")
            stack.callback(pool.shutdown, cancel_futures=True)
            writer = ThreadPoolExecutor(1, "writer")
            stack.callback(writer.shutdown)
            reader = ThreadPoolExecutor(1, "reader")
            stack.callback(reader.shutdown, cancel_futures=True)

            windows = self._begin_windows(shards, pool)
            upcoming = reader.submit(next, windows, None)
            rows: list[Future[dict[str, Any]]] = []
            written: Future[Written] | None = None
            while (window := upcoming.result()) is not None:
                # The next images are read and decoded, and the last ones encoded, while the model computes
                upcoming = reader.submit(next, windows, None)
                index, images, is_last = window
                labelled = self._label([image.result() for image in images], pool)
                wait(rows)
                rows += labelled
                self.progress(len(labelled))
                if is_last:
                    if written is not None:
                        yield written.result()
                    written, rows = writer.submit(self._write, index, rows), []
            if written is not None:
                yield written.result()

    def _begin_windows(
        self, shards: Iterable[Shard], pool: ThreadPoolExecutor
    ) -> Iterator[tuple[int, list[Future[_Image]], bool]]:
        """Begin to read the images of a few batches; the index of their shard, the images, and whether it ends."""
        size = _BATCHES_AT_ONCE * self.options.batch_size
        for shard in shards:
            first = shard.index * self.options.shard_size
            for start in range(0, len(shard.rows), size):
                rows = enumerate(shard.rows[start : start + size], first + start)
                images = [pool.submit(self._read, number, values) for number, values in rows]
                yield shard.index, images, start + size >= len(shard.rows)

    def _read(self, number: int, values: Mapping[str, Any]) -> _Image:
        try:
            encoded, image = _open(values.get(self.options.image_column))
            if self.options.with_images and encoded is None:
                encoded = _png(np.asarray(image))
            return _Image(number, values, self.segmenter.prepare(image), encoded if self.options.with_images else None)
        except Exception as error:
            # Decoders of damaged files raise what they please
            return _Image(number, values, error=one_line(error)[:300])

    def _label(self, images: Sequence[_Image], pool: ThreadPoolExecutor) -> list[Future[dict[str, Any]]]:
        """Rows of the part file, on their way."""
        rows: dict[int, Future[dict[str, Any]]] = {}
        alike = defaultdict(list)
        for image in images:
            if image.prepared is not None:
                alike[image.prepared.pixel_values.shape].append(image)
            elif self.options.strict:
                raise ValueError(f"row {image.number}: {image.error}")
            else:
                rows[image.number] = pool.submit(self._row, image, None)
        for group in alike.values():
            for start in range(0, len(group), self.options.batch_size):
                batch = group[start : start + self.options.batch_size]
                for image, segmentation in zip(batch, self._segment(batch), strict=True):
                    rows[image.number] = pool.submit(self._row, image, segmentation)
        return [rows[image.number] for image in images]

    def _segment(self, batch: Sequence[_Image]) -> list[Segmentation]:
        """Label images of one padded size; one by one where the memory does not hold them all."""
        try:
            return self.segmenter.segment([image.prepared for image in batch if image.prepared], self.vocabulary)
        except (MemoryError, RuntimeError) as error:
            # On the CPU PyTorch has no type of its own for it
            if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
                raise
            if len(batch) == 1:
                raise ValueError(
                    f"row {batch[0].number}: the image does not fit into the memory of "
                    f"{self.segmenter.model.device}: free some of it, or compute on the CPU"
                ) from error
        torch.cuda.empty_cache()
        return [segmentation for image in batch for segmentation in self._segment([image])]

    def _row(self, image: _Image, segmentation: Segmentation | None) -> dict[str, Any]:
        """A row of a part file; without a segmentation that of an image that cannot be read."""
        row = {name: _without_path(image.values[name]) for name in self.options.keep_columns}
        row |= {ROW: image.number, IMAGE: _file(image.encoded), ANNOTATION: None, SCORES: None, SEGMENTS: []}
        row[ERROR] = image.error
        if segmentation is not None:
            row[ANNOTATION] = _file(_png(segmentation.label_map.numpy().astype(self.map_type)))
            row[SEGMENTS] = [
                {"label": part.label, "index": part.index, "area": part.area, "mean_score": part.score}
                for part in segmentation.segments()
            ]
            if self.options.with_scores:
                # A score sums what all queries say of a pixel, and may be above 1
                thousandths = np.rint(segmentation.scores.numpy() * 1000).clip(0, 65535).astype(np.uint16)
                row[SCORES] = _file(_png(thousandths))
        return {name: row[name] for name in self.features}

    def _write(self, index: int, futures: Sequence[Future[dict[str, Any]]]) -> Written:
        rows = [future.result() for future in futures]
        path = _part_file(self.output, index)
        try:
            with replacing_file(path) as beside:
                pq.write_table(Dataset.from_list(rows, features=self.features).data.table, beside)
        except OSError as error:
            # The reason may be a number only, or a sentence of pyarrow's that names the file beside
            reason = os.strerror(error.errno) if error.errno else one_line(error)
            raise OSError(
                f"{path} cannot be written ({reason}): what is done stays; make room or choose another disk, and run "
                "the same command again to go on"
            ) from error
        errors = [f"row {row[ROW]}: {row[ERROR]}" for row in rows if row[ERROR] is not None]
        return Written(len(rows), len(errors), errors[0] if errors else None)


def result_features(features: Mapping[str, Any] | None, options: Options) -> Features:
    """Columns of the part files; `features` are those of the data set."""
    segment = {"label": Value("string"), "index": Value("int32"), "area": Value("float32")}
    columns: dict[str, Any] = {ROW: Value("int64"), **{name: (features or {})[name] for name in options.keep_columns}}
    columns |= {IMAGE: ImageFeature()} if options.with_images else {}
    columns |= {ANNOTATION: ImageFeature()} | ({SCORES: ImageFeature()} if options.with_scores else {})
    columns |= {SEGMENTS: [segment | {"mean_score": Value("float32")}], ERROR: Value("string")}
    decoded = {name: ImageFeature() if isinstance(kind, ImageFeature) else kind for name, kind in columns.items()}
    return Features(decoded)


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
        # PIL refuses images from twice as many pixels only, which take gigabytes
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and image.width * image.height > limit:
            raise ValueError(f"the image has {image.width} x {image.height} pixels, more than the {limit:,} allowed")
        return value, load_image(image, "the image")


def _png(pixels: np.ndarray) -> bytes:
    """An array of 8 or 16 bits as a PNG file, without loss."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _file(encoded: bytes | None) -> dict[str, Any] | None:
    return None if encoded is None else {"bytes": encoded, "path": None}


def _without_path(value: Any) -> Any:
    """An encoded file without its path, which `datasets` would store in place of the content."""
    is_file = isinstance(value, Mapping) and set(value) == {"bytes", "path"} and value["bytes"] is not None
    return _file(value["bytes"]) if is_file else value


# Ray


class _RayLabeler:
    """What an actor of the pool runs; the model is loaded with its first shard."""

    def __init__(self, load: Callable, open_rows: Callable, output: Path, options: Options) -> None:
        self.load, self.open_rows, self.output, self.options = load, open_rows, output, options
        self.labeler: ShardLabeler | None = None

    def read_stream(self, batch: Any) -> Iterator[dict[str, Any]]:
        """The shards of a stream that have no part file yet, each as one row, so that blocks do not cut them."""
        rows = _encoded(self.open_rows(), self.options)
        for shard in _open_shards(rows, self.output, self.options):
            table = Dataset.from_list(list(shard.rows), features=rows.features).data.table
            sink = io.BytesIO()
            with pa.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(table)
            yield {"index": [shard.index], "rows": np.array([sink.getvalue()], dtype=object)}

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Label one shard. What the user has to mend comes back as a sentence, in place of Ray's pages."""
        images, failures, first_error, stopped = 0, 0, None, None
        try:
            if self.labeler is None:
                self.rows = _encoded(self.open_rows(), self.options)
                self.labeler = ShardLabeler(*self.load(None), self.rows.features, self.output, self.options)
            index = int(batch["index"][0])
            if "rows" in batch:
                shard = Shard(index, pa.ipc.open_stream(batch["rows"][0]).read_all().to_pylist())
            else:
                shard = _read_shard(self.rows, index, self.options.shard_size)
            # Ray asks again where it does not know whether an actor that died was done
            if _rows_in(_part_file(self.output, index)) != len(shard.rows):
                [written] = self.labeler.run([shard])
                images, failures, first_error = written.images, written.failures, written.first_error
        except (OSError, ValueError) as error:
            stopped = str(error)
        outcome = {"images": images, "failures": failures, "first_error": first_error, "stopped": stopped}
        return {name: [value] for name, value in outcome.items()}


def _ray_outcomes(ray: Any, labeler: _RayLabeler, rows: Any, actors: int | None) -> Iterator[dict[str, Any]]:
    """What the actors return of each shard."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    actors = actors or gpus or len(nodes)
    # Ray gives an actor as many threads as CPUs
    shares = min(min(node["CPU"] for node in nodes), sum(node["CPU"] for node in nodes) // actors)
    needs = {"num_gpus": 1} if gpus else {"num_cpus": max(1, int(shares))}
    if isinstance(rows, Dataset):
        indices = _open_indices(rows, labeler.output, labeler.options)
        if not indices:
            return
        items = [{"index": index} for index in indices]
        shards = ray.data.from_items(items, override_num_blocks=min(len(items), _RAY_TASKS))
    else:
        # With needs of its own, so that Ray does not put it into an actor
        shards = ray.data.from_items([{"index": 0}]).map_batches(labeler.read_stream, num_cpus=0)
    outcomes = shards.map_batches(
        _RayLabeler,
        fn_constructor_args=(labeler.load, labeler.open_rows, labeler.output, labeler.options),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=actors),
        **needs,
    )
    yield from outcomes.iter_rows()


# The folder


def _part_file(output: Path, index: int) -> Path:
    return output / f"part-{index:06d}.parquet"


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


def _rows_in(path: Path) -> int:
    """Rows of a part file; 0 where there is none, or a damaged one that has to be made anew."""
    return (_counts(path) or (0, 0))[0]


def _bar(rows: Any, output: Path, options: Options, progress: bool) -> tqdm:
    done = 0
    if isinstance(rows, Dataset):
        size = options.shard_size
        done = len(rows) - sum(min(size, len(rows) - i * size) for i in _open_indices(rows, output, options))
    total = len(rows) if isinstance(rows, Dataset) else None
    return tqdm(desc="segmenting", total=total, initial=done, unit="image", disable=not progress, smoothing=0.05)


def _report(written: Sequence[Written], start: float, rows: Any, output: Path, options: Options) -> Report:
    counts = [count for count in map(_counts, output.glob("part-*.parquet")) if count is not None]
    return Report(
        images=sum(part.images for part in written),
        failures=sum(part.failures for part in written),
        first_error=next((part.first_error for part in written if part.first_error), None),
        seconds=time.perf_counter() - start,
        parts=len(counts),
        expected_parts=_shard_count(rows, options),
        total=sum(images for images, _ in counts),
        total_failures=sum(failures for _, failures in counts),
    )


def _claim(output: Path, vocabulary: Vocabulary, run: Mapping[str, str], about: Mapping[str, Any]) -> None:
    """
    Make a folder this run's own.

    Raises:
        ValueError: it is another run's, or holds files of unknown origin where this one would write.
    """
    path = output / RUN_FILE
    labels = vocabulary.shown_labels
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
    else:
        ours = [*output.glob("part-*.parquet"), output / ID2LABEL_FILE, output / CARD_FILE]
        if taken := [file.name for file in ours if file.exists()]:
            raise ValueError(f"{output} holds {taken[0]} but no {RUN_FILE}, which says of what: choose another folder")
        # First: what is there besides is this run's own
        write_json(path, {**about, "labels": list(labels), "compared": dict(run)})
    for leftover in output.iterdir():
        if _OUR_UNFINISHED.fullmatch(leftover.name):
            leftover.unlink(missing_ok=True)
    if not (output / ID2LABEL_FILE).exists():
        write_json(output / ID2LABEL_FILE, {str(index): label for index, label in enumerate(labels)})
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


def _fingerprint(
    segmenter: Segmenter, vocabulary: Vocabulary, rows: Any, options: Options, settings: Mapping[str, Any]
) -> dict[str, str]:
    """
    What makes a run this one, each entry a short text: two runs with the same entries write the same rows.

    The batch size and the device are left out: they change nothing but rounding.
    """
    weights = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(segmenter.model.state_dict().items()):
        weights.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    configs = [
        json.loads(config.to_json_string(), object_hook=lambda entry: {k: v for k, v in entry.items() if k not in _VOLATILE})
        for config in (segmenter.model.config, segmenter.processor.image_processor)
    ]
    if isinstance(rows, Dataset):
        length, sample = len(rows), [rows[len(rows) * step // 8] for step in range(8 if len(rows) else 0)]
    else:
        length, sample = None, list(rows.take(2))
    return {
        "model": _digest([weights.hexdigest(), configs]),
        "labels": _digest([vocabulary.labels, vocabulary.num_own, vocabulary.shown_labels]),
        "dataset": _digest([length, [_describe(row.get(options.image_column)) for row in sample]]),
        "shard_size": str(options.shard_size),
        "columns": ", ".join(result_features(rows.features, options)),
        **{name: _digest(value) for name, value in settings.items()},
    }


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _describe(value: Any) -> str:
    """The content of an image, or its name: the same wherever the data set lies."""
    if isinstance(value, Mapping):
        content = value.get("bytes")
        return hashlib.blake2b(content).hexdigest() if content else Path(value.get("path") or "").name
    return repr(value)[:1000]


__all__ = [
    "RUN_FILE",
    "Options",
    "Report",
    "Shard",
    "ShardLabeler",
    "Written",
    "result_features",
    "segment_dataset",
    "segment_dataset_with_ray",
]
