# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""The console command `san`."""

import io
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from importlib import import_module
from types import ModuleType

from modeling_san import __version__

from .errors import CommandError, MessageHandler, report_error
from .parser import CommandParser

# Each is a module beside this one, with `add_parser(subparsers)` and `run(args)`
_COMMANDS = (
    "segment",
    "segment-dataset",
    "demo",
    "convert",
    "contact-sheet",
    "train",
    "evaluate",
    "export",
    "prepare",
    "push",
    "app",
)

# Commands that read further options themselves, from `args.others`
_TAKES_OTHERS = ("train",)

_EXAMPLE = """\
example:
  san demo
  san segment street.jpg --labels "sky, road, building, car|automobile"
  san COMMAND --help
"""

_MESSAGES = MessageHandler(logging.WARNING)

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def make_parser(commands: Iterable[str] = _COMMANDS) -> CommandParser:
    """The parser of `san` with these commands, the module of each of which is imported."""
    parser = CommandParser(
        prog="san",
        description="Side Adapter Network: label every pixel of an image with any words.",
        epilog=_EXAMPLE,
    )
    parser.add_argument("--version", action="version", version=f"san {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", required=True)
    for command in commands:
        _module(command).add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run one command; `argv` are the process's own arguments by default.

    Returns:
        exit code: 0, 2 for bad input, 130 after Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    # The others are needed only to say which there are
    parser = make_parser(argv[:1] if argv and argv[0] in _COMMANDS else _COMMANDS)
    args, others = parser.parse_known_args(argv)
    args.others = others
    if args.others and args.command not in _TAKES_OTHERS:
        parser.error(f"unrecognized arguments: {' '.join(args.others)}")
    logging.getLogger(__package__.partition(".")[0]).addHandler(_MESSAGES)
    # Names of files may be any bytes, and the terminal need not have letters for them
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
            return _module(args.command).run(args) or 0
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader, `head` for example, has seen enough. Python would complain once more when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (CommandError, OSError, ValueError) as error:
        report_error(error)
        return EXIT_BAD_INPUT


def _module(command: str) -> ModuleType:
    return import_module(f".{command.replace('-', '_')}", __package__)


if __name__ == "__main__":
    sys.exit(main())
