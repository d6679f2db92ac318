# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""Official benchmark folders turned into parquet shards that `datasets` reads."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features
from datasets import Image as ImageFeature
from PIL import Image, ImageOps
from tqdm import tqdm

from modeling_san.processing.files import (
    LOCK_FILE,
    locked_folder,
    remove_unfinished,
    replacing_file,
    write_json,
    write_text,
)
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

# Readers of data sets pass hidden folders over: nobody trains on a half of a split.
_WORK = ".unfinished"
# Where a shard says, in the metadata of its schema, what it is a part of
_FACTS = b"san_prepare"
_ROW_GROUP = 128
_EXIF_ORIENTATION = 0x0112
_Row = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class PreparedSplit:
    """
    What became of one split.

    Attributes:
        images: how many the shards hold.
        shards: number of parquet files.
        skipped: how many could not be used.
        layout: which release was read and how its values were.
    """

    images: int
    shards: int
    skipped: int
    layout: str


def prepare(
    preset: str | Preset,
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    split: str = "all",
    workers: int | None = None,
    images_per_shard: int = 2000,
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
        images_per_shard: how many images a parquet file holds; 2000 of COCO's or ADE20K's take about 400 MB.
        allow_incomplete: go on, with a warning, where the number of images is not the official one.
        skip_unreadable: leave out, with a warning, damaged files and label maps of another size than their image.
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
    found = _find(preset, source, split, allow_incomplete, warn)
    try:
        with _claimed(output, preset), ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
            for name, files in found.items():
                read = partial(_read_row, reader=files.reader, warn=warn if skip_unreadable else None)
                with tqdm(total=len(files.pairs), desc=name, unit=" images", disable=not progress) as bar:
                    for path, pairs, facts in _missing_shards(preset, output, name, files, images_per_shard, bar):
                        _write_shard(path, pairs, facts, partial(pool.map, read), bar)
                for path in sorted((output / _WORK / name).glob("*.parquet")):
                    os.replace(path, output / path.name)
            prepared = _prepared_splits(output, preset)
            _write_card(output, preset, prepared)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            f"no space is left on the disk of {output}: finished shards stay; make room and run the same command "
            "again."
        ) from error
    return {name: prepared[name] for name in found}


def _find(
    preset: Preset, source: Path, split: str, allow_incomplete: bool, warn: Callable[[str], object]
) -> dict[str, FoundSplit]:
    """Files of the splits that are there, compared with the official numbers of images."""
    if split != "all" and split not in preset.splits:
        raise ValueError(f"{preset.name} has no split {split!r}: choose one of all, {', '.join(preset.splits)}.")
    found: dict[str, FoundSplit] = {}
    missing: list[str] = []
    odd: list[str] = []
    for name in ("train", "validation") if split == "all" else (split,):
        try:
            files = find_files(preset, source, name)
        except MissingFolderError as error:
            missing.append(f"{name}: {error}")
            continue
        kinds = (("without label map", files.without_label_map), ("without image", files.without_image))
        unpaired = "".join(f"; {len(names)} {kind}: {listed(names)}" for kind, names in kinds if names)
        official = preset.splits[name]["count"]
        if not files.pairs:
            missing.append(f"{name}: {source} holds no image with its label map{unpaired}.")
            continue
        found[name] = files
        if len(files.pairs) not in official or unpaired:
            expected = " or ".join(map(str, official))
            odd.append(f"{name}: found {len(files.pairs)} of {expected} images with label maps{unpaired}")
    if missing and (not found or not allow_incomplete):
        rest = f" To go on with {', '.join(found)} alone, pass --split or --allow-incomplete." if found else ""
        raise ValueError(f"{missing[0]} {preset.name} expects {preset.expected}.{rest}")
    if odd and not allow_incomplete:
        raise ValueError(
            f"{'. '.join(odd)}. Is an archive missing or unpacked in part? To go on with what is there, pass "
            "--allow-incomplete."
        )
    for warning in [*(f"left out: {reason}" for reason in missing), *odd]:
        warn(warning)
    return found


@contextmanager
def _claimed(output: Path, preset: Preset) -> Iterator[None]:
    """
    Hold `output` for this process alone.

    Raises:
        ValueError: it holds something else, or another process writes there.
    """
    with locked_folder(output):
        work = output / _WORK
        shards = list(output.glob("*.parquet"))
        is_new = not work.is_dir() and not shards
        if is_new and any(not path.name.startswith(LOCK_FILE) for path in output.iterdir()):
            raise ValueError(f"{output} is not empty, and not from `san prepare`: pass an empty or a new folder.")
        for path in shards:
            if _facts_of(path).get("preset") != preset.name:
                raise ValueError(f"{path} was not written by `san prepare {preset.name}`: pass another folder.")
        work.mkdir(parents=True, exist_ok=True)
        remove_unfinished(output)
        yield
        # The shards have moved to their place; what else lies there stays
        for folder in (*(work / split for split in preset.splits), work):
            with suppress(OSError):
                folder.rmdir()


def _facts_of(path: Path) -> dict[str, Any]:
    """What `san prepare` wrote into a shard, and its `rows`; nothing where the file is none of its shards."""
    with suppress(pa.ArrowException, OSError, KeyError, TypeError, ValueError):
        metadata = pq.read_metadata(path)
        return {**json.loads(metadata.metadata[_FACTS]), "rows": metadata.num_rows}
    return {}


def _missing_shards(
    preset: Preset, output: Path, split: str, files: FoundSplit, images_per_shard: int, bar: tqdm
) -> Iterator[tuple[Path, Sequence[Pair], dict[str, Any]]]:
    """
    Path, images and facts of each shard of a split that is not there yet.

    Raises:
        ValueError: there are shards of other images, or of another division into shards.
    """
    work = output / _WORK / split
    # Names alone tell plans apart: a mended file, or a moved source, leaves the plan what it was
    plan = "\n".join(f"{pair.image.name}\t{pair.label_map.name}" for pair in files.pairs)
    facts = {
        "preset": preset.name,
        "split": split,
        "layout": files.layout,
        "plan": hashlib.sha256(os.fsencode(f"{images_per_shard}\n{plan}")).hexdigest(),
    }
    finished = {path.name: path for folder in (output, work) for path in folder.glob(f"{split}-*.parquet")}
    for path in finished.values():
        if _facts_of(path).get("plan") != facts["plan"]:
            raise ValueError(
                f"{path} holds other images of {split}, or another number of them, than this run would write: go on "
                f"with the same source and options, pass another folder, or delete {output} to start anew."
            )
    work.mkdir(parents=True, exist_ok=True)
    remove_unfinished(work)
    starts = range(0, len(files.pairs), images_per_shard)
    for number, start in enumerate(starts):
        pairs = files.pairs[start : start + images_per_shard]
        name = f"{split}-{number:05d}-of-{len(starts):05d}.parquet"
        if name in finished:
            bar.update(len(pairs))
            # The speed shown is that of this run
            bar.initial = bar.n
        else:
            yield work / name, pairs, {**facts, "images": len(pairs)}


def _write_shard(
    path: Path,
    pairs: Sequence[Pair],
    facts: dict[str, Any],
    read: Callable[[Sequence[Pair]], Iterator[_Row | None]],
    bar: tqdm,
) -> None:
    """Write one shard, a group of rows at a time, so that few wait in memory."""
    schema = Features(image=ImageFeature(), annotation=ImageFeature()).arrow_schema
    schema = schema.with_metadata({**(schema.metadata or {}), _FACTS: json.dumps(facts).encode()})
    # Images are compressed already, and no two are equal.
    options: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    with replacing_file(path) as beside, pq.ParquetWriter(beside, schema, **options) as writer:
        for start in range(0, len(pairs), _ROW_GROUP):
            group = pairs[start : start + _ROW_GROUP]
            rows = [row for row in read(group) if row is not None]
            if rows:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
            bar.update(len(group))


def _read_row(pair: Pair, reader: LabelReader, warn: Callable[[str], object] | None) -> _Row | None:
    """
    The cells of one image: its file as it is, and its label map as a PNG file.

    Returns:
        the row; None where a file is unreadable and `warn` was told.

    Raises:
        ValueError: a file is unreadable and there is no `warn`, or the label map holds an unknown value.
    """
    try:
        image, (width, height), orientation = _read_image(pair.image)
        label_map = Image.fromarray(reader.read(pair.label_map))
        if label_map.size == (width, height):
            # Official label maps lie on the stored pixels, and readers turn images upright: turn the label map along.
            label_map.getexif()[_EXIF_ORIENTATION] = orientation
            label_map = ImageOps.exif_transpose(label_map)
        elif orientation < 5 or label_map.size != (height, width):
            raise UnreadableFileError(
                f"{pair.label_map} is {label_map.width} x {label_map.height} pixels and its image {width} x {height}."
            )
    except UnreadableFileError as error:
        if warn is None:
            raise ValueError(
                f"{error} Mend it and run the same command again, finished shards stay; or pass --skip-unreadable to "
                "leave out such images."
            ) from error
        warn(f"left out: {error}")
        return None
    encoded = io.BytesIO()
    label_map.save(encoded, format="PNG")
    return {
        "image": {"bytes": image, "path": pair.image.name},
        "annotation": {"bytes": encoded.getvalue(), "path": f"{pair.image.stem}.png"},
    }


def _read_image(path: Path) -> tuple[bytes, tuple[int, int], int]:
    """An image's file, its stored width and height, and its EXIF orientation; decoded once to see that it can be."""
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
            size, orientation = image.size, image.getexif().get(_EXIF_ORIENTATION, 1)
            # An eighth of the size goes through all of a JPEG file in half the time.
            image.draft("RGB", (1, 1))
            image.load()
    # Decoders of damaged files raise what they please
    except Exception as error:
        raise UnreadableFileError(f"{path} cannot be read as an image: {one_line(error)}.") from error
    return content, size, orientation


def _prepared_splits(output: Path, preset: Preset) -> dict[str, PreparedSplit]:
    """The splits whose shards are in their place."""
    prepared = {}
    for split in preset.splits:
        if shards := [_facts_of(path) for path in output.glob(f"{split}-*.parquet")]:
            images = sum(facts["rows"] for facts in shards)
            skipped = sum(facts["images"] for facts in shards) - images
            prepared[split] = PreparedSplit(images, len(shards), skipped, shards[0]["layout"])
    return prepared


def _write_card(output: Path, preset: Preset, prepared: dict[str, PreparedSplit]) -> None:
    """What describes the data set: for people, for `datasets`, and for other programs."""
    classes = preset.vocabulary
    write_json(output / "id2label.json", {str(index): name for index, name in enumerate(classes.classes)})
    write_json(output / "label_set.json", {"classes": list(classes.classes), "ignore_index": classes.ignore_index})
    files = "".join(f"  - split: {name}\n    path: {name}-*.parquet\n" for name in prepared)
    rows = "".join(
        f"| {name} | {split.images} | {' or '.join(map(str, preset.splits[name]['count']))} | {split.skipped} | "
        f"{split.layout} |\n"
        for name, split in prepared.items()
    )
    write_text(
        output / "README.md",
        f"---\npretty_name: {json.dumps(preset.title)}\ntask_categories:\n- image-segmentation\n"
        f"configs:\n- config_name: default\n  data_files:\n{files}---\n\n"
        f"# {preset.title}\n\n"
        f"The official archives ({preset.homepage}; their terms hold for these files) as parquet files: `image`, the "
        f"original file, and `annotation`, a PNG file of class indices 0 ... {len(classes) - 1}, "
        f"{classes.ignore_index} = no label. Class names: `id2label.json`, or `--labels {preset.name}`.\n\n"
        "| split | images | official number | skipped | label maps read from |\n|---|---|---|---|---|\n"
        f"{rows}\nMade by `san prepare {preset.name}`.\n",
    )


__all__ = ["PreparedSplit", "prepare"]
