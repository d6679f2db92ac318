# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""What accompanies a model on the Hub. The names load on first use, as they take most of the package with them."""

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {"make_model_card": "modeling_san.hub_card.model_card"}

__all__ = ["make_model_card"]

if TYPE_CHECKING:
    from modeling_san.hub_card.model_card import make_model_card


def __getattr__(name: str) -> Any:
    """Import a public name from its home module on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
