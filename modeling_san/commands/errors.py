"""What a command says: results on standard output, and in one line what it cannot do, with what to do instead."""

import re
import sys
from typing import TextIO

from modeling_san.processing.wording_san import one_line

# All but tabs and line breaks, and what turns the direction of writing: labels, file names and models come from
# anywhere, and a terminal obeys what it is sent
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


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


def _write(text: str, stream: TextIO) -> None:
    from tqdm import tqdm

    escaped = _CONTROL_CHARACTERS.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)
    tqdm.write(escaped, file=stream)
    # A long run that is piped into a file or another program is to be followed as it goes
    stream.flush()
