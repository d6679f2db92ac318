# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""Images and words in, tensors out, and back again. The public names load on first use."""

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "drawing": ("label_colors", "label_png", "overlay", "palette"),
    "image_processing_san": ("SANImageProcessor", "SANImageProcessorKwargs", "SANImageProcessorPil"),
    "labels_san": ("normalize_labels", "split_synonyms"),
    "pipeline_san": ("OpenVocabularySegmentationPipeline",),
    "processing_san": ("DEFAULT_TEMPLATES", "SANProcessor"),
    "segmenter": ("Segment", "Segmentation", "Segmenter", "Vocabulary"),
    "vocabulary_san": (
        "EXTENSIONS",
        "OTHER_LABEL",
        "ClassList",
        "extend_labels",
        "load_vocabulary",
        "prompt_templates",
        "template_names",
        "vocabulary_names",
    ),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

if TYPE_CHECKING:
    from .drawing import label_colors, label_png, overlay, palette
    from .image_processing_san import SANImageProcessor, SANImageProcessorKwargs, SANImageProcessorPil
    from .labels_san import normalize_labels, split_synonyms
    from .pipeline_san import OpenVocabularySegmentationPipeline
    from .processing_san import DEFAULT_TEMPLATES, SANProcessor
    from .segmenter import Segment, Segmentation, Segmenter, Vocabulary
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

__all__ = [
    "DEFAULT_TEMPLATES",
    "EXTENSIONS",
    "OTHER_LABEL",
    "ClassList",
    "OpenVocabularySegmentationPipeline",
    "SANImageProcessor",
    "SANImageProcessorKwargs",
    "SANImageProcessorPil",
    "SANProcessor",
    "Segment",
    "Segmentation",
    "Segmenter",
    "Vocabulary",
    "extend_labels",
    "label_colors",
    "label_png",
    "load_vocabulary",
    "normalize_labels",
    "overlay",
    "palette",
    "prompt_templates",
    "split_synonyms",
    "template_names",
    "vocabulary_names",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its home on first use."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value
