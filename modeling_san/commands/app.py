# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""`san app`: a page in the browser to segment images with."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .errors import CommandError, say, warn
from .labels import add_label_options, read_labels
from .parser import add_device_option, add_model_option, integer_between

_DESCRIPTION = """\
Serve a page on which images are segmented by any words. It is open to this machine alone unless --host or --share
say otherwise, works without a network, and ends with Ctrl-C. What was uploaded is removed then.
"""
_EXAMPLE = """\
example:
  san app
  san app --model ./san-vit-b-16 --labels "sky, road, building, car|automobile" --port 8000
  san app --model user/san-vit-b-16 --space my-space
"""


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser of `san`."""
    parser = subparsers.add_parser("app", help="a page to try a model on", description=_DESCRIPTION, epilog=_EXAMPLE)
    add_model_option(parser)
    add_label_options(parser)
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at; 0.0.0.0 opens the page to the network (default: %(default)s)",
    )
    parser.add_argument(
        "--port", type=integer_between(1, 65535), help="port to listen at (default: a free one from 7860 on)"
    )
    parser.add_argument(
        "--share", action="store_true", help="open the page to anybody who knows its address, through Gradio's servers"
    )
    parser.add_argument(
        "--space",
        metavar="DIR",
        help="instead of serving the page, write a Space for the Hub repository --model into this new folder",
    )
    add_device_option(parser)


def run(args: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C or SIGTERM, or write a Space."""
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise CommandError('the page needs Gradio, which is not installed: pip install "modeling-san[app]"') from error
    if args.space is not None:
        return _write_space(args)
    from modeling_san.hub_card.app import serve
    from modeling_san.processing.device import pick_device

    from .models import load_model, quiet_libraries

    quiet_libraries()
    labels = read_labels(args)
    say("loading the model")
    loaded = load_model(args.model, pick_device(args.device))
    say("starting the page")
    if args.share:
        warn("anybody who learns the page's address can use it, and images pass through Gradio's servers")
    try:
        serve(
            loaded.model,
            loaded.processor,
            name=loaded.name,
            labels=labels,
            host=args.host,
            port=args.port,
            share=args.share,
            on_start=lambda address: say(f"page: {address} (Ctrl-C ends it)"),
        )
    except OSError as error:
        where = args.host if args.port is None else f"{args.host}:{args.port}"
        raise CommandError(f"{where} cannot be listened at: pass another --port or --host ({error})") from error
    return 0


def _write_space(args: argparse.Namespace) -> int:
    from modeling_san.hub_card.space import write_space

    if args.model is None:
        raise CommandError("--space needs --model: name the model's repository on the Hub, such as user/san-vit-b-16")
    if given := [option for option in ("labels", "labels_file", "port", "share") if getattr(args, option)]:
        options = ", ".join(f"--{option.replace('_', '-')}" for option in given)
        raise CommandError(f"--space writes a page for anybody's words: leave out {options}")
    if Path(args.space).is_file():
        raise CommandError(f"--space {args.space} is a file: name a new folder")
    folder = write_space(args.space, args.model)
    say(f"space: {folder}, for {args.model}; upload it with: hf upload USER/SPACE {folder} --repo-type space")
    return 0
