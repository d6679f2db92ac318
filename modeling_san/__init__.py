"""Side Adapter Network: label every pixel of an image with any words.

The public names load on first use, so that `import modeling_san` stays cheap. transformers' Auto classes and its
`pipeline` know the models once a public name is used, or at once where transformers is imported before; see `auto.py`.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from .auto import register
from .builtin import BUILTIN_MODEL

__version__ = "0.1.0"

_HOMES = {
    "SANConfig": "modeling_san.configuration_san",
    "SANForOpenVocabSegmentation": "modeling_san.modeling_san",
    "SANForSemanticSegmentation": "modeling_san.modeling_san",
    "SANImageProcessor": "modeling_san.processing",
    "SANOutput": "modeling_san.modeling_san",
    "SANPreTrainedModel": "modeling_san.modeling_san",
    "SANProcessor": "modeling_san.processing",
}

__all__ = [
    "BUILTIN_MODEL",
    "SANConfig",
    "SANForOpenVocabSegmentation",
    "SANForSemanticSegmentation",
    "SANImageProcessor",
    "SANOutput",
    "SANPreTrainedModel",
    "SANProcessor",
]

if TYPE_CHECKING:
    from modeling_san.configuration_san import SANConfig
    from modeling_san.modeling_san import (
        SANForOpenVocabSegmentation,
        SANForSemanticSegmentation,
        SANOutput,
        SANPreTrainedModel,
    )
    from modeling_san.processing import SANImageProcessor, SANProcessor


def __getattr__(name: str) -> Any:
    """Import a public name from its home module on first use, and register all of them."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    register()
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Names for completion, loaded or not."""
    return sorted([*globals(), *_HOMES])


if "transformers" in sys.modules:
    register()
