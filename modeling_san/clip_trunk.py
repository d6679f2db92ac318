"""CLIP's encoder layers with a say in who attends to whom: their own modules, in their own order."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import eager_attention_forward

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]


def run_layer(layer: Any, hidden_states: Tensor, mix: Mix, asking: Tensor | None = None) -> Tensor:
    """
    Run one encoder layer of CLIP with another way of attending.

    Args:
        layer: a `CLIPEncoderLayer`.
        hidden_states: `(batch, tokens, width)`.
        mix: takes queries `(batch, asking, width)`, keys and values `(batch, tokens, width)` and returns what each of
            those that ask gets, `(batch, asking, width)`; usually by way of `attend`.
        asking: indices of the tokens that go through the layer, where others are only there to be seen.

    Returns:
        `(batch, asking, width)`.
    """
    attention = layer.self_attn
    normed = layer.layer_norm1(hidden_states)
    asked = normed if asking is None else normed.index_select(1, asking)
    attended = mix(attention.q_proj(asked), attention.k_proj(normed), attention.v_proj(normed))
    residual = hidden_states if asking is None else hidden_states.index_select(1, asking)
    hidden_states = residual + attention.out_proj(attended)
    return hidden_states + layer.mlp(layer.layer_norm2(hidden_states))


def attend(layer: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """
    CLIP's attention in the implementation that its config names.

    Args:
        layer: the `CLIPEncoderLayer` that attends.
        query: `(batch, asking, width)`.
        key: `(batch, seen, width)`.
        value: `(batch, seen, width)`.
        mask: added to the logits, `(batch or 1, heads or 1, asking or 1, seen)`.

    Returns:
        `(batch, asking, width)`.
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
    return attended.flatten(2)


__all__ = ["attend", "run_layer"]
