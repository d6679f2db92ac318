"""How a mask becomes a question to CLIP: attention biases that steer [SLS] tokens (paper, section 3.2).

CLIP recognises a whole image through its [CLS] token. A [SLS] token is a shadow copy of [CLS] that looks at one
region only: in CLIP's deep layers it attends to itself and to the patches, and a bias added to the patch logits before
the softmax tells it where to look. [CLS] and the patches never see a [SLS] token, so their path stays CLIP's own:

              |  [CLS]   patches   [SLS]
    ----------+-----------------------------
    [CLS]     |    0        0      -inf
    patches   |    0        0      -inf
    [SLS]     |  -inf     bias      0 on the diagonal, -inf elsewhere

Nothing is registered on CLIP and nothing of it is copied: its own modules run, in its own order. The upper rows need
no mask and the lower rows need no [CLS], so that each deep layer attends twice, over less; and as only [SLS] tokens
leave the last layer, that one asks nothing on behalf of the patches. Where a layer has to run as a whole, because its
output is recorded or its activations are checkpointed, it gets the table above as the additive mask that CLIP's layers
take with every call. Biases and masks are arguments, so calls share no state: threads may use one model at once, and
`torch.compile`, gradient checkpointing, `eager` and `sdpa` attention work as they do for CLIP.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .clip_trunk import attend, run_layer


def pool_attention_bias(
    attention_bias: Tensor, size: tuple[int, int], method: str = "max", longest_window: int | None = None
) -> Tensor:
    """
    Bring attention biases from the side adapter's grid to CLIP's patch grid.

    Args:
        attention_bias: `(batch, heads, queries, height, width)`.
        size: height and width of CLIP's patch grid.
        method: `"max"` or `"avg"`, adaptive pooling as PyTorch's; `"nearest"`, `"bilinear"` or `"bicubic"`.
        longest_window: cells of the side adapter's grid that one of CLIP's can span in a row or column; needed only
            where sizes are symbols.

    Returns:
        `(batch, heads, queries, size[0] * size[1])`, patches in row order.

    Raises:
        NotImplementedError: for an unknown method.
    """
    if method in ("max", "avg"):
        for dim, cells in ((-2, size[0]), (-1, size[1])):
            windows = _window_cells(attention_bias, dim, cells, longest_window)
            if method == "max":
                attention_bias = functools.reduce(torch.maximum, (cell for cell, _ in windows))
            else:
                attention_bias = functools.reduce(torch.add, (cell * share for cell, share in windows))
        return attention_bias.flatten(-2)
    align_corners = None if method == "nearest" else False
    # The batch stays a dimension of its own, as its length may be a symbol
    pooled = nn.functional.interpolate(attention_bias.flatten(1, 2), size, mode=method, align_corners=align_corners)
    return pooled.unflatten(1, attention_bias.shape[1:3]).flatten(-2)


def _window_cells(
    bias: Tensor, dim: int, cells: int, longest_window: int | None
) -> Iterator[tuple[Tensor, Tensor | float]]:
    """
    The first cell of all windows of adaptive pooling along `dim`, with its share of the window, then the second, ...

    PyTorch's own pooling looks up every window for itself and notes where it found the maximum: 20 times slower.
    """
    length = bias.shape[dim]
    if longest_window is None and length % cells == 0:
        windows = bias.unflatten(dim, (cells, -1))
        yield from ((cell, cells / length) for cell in windows.unbind(dim))
        return
    index = torch.arange(cells, device=bias.device)
    starts, ends = index * length // cells, ((index + 1) * length + cells - 1) // cells
    for offset in range(int((ends - starts).max()) if longest_window is None else longest_window):
        # A window that is shorter than the longest one repeats its last cell
        picked = bias.index_select(dim, torch.minimum(starts + offset, ends - 1))
        share = ((starts + offset < ends) / (ends - starts)).to(bias.dtype)
        yield picked, share[:, None] if dim == -2 else share


def make_attention_mask(attention_bias: Tensor, prompts: int = 0) -> Tensor:
    """
    The additive mask of the table above.

    Args:
        attention_bias: `(batch, heads, queries, patches)`; `heads` may be 1, shared by all heads.
        prompts: number of learned prompt tokens behind the [SLS] tokens, which only these see.

    Returns:
        `(batch, heads, tokens, tokens)` for the tokens [CLS], patches, [SLS], prompts;
        `tokens = 1 + patches + queries + prompts`.
    """
    queries, patches = attention_bias.shape[-2:]
    hidden = float("-inf")
    sls_rows = nn.functional.pad(_make_sls_mask(attention_bias, prompts), (1, 0), value=hidden)
    clip_row = nn.functional.pad(attention_bias.new_zeros(1 + patches), (0, queries + prompts), value=hidden)
    clip_rows = clip_row.expand(*attention_bias.shape[:2], 1 + patches, -1)
    mask = torch.cat([clip_rows, sls_rows], dim=-2)
    # What the prompts themselves attend to is never read; a row must not be hidden from everything.
    return nn.functional.pad(mask, (0, 0, 0, prompts)) if prompts else mask


def _make_sls_mask(attention_bias: Tensor, prompts: int) -> Tensor:
    """The [SLS] tokens' rows of the table, without [CLS]: `(batch, heads, queries, patches + queries + prompts)`."""
    queries = attention_bias.shape[-2]
    others = ~torch.eye(queries, dtype=torch.bool, device=attention_bias.device)
    to_itself = attention_bias.new_zeros(queries, queries).masked_fill(others, float("-inf"))
    to_itself = nn.functional.pad(to_itself, (0, prompts))
    return torch.cat([attention_bias, to_itself.expand(*attention_bias.shape[:2], -1, -1)], dim=-1)


def recognize_regions(
    layers: Sequence[Any],
    hidden_states: Tensor,
    sls_tokens: Tensor,
    attention_biases: Sequence[Tensor],
    prompts: Tensor | None = None,
    call: Callable[..., Tensor] | None = None,
    checkpointing: bool = False,
) -> Tensor:
    """
    Take [SLS] tokens through CLIP's deep layers, each steered to its region.

    Args:
        layers: CLIP's encoder layers after the one where [SLS] tokens start.
        hidden_states: output of that layer, [CLS] first: `(batch, 1 + patches, width)`.
        sls_tokens: what the [SLS] tokens start as: `(batch, queries, width)`.
        attention_biases: for each layer, or once for all of them, a bias on CLIP's grid of shape
            `(batch, heads, queries, patches)`; `heads` may be 1.
        prompts: learned tokens that [SLS] tokens see beside the patches, new ones in each layer (visual prompt tuning,
            arXiv 2203.12119, "deep"): `(layers, prompts, width)`.
        call: runs a layer as a whole, given the layer, its tokens and its mask; None runs the parts of it that the
            [SLS] tokens need.
        checkpointing: without `call`, whether the backward pass computes activations again in those layers that
            transformers has set up for it.

    Returns:
        the [SLS] tokens after the last layer: `(batch, queries, width)`.
    """
    batch, queries = sls_tokens.shape[:2]
    num_prompts = 0 if prompts is None else prompts.shape[1]
    make_mask = _make_sls_mask if call is None else make_attention_mask
    masks = [make_mask(bias, num_prompts) for bias in attention_biases]
    hidden_states = torch.cat([hidden_states, sls_tokens], dim=1)
    tokens = hidden_states.shape[1]
    for index, layer in enumerate(layers):
        mask = masks[index if len(masks) > 1 else 0]
        seen = hidden_states[:, :tokens]
        if prompts is not None:
            seen = torch.cat([seen, prompts[index].to(seen.dtype).expand(batch, -1, -1)], dim=1)
        if call is not None:
            hidden_states = call(layer, seen, mask)
            continue
        arguments = (layer, seen, tokens, mask, index == len(layers) - 1)
        if checkpointing and layer.gradient_checkpointing:
            hidden_states = layer._gradient_checkpointing_func(_run_steered, *arguments)
        else:
            hidden_states = _run_steered(*arguments)
    return hidden_states[:, :tokens][:, -queries:]


def _run_steered(layer: Any, seen: Tensor, tokens: int, mask: Tensor, sls_only: bool) -> Tensor:
    """
    One of CLIP's encoder layers, where [CLS] and patches attend among themselves and [SLS] tokens where they are sent.

    Args:
        layer: a `CLIPEncoderLayer`.
        seen: [CLS], patches, [SLS] tokens and prompts: `(batch, tokens + prompts, width)`.
        tokens: how many of them are no prompts.
        mask: of `_make_sls_mask`.
        sls_only: leave out what only [CLS] and the patches need.

    Returns:
        the tokens after the layer, `(batch, tokens or queries, width)`.
    """
    first_sls = tokens - mask.shape[-2]

    def mix(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        sls = attend(layer, query[:, -mask.shape[-2] :], key[:, 1:], value[:, 1:], mask)
        if sls_only:
            return sls
        clip = attend(layer, query[:, :first_sls], key[:, :first_sls], value[:, :first_sls], None)
        return torch.cat([clip, sls], dim=1)

    asking = torch.arange(first_sls if sls_only else 0, tokens, device=seen.device)
    return run_layer(layer, seen, mix, asking if sls_only or tokens < seen.shape[1] else None)


__all__ = ["make_attention_mask", "pool_attention_bias", "recognize_regions"]
