"""How a mask becomes a question to CLIP: attention biases that steer [SLS] tokens (paper, section 3.2).

CLIP recognises a whole picture through its [CLS] token. A [SLS] token is a shadow copy of [CLS] that looks at one
region only: in CLIP's deep layers it attends to itself and to the patches, and a bias added to the patch logits before
the softmax tells it where to look. [CLS] and the patches never see a [SLS] token, so their path stays CLIP's own.

Nothing is registered on CLIP and nothing of it is copied. Its encoder layers already take an additive attention mask
with every call; this module hooks in there, with a mask that encodes who sees whom:

              |  [CLS]   patches   [SLS]
    ----------+-----------------------------
    [CLS]     |    0        0      -inf
    patches   |    0        0      -inf
    [SLS]     |  -inf     bias      0 on the diagonal, -inf elsewhere

As the mask is an argument, calls share no state: threads may use one model at once, and `torch.compile`, gradient
checkpointing, `eager` and `sdpa` attention work as they do for CLIP.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

_POOLING: dict[str, Callable[[Tensor, tuple[int, int]], Tensor]] = {
    "max": nn.functional.adaptive_max_pool2d,
    "avg": nn.functional.adaptive_avg_pool2d,
    "nearest": lambda bias, size: nn.functional.interpolate(bias, size, mode="nearest"),
    "bilinear": lambda bias, size: nn.functional.interpolate(bias, size, mode="bilinear", align_corners=False),
    "bicubic": lambda bias, size: nn.functional.interpolate(bias, size, mode="bicubic", align_corners=False),
}


def pool_attention_bias(attention_bias: Tensor, size: tuple[int, int], method: str = "max") -> Tensor:
    """
    Bring attention biases from the side adapter's grid to CLIP's patch grid.

    Args:
        attention_bias: `(batch, heads, queries, height, width)`.
        size: height and width of CLIP's patch grid.
        method: `"max"`, `"avg"`, `"nearest"`, `"bilinear"` or `"bicubic"`.

    Returns:
        `(batch, heads, queries, size[0] * size[1])`, patches in row order.

    Raises:
        KeyError: for an unknown method.
    """
    return _POOLING[method](attention_bias.flatten(0, 2)[:, None], size).view(*attention_bias.shape[:3], -1)


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
    others = ~torch.eye(queries, dtype=torch.bool, device=attention_bias.device)
    to_itself = attention_bias.new_zeros(queries, queries).masked_fill(others, hidden)
    sls_rows = torch.cat(
        [
            attention_bias.new_full((*attention_bias.shape[:3], 1), hidden),
            attention_bias,
            to_itself.expand(*attention_bias.shape[:2], -1, -1),
        ],
        dim=-1,
    )
    clip_row = nn.functional.pad(attention_bias.new_zeros(1 + patches), (0, queries), value=hidden)
    clip_rows = clip_row.expand(*attention_bias.shape[:2], 1 + patches, -1)
    mask = torch.cat([clip_rows, sls_rows], dim=-2)
    if prompts:
        mask = nn.functional.pad(mask, (0, prompts), value=hidden)
        mask[..., -queries:, -prompts:] = 0.0
        # What the prompts themselves attend to is never read; a row must not be hidden from everything.
        mask = nn.functional.pad(mask, (0, 0, 0, prompts))
    return mask


def recognize_regions(
    layers: Iterable[nn.Module],
    hidden_states: Tensor,
    sls_tokens: Tensor,
    attention_biases: Sequence[Tensor],
    prompts: Tensor | None = None,
    call: Callable[..., Tensor] = lambda layer, *args: layer(*args),
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
        call: how to run a layer; replaced where activations are checkpointed.

    Returns:
        the [SLS] tokens after the last layer: `(batch, queries, width)`.
    """
    batch, queries = sls_tokens.shape[:2]
    num_prompts = 0 if prompts is None else prompts.shape[1]
    masks = [make_attention_mask(bias, num_prompts) for bias in attention_biases]
    hidden_states = torch.cat([hidden_states, sls_tokens], dim=1)
    tokens = hidden_states.shape[1]
    for index, layer in enumerate(layers):
        if prompts is not None:
            layer_prompts = prompts[index].to(hidden_states.dtype).expand(batch, -1, -1)
            hidden_states = torch.cat([hidden_states[:, :tokens], layer_prompts], dim=1)
        hidden_states = call(layer, hidden_states, masks[index if len(masks) > 1 else 0])
    return hidden_states[:, tokens - queries : tokens]


__all__ = ["make_attention_mask", "pool_attention_bias", "recognize_regions"]
