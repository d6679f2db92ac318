"""Images and words in, tensors out, and back again."""

from typing import TYPE_CHECKING, Any

from .drawing import label_colors, label_png, overlay, palette, summarize
from .image_processing_san import SANImageProcessor, SANImageProcessorKwargs
from .labels_san import normalize_labels, parse_labels, split_synonyms
from .processing_san import DEFAULT_TEMPLATES, SANProcessor
from .vocabulary_san import (
    EXTENSIONS,
    OTHER_LABEL,
    ClassList,
    extend_labels,
    load_vocabulary,
    prompt_templates,
    template_names,
    vocabulary_names,
)

if TYPE_CHECKING:
    from .pipeline_san import OpenVocabularySegmentationPipeline

__all__ = [
    "DEFAULT_TEMPLATES",
    "EXTENSIONS",
    "OTHER_LABEL",
    "ClassList",
    "OpenVocabularySegmentationPipeline",
    "SANImageProcessor",
    "SANImageProcessorKwargs",
    "SANProcessor",
    "extend_labels",
    "label_colors",
    "label_png",
    "load_vocabulary",
    "normalize_labels",
    "overlay",
    "palette",
    "parse_labels",
    "prompt_templates",
    "split_synonyms",
    "summarize",
    "template_names",
    "vocabulary_names",
]


def __getattr__(name: str) -> Any:
    """The pipeline, imported on first use: it takes all of transformers' pipelines with it."""
    if name != "OpenVocabularySegmentationPipeline":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .pipeline_san import OpenVocabularySegmentationPipeline

    return OpenVocabularySegmentationPipeline
