# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""Which models there are: known to transformers' Auto classes and to `pipeline`, and found by the type in a config."""

import functools
from typing import Any, NamedTuple


class ModelClasses(NamedTuple):
    """The classes of a model that was registered here."""

    config: Any
    model: Any
    processor: Any


_registered: dict[str, ModelClasses] = {}


@functools.cache
def register() -> None:
    """Register every model, once. Imports PyTorch and most of transformers."""
    from transformers import AutoModel
    from transformers.pipelines import PIPELINE_REGISTRY

    from .configuration_bridge import BridgeConfig
    from .configuration_open_vocabulary import CUSTOM_PIPELINES
    from .configuration_san import SANConfig
    from .modeling_bridge import BridgeForOpenVocabSegmentation
    from .modeling_san import SANForOpenVocabSegmentation, SANForSemanticSegmentation
    from .processing.pipeline_san import OpenVocabularySegmentationPipeline

    register_model(SANConfig, SANForOpenVocabSegmentation, SANForSemanticSegmentation)
    register_model(BridgeConfig, BridgeForOpenVocabSegmentation)
    for task, entry in CUSTOM_PIPELINES.items():
        PIPELINE_REGISTRY.register_pipeline(
            task, pipeline_class=OpenVocabularySegmentationPipeline, pt_model=AutoModel, type=entry["type"]
        )


def register_model(config_class: Any, model_class: Any, semantic_class: Any = None) -> None:
    """
    Make a model known, so that the Auto classes and everything in this package load it by its `model_type`.

    Args:
        config_class: an `OpenVocabularyConfig`.
        model_class: an `OpenVocabularyModel`.
        semantic_class: its `ForSemanticSegmentation`, if it has one.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForSemanticSegmentation, AutoProcessor
    from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING

    from .processing import SANImageProcessor, SANImageProcessorPil, SANProcessor

    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, model_class, exist_ok=True)
    if semantic_class is not None:
        AutoModelForSemanticSegmentation.register(config_class, semantic_class, exist_ok=True)
    backends: dict[str, type] = {"torchvision": SANImageProcessor, "pil": SANImageProcessorPil}
    AutoImageProcessor.register(config_class, image_processor_classes=backends, exist_ok=True)
    AutoProcessor.register(config_class, SANProcessor, exist_ok=True)
    # Pipelines look for one beside every image processor's code, and would ask whether to trust it
    VIDEO_PROCESSOR_MAPPING.register(config_class, {}, exist_ok=True)  # type: ignore[arg-type]
    _registered[config_class.model_type] = ModelClasses(config_class, model_class, SANProcessor)


def classes_of_type(model_type: Any) -> ModelClasses:
    """
    The classes of a registered model: no other code is run, whatever a config names.

    Raises:
        ValueError: none has this type.
    """
    register()
    if not isinstance(model_type, str) or model_type not in _registered:
        what = "no model type" if model_type is None else f"the type {model_type!r}"
        raise ValueError(f"it has {what}, which is none of this package's: {', '.join(_registered)}")
    return _registered[model_type]


def classes_of(source: Any, **places: Any) -> ModelClasses:
    """
    The classes of the model in a folder or a Hub repository, by its config.

    Args:
        source: the folder, or the repository's name.
        places: where to look, such as `revision`, as of `from_pretrained`.

    Raises:
        OSError: there is no config that can be read.
        ValueError: it is of another kind of model.
    """
    from transformers import PreTrainedConfig

    config, _ = PreTrainedConfig.get_config_dict(source, **places)
    return classes_of_type(config.get("model_type") if isinstance(config, dict) else None)


__all__ = ["ModelClasses", "classes_of", "classes_of_type", "register", "register_model"]
