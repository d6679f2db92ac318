"""What a command says when it cannot go on: one line, with what to do."""

import sys

from modeling_san.processing.wording_san import one_line

_PROGRAM = "san"


class CommandError(Exception):
    """The user has to change something; the message says what. Ends a command with exit code 2."""


def report_error(error: BaseException | str) -> None:
    """Write `san: error: ...` to standard error, above a progress bar if one is shown."""
    _report("error", error)


def warn(message: str) -> None:
    """Write `san: warning: ...` to standard error."""
    _report("warning", message)


def say(message: str) -> None:
    """Write a line to standard output, above a progress bar if one is shown."""
    from tqdm import tqdm

    tqdm.write(message, file=sys.stdout)
    # A long run that is piped into a file or another program is to be followed as it goes
    sys.stdout.flush()


def _report(kind: str, message: BaseException | str) -> None:
    from tqdm import tqdm

    tqdm.write(f"{_PROGRAM}: {kind}: {one_line(message)}", file=sys.stderr)
