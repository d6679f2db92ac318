"""`san convert`: the original's released checkpoints as model folders."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modeling_san.processing.wording_san import one_line

from .errors import CommandError, say

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

    from modeling_san import SANForOpenVocabSegmentation, SANProcessor

_HUB_PREFIX = "hub:"
_DEFAULT_TOKENIZER = "openai/clip-vit-base-patch16"

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
    """
    Convert one checkpoint.

    Returns:
        exit code.
    """
    from modeling_san.conversion import convert_checkpoint, load_checkpoint
    from modeling_san.processing import DEFAULT_TEMPLATES

    from .models import quiet_libraries

    quiet_libraries()
    output = Path(args.output)
    _check_output(output, args.overwrite)
    reference_config = _read_config(args.config)
    state_dict = load_checkpoint(_find_checkpoint(args.checkpoint))
    # Before the conversion, which takes longer than to find out that there is no tokenizer
    tokenizer = _load_tokenizer(args.tokenizer)
    try:
        model = convert_checkpoint(state_dict, reference_config)
    except ValueError as error:
        raise CommandError(f"{args.checkpoint}: {one_line(error)}") from error
    templates = (reference_config or {}).get("MODEL.SAN", {}).get("CLIP_TEMPLATE_SET", DEFAULT_TEMPLATES)
    _save(model, make_processor(model, tokenizer, templates), output)
    say(f"wrote {output}: {sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M parameters")
    say(f'try:  san segment IMAGE --model {output} --labels "sky, road"')
    return 0


def make_processor(model: SANForOpenVocabSegmentation, tokenizer: CLIPTokenizer, templates: str) -> SANProcessor:
    """
    The processor that belongs to a converted model.

    Raises:
        CommandError: the tokenizer is another model's.
    """
    from modeling_san.processing import SANImageProcessor, SANProcessor

    config, tokens = model.config, model.text_model.config.vocab_size
    if len(tokenizer) != tokens:
        raise CommandError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {tokens}: pass CLIP's own with --tokenizer"
        )
    image_processor = SANImageProcessor(size_divisor=config.size_divisor, mask_stride=config.side_patch_size)
    return SANProcessor(image_processor, tokenizer, templates)


def _find_checkpoint(checkpoint: str) -> Path:
    """A file, downloaded where the user asks for one of the Hub."""
    from modeling_san.conversion import download_checkpoint

    if checkpoint.startswith(_HUB_PREFIX):
        return download_checkpoint(checkpoint.removeprefix(_HUB_PREFIX))
    return Path(checkpoint)


def _read_config(path: str | None) -> dict[str, Any] | None:
    """The original's configuration, checked for its form; `convert_checkpoint` checks the content."""
    if path is None:
        return None
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CommandError(f"--config {path} cannot be read ({error.strerror or error}): check the path") from error
    except ValueError as error:
        raise CommandError(f"--config {path} is not valid JSON: {one_line(error)}") from error
    sections = ("MODEL.SAN", "MODEL.SIDE_ADAPTER")
    if not isinstance(config, dict) or not all(isinstance(config.get(key), Mapping) for key in sections):
        raise CommandError(f"--config {path}: expected a JSON object with the sections {' and '.join(sections)}")
    return config


def _load_tokenizer(source: str) -> CLIPTokenizer:
    """CLIP's tokenizer; the library makes an empty one, silently, where it finds no files."""
    from transformers import CLIPTokenizer

    tokenizer, reason = None, ""
    try:
        tokenizer = CLIPTokenizer.from_pretrained(source)
    except Exception as error:
        # Damaged files and missing networks raise many kinds
        reason = f" ({one_line(error)})"
    if tokenizer is None or len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise CommandError(
            f"no tokenizer in {source}: it is neither a folder with CLIP's tokenizer, nor in the local cache of the "
            f"Hub, nor to be fetched{reason}: connect to the network, or pass a folder with --tokenizer"
        )
    return tokenizer


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
