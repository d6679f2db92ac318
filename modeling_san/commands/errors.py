"""What a command says when it cannot go on: one line, with what to do."""

import sys

_PROGRAM = "san"
_LISTED_LINES = 6


class CommandError(Exception):
    """The user has to change something; the message says what. Ends a command with exit code 2."""


def one_line(error: BaseException | str) -> str:
    """A message without line breaks.

    Args:
        error: an exception or a text. Of a text with many lines the first few are kept, and the rest counted.
    """
    text = str(error) or type(error).__name__
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    if not lines:
        return ""
    left_out = len(lines) - 1 - _LISTED_LINES
    listed = "; ".join(lines[1 : 1 + _LISTED_LINES])
    more = f"; and {left_out} more" if left_out > 0 else ""
    return " ".join(part for part in (lines[0], listed + more) if part)


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
