"""Official benchmark folders turned into parquet shards that `datasets` reads."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features
from datasets import Image as ImageFeature
from PIL import Image
from tqdm import tqdm

from modeling_san.processing.files import remove_unfinished, replacing_file, write_json, write_text
from modeling_san.processing.wording_san import listed, one_line
from modeling_san.training.official_files import (
    FoundSplit,
    LabelReader,
    MissingFolderError,
    Pair,
    UnreadableFileError,
    find_files,
)
from modeling_san.training.presets import Preset, load_preset

IMAGES_PER_SHARD = 2000
"""About 400 MB of COCO's or ADE20K's images."""

# Readers of data sets pass hidden folders over: nobody trains on a half of a split.
_WORK = ".unfinished"
_RECORD = "prepared.json"
_Row = dict[str, dict[str, Any]]
_FEATURES = Features(image=ImageFeature(), annotation=ImageFeature())
_ROW_GROUP_BYTES = 32 * 2**20
_WAITING_PER_WORKER = 4
_EXIF_ORIENTATION = 0x0112
# How a label map is turned as its image is, by the image's EXIF orientation.
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda labels: labels[:, ::-1],
    3: lambda labels: labels[::-1, ::-1],
    4: lambda labels: labels[::-1],
    5: lambda labels: labels.T,
    6: lambda labels: np.rot90(labels, -1),
    7: lambda labels: labels[::-1, ::-1].T,
    8: np.rot90,
}


@dataclass(frozen=True)
class PreparedSplit:
    """
    What became of one split.

    Attributes:
        images: how many the shards hold.
        shards: number of parquet files.
        skipped: files that could not be used, each with the reason.
        layout: which release was read and how its values were.
        plan: fingerprint of the images' names and their division into shards.
    """

    images: int
    shards: int
    skipped: tuple[str, ...]
    layout: str
    plan: str


def prepare(
    preset: str | Preset,
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    split: str = "all",
    workers: int | None = None,
    images_per_shard: int = IMAGES_PER_SHARD,
    allow_incomplete: bool = False,
    skip_unreadable: bool = False,
    progress: bool = True,
    warn: Callable[[str], object] = warnings.warn,
) -> dict[str, PreparedSplit]:
    """
    Turn an official folder into parquet shards with the columns `image` and `annotation`.

    Images are copied byte for byte; label maps become PNG files of class indices in full size, of 8 bits where the
    ignore label is 255 and of 16 where it is 65535. Beside the shards come `README.md`, `id2label.json` and
    `label_set.json`. A run that was cut off goes on where it stopped when it is started again with the same arguments:
    until a split is complete, its finished shards wait in the hidden folder `.unfinished`.

    Args:
        preset: name of a label set, such as "ade20k_150".
        source: folder into which the official archives were unpacked.
        output: folder to write; empty, missing, or begun by the same preset.
        split: "train", "validation", "train_aug" (VOC's) or "all", which is the first two.
        workers: threads that read and encode; None takes one for each core, at most 8.
        images_per_shard: how many images a parquet file holds.
        allow_incomplete: go on, with a warning, where the number of images is not the official one.
        skip_unreadable: leave out, and count, damaged files and label maps of another size than their image.
        progress: show a progress bar.
        warn: takes what should be known before hours of work are over.

    Returns:
        what became of each split.

    Raises:
        ValueError: the source is not what the preset expects, files are damaged or missing, or `output` holds
            something else; the message says what to do. Finished shards stay.
        OSError: it cannot be written, for example because the disk is full. Finished shards stay.
    """
    preset = load_preset(preset) if isinstance(preset, str) else preset
    source, output = Path(source), Path(output)
    if images_per_shard < 1 or (workers is not None and workers < 1):
        raise ValueError(f"images_per_shard is {images_per_shard} and workers {workers}: both have to be at least 1.")
    found = _find(preset, source, _splits(preset, split), allow_incomplete, warn)
    _check_counts(preset, found, allow_incomplete, warn)
    workers = workers or min(8, os.cpu_count() or 1)
    try:
        with _claimed(output, preset) as record, ThreadPoolExecutor(workers) as pool:
            for name, files in found.items():
                writer = _SplitWriter(
                    output,
                    name,
                    files,
                    pool,
                    workers * _WAITING_PER_WORKER,
                    images_per_shard,
                    skip_unreadable,
                    progress,
                )
                record[name] = writer.write(record.get(name))
                _write_record(output, preset, record)
            _write_card(output, preset, record)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            f"no space is left on the disk of {output}: finished shards stay; make room and run the same command "
            "again."
        ) from error
    for name in found:
        if record[name].skipped:
            warn(f"{name}: skipped {len(record[name].skipped)}: {listed(record[name].skipped)}")
    return {name: record[name] for name in found}


class _SplitWriter:
    """Writes the shards of one split into the hidden folder, and moves them to their place when all are there."""

    def __init__(
        self,
        output: Path,
        split: str,
        files: FoundSplit,
        pool: ThreadPoolExecutor,
        waiting: int,
        images_per_shard: int,
        skip_unreadable: bool,
        progress: bool,
    ) -> None:
        self.output = output
        self.split = split
        self.files = files
        self.pool = pool
        self.waiting = waiting
        self.skip_unreadable = skip_unreadable
        self.progress = progress
        self.work = output / _WORK / split
        starts = range(0, len(files.pairs), images_per_shard)
        self.parts = [files.pairs[start : start + images_per_shard] for start in starts]
        self.names = [f"{split}-{number:05d}-of-{len(starts):05d}.parquet" for number in range(len(starts))]
        self.plan = _fingerprint(files.pairs, images_per_shard)

    def write(self, before: PreparedSplit | None) -> PreparedSplit:
        """
        Write what is not written yet.

        Args:
            before: what the record says, where the split is complete already.
        """
        if before is not None:
            if before.plan != self.plan:
                raise ValueError(
                    f"{self.output} holds {self.split} already, of other images or other shards ({before.images} "
                    f"images in {before.shards}): pass another folder, or delete this one to start anew."
                )
            if all((self.output / name).is_file() for name in self.names):
                return before
        self._begin()
        total = len(self.files.pairs)
        with tqdm(total=total, desc=self.split, unit=" images", smoothing=0.05, disable=not self.progress) as bar:
            for number, part in enumerate(self.parts):
                if self._rows(number) == len(part) - len(self._skipped(number)):
                    bar.update(len(part))
                    # The speed shown is that of this run
                    bar.initial = bar.n
                else:
                    self._write_shard(number, bar)
        return self._finish()

    def _begin(self) -> None:
        plan = {"plan": self.plan, "images": len(self.files.pairs), "shards": len(self.parts)}
        path = self.work / "plan.json"
        if path.is_file():
            begun = json.loads(path.read_text(encoding="utf-8"))
            if begun != plan:
                raise ValueError(
                    f"{self.output} holds an unfinished run over {begun['images']} images of {self.split} in "
                    f"{begun['shards']} shards, and this one is over {plan['images']} in {plan['shards']} or over "
                    f"others: go on with the same folder and options, or delete {self.work} to start anew."
                )
        remove_unfinished(self.work)
        write_json(path, plan)

    def _rows(self, number: int) -> int:
        """Images in a finished shard, in the hidden folder or in its place already; -1 if there is none."""
        for folder in (self.work, self.output):
            with suppress(pa.ArrowException, OSError):
                return pq.read_metadata(folder / self.names[number]).num_rows
        return -1

    def _skipped_file(self, number: int) -> Path:
        return self.work / f"skipped-{number:05d}.json"

    def _skipped(self, number: int) -> list[str]:
        path = self._skipped_file(number)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []

    def _write_shard(self, number: int, bar: tqdm) -> None:
        skipped: list[str] = []
        schema = _FEATURES.arrow_schema
        # Images are compressed already, and no two are equal.
        options: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_statistics": False}
        with replacing_file(self.work / self.names[number]) as beside:
            with pq.ParquetWriter(beside, schema, **options) as writer:
                for rows in self._row_groups(self.parts[number], skipped, bar):
                    writer.write_table(pa.Table.from_pylist(rows, schema=schema))
            # Before the shard is in its place, so that a shard in its place always has its list.
            write_json(self._skipped_file(number), skipped)

    def _row_groups(self, part: Sequence[Pair], skipped: list[str], bar: tqdm) -> Iterator[list[_Row]]:
        """Rows of `part`, as many together as memory should hold; `skipped` takes what cannot be read."""
        rows: list[_Row] = []
        size = 0
        for row in self._read_in_order(part):
            if isinstance(row, UnreadableFileError):
                if not self.skip_unreadable:
                    raise ValueError(
                        f"{row} Mend it and run the same command again, finished shards stay; or pass "
                        "--skip-unreadable to leave out such images."
                    ) from row
                skipped.append(str(row))
            else:
                rows.append(row)
                size += sum(len(cell["bytes"]) for cell in row.values())
            if size >= _ROW_GROUP_BYTES:
                yield rows
                rows, size = [], 0
            bar.update()
        if rows:
            yield rows

    def _read_in_order(self, part: Sequence[Pair]) -> Iterator[_Row | UnreadableFileError]:
        """Rows of `part`, read by all workers and given out in order; few wait in memory at any time."""
        waiting: deque[Future] = deque()
        try:
            for pair in part:
                waiting.append(self.pool.submit(_try_row, pair, self.files.reader))
                if len(waiting) >= self.waiting:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def _finish(self) -> PreparedSplit:
        """Check the counts and move the shards into their place."""
        numbers = range(len(self.parts))
        skipped = tuple(reason for number in numbers for reason in self._skipped(number))
        rows = sum(map(self._rows, numbers))
        if rows != len(self.files.pairs) - len(skipped):
            raise ValueError(
                f"the shards of {self.split} hold {rows} images where {len(self.files.pairs) - len(skipped)} were "
                f"written: the disk of {self.output} cannot be trusted; delete {self.work} and try another disk."
            )
        for name in self.names:
            if (self.work / name).is_file():
                os.replace(self.work / name, self.output / name)
        return PreparedSplit(
            images=rows, shards=len(self.parts), skipped=skipped, layout=self.files.layout, plan=self.plan
        )


def _try_row(pair: Pair, reader: LabelReader) -> _Row | UnreadableFileError:
    """A row, or why there is none: the caller says what then, after the rows before it."""
    try:
        return _read_row(pair, reader)
    except UnreadableFileError as error:
        return error


def _read_row(pair: Pair, reader: LabelReader) -> _Row:
    """The cells of one image: its file as it is, and its label map as a PNG file."""
    image, (width, height), orientation = _read_image(pair.image)
    labels = reader.read(pair.label_map)
    if orientation in _TURNS and labels.shape == (height, width):
        # Official label maps lie on the stored pixels, and readers turn images upright: turn the label map along.
        labels = _TURNS[orientation](labels)
    elif labels.shape != ((width, height) if orientation >= 5 else (height, width)):
        raise UnreadableFileError(
            f"{pair.label_map} is {labels.shape[1]} x {labels.shape[0]} pixels and its image {width} x {height}."
        )
    encoded = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(labels)).save(encoded, format="PNG")
    return {
        "image": {"bytes": image, "path": pair.image.name},
        "annotation": {"bytes": encoded.getvalue(), "path": f"{pair.image.stem}.png"},
    }


def _read_image(path: Path) -> tuple[bytes, tuple[int, int], int]:
    """An image's file, its stored width and height, and its EXIF orientation; decoded once to see that it can be."""
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
            size = image.size
            orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
            # An eighth of the size goes through all of a JPEG file in half the time.
            image.draft("RGB", (1, 1))
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableFileError(f"{path} cannot be read as an image: {one_line(error)}.") from error
    return content, size, orientation if orientation in _TURNS else 1


def _splits(preset: Preset, split: str) -> tuple[str, ...]:
    if split == "all":
        return ("train", "validation")
    if split not in preset.counts:
        raise ValueError(f"{preset.name} has no split {split!r}: choose one of all, {', '.join(preset.counts)}.")
    return (split,)


def _find(
    preset: Preset, source: Path, splits: Sequence[str], allow_incomplete: bool, warn: Callable[[str], object]
) -> dict[str, FoundSplit]:
    """Files of the splits that are there."""
    found: dict[str, FoundSplit] = {}
    missing: list[str] = []
    for split in splits:
        try:
            files = find_files(preset.name, source, split)
        except MissingFolderError as error:
            missing.append(f"{split}: {error}")
            continue
        if files.pairs:
            found[split] = files
        else:
            missing.append(f"{split}: {source} holds no image with its label map{_unpaired(files)}.")
    if missing and (not found or not allow_incomplete):
        rest = f" To go on with {', '.join(found)} alone, pass --split or --allow-incomplete." if found else ""
        raise ValueError(f"{missing[0]} {preset.name} expects {preset.expected}.{rest}")
    for reason in missing:
        warn(f"left out: {reason}")
    return found


def _check_counts(
    preset: Preset, found: dict[str, FoundSplit], allow_incomplete: bool, warn: Callable[[str], object]
) -> None:
    """Compare the numbers of images with the official ones."""
    complaints = []
    for split, files in found.items():
        official = preset.counts[split]
        unpaired = _unpaired(files)
        if len(files.pairs) not in official or unpaired:
            expected = " or ".join(map(str, official))
            complaints.append(f"{split}: found {len(files.pairs)} of {expected} images with label maps{unpaired}")
    if complaints and not allow_incomplete:
        raise ValueError(
            f"{'. '.join(complaints)}. Is an archive missing or unpacked in part? To go on with what is there, pass "
            "--allow-incomplete."
        )
    for complaint in complaints:
        warn(complaint)


def _unpaired(files: FoundSplit) -> str:
    kinds = (("without label map", files.without_label_map), ("without image", files.without_image))
    return "".join(f"; {len(names)} {kind}: {listed(names)}" for kind, names in kinds if names)


def _fingerprint(pairs: Sequence[Pair], images_per_shard: int) -> str:
    """Tells plans apart by names: a mended file, or a moved source, leaves the plan what it was."""
    digest = hashlib.sha256(f"{images_per_shard}\n".encode())
    for pair in pairs:
        digest.update(os.fsencode(f"{pair.image.name}\t{pair.label_map.name}\n"))
    return digest.hexdigest()


@contextmanager
def _claimed(output: Path, preset: Preset) -> Iterator[dict[str, PreparedSplit]]:
    """
    Hold `output` for this process alone.

    Yields:
        the splits that are complete.

    Raises:
        ValueError: it holds something else, or another process writes there.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file: pass a folder to write to.")
    work, path = output / _WORK, output / _RECORD
    if not work.is_dir() and not path.is_file() and output.is_dir() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty, and not from `san prepare`: pass an empty or a new folder.")
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w", encoding="utf-8") as lock:
        try:
            # The system lets go of the lock however the process ends.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise ValueError(
                f"another process is writing to {output}: wait for it, or pass another folder."
            ) from error
        remove_unfinished(output)
        if not path.is_file():
            _write_record(output, preset, {})
        record = _read_record(path, preset)
        yield record
        shutil.rmtree(work, ignore_errors=True)


def _read_record(path: Path, preset: Preset) -> dict[str, PreparedSplit]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["preset"] != preset.name:
            raise ValueError(f"{path.parent} holds {data['preset']}, not {preset.name}: pass another folder.")
        return {
            name: PreparedSplit(**{**fields, "skipped": tuple(fields["skipped"])})
            for name, fields in data["splits"].items()
        }
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: delete {path.parent} to start anew, or pass another folder.") from error


def _write_record(output: Path, preset: Preset, record: dict[str, PreparedSplit]) -> None:
    splits = {name: asdict(split) for name, split in record.items()}
    write_json(output / _RECORD, {"preset": preset.name, "splits": splits})


def _write_card(output: Path, preset: Preset, record: dict[str, PreparedSplit]) -> None:
    """What describes the data set: for people, for `datasets`, and for other programs."""
    vocabulary = preset.vocabulary
    write_json(output / "id2label.json", {str(index): name for index, name in enumerate(vocabulary.classes)})
    write_json(
        output / "label_set.json", {"classes": list(vocabulary.classes), "ignore_index": vocabulary.ignore_index}
    )
    order = [name for name in preset.counts if name in record]
    files = "".join(f"  - split: {name}\n    path: {name}-*.parquet\n" for name in order)
    rows = "".join(
        f"| {name} | {record[name].images} | {' or '.join(map(str, preset.counts[name]))} | "
        f"{len(record[name].skipped)} | {record[name].layout} |\n"
        for name in order
    )
    write_text(
        output / "README.md",
        f"---\npretty_name: {json.dumps(preset.title)}\ntask_categories:\n- image-segmentation\n"
        f"configs:\n- config_name: default\n  data_files:\n{files}---\n\n"
        f"# {preset.title}\n\n"
        f"The official archives ({preset.homepage}; their terms hold for these files) as parquet files: `image`, the "
        f"original file, and `annotation`, a PNG file of class indices 0 ... {len(vocabulary) - 1}, "
        f"{vocabulary.ignore_index} = no label. Class names: `id2label.json`, or `--labels {preset.name}`.\n\n"
        "| split | images | official number | skipped | label maps read from |\n|---|---|---|---|---|\n"
        f"{rows}\nMade by `san prepare {preset.name}`.\n",
    )


__all__ = ["IMAGES_PER_SHARD", "PreparedSplit", "prepare"]
