# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""Load a model for a command, and say in one sentence why it cannot be loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modeling_san import BUILTIN_MODEL
from modeling_san.processing.wording_san import one_line

from .errors import CommandError

if TYPE_CHECKING:
    import torch

    from modeling_san.auto import ModelClasses
    from modeling_san.processing import Segmenter, Vocabulary


@dataclass(frozen=True)
class LoadedModel:
    """A model under the name that the user calls it by, in evaluation mode and float32, with its own processor."""

    name: str
    segmenter: Segmenter

    @property
    def model(self) -> Any:
        """The network."""
        return self.segmenter.model

    @property
    def processor(self) -> Any:
        """What makes its inputs."""
        return self.segmenter.processor

    def vocabulary(
        self, labels: Sequence[str] | None, *, templates: str | Sequence[str] | None = None, extend: str = "none"
    ) -> Vocabulary:
        """
        `Segmenter.vocabulary`, where a model without labels needs some.

        Raises:
            ValueError, CommandError: there are no labels, or they cannot be used.
        """
        if labels is None and self.model.config.stored_labels is None:
            raise CommandError(
                f'model {self.name} has no labels of its own: name what to look for, for example --labels "sky, road"'
            )
        return self.segmenter.vocabulary(labels, templates=templates, extend=extend)


def quiet_libraries() -> None:
    """Keep the libraries' own log and loading bars off the terminal; bars of downloads stay."""
    from huggingface_hub.utils import enable_progress_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
    enable_progress_bars()


def load_model(name: str | None, device: torch.device) -> LoadedModel:
    """
    Load a model and its processor from a folder or a Hub repository; None stands for the built-in model.

    Weights come from safetensors only, and no code of a model folder is run.

    Raises:
        CommandError: says what is wrong with the folder or repository.
    """
    import torch

    from modeling_san.processing import Segmenter

    source = str(BUILTIN_MODEL) if name is None else name
    _check_source(source)
    _, model_class, processor_class = _find_classes(source)
    try:
        processor = processor_class.from_pretrained(source)
        model = model_class.from_pretrained(source, dtype=torch.float32, use_safetensors=True)
    except Exception as error:
        # Damaged files raise whatever their reader happens to: safetensors, JSON, tokenizers and configs differ
        raise CommandError(f"model {source} cannot be loaded: {one_line(error)}") from error
    check_tokenizer(
        processor.tokenizer,
        model.config,
        f"files of the tokenizer of {source} are missing or another model's, save the processor into it once more",
    )
    return LoadedModel("built-in" if name is None else name, Segmenter(model.to(device).eval(), processor))


def check_tokenizer(tokenizer: Any, config: Any, remedy: str) -> None:
    """Raise a `CommandError` with this remedy where a model does not know just the tokenizer's tokens."""
    # The library makes an empty tokenizer where it finds no files
    tokens, expected = len(tokenizer), config.text_config.vocab_size
    if tokens != expected:
        raise CommandError(f"the tokenizer has {tokens} tokens and the model {expected}: {remedy}")


def _check_source(source: str) -> None:
    """A folder has to hold a config and weights; anything else may be a Hub repository unless it looks like a path."""
    from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

    folder = Path(source)
    if not folder.exists():
        if folder.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1 or "\\" in source:
            raise CommandError(f"model {source}: there is no such folder: check the path")
        return
    if not folder.is_dir():
        raise CommandError(
            f"model {source} is a file: pass a folder that save_pretrained wrote (`san convert {source} DIR` makes "
            "one of a released checkpoint)"
        )
    for what, files in (
        (CONFIG_NAME, (CONFIG_NAME,)),
        (f"weights ({SAFE_WEIGHTS_NAME})", (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)),
    ):
        if not any((folder / file).is_file() for file in files):
            raise CommandError(f"model folder {source} has no {what}: pass a folder that save_pretrained wrote")


def _find_classes(source: str) -> ModelClasses:
    """The classes of a model and its processor, by the type in its config."""
    from modeling_san.auto import classes_of

    try:
        return classes_of(source)
    except ValueError as error:
        raise CommandError(f"model {source} cannot be used: {error}") from error
    except OSError as error:
        if Path(source).is_dir():
            raise CommandError(f"model folder {source}: config.json cannot be read: {one_line(error)}") from error
        raise CommandError(
            f"model {source}: there is no such folder, and the Hub has no such model or cannot be reached: check the "
            "name and the network"
        ) from error
