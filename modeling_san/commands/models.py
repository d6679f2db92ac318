"""Load a model for a command, and say in one sentence why it cannot be loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from modeling_san import BUILTIN_MODEL

from .errors import CommandError, one_line

if TYPE_CHECKING:
    import torch

    from modeling_san import SANForOpenVocabSegmentation, SANProcessor

_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
_MODEL_TYPE = "san"


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to segment.

    Attributes:
        name: what the user called it, or "built-in".
        model: in evaluation mode and float32.
        processor: that was saved with it.
    """

    name: str
    model: SANForOpenVocabSegmentation
    processor: SANProcessor


def quiet_libraries() -> None:
    """Keep the libraries' own log and loading bars off the terminal; bars of downloads stay."""
    from huggingface_hub.utils import enable_progress_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
    enable_progress_bars()


def pick_device(name: str | None) -> torch.device:
    """
    The device to compute on.

    Args:
        name: as PyTorch writes it; None takes a GPU if there is one.

    Raises:
        CommandError: there is no such device on this machine.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except Exception as error:
        # Each kind of device that is not there has its own kind of exception
        raise CommandError(f"--device {name} cannot be used on this machine: leave it out, or pass cpu") from error
    return device


def load_model(name: str | None, device: torch.device) -> LoadedModel:
    """
    Load a model and its processor. Weights come from safetensors only, and no code of a model folder is run.

    Args:
        name: a folder or a Hub repository; None takes the built-in model.
        device: where to put it.

    Raises:
        CommandError: says what is wrong with the folder or repository.
    """
    import torch

    from modeling_san import SANForOpenVocabSegmentation, SANProcessor

    source = str(BUILTIN_MODEL) if name is None else name
    _check_source(source, is_builtin=name is None)
    _check_model_type(source)
    try:
        processor = SANProcessor.from_pretrained(source)
        model, loading = SANForOpenVocabSegmentation.from_pretrained(
            source, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:
        # Damaged files raise whatever their reader happens to: safetensors, JSON, tokenizers and configs differ
        raise CommandError(f"model {source} cannot be loaded: {one_line(error)}") from error
    if missing := sorted(loading["missing_keys"]):
        raise CommandError(
            f"model {source} lacks {len(missing)} of its weights, {missing[0]} for example: write it anew with "
            "save_pretrained, `san convert` or `san train`"
        )
    _check_tokenizer(source, len(processor.tokenizer), model.text_model.config.vocab_size)
    return LoadedModel("built-in" if name is None else name, model.to(device).eval(), processor)


def _check_source(source: str, is_builtin: bool) -> None:
    """A folder has to hold a config and weights; anything else may be a Hub repository unless it looks like a path."""
    folder = Path(source)
    if is_builtin and not folder.is_dir():
        raise CommandError(
            "this installation lacks the built-in model: install the package anew, make the model with "
            "examples/drawn_world, or pass another one with --model"
        )
    if not folder.exists():
        if folder.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1 or "\\" in source:
            raise CommandError(f"model {source}: there is no such folder: check the path")
        return
    if not folder.is_dir():
        raise CommandError(
            f"model {source} is a file: pass a folder that save_pretrained wrote (`san convert {source} DIR` makes "
            "one of a released checkpoint)"
        )
    if not (folder / "config.json").is_file():
        raise CommandError(f"model folder {source} has no config.json: pass a folder that save_pretrained wrote")
    if not any((folder / weights).is_file() for weights in _WEIGHT_FILES):
        raise CommandError(
            f"model folder {source} has no weights (model.safetensors): pass a folder that save_pretrained wrote"
        )


def _check_model_type(source: str) -> None:
    """Refuse other models: the library would fill a SAN model with random weights."""
    from modeling_san import SANConfig

    try:
        config, _ = SANConfig.get_config_dict(source)
    except OSError as error:
        if Path(source).is_dir():
            raise CommandError(f"model folder {source}: config.json cannot be read: {one_line(error)}") from error
        raise CommandError(
            f"model {source}: there is no such folder, and the Hub has no such model or cannot be reached: check the "
            "name and the network"
        ) from error
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if model_type != _MODEL_TYPE:
        what = "has a config.json without a model type" if model_type is None else f"is of type {model_type!r}"
        raise CommandError(
            f"model {source} {what} and not a SAN model: pass one that `san convert` or `san train` wrote"
        )


def _check_tokenizer(source: str, tokens: int, expected: int) -> None:
    """A missing tokenizer file goes unnoticed by the library, which then makes an empty one."""
    if tokens != expected:
        raise CommandError(
            f"model {source}: its tokenizer has {tokens} tokens and the model {expected}: the tokenizer's files are "
            "missing or another model's, save the processor into the folder once more"
        )
