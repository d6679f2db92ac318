# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""Processor of SAN: images and labels in, one set of model inputs out."""

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoTokenizer, CLIPTokenizer, PreTrainedTokenizerBase
from transformers.image_processing_utils import BatchFeature
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, TextKwargs, Unpack
from transformers.utils import TensorType

from .image_processing_san import (
    BaseSANImageProcessor,
    SANImageProcessor,
    SANImageProcessorKwargs,
    SANImageProcessorPil,
)
from .labels_san import normalize_labels, repair_prompt, split_synonyms
from .templates_san import DEFAULT_TEMPLATES, Templates, resolve_templates

if TYPE_CHECKING:
    # Never imported here: transformers takes along what custom code imports, and the pipeline belongs to it.
    from .pipeline_san import OpenVocabularySegmentationPipeline  # noqa: F401


class SANProcessorKwargs(ProcessingKwargs, total=False):
    """Options of `SANProcessor`: those of the tokenizer and of the image processor, flat or in `text_kwargs=...`,
    `images_kwargs=...` and `common_kwargs=...`.
    """

    images_kwargs: SANImageProcessorKwargs  # type: ignore[misc]
    # Older versions of transformers read it
    _defaults = {}  # type: ignore[misc]


class SANProcessor(ProcessorMixin):
    """SAN's image processor and CLIP's tokenizer, with the prompt templates that labels are put into.

    Args:
        image_processor: prepares the images; None makes one with the defaults.
        tokenizer: of the model's text encoder, such as CLIP's.
        templates: name of a set of templates ("vild", "imagenet"), or templates that each hold one `{}`. They are
            saved with the processor word for word. A saved form `{"name": ..., "prompts": [...]}` is taken as well.

    Attributes:
        templates: the templates, a list of strings.
        templates_name: the name they were chosen by, or None.

    Raises:
        ValueError: there is no such set of templates, or one of them cannot be used.
    """

    # A saved processor carries this code, so that it loads where the package is not installed.
    _auto_class = "AutoProcessor"  # type: ignore[assignment]
    valid_processor_kwargs = SANProcessorKwargs  # type: ignore[assignment]

    def __init__(
        self,
        image_processor: BaseSANImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        templates: Templates = DEFAULT_TEMPLATES,
    ) -> None:
        """Take the two halves and resolve the templates."""
        if tokenizer is None:
            raise ValueError("tokenizer is missing: pass CLIP's, for example CLIPTokenizer.from_pretrained(folder)")
        super().__init__(SANImageProcessor() if image_processor is None else image_processor, tokenizer)
        self.templates_name, self.templates = resolve_templates(templates)

    def __call__(
        self,
        images: Any = None,
        text: str | Iterable[str] | None = None,
        segmentation_maps: Any = None,
        templates: Templates | None = None,
        **kwargs: Unpack[SANProcessorKwargs],
    ) -> BatchFeature:
        """Prepare images, labels or both.

        Args:
            images: one image or a list, see `SANImageProcessor.preprocess`.
            text: labels, a list of class names or one line of them, separated by commas. They are lower-cased and
                stripped; "car|automobile" is one label with two synonyms.
            segmentation_maps: class indices, one map for each image, see `SANImageProcessor.preprocess`.
            templates: prompt templates for this call, like the argument of the class; None takes the processor's own.
            **kwargs: options of the image processor, such as `size` or `do_resize`, and of the tokenizer, such as
                `padding` (True: to the longest prompt) or `truncation` (False: a prompt that is too long is an
                error). `return_tensors` is "pt" unless "np", or None for numpy arrays and nested lists, is given.

        Returns:
            What `SANImageProcessor.preprocess` returns, if there are images. Segmentation maps become two lists with
            one entry per image: `mask_labels`, (n, height, width) float32 at the padded size, one 0 / 1 mask for
            each class present, 0 where padded or ignored; and `class_labels`, (n,) int64. A map without any class
            gives (0, height, width) and (0,). If there are labels, also `input_ids` and
            `attention_mask`, both (labels, prompts, tokens) int64. Prompts of a label are its synonyms in all
            templates, synonym after synonym; a label with fewer synonyms than others has rows at the end whose
            attention_mask is all 0 (their tokens repeat its first prompt). Tokens are as many as the longest prompt
            has, start and end included.

        Raises:
            ValueError: there are neither images nor labels, or one of them cannot be used.
        """
        if images is None and text is None:
            raise ValueError('there is nothing to process: pass images=..., text=["sky", "road"], or both')
        if images is None and segmentation_maps is not None:
            raise ValueError("segmentation_maps came without images: pass the images they belong to")
        image_options = set(self.image_processor.valid_kwargs.__annotations__)
        text_options = set(TextKwargs.__annotations__)
        known = image_options | text_options | {"text_kwargs", "images_kwargs", "common_kwargs"}
        if unknown := sorted(set(kwargs) - known):
            raise ValueError(f"{', '.join(unknown)}: neither the tokenizer nor the image processor has such an option")
        if images is None and (misplaced := sorted(set(kwargs) & (image_options - text_options))):
            raise ValueError(f"{', '.join(misplaced)}: these are options for images, and there are none")
        common = {"return_tensors": "pt", **kwargs.pop("common_kwargs", {})}  # type: ignore[typeddict-item]
        options = self._merge_kwargs(SANProcessorKwargs, common_kwargs=common, **kwargs)  # type: ignore[arg-type]
        inputs = BatchFeature()
        if images is not None:
            inputs.update(
                self.image_processor(images, segmentation_maps=segmentation_maps, **options["images_kwargs"])
            )
            if segmentation_maps is not None:
                ignore_index = options["images_kwargs"].get("ignore_index", self.image_processor.ignore_index)
                maps = inputs.pop("labels")
                masks, classes = zip(*(_class_masks(np.asarray(each), ignore_index) for each in maps), strict=True)
                convert = torch.from_numpy if isinstance(maps, torch.Tensor) else np.asarray
                inputs["mask_labels"], inputs["class_labels"] = list(map(convert, masks)), list(map(convert, classes))
        if text is not None:
            inputs.update(self.tokenize_labels(text, templates, **options["text_kwargs"]))
        return inputs

    def tokenize_labels(
        self,
        labels: str | Iterable[str],
        templates: Templates | None = None,
        *,
        padding: Any = True,
        truncation: Any = False,
        return_tensors: str | TensorType | None = "pt",
        **options: Any,
    ) -> BatchFeature:
        """Put labels into the prompt templates and tokenize the prompts, see `__call__`.

        Args:
            labels: class names.
            templates: prompt templates; None takes the processor's own.
            padding: as of tokenizers.
            truncation: as of tokenizers.
            return_tensors: "pt", "np", or None for nested lists.
            options: of the tokenizer.

        Returns:
            `input_ids` and `attention_mask`, both (labels, prompts, tokens) int64.

        Raises:
            ValueError: labels or templates are refused, or a prompt is longer than the model can read.
        """
        names = normalize_labels(labels)
        patterns = self.templates if templates is None else resolve_templates(templates)[1]
        prompts = [
            [repair_prompt(pattern.replace("{}", synonym)) for synonym in split_synonyms(name) for pattern in patterns]
            for name in names
        ]
        flat = [prompt for of_label in prompts for prompt in of_label]
        paddings = {name: options.pop(name, None) for name in ("pad_to_multiple_of", "padding_side")}
        encoded = self.tokenizer(flat, padding=False, truncation=truncation, **{"verbose": False, **options})
        # The tokenizer would pad by a setting of its own, which is saved with it and which threads share
        longest = options.get("max_length") if padding == "max_length" else None
        encoded = self.tokenizer.pad(encoded, padding=padding, max_length=longest, **paddings)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        if len(set(lengths)) > 1:
            raise ValueError(f"prompts of {min(lengths)} to {max(lengths)} tokens make no tensor: leave padding=True")
        ids, mask = (np.array(encoded[name], dtype=np.int64) for name in ("input_ids", "attention_mask"))
        owner = np.repeat(np.arange(len(names)), [len(of_label) for of_label in prompts])
        limit, worst = self.tokenizer.model_max_length, mask.sum(axis=1).argmax()
        if mask[worst].sum() > limit:
            raise ValueError(
                f"label {names[owner[worst]]!r} makes a prompt of {mask[worst].sum()} tokens and the model reads at "
                f"most {limit}: shorten the label or the templates, or pass truncation=True"
            )
        data = {"input_ids": _rows(ids, owner, fill=True), "attention_mask": _rows(mask, owner, fill=False)}
        if return_tensors is None:
            return BatchFeature({name: array.tolist() for name, array in data.items()})
        return BatchFeature(data, tensor_type=return_tensors)

    def post_process_semantic_segmentation(self, outputs: Any, target_sizes: Any = None, **kwargs: Any) -> Any:
        """Label every pixel, see `SANImageProcessor.post_process_semantic_segmentation`."""
        return self.image_processor.post_process_semantic_segmentation(outputs, target_sizes, **kwargs)

    def post_process_with_scores(
        self, outputs: Any, target_sizes: Any = None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Label every pixel and say what its label scores, see `SANImageProcessor.post_process_with_scores`."""
        return self.image_processor.post_process_with_scores(outputs, target_sizes)

    def post_process_semantic_scores(self, outputs: Any, target_sizes: Any = None) -> list[torch.Tensor]:
        """Scores of all classes at every pixel, see `SANImageProcessor.post_process_semantic_scores`."""
        return self.image_processor.post_process_semantic_scores(outputs, target_sizes)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        templates: Templates | None = None,
        backend: str | None = None,
        **kwargs: Any,
    ) -> "SANProcessor":
        """Load a processor that `save_pretrained` wrote, from a folder or the Hub.

        The classes of the two halves are named here rather than looked up by the library, so that a folder loads
        whether or not anything was registered with the library's automatic classes.

        Args:
            pretrained_model_name_or_path: the folder, or the name of a Hub repository.
            templates: prompt templates to use in place of the saved ones.
            backend: of the image processor, "pil" or "torchvision"; None takes torchvision where it is installed.
            **kwargs: where and what to load, such as `revision`, `token`, `cache_dir`, `subfolder`; and options of the
                image processor to change.

        Raises:
            OSError: there are no processor or no tokenizer files.
        """
        image_processor_class: Any = SANImageProcessorPil if backend == "pil" else SANImageProcessor
        image_processor = image_processor_class.from_pretrained(pretrained_model_name_or_path, **kwargs)
        places = {
            key: value for key, value in kwargs.items() if key not in SANImageProcessor.valid_kwargs.__annotations__
        }
        named = get_tokenizer_config(pretrained_model_name_or_path, **places).get("tokenizer_class")
        # Not looked up where it is CLIP's: that would ask for the model's config as well
        tokenizer_class: Any = CLIPTokenizer if named is None or named.startswith("CLIP") else AutoTokenizer
        tokenizer = tokenizer_class.from_pretrained(pretrained_model_name_or_path, **places)
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            # The library makes a tokenizer that knows no word, and says nothing
            raise OSError(
                f"{pretrained_model_name_or_path} holds no tokenizer files: save the processor into it once more"
            )
        if templates is None:
            saved, _ = cls.get_processor_dict(pretrained_model_name_or_path, **places)
            templates = saved.get("templates", DEFAULT_TEMPLATES)
        return cls(image_processor, tokenizer, templates)

    def batch_decode(self, token_ids: Any, **kwargs: Any) -> list[str]:
        """
        Prompts as texts.

        Args:
            token_ids: `input_ids` of any shape, `(labels, prompts, tokens)` or `(prompts, tokens)`.
            kwargs: of the tokenizer, such as `skip_special_tokens`.

        Returns:
            one text for each row of tokens.
        """
        rows = torch.as_tensor(np.asarray(token_ids))
        return self.tokenizer.batch_decode(rows.reshape(-1, rows.shape[-1]), **kwargs)

    def post_process_instance_segmentation(self, *args: Any, **kwargs: Any) -> Any:
        """
        Not to be done, as `post_process_panoptic_segmentation`.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "masks of this model belong to classes, and do not tell one instance from another: use "
            "post_process_semantic_segmentation."
        )

    post_process_panoptic_segmentation = post_process_instance_segmentation

    def to_dict(self) -> dict[str, Any]:
        """What is saved: the image processor's options, the templates with their name, and where the code is."""
        saved = super().to_dict()
        # The library adds it when it saves, and leaves it out when it loads
        saved["auto_map"] = {self._auto_class: f"{type(self).__module__.rpartition('.')[2]}.{type(self).__name__}"}
        saved["templates"] = {"name": self.templates_name, "prompts": list(self.templates)}
        return saved

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model inputs that `__call__` can return."""
        return [*self.image_processor.model_input_names, "input_ids", "attention_mask"]


def _rows(tokens: np.ndarray, owner: np.ndarray, *, fill: bool) -> np.ndarray:
    """Prompts (n, tokens) of the labels (n,) that own them, as (labels, prompts, tokens).

    Where a label has fewer prompts than others its first one is repeated, if `fill` says so: a row without any token
    would have no end of text to be pooled at. Otherwise it is 0.
    """
    counts = np.bincount(owner)
    first = np.cumsum(counts) - counts
    rows = np.repeat(tokens[first][:, None] * fill, counts.max(), axis=1)
    rows[owner, np.arange(len(owner)) - first[owner]] = tokens
    return rows


def _class_masks(label_map: np.ndarray, ignore_index: int) -> tuple[np.ndarray, np.ndarray]:
    """One mask (n, height, width) float32 and one index (n,) int64 for each class in a map (height, width)."""
    classes = np.unique(label_map)
    classes = classes[classes != ignore_index]
    return np.equal(label_map, classes[:, None, None]).astype(np.float32), classes


__all__ = ["DEFAULT_TEMPLATES", "SANProcessor", "SANProcessorKwargs", "resolve_templates"]
