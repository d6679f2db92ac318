# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""Short names of what a result depends on: equal where the same would come out, different where it would not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

_STORED_LABELS = "stored_class_embeds"
"""Made of the weights and a vocabulary, and no weight itself."""


def digest_json(value: Any) -> str:
    """32 hexadecimal digits of a value; what JSON does not know counts as the text that it prints as."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def digest_weights(weights: Mapping[str, Tensor]) -> str:
    """
    32 hexadecimal digits of weights by name, in whatever precision they are held and whichever labels are stored.

    Args:
        weights: a model's `state_dict()`.
    """
    return _digest(weights, weights.__getitem__)


def digest_weight_files(folder: Path) -> str | None:
    """`digest_weights` of the safetensors files in a model's folder, one tensor in memory at a time; None without."""
    owners: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        file = safe_open(path, "pt")
        owners |= dict.fromkeys(file.keys(), file)
    return _digest(owners, lambda name: owners[name].get_tensor(name)) if owners else None


def _digest(names: Mapping[str, Any], read: Callable[[str], Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(name for name in names if name != _STORED_LABELS):
        tensor = read(name).detach().cpu()
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        # Half precision is a part of single precision
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


__all__ = ["digest_json", "digest_weight_files", "digest_weights"]
