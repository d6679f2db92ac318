# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""Side Adapter Network: label every pixel of an image with any words.

Importing the package makes the models known to transformers' Auto classes and to `pipeline`; see `auto.py`. Within the
console command `san` they become known when it loads a model, so that its help and its errors do not wait for PyTorch.
"""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .auto import register
from .builtin import BUILTIN_MODEL

__version__ = "0.1.0"

_HOMES = {
    "BridgeConfig": "modeling_san.configuration_bridge",
    "BridgeForOpenVocabSegmentation": "modeling_san.modeling_bridge",
    "BridgeOutput": "modeling_san.modeling_bridge",
    "SANConfig": "modeling_san.configuration_san",
    "SANForOpenVocabSegmentation": "modeling_san.modeling_san",
    "SANForSemanticSegmentation": "modeling_san.modeling_san",
    "SANImageProcessor": "modeling_san.processing",
    "SANOutput": "modeling_san.modeling_san",
    "SANSemanticSegmenterOutput": "modeling_san.modeling_san",
    "SANPreTrainedModel": "modeling_san.modeling_san",
    "SANProcessor": "modeling_san.processing",
}

__all__ = [
    "BUILTIN_MODEL",
    "BridgeConfig",
    "BridgeForOpenVocabSegmentation",
    "BridgeOutput",
    "SANConfig",
    "SANForOpenVocabSegmentation",
    "SANForSemanticSegmentation",
    "SANImageProcessor",
    "SANOutput",
    "SANPreTrainedModel",
    "SANProcessor",
    "SANSemanticSegmenterOutput",
]

if TYPE_CHECKING:
    from modeling_san.configuration_bridge import BridgeConfig
    from modeling_san.configuration_san import SANConfig
    from modeling_san.modeling_bridge import BridgeForOpenVocabSegmentation, BridgeOutput
    from modeling_san.modeling_san import (
        SANForOpenVocabSegmentation,
        SANForSemanticSegmentation,
        SANOutput,
        SANPreTrainedModel,
        SANSemanticSegmenterOutput,
    )
    from modeling_san.processing import SANImageProcessor, SANProcessor


def __getattr__(name: str) -> Any:
    """Import a public name from its home module on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Names for completion, loaded or not."""
    return sorted([*globals(), *_HOMES])


# A script of the user's may be called san.py
if Path(sys.argv[0]).name not in ("san", "san.exe"):
    register()
