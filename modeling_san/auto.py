"""Makes the models known to transformers' Auto classes and to `pipeline`."""

import functools
from typing import Any


@functools.cache
def register() -> None:
    """Register every class, once. Imports PyTorch and most of transformers."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForSemanticSegmentation, AutoProcessor
    from transformers.pipelines import PIPELINE_REGISTRY

    from .configuration_san import CUSTOM_PIPELINES, SANConfig
    from .modeling_san import SANForOpenVocabSegmentation, SANForSemanticSegmentation
    from .processing import SANImageProcessor, SANProcessor
    from .processing.pipeline_san import OpenVocabularySegmentationPipeline

    AutoConfig.register(SANConfig.model_type, SANConfig, exist_ok=True)
    AutoModel.register(SANConfig, SANForOpenVocabSegmentation, exist_ok=True)
    AutoModelForSemanticSegmentation.register(SANConfig, SANForSemanticSegmentation, exist_ok=True)
    AutoImageProcessor.register(SANConfig, image_processor_classes={"pil": SANImageProcessor}, exist_ok=True)
    AutoProcessor.register(SANConfig, SANProcessor, exist_ok=True)
    entry: Any
    for task, entry in CUSTOM_PIPELINES.items():
        PIPELINE_REGISTRY.register_pipeline(
            task, pipeline_class=OpenVocabularySegmentationPipeline, pt_model=AutoModel, type=entry["type"]
        )


__all__ = ["register"]
