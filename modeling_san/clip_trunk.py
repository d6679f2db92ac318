# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""How a CLIP is laid out: prefix tokens, layers, final norm and projection, and its text side. Nothing else knows.

CLIP's own modules do all the work, each through its own call: what hooks, wraps, shards, offloads, adapts or quantises
a module is heard. A layer can also run in parts, `keys_and_values` and `update`, which lets the caller say who attends
to whom and leave out what nobody reads; ask `can_run_in_parts` first.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import (
    CLIPAttention,
    CLIPEncoderLayer,
    CLIPVisionEmbeddings,
    eager_attention_forward,
)
from transformers.utils.import_utils import is_torchdynamo_exporting


class AnySizeVisionEmbeddings(CLIPVisionEmbeddings):
    """CLIP's patch embedding, which calls for its table of positions and resizes it where the grid is another."""

    def interpolate_pos_encoding(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        """Positions `(1, 1 + patches, width)` for an image of `height` x `width` pixels; embeddings are not read."""
        positions = self.position_embedding(self.position_ids)
        side = math.isqrt(self.num_patches)
        patch_size: Any = self.patch_size
        grid = (height // patch_size, width // patch_size)
        # An exported program takes any size: it may not depend on whether this one is the table's own
        if not is_torchdynamo_exporting() and grid == (side, side):
            return positions
        table = positions[:, 1:].transpose(1, 2).unflatten(-1, (side, side))
        table = nn.functional.interpolate(table, grid, mode="bicubic", align_corners=False)
        return torch.cat([positions[:, :1], table.flatten(2).transpose(1, 2)], dim=1)


@dataclass(frozen=True)
class TrunkStates:
    """
    What the first layers of a trunk say.

    Attributes:
        hidden_states: the input of the first layer and the output of each, `(batch, 1 + patches, width)`, [CLS] first.
        grid: rows and columns of patches.
    """

    hidden_states: Sequence[Tensor]
    grid: tuple[int, int]

    @property
    def last(self) -> Tensor:
        """All tokens after the last of these layers."""
        return self.hidden_states[-1]

    @property
    def cls_token(self) -> Tensor:
        """`(batch, 1, width)`, after the last of these layers."""
        return self.last[:, :1]

    def patches(self, layer: int) -> Tensor:
        """`(batch, patches, width)` after a layer; 0 is before the first."""
        return self.hidden_states[layer][:, 1:]


class ClipTrunk:
    """
    CLIP's image encoder, taken layer by layer. Holds no weights: it is made of the model's modules for each use.

    Args:
        vision_model: a `CLIPVisionModel` with [`AnySizeVisionEmbeddings`].
        projection: from its width to that of the joint space.
    """

    def __init__(self, vision_model: Any, projection: nn.Module) -> None:
        self.vision_model = vision_model
        self.projection = projection

    def encode(self, pixels: Tensor, num_layers: int) -> TrunkStates:
        """Run the first `num_layers` layers on `(batch, 3, height, width)`."""
        patch_size = self.vision_model.embeddings.patch_size
        tokens = self.vision_model.embeddings(pixels, interpolate_pos_encoding=True)
        hidden_states = [self.vision_model.pre_layrnorm(tokens)]
        for layer in self.vision_model.encoder.layers[:num_layers]:
            hidden_states.append(layer(hidden_states[-1], None))
        return TrunkStates(hidden_states, (pixels.shape[-2] // patch_size, pixels.shape[-1] // patch_size))

    def layers_from(self, start: int) -> Sequence[Any]:
        """The layers after the first `start`."""
        return self.vision_model.encoder.layers[start:]

    def project(self, tokens: Tensor) -> Tensor:
        """Unit vectors in the joint space, `(..., projection_dim)` in float32, of what leaves the last layer."""
        embeds = self.projection(self.vision_model.post_layernorm(tokens))
        return nn.functional.normalize(embeds.float(), dim=-1)


def make_vision_model(config: Any) -> CLIPVisionModel:
    """A `CLIPVisionModel` that takes images of any size; its weights have the names that CLIP's have."""
    vision_model = CLIPVisionModel._from_config(config)
    vision_model.embeddings = AnySizeVisionEmbeddings(config)
    return vision_model


# A layer in parts


def can_run_in_parts(layer: Any) -> bool:
    """
    Whether nobody would notice that a layer's own call is left out.

    Hooks (of recorded outputs, offloading, FSDP or the user), wrappers, another `forward` and gradient checkpointing
    all sit on the call of the layer or of its attention. The modules inside are called either way.
    """
    if not isinstance(layer, CLIPEncoderLayer) or (layer.gradient_checkpointing and layer.training):
        return False
    return all(_is_untouched(*part) for part in ((layer, CLIPEncoderLayer), (layer.self_attn, CLIPAttention)))


def _is_untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    if any(map(len, hooks)) or "forward" in module.__dict__ or not isinstance(module, kind):
        return False
    return torch.compiler.is_compiling() or inspect.unwrap(type(module).forward) is inspect.unwrap(kind.forward)


def keys_and_values(layer: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What others see of `(batch, tokens, width)` in a layer: keys and values of the same shape."""
    normed = layer.layer_norm1(tokens)
    return layer.self_attn.k_proj(normed), layer.self_attn.v_proj(normed)


def update(layer: Any, tokens: Tensor, attend_fn: Callable[[Tensor], Tensor]) -> Tensor:
    """
    Take tokens `(batch, tokens, width)` through a layer.

    `attend_fn` takes their queries and returns what each gathers, in the same shape; see `attend`.
    """
    query = layer.self_attn.q_proj(layer.layer_norm1(tokens))
    tokens = tokens + layer.self_attn.out_proj(attend_fn(query))
    return tokens + layer.mlp(layer.layer_norm2(tokens))


def attend(layer: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """
    CLIP's attention in the implementation that its config names.

    Args:
        layer: the `CLIPEncoderLayer` that attends.
        query: `(batch, tokens, width)`, the shape of what is returned.
        key, value: `(batch, seen, width)`.
        mask: added to the logits, `(batch or 1, heads or 1, tokens or 1, seen)`.
    """
    attention = layer.self_attn
    implementation = ALL_ATTENTION_FUNCTIONS.get_interface(
        attention.config._attn_implementation, eager_attention_forward
    )
    query, key, value = (
        tensor.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for tensor in (query, key, value)
    )
    dropout = attention.dropout if attention.training else 0.0
    attended, _ = implementation(
        attention, query, key, value, mask, scaling=attention.scale, dropout=dropout, is_causal=False
    )
    if is_torchdynamo_exporting():
        # Exporters replace the attention by one whose result lies in memory in another order
        attended = attended.clone(memory_format=torch.contiguous_format)
    return attended.flatten(2)


# The text side


def find_prompt_ends(text_model: Any, input_ids: Tensor) -> Tensor:
    """Where CLIP reads what each of `(prompts, tokens)` says, at its first end-of-text token: `(prompts,)`."""
    # Configs of old checkpoints name token 2 where they mean the one with the highest number
    is_end = input_ids if text_model.eos_token_id == 2 else (input_ids == text_model.eos_token_id).int()
    return is_end.argmax(dim=-1)


def text_layers_in_parts(text_model: Any) -> Sequence[Any] | None:
    """The layers of a text encoder that may run in parts; None where it has to run as a whole."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not hasattr(text_model, "encoder"):
        return None
    layers = text_model.encoder.layers
    untouched = "forward" not in text_model.__dict__ and not text_model._forward_hooks
    return layers if untouched and all(map(can_run_in_parts, layers)) else None


__all__ = [
    "AnySizeVisionEmbeddings",
    "ClipTrunk",
    "TrunkStates",
    "attend",
    "can_run_in_parts",
    "find_prompt_ends",
    "keys_and_values",
    "make_vision_model",
    "text_layers_in_parts",
    "update",
]
