# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""`san push`: publish a model on the Hub, in one commit."""

import argparse
from pathlib import Path
from typing import Any

from modeling_san.processing.wording_san import listed

from .errors import CommandError, say, warn

_DESCRIPTION = """\
Publish a model's folder on the Hugging Face Hub, in one commit: weights, configuration, processor, the code that loads
them where this package is not installed, and a model card. A README.md in the folder is taken as the card; without
one, or with --new-card, a card is made from what the folder holds: configuration, recipe.yaml, results.json.
Checkpoints, logs and all else stay where they are, and the folder is not changed.

The token is the one that `hf auth login` stores, or HF_TOKEN.
"""
_EXAMPLE = """\
example:
  san push my-model me/my-model --dry-run
  san push my-model me/my-model --private --license apache-2.0 --results outputs/evaluation
  san push my-model me/my-model --update --message "Train for longer"

The card to look at and edit before:
  python -c "from modeling_san.hub_card import make_model_card; make_model_card('my-model').save('my-model/README.md')"
"""


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser of `san`."""
    parser = subparsers.add_parser(
        "push", help="publish a model on the Hub", description=_DESCRIPTION, epilog=_EXAMPLE
    )
    parser.add_argument("folder", metavar="FOLDER", help="with a model and its processor")
    parser.add_argument("repo_id", metavar="REPO_ID", help="where to: your name or organisation, a slash, a name")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--dry-run", action="store_true", help="list what would be published; needs no network")
    parser.add_argument("--update", action="store_true", help="commit on top of what the repository holds already")
    parser.add_argument("--message", default="Upload a model", help='of the commit (default: "%(default)s")')
    parser.add_argument("--new-card", action="store_true", help="make a card also where there is one already")
    parser.add_argument("--license", metavar="ID", help="of the weights, for the card: apache-2.0, for example")
    parser.add_argument("--base-model", metavar="HUB_ID", help="what these weights were made from, for the card")
    parser.add_argument(
        "--results",
        action="append",
        default=[],
        metavar="DIR_OR_FILE",
        help="what `san evaluate` measured, for the card; may be given several times",
    )


def run(args: argparse.Namespace) -> int:
    """Publish, or list what would be published."""
    from tqdm import tqdm

    from modeling_san.processing.device import pick_device

    from .models import load_model, quiet_libraries

    folder = Path(args.folder)
    if not folder.is_dir():
        raise CommandError(
            f"{folder} is not a folder: pass one that `san train`, `san convert` or save_pretrained wrote"
        )
    if not args.message.strip():
        raise CommandError("--message is empty: say in a few words what the commit brings")

    from modeling_san.hub_card.publish import check_repo_id, find_token, prepared_upload, push

    quiet_libraries()
    check_repo_id(args.repo_id)
    if not args.dry_run:
        find_token()
    # What does not load here would load nowhere
    load_model(str(folder), pick_device("cpu"))
    with prepared_upload(
        folder,
        args.repo_id,
        new_card=args.new_card,
        results=args.results,
        license=args.license,
        base_model=args.base_model,
    ) as upload:
        if not upload.has_new_card and (args.results or args.license or args.base_model):
            warn("README.md is taken as it is: --results, --license and --base-model are for a --new-card")
        elif upload.has_new_card and not upload.states_license():
            warn("the card states no licence of the weights: pass --license")
        sizes = upload.sizes()
        for name, size in [*sizes.items(), (f"{len(sizes)} files", sum(sizes.values()))]:
            note = upload.notes.get(name, "")
            say(f"  {name:<{max(map(len, sizes))}}  {tqdm.format_sizeof(size, 'B'):>7}  {note}".rstrip())
        if upload.left_out:
            say(f"left out: {listed(upload.left_out, 12)}")
        if args.dry_run:
            say(f"nothing was sent; without --dry-run this goes to {args.repo_id}")
            return 0
        published = push(
            upload,
            args.repo_id,
            private=args.private,
            update=args.update,
            new_card=args.new_card,
            message=args.message,
        )
    if published.kept_card:
        say("the card of the repository was left as it is; --new-card replaces it")
    if published.removed:
        say(f"removed from the repository: {', '.join(published.removed)}")
    say(f"published: {published.url} (commit {published.commit[:8]})")
    return 0
