# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""What a command says: results on standard output, and in one line what it cannot do, with what to do instead."""

import logging
import sys
from typing import TextIO

from modeling_san.processing.wording_san import escaped, one_line


class CommandError(Exception):
    """The user has to change something; the message says what. Ends a command with exit code 2."""


def report_error(error: BaseException | str) -> None:
    """Write `san: error: ...` to standard error, above a progress bar if one is shown."""
    _write(f"san: error: {one_line(error)}", sys.stderr)


def warn(message: str) -> None:
    """Write `san: warning: ...` to standard error."""
    _write(f"san: warning: {one_line(message)}", sys.stderr)


def say(message: str) -> None:
    """Write to standard output, above a progress bar if one is shown."""
    _write(message, sys.stdout)


class MessageHandler(logging.Handler):
    """Says what the package logs as commands say it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record as a warning, or as an error if it is one."""
        (report_error if record.levelno >= logging.ERROR else warn)(record.getMessage())


def _write(text: str, stream: TextIO) -> None:
    from tqdm import tqdm

    tqdm.write(escaped(text), file=stream)
    # A long run that is piped into a file or another program is to be followed as it goes
    stream.flush()
