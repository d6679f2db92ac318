"""Files and folders that appear complete or not at all, whatever happens while they are written."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_UNFINISHED = ".unfinished-"


@contextmanager
def replacing_file(path: str | os.PathLike) -> Iterator[Path]:
    """
    Write a file beside its place and move it there at the end of the block.

    Args:
        path: where the file belongs; its folder is made if it is missing.

    Yields:
        path to write to. If the block fails, what was written is deleted and an older file at `path` stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    try:
        yield beside
        _flush(beside)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    _flush(path.parent)


@contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """
    Fill a folder beside its place and move it there at the end of the block.

    Args:
        path: where the folder belongs; it must not exist, or be empty.

    Yields:
        folder to write into. If the block fails it is deleted with all that is in it.

    Raises:
        FileExistsError: if there is something at `path` already.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    beside.mkdir()
    try:
        yield beside
        for file in sorted(beside.rglob("*")):
            _flush(file)
        # Only an empty folder can be replaced: what is there already is never overwritten.
        os.rename(beside, path)
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)
        if isinstance(error, OSError) and path.is_dir() and any(path.iterdir()):
            raise FileExistsError(f"{path} exists already and is not empty: choose another folder.") from error
        raise
    _flush(path.parent)


@contextmanager
def filling_folder(path: str | os.PathLike) -> Iterator[Path]:
    """
    Write several files beside a folder's own and move them in at the end of the block, replacing older ones.

    Args:
        path: the folder, made if it is missing; what else it holds stays.

    Yields:
        folder to write into. If the block fails nothing of it comes to `path`.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    beside = path / f"{_UNFINISHED}{uuid.uuid4().hex[:8]}"
    beside.mkdir()
    try:
        yield beside
        # Weights last: where they are, what belongs to them is there
        files = sorted(beside.iterdir(), key=lambda file: (file.suffix == ".safetensors", file.name))
        for file in files:
            _flush(file)
        for file in files:
            os.replace(file, path / file.name)
        _flush(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file in UTF-8, complete or not at all."""
    with replacing_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, data: Any) -> None:
    """Write `data` as indented JSON, complete or not at all."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def remove_unfinished(folder: str | os.PathLike) -> None:
    """Delete what killed processes left unfinished in `folder`; call it while nothing else writes there."""
    for path in Path(folder).glob(f"*{_UNFINISHED}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}{_UNFINISHED}{uuid.uuid4().hex[:8]}")


def _flush(path: Path) -> None:
    """Wait until the disk holds `path`: a name must not survive a power cut that its content does not survive."""
    if os.name == "nt":
        # Windows neither opens folders nor flushes what was opened for reading
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


__all__ = ["filling_folder", "new_folder", "remove_unfinished", "replacing_file", "write_json", "write_text"]
