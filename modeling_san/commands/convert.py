# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""`san convert`: the original's released checkpoints as model folders."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modeling_san.processing.label_files import read_json_or_lines
from modeling_san.processing.wording_san import one_line

from .errors import CommandError, say

if TYPE_CHECKING:
    from modeling_san import SANForOpenVocabSegmentation, SANProcessor

_HUB_PREFIX = "hub:"
_DEFAULT_TOKENIZER = "openai/clip-vit-base-patch16"
_CONFIG_SECTIONS = ("MODEL.SAN", "MODEL.SIDE_ADAPTER")
_CONFIG_FORM = f"a JSON object with the sections {' and '.join(_CONFIG_SECTIONS)}"

_DESCRIPTION = """\
Convert a checkpoint of SAN's original implementation, or OpenMMLab's edition of one, into a folder that `--model` and
from_pretrained take: weights as safetensors, configuration, tokenizer and image processor. Nothing in a checkpoint is
executed. OUT appears when it is complete, or not at all.
"""
_EXAMPLE = """\
example:
  san convert hub:vit-b-16 san-vit-b-16
  san convert san_vit_large_14.pth san-vit-l-14 --tokenizer ./clip-tokenizer
"""


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser of `san`."""
    parser = subparsers.add_parser(
        "convert", help="convert a released checkpoint", description=_DESCRIPTION, epilog=_EXAMPLE
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help=".pth or .safetensors file, or hub:vit-b-16 or hub:vit-l-14 to download a released one",
    )
    parser.add_argument("output", metavar="OUT", help="folder to write")
    parser.add_argument(
        "--tokenizer",
        metavar="PATH_OR_HUB_ID",
        default=_DEFAULT_TOKENIZER,
        help=f"CLIP's tokenizer (default: {_DEFAULT_TOKENIZER}, from the Hub or its local cache)",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="JSON with the original's MODEL.SAN and MODEL.SIDE_ADAPTER sections, for other models than the released",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is a model folder already")


def run(args: argparse.Namespace) -> int:
    """Convert one checkpoint."""
    from transformers import CLIPTokenizer

    from modeling_san.conversion import convert_checkpoint, download_checkpoint, load_checkpoint
    from modeling_san.processing import DEFAULT_TEMPLATES, SANImageProcessor, SANProcessor

    from .models import check_tokenizer, quiet_libraries

    quiet_libraries()
    output = Path(args.output)
    _check_output(output, args.overwrite)
    reference_config = None if args.config is None else _read_config(args.config)
    is_released = args.checkpoint.startswith(_HUB_PREFIX)
    path = download_checkpoint(args.checkpoint.removeprefix(_HUB_PREFIX)) if is_released else args.checkpoint
    state_dict = load_checkpoint(path)
    # Before the conversion, which takes longer than to find out that there is no tokenizer
    try:
        tokenizer = CLIPTokenizer.from_pretrained(args.tokenizer)
    except Exception as error:
        # Damaged files and missing networks raise many kinds
        raise CommandError(
            f"no tokenizer in {args.tokenizer} ({one_line(error)}): connect to the network, or pass a folder with "
            "CLIP's tokenizer with --tokenizer"
        ) from error
    try:
        model = convert_checkpoint(state_dict, reference_config)
    except ValueError as error:
        raise CommandError(f"{args.checkpoint}: {one_line(error)}") from error
    config = model.config
    check_tokenizer(tokenizer, config, f"pass a folder with CLIP's own with --tokenizer, not {args.tokenizer}")
    image_processor = SANImageProcessor(size_divisor=config.size_divisor, mask_stride=config.mask_stride)
    templates = (reference_config or {}).get("MODEL.SAN", {}).get("CLIP_TEMPLATE_SET", DEFAULT_TEMPLATES)
    _save(model, SANProcessor(image_processor, tokenizer, templates), output)
    say(f"wrote {output}: {sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M parameters")
    say(f'try:  san segment IMAGE --model {output} --labels "sky, road"')
    return 0


def _read_config(path: str) -> dict[str, Any]:
    """The original's configuration, checked for its form; `convert_checkpoint` checks the content."""
    config = read_json_or_lines(path, "--config", _CONFIG_FORM)
    if not isinstance(config, dict) or not all(isinstance(config.get(key), dict) for key in _CONFIG_SECTIONS):
        raise CommandError(f"--config {path}: expected {_CONFIG_FORM}")
    return config


def _check_output(output: Path, overwrite: bool) -> None:
    """Refuse to replace what is there, unless it is a model and the user says so."""
    if not (output.exists() or output.is_symlink()) or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / "config.json").is_file():
        raise CommandError(f"{output} exists and is not a model folder: choose another name")
    if not overwrite:
        raise CommandError(f"{output} exists: choose another name, or pass --overwrite to replace it")


def _save(model: SANForOpenVocabSegmentation, processor: SANProcessor, output: Path) -> None:
    """Write a folder that is complete or not there; files that an older model has besides stay."""
    from modeling_san.processing.files import filling_folder, new_folder

    try:
        with (filling_folder if output.exists() else new_folder)(output) as folder:
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
            for path in folder.iterdir():
                # Weights are written readable for their owner alone; the folder's other files follow the umask
                shutil.copymode(folder / "config.json", path)
    except OSError as error:
        raise CommandError(f"{output} cannot be written: {error.strerror or error}") from error
