"""The console command `san`."""

import io
import os
import sys
import warnings
from collections.abc import Sequence

from modeling_san import __version__

from . import (
    app,
    contact_sheet,
    convert,
    curves,
    demo,
    evaluate,
    export,
    fine_tune,
    prepare,
    push,
    segment,
    segment_dataset,
    train,
)
from .errors import CommandError, report_error
from .parser import CommandParser

# Modules with `add_parser(subparsers)` and `run(args)`, which import what is heavy inside `run` only.
_COMMANDS = {
    "segment": segment,
    "segment-dataset": segment_dataset,
    "demo": demo,
    "convert": convert,
    "contact-sheet": contact_sheet,
    "train": train,
    "fine-tune": fine_tune,
    "evaluate": evaluate,
    "export": export,
    "curves": curves,
    "prepare": prepare,
    "push": push,
    "app": app,
}

# Commands that read further options themselves, from `args.others`
_TAKES_OTHERS = ("train",)

_EXAMPLE = """\
example:
  san demo
  san segment street.jpg --labels "sky, road, building, car|automobile"
  san COMMAND --help
"""

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def make_parser() -> CommandParser:
    """The parser of `san` and all its commands."""
    parser = CommandParser(
        prog="san",
        description="Side Adapter Network: label every pixel of an image with any words.",
        epilog=_EXAMPLE,
    )
    parser.add_argument("--version", action="version", version=f"san {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", required=True)
    for module in _COMMANDS.values():
        module.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run one command.

    Args:
        argv: arguments after the program's name; those of the process by default.

    Returns:
        exit code: 0, 2 for bad input, 130 after Ctrl-C.
    """
    parser = make_parser()
    args, others = parser.parse_known_args(argv)
    args.others = others
    if args.others and args.command not in _TAKES_OTHERS:
        parser.error(f"unrecognized arguments: {' '.join(args.others)}")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name that the terminal has no letters for must not end a run
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
            return _COMMANDS[args.command].run(args) or 0
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader, `head` for example, has seen enough. Python would complain once more when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (CommandError, OSError, ValueError) as error:
        report_error(error)
        return EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
