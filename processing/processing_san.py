"""Processor of SAN: images and labels in, one set of model inputs out."""

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import numpy as np
import torch
from transformers import CLIPTokenizer
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin
from transformers.utils import TensorType

from .image_processing_san import SANImageProcessor
from .labels_san import normalize_labels, split_synonyms
from .vocabulary_san import prompt_templates

DEFAULT_TEMPLATES = "vild"
"""The prompt templates of the released SAN models."""

Templates = str | Iterable[str] | Mapping[str, Any]

_Map = TypeVar("_Map", np.ndarray, torch.Tensor)

if TYPE_CHECKING:
    # Never imported here: transformers takes along what custom code imports, and the pipeline belongs to it.
    from .pipeline_san import OpenVocabularySegmentationPipeline  # noqa: F401


class SANProcessor(ProcessorMixin):
    """SAN's image processor and CLIP's tokenizer, with the prompt templates that labels are put into.

    Args:
        image_processor: prepares the images; None makes one with the defaults.
        tokenizer: CLIP's tokenizer, or one of its kind.
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

    def __init__(
        self,
        image_processor: SANImageProcessor | None = None,
        tokenizer: CLIPTokenizer | None = None,
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
        return_tensors: str | TensorType | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare images, labels or both.

        Args:
            images: one image or a list, see `SANImageProcessor.preprocess`.
            text: labels, a list of class names (one string is one label). They are lower-cased and stripped;
                "car|automobile" is one label with two synonyms.
            segmentation_maps: class indices, one map for each image, see `SANImageProcessor.preprocess`.
            templates: prompt templates for this call, like the argument of the class; None takes the processor's own.
            return_tensors: "pt", "np", or None for numpy arrays and nested lists.
            **kwargs: options of the image processor for this call, such as `size` or `do_resize`.

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
        if images is None and kwargs:
            raise ValueError(f"{', '.join(sorted(kwargs))}: these are options for images, and there are none")
        inputs = BatchFeature()
        if images is not None:
            inputs.update(
                self.image_processor(
                    images, segmentation_maps=segmentation_maps, return_tensors=return_tensors, **kwargs
                )
            )
            if segmentation_maps is not None:
                ignore_index = kwargs.get("ignore_index", self.image_processor.ignore_index)
                pairs = [_masks(label_map, ignore_index) for label_map in inputs.pop("labels")]
                inputs["mask_labels"], inputs["class_labels"] = map(list, zip(*pairs, strict=True))
        if text is not None:
            inputs.update(self.tokenize_labels(text, templates, return_tensors))
        return inputs

    def tokenize_labels(
        self,
        labels: str | Iterable[str],
        templates: Templates | None = None,
        return_tensors: str | TensorType | None = "pt",
    ) -> BatchFeature:
        """Put labels into the prompt templates and tokenize the prompts, see `__call__`.

        Args:
            labels: class names.
            templates: prompt templates; None takes the processor's own.
            return_tensors: "pt", "np", or None for nested lists.

        Returns:
            `input_ids` and `attention_mask`, both (labels, prompts, tokens) int64.

        Raises:
            ValueError: labels or templates are refused, or a prompt is longer than the model can read.
        """
        names = normalize_labels(labels)
        patterns = self.templates if templates is None else resolve_templates(templates)[1]
        prompts = [_prompts(name, patterns) for name in names]
        token_ids = self._tokenize(names, prompts)
        ids, mask = self._stack(token_ids)
        if return_tensors is None:
            return BatchFeature({"input_ids": ids.tolist(), "attention_mask": mask.tolist()})
        return BatchFeature({"input_ids": ids, "attention_mask": mask}, tensor_type=return_tensors)

    @overload
    def post_process_semantic_segmentation(
        self, outputs: Any, target_sizes: Any = None, *, return_scores: Literal[False] = False
    ) -> list[torch.Tensor]: ...

    @overload
    def post_process_semantic_segmentation(
        self, outputs: Any, target_sizes: Any = None, *, return_scores: Literal[True]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]: ...

    def post_process_semantic_segmentation(
        self, outputs: Any, target_sizes: Any = None, *, return_scores: bool = False
    ) -> list[torch.Tensor] | tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Label every pixel, see `SANImageProcessor.post_process_semantic_segmentation`."""
        return self.image_processor.post_process_semantic_segmentation(
            outputs, target_sizes, return_scores=return_scores
        )

    def post_process_semantic_scores(self, outputs: Any, target_sizes: Any = None) -> list[torch.Tensor]:
        """Scores of all classes at every pixel, see `SANImageProcessor.post_process_semantic_scores`."""
        return self.image_processor.post_process_semantic_scores(outputs, target_sizes)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        templates: Templates | None = None,
        **kwargs: Any,
    ) -> "SANProcessor":
        """Load a processor that `save_pretrained` wrote, from a folder or the Hub.

        The classes of the two halves are named here rather than looked up by the library, so that a folder loads
        whether or not anything was registered with the library's automatic classes.

        Args:
            pretrained_model_name_or_path: the folder, or the name of a Hub repository.
            templates: prompt templates to use in place of the saved ones.
            **kwargs: where and what to load, such as `revision`, `token`, `cache_dir`, `subfolder`; and options of the
                image processor to change.

        Raises:
            OSError: there are no processor or no tokenizer files.
        """
        image_processor = SANImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)
        places = {
            key: value for key, value in kwargs.items() if key not in SANImageProcessor.valid_kwargs.__annotations__
        }
        tokenizer = CLIPTokenizer.from_pretrained(pretrained_model_name_or_path, **places)
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            # The library makes a tokenizer that knows no word, and says nothing
            raise OSError(
                f"{pretrained_model_name_or_path} holds no tokenizer files: save the processor into it once more"
            )
        if templates is None:
            saved, _ = cls.get_processor_dict(pretrained_model_name_or_path, **places)
            templates = saved.get("templates", DEFAULT_TEMPLATES)
        return cls(image_processor, tokenizer, templates)

    def to_dict(self) -> dict[str, Any]:
        """What is saved: the image processor's options, and the templates with their name."""
        saved = super().to_dict()
        saved["templates"] = {"name": self.templates_name, "prompts": list(self.templates)}
        return saved

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model inputs that `__call__` can return."""
        return [*self.image_processor.model_input_names, "input_ids", "attention_mask"]

    def _tokenize(self, names: list[str], prompts: list[list[str]]) -> list[list[list[int]]]:
        """Token ids of every prompt of every label, refusing prompts that are too long."""
        flat = [prompt for of_label in prompts for prompt in of_label]
        ids = iter(self.tokenizer(flat, padding=False, truncation=False, verbose=False)["input_ids"])
        token_ids = [[next(ids) for _ in of_label] for of_label in prompts]
        limit = self.tokenizer.model_max_length
        for name, of_label in zip(names, token_ids, strict=True):
            longest = max(map(len, of_label))
            if longest > limit:
                raise ValueError(
                    f"label {name!r} makes a prompt of {longest} tokens and the model reads at most {limit}: shorten "
                    "the label or the templates"
                )
        return token_ids

    def _stack(self, token_ids: list[list[list[int]]]) -> tuple[np.ndarray, np.ndarray]:
        """Ragged token ids as two arrays (labels, prompts, tokens), ids and mask."""
        shape = (
            len(token_ids),
            max(map(len, token_ids)),
            max(len(prompt) for of_label in token_ids for prompt in of_label),
        )
        pad = self.tokenizer.pad_token_id
        ids = np.full(shape, self.tokenizer.eos_token_id if pad is None else pad, dtype=np.int64)
        mask = np.zeros(shape, dtype=np.int64)
        for label, of_label in enumerate(token_ids):
            # A row without any token would have no end of text to be pooled at: unused rows repeat the first prompt
            ids[label, len(of_label) :, : len(of_label[0])] = of_label[0]
            for row, prompt in enumerate(of_label):
                ids[label, row, : len(prompt)] = prompt
                mask[label, row, : len(prompt)] = 1
        return ids, mask


def resolve_templates(templates: Templates) -> tuple[str | None, list[str]]:
    """Name, if there is one, and text of prompt templates.

    Args:
        templates: a name, a list of templates, or the saved form `{"name": ..., "prompts": [...]}`.

    Raises:
        ValueError: the name is unknown, there are no templates, or one does not hold exactly one `{}`.
    """
    if isinstance(templates, str):
        if "{" in templates:
            raise ValueError(f"templates is {templates!r}: pass a list, [{templates!r}], or the name of a set")
        return templates, list(prompt_templates(templates))
    name = None
    if isinstance(templates, Mapping):
        name, templates = templates.get("name"), templates.get("prompts", [])
    patterns = list(templates)
    if not patterns:
        raise ValueError('templates is empty: pass at least one, for example ["a photo of a {}."]')
    for pattern in patterns:
        if not isinstance(pattern, str) or pattern.count("{}") != 1 or set("{}") & set(pattern.replace("{}", "")):
            raise ValueError(
                f"template {pattern!r} cannot be used: expected a string with {{}} once, where the label goes, and no "
                'other braces, for example "a photo of a {}."'
            )
    return name, patterns


def _masks(label_map: _Map, ignore_index: int) -> tuple[_Map, _Map]:
    """One mask (n, height, width) float32 and one index (n,) int64 for each class in a map (height, width)."""
    array = np.asarray(label_map)
    classes = np.unique(array)
    classes = classes[classes != ignore_index]
    masks = np.equal(array, classes[:, None, None]).astype(np.float32)
    if isinstance(label_map, torch.Tensor):
        return torch.from_numpy(masks), torch.from_numpy(classes)
    return masks, classes


def _prompts(label: str, templates: list[str]) -> list[str]:
    """All prompts of one label: its synonyms one after the other, each in every template."""
    return [template.replace("{}", synonym) for synonym in split_synonyms(label) for template in templates]
