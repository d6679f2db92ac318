# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""Files and folders that appear complete or not at all, and never in the place of somebody's own.

What is deleted or replaced has a name that the package gives, in a folder that a file of its own marks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

LOCK_FILE = ".san.lock"
"""In a folder that a run writes to, for as long as it runs."""

_UNFINISHED = re.compile(r"\.unfinished-[0-9a-f]{8}$")


@contextmanager
def locked_folder(path: str | os.PathLike) -> Iterator[Path]:
    """
    Hold a folder for the block; made if it is missing. The system lets go of it however the process ends.

    Yields:
        the folder.

    Raises:
        ValueError: another run holds it, which the sentence names, or it is a file.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: choose a folder to write to.")
    folder.mkdir(parents=True, exist_ok=True)
    # Not kept by the thread: what a run calls may write from another one
    lock, holder = FileLock(folder / LOCK_FILE, thread_local=False), folder / f"{LOCK_FILE}.holder"
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        who = "another run"
        with suppress(OSError):
            who = holder.read_text(encoding="utf-8").strip() or who
        raise ValueError(f"{who} is writing to {folder}: wait for it, or choose another folder.") from error
    try:
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        yield folder
    finally:
        holder.unlink(missing_ok=True)
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


def refuse_foreign_files(folder: str | os.PathLike, patterns: Iterable[str], mark: str) -> None:
    """
    Refuse to write where files are that nobody can tell the origin of.

    Args:
        folder: that is to be written to; it need not exist.
        patterns: names of files to be written, as globs below the folder.
        mark: the file that a folder of the same kind has, without which its files are somebody's own.

    Raises:
        ValueError: one of the files is there; the sentence names it.
    """
    folder = Path(folder)
    if taken := next((path for pattern in patterns for path in sorted(folder.glob(pattern))), None):
        raise ValueError(
            f"{taken} is there already, and no {mark} beside it says that it may be replaced: choose another folder."
        )


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
    beside = path / f".unfinished-{uuid.uuid4().hex[:8]}"
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
    """Delete what killed processes left half written in `folder`; call it while nothing else writes there."""
    for path in filter(_is_unfinished, Path(folder).glob("*")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Delete a folder that the package wrote: under its name there is all of it or nothing, at any moment."""
    doomed = _beside(path)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _is_unfinished(path: Path) -> bool:
    return _UNFINISHED.search(path.name) is not None


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.unfinished-{uuid.uuid4().hex[:8]}")


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


__all__ = [
    "LOCK_FILE",
    "filling_folder",
    "locked_folder",
    "new_folder",
    "refuse_foreign_files",
    "remove_folder",
    "remove_unfinished",
    "replacing_file",
    "write_json",
    "write_text",
]
