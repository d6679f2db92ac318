# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""How a mask becomes a question to CLIP: attention biases that steer [SLS] tokens (paper, section 3.2).

CLIP recognises a whole image through its [CLS] token. A [SLS] token is a shadow copy of [CLS] that looks at one
region only: in CLIP's deep layers it attends to itself and to the patches, and a bias added to the patch logits before
the softmax tells it where to look. [CLS] and the patches never see a [SLS] token, so their path stays CLIP's own:

              |  [CLS]   patches   [SLS]
    ----------+-----------------------------
    [CLS]     |    0        0      -inf
    patches   |    0        0      -inf
    [SLS]     |  -inf     bias      0 on the diagonal, -inf elsewhere

So a layer takes two streams of tokens: CLIP's attend among themselves, then the steered ones attend to both. Who sees
whom is handed in: `mask_regions` is the table above, and other models have others. Where a layer has to run as a whole
(`can_run_in_parts`), it gets the table as its mask. Nothing is registered on CLIP, so that threads may share a model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .clip_trunk import attend, can_run_in_parts, keys_and_values, update

HIDDEN = float("-inf")


@dataclass(frozen=True)
class StreamMasks:
    """
    Who sees whom in a layer: numbers to add to the attention logits, 0 for what is seen and -inf for what is not.

    Attributes:
        steered: rows of the steered tokens, `(batch, heads or 1, steered, clip + steered + prompts)`.
        clip: rows of CLIP's tokens among themselves, `(batch or 1, heads or 1, clip, clip)`; None shows all of them.
    """

    steered: Tensor
    clip: Tensor | None = None

    def as_table(self, clip_tokens: int) -> Tensor:
        """One mask of a layer that takes all `tokens` at once, CLIP's first, `(batch, heads or 1, tokens, tokens)`."""
        batch, heads, steered, tokens = self.steered.shape
        clip = self.steered.new_zeros(1) if self.clip is None else self.clip.to(self.steered.dtype)
        clip = clip.expand(batch, heads, clip_tokens, clip_tokens)
        clip = nn.functional.pad(clip, (0, tokens - clip_tokens), value=HIDDEN)
        rows = torch.cat([clip, self.steered], dim=-2)
        # What prompts attend to is never read; a row must not be hidden from everything
        return nn.functional.pad(rows, (0, 0, 0, tokens - clip_tokens - steered))


MaskBuilder = Callable[[Tensor, int], StreamMasks]
"""Makes masks of a bias `(batch, heads or 1, steered, patches)` and the number of prompts."""


def mask_regions(attention_bias: Tensor, prompts: int = 0) -> StreamMasks:
    """
    The table above: a steered token sees itself, the patches with its bias, and the prompts; not [CLS].

    Args:
        attention_bias: `(batch, heads or 1, queries, patches)`.
        prompts: number of learned prompt tokens, which only steered tokens see.
    """
    queries = attention_bias.shape[-2]
    others = ~torch.eye(queries, dtype=torch.bool, device=attention_bias.device)
    to_itself = attention_bias.new_zeros(queries, queries).masked_fill(others, HIDDEN)
    to_itself = nn.functional.pad(to_itself, (0, prompts)).expand(*attention_bias.shape[:2], -1, -1)
    to_patches = nn.functional.pad(attention_bias, (1, 0), value=HIDDEN)
    return StreamMasks(torch.cat([to_patches, to_itself], dim=-1))


def recognize_regions(
    layers: Sequence[Any],
    clip_tokens: Tensor,
    sls_tokens: Tensor,
    attention_biases: Sequence[Tensor],
    prompts: Tensor | None = None,
    build_masks: MaskBuilder = mask_regions,
) -> Tensor:
    """
    Take [SLS] tokens through CLIP's deep layers, each steered to its region.

    Args:
        layers: CLIP's encoder layers after the one where [SLS] tokens start.
        clip_tokens: output of that layer, [CLS] first: `(batch, 1 + patches, width)`.
        sls_tokens: what the [SLS] tokens start as: `(batch, queries, width)`.
        attention_biases: for each layer, or once for all of them, a bias on CLIP's grid of shape
            `(batch, heads or 1, queries, patches)`.
        prompts: learned tokens that [SLS] tokens see beside the patches, new ones in each layer (visual prompt tuning,
            arXiv 2203.12119, "deep"): `(layers, prompts, width)`.
        build_masks: who sees whom.

    Returns:
        the [SLS] tokens after the last layer: `(batch, queries, width)`.
    """
    num_prompts = 0 if prompts is None else prompts.shape[1]
    masks = [build_masks(bias, num_prompts) for bias in attention_biases]
    if prompts is not None:
        prompts = prompts.to(sls_tokens.dtype)[:, None].expand(-1, sls_tokens.shape[0], -1, -1)
    for index, layer in enumerate(layers):
        clip_tokens, sls_tokens = steered_layer(
            layer,
            clip_tokens,
            sls_tokens,
            masks[index if len(masks) > 1 else 0],
            prompts=None if prompts is None else prompts[index],
            last=index == len(layers) - 1,
        )
    return sls_tokens


def steered_layer(
    layer: Any,
    clip_tokens: Tensor,
    sls_tokens: Tensor,
    masks: StreamMasks,
    *,
    prompts: Tensor | None = None,
    last: bool = False,
) -> tuple[Tensor, Tensor]:
    """
    Take both streams through one of CLIP's layers.

    Args:
        layer: a `CLIPEncoderLayer`.
        clip_tokens: `(batch, 1 + patches, width)`.
        sls_tokens: `(batch, queries, width)`.
        masks: who sees whom.
        prompts: `(batch, prompts, width)`, to be seen by [SLS] tokens.
        last: whether nobody reads CLIP's tokens afterwards, so that they may be left as they came.

    Returns:
        CLIP's tokens and the [SLS] tokens after the layer.
    """
    others = sls_tokens if prompts is None else torch.cat([sls_tokens, prompts], dim=1)
    if not can_run_in_parts(layer):
        streams = [clip_tokens, others]
        tokens = layer(torch.cat(streams, dim=1), masks.as_table(clip_tokens.shape[1]))
        clip_tokens, others = tokens.split([stream.shape[1] for stream in streams], dim=1)
        return clip_tokens, others[:, : sls_tokens.shape[1]]

    clip_seen, others_seen = keys_and_values(layer, clip_tokens), keys_and_values(layer, others)
    key, value = (torch.cat(pair, dim=1) for pair in zip(clip_seen, others_seen, strict=True))
    sls_tokens = update(layer, sls_tokens, lambda query: attend(layer, query, key, value, masks.steered))
    if not last:
        clip_tokens = update(layer, clip_tokens, lambda query: attend(layer, query, *clip_seen, masks.clip))
    return clip_tokens, sls_tokens


__all__ = ["MaskBuilder", "StreamMasks", "mask_regions", "recognize_regions", "steered_layer"]
