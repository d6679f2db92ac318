# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""What every model here shares, whatever its network: words in, class embeddings out, and batches of any sizes.

A sibling derives from [`OpenVocabularyModel`], names the parameters that are its own, and has a `forward` that takes
`input_ids` or `class_embeds`. Labels to store, choices of what trains, loading and saving follow from here.
"""

import copy
import difflib
import functools
import inspect
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoProcessor, CLIPModel, PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .prompt_encoder import encode_prompts

_logger = logging.getLogger(__name__)

TEXT_BATCH_SIZE = 512
"""Prompts encoded at once; bounds the memory that long vocabularies take."""

_PIXELS_AT_ONCE = 2 * 640 * 640
"""That a CPU takes through the network together: a tenth faster than eight images of 640 x 640 at once."""

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")

_RECORDED = ("hidden_states", "attentions")
_IGNORED_ARGUMENTS = frozenset(
    (
        *("num_items_in_batch", "return_loss", "use_cache"),  # of Trainer
        *("image", "image_id", "image_path", "file_name", "id", "index", "target_sizes", "original_sizes"),  # of data
    )
)


class LabelProcessor(Protocol):
    """What `set_labels` asks of a processor: [`SANProcessor`] or anything that makes prompts of labels."""

    def __call__(self, *, text: Sequence[str], return_tensors: str) -> Any:
        """Return `input_ids` and `attention_mask` of shape `(labels, prompts, tokens)`."""


class OpenVocabularyModel(PreTrainedModel):
    """
    Base of the models: a text encoder, labels that may be stored, and parts of CLIP that train or do not.

    The network has `text_model` and `text_projection` (or its own `encode_prompts`) and a buffer
    `stored_class_embeds`; the config `projection_dim`, `has_stored_labels`, `stored_labels` and
    `trainable_clip_parameters`.
    """

    # The stored vocabulary, where another one was given.
    _keys_to_ignore_on_load_unexpected = ["stored_class_embeds"]
    # Keyword arguments are no reason for `Trainer` to leave the division by accumulated batches to the model.
    accepts_loss_kwargs = False
    own_parameters: ClassVar[tuple[str, ...]] = ()
    """What the names of parameters that a sibling adds to CLIP begin with: these train always."""

    config_class: Any
    stored_class_embeds: Tensor | None

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: for custom code transformers skips modules without parameters of their own, as CLIP's and our layers."""
        return False

    # Loading and saving

    @classmethod
    def from_clip(cls, clip: CLIPModel, **config_kwargs: Any) -> Any:
        """
        Put a new network around a trained CLIP.

        Args:
            clip: any `CLIPModel`; its weights are copied.
            config_kwargs: fields of the config other than CLIP's own.

        Returns:
            the model, ready to train.

        Raises:
            TypeError: for anything but a `CLIPModel`.
        """
        if not isinstance(clip, CLIPModel):
            raise TypeError(
                f"from_clip takes a CLIPModel and was given {type(clip).__name__}: load one with "
                "CLIPModel.from_pretrained(...)."
            )
        config = cls.config_class(
            vision_config=clip.vision_model.config.to_dict(),
            text_config=clip.text_model.config.to_dict(),
            projection_dim=clip.visual_projection.out_features,
            logit_scale_init_value=clip.logit_scale.item(),
            **config_kwargs,
        )
        model = cls(config)
        model.load_state_dict(clip.state_dict(), strict=False)
        return model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """
        Load as every transformers model; what is frozen in a new model is frozen in a loaded one. Names in `id2label`
        other than the stored ones replace them as the vocabulary. Weights have to be just those of the config, unless
        the caller allows for others by `ignore_mismatched_sizes`, `output_loading_info` or a `state_dict`.

        Raises:
            RuntimeError: weights are missing, left over or of other shapes.
            ValueError: where the labels to store have no names, or positions other than 0, 1, 2 ...
            OSError: where there are labels to store, and no processor beside the model to encode them with.
        """
        source, labels = pretrained_model_name_or_path, None
        wants_report = kwargs.pop("output_loading_info", False)
        # The library refuses other shapes only, and names them in its log
        is_strict = not kwargs.get("ignore_mismatched_sizes") and not wants_report and "state_dict" not in kwargs
        places = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
        if (saved := cls._read_config(source, places)) is not None:
            named = "id2label" in kwargs or "label2id" in kwargs
            if not isinstance(config, PreTrainedConfig):
                # Not the dtype: a config takes its name only, and would look for one that is called "auto"
                kept = places | {name: kwargs.pop(name) for name in ("dtype", "torch_dtype") if name in kwargs}
                config, kwargs = cls.config_class.from_pretrained(
                    config or source, return_unused_kwargs=True, **kwargs
                )
                kwargs.update(kept)
            if named or config.id2label != saved.id2label:
                labels = cls._labels_to_store(config, saved)
        if labels is not None:
            # Code that came with the checkpoint stays with it; the package's own never runs another's.
            from_checkpoint = cls.__module__.startswith("transformers_modules.")
            processor = _load_processor(source, trust_remote_code=from_checkpoint, **places)
            config = copy.deepcopy(config)
            config.has_stored_labels = False
        loaded: Any = super().from_pretrained(
            source,
            *args,
            config=config,
            output_loading_info=True,
            **(kwargs | {"ignore_mismatched_sizes": True} if is_strict else kwargs),
        )
        model, report = loaded
        if is_strict:
            _refuse_unfit_weights(source, report)
        # Loading replaces parameters and with them their requires_grad.
        model.apply_trainable()
        if labels is not None:
            model.set_labels(labels, processor)
        return (model, report) if wants_report else model

    @classmethod
    def _labels_to_store(cls, config: Any, saved: Any) -> list[str] | None:
        """Names that a checkpoint's stored embeddings are not of, to be encoded in their place."""
        if not (saved.has_stored_labels and config.has_stored_labels):
            return None
        labels = named_labels(config.id2label)
        return None if labels == list(saved.stored_labels) else labels

    @classmethod
    def _read_config(cls, source: Any, places: Mapping[str, Any]) -> Any:
        """The config saved with a checkpoint; None where there is none, as in folders of adapters."""
        if source is None:
            return None
        try:
            saved, _ = cls.config_class.get_config_dict(source, **places)
        except OSError:
            return None
        return cls.config_class.from_dict(saved)

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """Save as every transformers model, and remove weights of an earlier save, in one file or in parts."""
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        whole, index = (Path(save_directory, name) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
        if kwargs.get("variant") is None and is_main_process and whole.exists() and index.exists():
            # Parts of an earlier save are gone by now, so that parts are what was saved; loading would take the file
            in_parts = any(whole.parent.glob(f"{whole.stem}-*-of-*{whole.suffix}"))
            (whole if in_parts else index).unlink()

    def get_decoder(self) -> Any:
        """The model itself: its text encoder writes no text, and is nobody's decoder."""
        return self

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """
        Not to be done: CLIP's vocabulary is fixed, and images, not words, are this model's input.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("the tokens of CLIP's text encoder are fixed: no others can be added.")

    # What trains

    def apply_trainable(self) -> None:
        """
        Let gradients reach what the model adds to CLIP, and of CLIP `config.trainable_clip_parameters` only.

        Raises:
            ValueError: where an entry of `trainable_clip_parameters` names no parameter of CLIP.
        """
        patterns = self.config.trainable_clip_parameters
        clip_names = [name for name, _ in self.named_parameters() if not name.startswith(self.own_parameters)]
        for pattern in patterns:
            if not any(pattern in name for name in clip_names):
                raise ValueError(
                    f"trainable_clip_parameters holds {pattern!r}, which is in no parameter name of CLIP: use for "
                    'example "vision_model", "visual_projection" or "vision_model.encoder.layers.11".'
                )
        for name, parameter in self.named_parameters():
            chosen = name.startswith(self.own_parameters) or any(pattern in name for pattern in patterns)
            parameter.requires_grad_(chosen)
        self.train(self.training)

    def trains_text_encoder(self) -> bool:
        """Whether the text encoder trains: stored label embeddings grow stale then, and batches bring prompts."""
        parts: tuple[Any, ...] = (self.text_model, self.text_projection)
        return any(parameter.requires_grad for part in parts for parameter in part.parameters())

    def train(self, mode: bool = True) -> Any:
        """
        Switch to training; parts of CLIP that hold frozen parameters only stay in evaluation mode, so that their
        dropout does not blur what trains. Layers follow, which have nothing of their own that training changes: it is
        by their mode that transformers knows which activations to compute again.
        """
        super().train(mode)
        for name, module in self.named_modules():
            follows = not name or f"{name}.".startswith(self.own_parameters)
            if follows or isinstance(module, GradientCheckpointingLayer):
                continue
            parameters = list(module.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                module.training = False
        return self

    # Words

    def get_class_embeds(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """
        Encode a vocabulary: prompts are encoded, normalised, averaged for each class and normalised again (paper,
        section 3.3).

        Args:
            input_ids: `(classes, prompts, tokens)`, or `(classes, tokens)` for one prompt each.
            attention_mask: same shape; a prompt whose row is all 0 is left out of its class's average. Padding needs
                no mask for CLIP's text encoder, which is causal: what follows the end-of-text token changes nothing.

        Returns:
            unit vectors `(classes, projection_dim)`.

        Raises:
            TypeError: for anything but a tensor.
            ValueError: for other shapes, or no classes.
        """
        if not isinstance(input_ids, Tensor):
            raise TypeError(
                f"input_ids are a {type(input_ids).__name__}: pass the tensor that "
                'processor(text=["sky", "road"], return_tensors="pt")["input_ids"] is.'
            )
        if input_ids.dim() == 2:
            input_ids = input_ids[:, None]
            attention_mask = None if attention_mask is None else attention_mask[:, None]
        if input_ids.dim() != 3 or 0 in input_ids.shape:
            raise ValueError(
                f"input_ids have shape {tuple(input_ids.shape)}: expected (classes, prompts, tokens) with at least "
                'one of each, as processor(text=["sky", "road"]) makes them.'
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains_text_encoder()):
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            chunks = (part.long().flatten(0, 1).split(TEXT_BATCH_SIZE) for part in (input_ids, mask))
            prompts = torch.cat([self.encode_prompts(*chunk) for chunk in zip(*chunks, strict=True)])
            prompts = nn.functional.normalize(prompts.float(), dim=-1).view(*input_ids.shape[:2], -1)
            if attention_mask is not None:
                prompts = prompts * attention_mask.any(-1, keepdim=True)
            return nn.functional.normalize(prompts.sum(1), dim=-1)

    def encode_prompts(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """What the text encoder makes of `(prompts, tokens)`: `(prompts, projection_dim)`, of any length."""
        return self.text_projection(encode_prompts(self.text_model, input_ids))  # type: ignore[operator]

    @can_return_tuple
    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """
        What CLIP says of prompts, as `CLIPModel.get_text_features`; `get_class_embeds` is for vocabularies.

        Args:
            input_ids: `(prompts, tokens)`.
            attention_mask: same shape.
            kwargs: of `CLIPTextModel`, such as `output_hidden_states` and `return_dict`.

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` `(prompts, projection_dim)`, not normalised, and
            `last_hidden_state` `(prompts, tokens, CLIP width)`.
        """
        outputs = self.text_model(input_ids, attention_mask, return_dict=True, **kwargs)  # type: ignore[operator]
        outputs.pooler_output = self.text_projection(outputs.pooler_output)  # type: ignore[operator]
        return outputs

    @torch.no_grad()
    def set_labels(self, labels: Sequence[str], processor: LabelProcessor) -> None:
        """
        Store a vocabulary with the model: it is saved and loaded with it and used when a call brings no text.

        Args:
            labels: class names, in the order of their indices.
            processor: turns the labels into prompts.

        Raises:
            TypeError: labels are one text, and no list.
        """
        if isinstance(labels, str):
            raise TypeError(f'labels are the text {labels!r}: pass a list of class names, such as ["sky", "road"].')
        labels = list(labels)
        if unknown := self.unknown_words(labels):
            _logger.warning(
                "the text encoder was not trained on %s: expect poor results for these words, unless it is trained on "
                "them.",
                ", ".join(map(repr, unknown[:10])) + (f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""),
            )
        inputs = processor(text=labels, return_tensors="pt")
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        # Where weights are offloaded there is no device to name, and hooks move what they get
        if self.device.type != "meta":
            ids, mask = ids.to(self.device), mask.to(self.device)
        self.stored_class_embeds = self.get_class_embeds(ids, mask).to(self.dtype)
        self.config.has_stored_labels = True
        self.config.id2label = dict(enumerate(labels))
        self.config.label2id = {label: index for index, label in enumerate(labels)}

    def unknown_words(self, labels: Sequence[str]) -> list[str]:
        """Names among labels and their synonyms that the model says it was not trained on; none if it does not say."""
        trained = getattr(self.config, "training_labels", None)
        if not trained:
            return []
        known, asked = (
            [" ".join(name.lower().split()) for label in given for name in label.split("|")]
            for given in (trained, labels)
        )
        return [name for name in asked if name not in set(known)]

    def choose_class_embeds(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, class_embeds: Tensor | None
    ) -> Tensor:
        """
        The vocabulary of a call: the words that it brings, their embeddings, or the stored labels.

        Returns:
            `(classes, projection_dim)` in float32.

        Raises:
            ValueError: there is none, or more than one; the embeddings have another shape.
        """
        if class_embeds is not None and input_ids is not None:
            raise ValueError("both class_embeds and input_ids were given: pass one of them.")
        if input_ids is not None:
            return self.get_class_embeds(input_ids, attention_mask)
        if class_embeds is None:
            class_embeds = self.stored_class_embeds
        if class_embeds is None:
            raise ValueError(
                "no vocabulary: pass input_ids (processor(text=[...]) makes them) or class_embeds; or store labels "
                "once with model.set_labels(labels, processor), or name them when the model is loaded: "
                'from_pretrained(folder, id2label={0: "sky", 1: "road"}).'
            )
        # Not `len`, which would fix the number of classes of an exported program
        if class_embeds.dim() != 2 or 0 in class_embeds.shape or class_embeds.shape[1] != self.config.projection_dim:
            raise ValueError(
                f"class_embeds have shape {tuple(class_embeds.shape)}: expected (classes, "
                f"{self.config.projection_dim}) with at least one class, as get_class_embeds returns."
            )
        return class_embeds.float()


def _refuse_unfit_weights(source: Any, report: Mapping[str, Any]) -> None:
    mismatched = (name for name, *_ in report["mismatched_keys"])
    if unfit := sorted({*report["missing_keys"], *report["unexpected_keys"], *mismatched}):
        raise RuntimeError(
            f"{source} has {len(unfit)} weights too few, too many or in other shapes than its config says, {unfit[0]} "
            "for example: save the model into it once more, or pass ignore_mismatched_sizes=True to begin with new "
            "ones where they do not fit."
        )


def _load_processor(source: Any, **options: Any) -> LabelProcessor:
    missing = (
        f"there is no processor in {source} to encode id2label with: save one there with processor.save_pretrained, "
        "or load without id2label and call model.set_labels(labels, processor)."
    )
    try:
        processor = AutoProcessor.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        raise OSError(missing) from error
    # Where there are files of a tokenizer only, that is what comes, and it knows no templates
    if not isinstance(processor, ProcessorMixin):
        raise OSError(missing)
    return processor


def are_placeholders(id2label: Mapping[Any, str] | None) -> bool:
    """Whether these are the names that every config starts with."""
    return all(label == f"LABEL_{position}" for position, label in (id2label or {}).items())


def named_labels(id2label: Mapping[Any, str] | None) -> list[str]:
    """Names by position; positions with a gap and names that are none raise."""
    id2label = {int(position): label for position, label in (id2label or {}).items()}
    if set(id2label) != set(range(len(id2label))):
        raise ValueError(
            f"id2label has the positions {', '.join(map(str, id2label))}: number the labels 0, 1, 2 and so on."
        )
    if are_placeholders(id2label):
        raise ValueError(
            f"the {len(id2label)} labels have no names, which are what this model goes by: pass them, for example "
            'id2label={0: "sky", 1: "road"}.'
        )
    return [id2label[position] for position in range(len(id2label))]


# Arguments of a call


def refuse_unknown_arguments(model_class: type[PreTrainedModel], names: Collection[str]) -> None:
    """
    Refuse arguments that no `forward` of a class knows, such as a misspelt one; what `Trainer` and data sets add may
    pass.

    Raises:
        TypeError: names the argument, and the one that is nearest.
    """
    unknown = [name for name in names if name not in _IGNORED_ARGUMENTS]
    if unknown:
        forwards = [vars(each)["forward"] for each in model_class.__mro__ if "forward" in vars(each)][:-1]
        known = dict.fromkeys(name for forward in forwards for name in inspect.signature(forward).parameters)
        choices = [*(known.keys() - {"self", "args", "kwargs"}), *(f"output_{name}" for name in _RECORDED)]
        choices += ["mask_labels", "class_labels"]
        nearest = difflib.get_close_matches(unknown[0], choices, 1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"it takes {', '.join(sorted(choices))}."
        raise TypeError(f"the model takes no argument {unknown[0]!r}: {hint}")


def record_on_request(*networks: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """
    Let `output_hidden_states` and `output_attentions` of a `forward` mean several networks, as the config has it
    where a call does not say; without them nothing is hooked.

    Args:
        networks: what the outputs of the further networks begin with in `_can_record_outputs`, such as `"side"`.
    """

    def decorate(forward: Callable[..., Any]) -> Callable[..., Any]:
        recorded = capture_outputs(forward, tie_last_hidden_states=False)

        @functools.wraps(forward)
        def wrapper(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
            for name in _RECORDED:
                asked = kwargs.pop(f"output_{name}", None)
                asked = bool(getattr(self.config, f"output_{name}")) if asked is None else asked
                # A list of layers, or 0 for the first one, is a wish too
                kwargs |= {f"output_{name}": asked} | {
                    f"output_{network}_{name}": asked is not False for network in networks
                }
            return recorded(self, *args, **kwargs)

        return wrapper

    return decorate


# Images of several sizes in one frame


@dataclass(frozen=True)
class ImageBatch:
    """
    Images of one padded size, which run together.

    Attributes:
        indices: where they are in the whole batch.
        size: height and width of each, padded, in pixels.
    """

    indices: list[int]
    size: tuple[int, int]

    def cut(self, maps: Tensor, stride: int = 1) -> Tensor:
        """What belongs to these images of `(whole batch, ..., height / stride, width / stride)`."""
        maps = maps[..., : self.size[0] // stride, : self.size[1] // stride]
        return maps if len(self.indices) == len(maps) else maps[self.indices]


def split_by_padded_size(pixel_values: Tensor, image_sizes: Tensor | None, divisor: int) -> list[ImageBatch]:
    """
    Part a batch so that each image runs on its own padded size: what shares a batch never changes an answer.

    Args:
        pixel_values: `(batch, channels, height, width)`.
        image_sizes: `(batch, 2)`, height and width of each image before padding; None where all fill the frame.
        divisor: images are padded to multiples of it.

    Raises:
        ValueError: for other shapes, or sizes that do not fit the frame.
    """
    batch, _, height, width = pixel_values.shape
    together = [ImageBatch(list(range(batch)), (height, width))]
    if image_sizes is None:
        return together
    if image_sizes.shape != (batch, 2):
        raise ValueError(
            f"image_sizes have shape {tuple(image_sizes.shape)}: expected ({batch}, 2), the height and width of "
            "each image before padding."
        )
    padded = (image_sizes + divisor - 1) // divisor * divisor
    if torch.compiler.is_compiling():
        # Sizes are data, which a graph without breaks cannot branch on; it can insist that they are all the same.
        frame = torch.tensor([height, width], device=padded.device)
        torch._assert_async((padded == frame).all(), "a compiled model takes images of one padded size at a time")
        return together
    groups: dict[tuple[int, int], list[int]] = {}
    for index, (rows, columns) in enumerate(padded.tolist()):
        if not (0 < rows <= height and 0 < columns <= width):
            raise ValueError(
                f"image_sizes[{index}] is {tuple(image_sizes[index].tolist())}, which padded to a multiple of "
                f"{divisor} does not fit pixel_values of {height} x {width}."
            )
        groups.setdefault((rows, columns), []).append(index)
    return [ImageBatch(indices, size) for size, indices in groups.items()]


def split_for_caches(batches: Sequence[ImageBatch], device: torch.device) -> Sequence[ImageBatch]:
    """On a CPU few images at a time: what many need between two layers would not stay in its caches."""
    if device.type != "cpu" or torch.compiler.is_compiling():
        return batches
    split = []
    for batch in batches:
        count = max(1, _PIXELS_AT_ONCE // (batch.size[0] * batch.size[1]))
        starts = range(0, len(batch.indices), count)
        split += [ImageBatch(batch.indices[start : start + count], batch.size) for start in starts]
    return split


def merge_batches(
    parts: Sequence[Mapping[str, Tensor]],
    batches: Sequence[ImageBatch],
    maps: Collection[str],
    frame: tuple[int, int],
) -> dict[str, Any]:
    """
    Batch tensors by name again, in the images' order.

    Args:
        parts: tensors by name, for each of `batches`.
        batches: what was run.
        maps: names of the tensors whose last dimensions are height and width; the smaller ones are filled with 0.
        frame: what maps are filled to.
    """
    order = torch.tensor([index for batch in batches for index in batch.indices]).argsort()
    merged = {}
    for name in parts[0]:
        tensors = [part[name] for part in parts]
        if name in maps:
            tensors = [
                nn.functional.pad(each, (0, frame[1] - each.shape[-1], 0, frame[0] - each.shape[-2]))
                if each.shape[-2:] != frame
                else each
                for each in tensors
            ]
        merged[name] = tensors[0] if len(parts) == 1 else torch.cat(tensors)[order.to(tensors[0].device)]
    return merged


__all__ = [
    "ImageBatch",
    "LabelProcessor",
    "OpenVocabularyModel",
    "are_placeholders",
    "merge_batches",
    "named_labels",
    "record_on_request",
    "refuse_unknown_arguments",
    "split_by_padded_size",
    "split_for_caches",
]
