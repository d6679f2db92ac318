# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""The side adapter: a light transformer that proposes masks and tells CLIP where to look (paper, section 3.1)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import eager_attention_forward
from transformers.utils.import_utils import is_torchdynamo_exporting

from .clip_trunk import TrunkStates
from .configuration_san import SANConfig


@dataclass
class MaskProposals:
    """
    What one decoded side layer says.

    Attributes:
        mask_logits: `(batch, queries, height / 16, width / 16)`.
        attention_bias: `(batch, bias layers, bias heads, queries, height / 16, width / 16)`.
    """

    mask_logits: Tensor
    attention_bias: Tensor


class SideAdapterEmbeddings(nn.Module):
    """Patches and queries with their learned positions."""

    def __init__(self, config: SANConfig) -> None:
        super().__init__()
        width, patch_size = config.side_hidden_size, config.side_patch_size
        grid = config.side_image_size // patch_size
        self.patch_embedding = nn.Conv2d(
            config.vision_config.num_channels, width, kernel_size=patch_size, stride=patch_size
        )
        self.position_embedding = nn.Parameter(torch.zeros(1, width, grid, grid))
        self.query_embedding = nn.Parameter(torch.zeros(1, config.num_queries, width))
        self.query_position_embedding = nn.Parameter(torch.zeros(1, config.num_queries, width))

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Tokens `(batch, queries + patches, side width)`, positions of that shape for one image, and the grid."""
        patches = self.patch_embedding(pixel_values)
        height, width = patches.shape[-2:]
        positions: Tensor = self.position_embedding
        # An exported program takes any size: it may not depend on whether this one is the grid's own
        if is_torchdynamo_exporting() or positions.shape[-2:] != (height, width):
            positions = nn.functional.interpolate(positions, (height, width), mode="bicubic", align_corners=False)
        queries = self.query_embedding.expand(patches.shape[0], -1, -1)
        tokens = torch.cat([queries, patches.flatten(2).transpose(1, 2)], dim=1)
        positions = torch.cat([self.query_position_embedding, positions.flatten(2).transpose(1, 2)], dim=1)
        return tokens, positions, (height, width)


class SideAdapterAttention(nn.Module):
    """Self-attention among queries and patches, one projection for queries, keys and values."""

    def __init__(self, config: SANConfig) -> None:
        super().__init__()
        self.config = config
        self.num_heads = config.side_num_heads
        self.scale = (config.side_hidden_size // config.side_num_heads) ** -0.5
        self.qkv = nn.Linear(config.side_hidden_size, 3 * config.side_hidden_size)
        self.projection = nn.Linear(config.side_hidden_size, config.side_hidden_size)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        """Map `(batch, tokens, side width)` to the same shape; eager attention gives its weights too."""
        batch, tokens, width = hidden_states.shape
        qkv = self.qkv(hidden_states).view(batch, tokens, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        attended, weights = attend(self, query, key, value, None, scaling=self.scale, dropout=0.0, is_causal=False)
        return self.projection(attended.reshape(batch, tokens, width)), weights


class SideAdapterMLP(nn.Module):
    """The two-layer perceptron of a transformer block, with exact GELU."""

    def __init__(self, config: SANConfig) -> None:
        super().__init__()
        inner = int(config.side_hidden_size * config.side_mlp_ratio)
        self.fc1 = nn.Linear(config.side_hidden_size, inner)
        self.fc2 = nn.Linear(inner, config.side_hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map `(batch, tokens, side width)` to the same shape."""
        return self.fc2(nn.functional.gelu(self.fc1(hidden_states)))


class SideAdapterLayer(GradientCheckpointingLayer):
    """A pre-norm transformer block."""

    def __init__(self, config: SANConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.side_hidden_size, eps=config.side_layer_norm_eps)
        self.attention = SideAdapterAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.side_hidden_size, eps=config.side_layer_norm_eps)
        self.mlp = SideAdapterMLP(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map `(batch, tokens, side width)` to the same shape."""
        attended, _ = self.attention(self.layer_norm1(hidden_states))
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class FeatureFusion(nn.Module):
    """Brings patches of a CLIP layer to the side adapter's width and grid."""

    def __init__(self, config: SANConfig) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(config.vision_config.hidden_size, eps=config.side_layer_norm_eps)
        self.projection = nn.Linear(config.vision_config.hidden_size, config.side_hidden_size)

    def forward(self, clip_patches: Tensor, clip_grid: tuple[int, int], grid: tuple[int, int]) -> Tensor:
        """Map `(batch, clip patches, CLIP width)` on CLIP's grid to `(batch, patches, side width)` on `grid`."""
        features = self.projection(self.layer_norm(clip_patches)).transpose(1, 2)
        features = features.reshape(*features.shape[:2], *clip_grid)
        features = nn.functional.interpolate(features, grid, mode="bilinear", align_corners=False)
        return features.flatten(2).transpose(1, 2)


class MaskDecoderMLP(nn.Module):
    """Three linear layers with ReLU in between, or two and another last one."""

    def __init__(self, input_dim: int, hidden_dim: int, last: nn.Module) -> None:
        super().__init__()
        self.fc1 = nn.Linear(input_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, hidden_dim)
        self.fc3 = last

    def forward(self, hidden_states: Tensor, *args: Tensor) -> Tensor:
        """Map `(..., input_dim)` to what the last layer, which takes further arguments, makes of it."""
        return self.fc3(nn.functional.relu(self.fc2(nn.functional.relu(self.fc1(hidden_states)))), *args)


class QueryProducts(nn.Module):
    """
    Products of queries with what a linear layer makes of patches, one after the other `dim` of its outputs.

    Patches are many and queries are few: q (W h + b) costs a fraction as (q W) h + q b, and the outputs for all
    patches, the largest tensor of the side adapter, never exist.

    Args:
        input_dim: width of the patches.
        dim: width of the queries.
        products: how many products each query has with each patch.
    """

    def __init__(self, input_dim: int, dim: int, products: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(products * dim, input_dim))
        self.bias = nn.Parameter(torch.zeros(products * dim))

    def forward(self, patches: Tensor, queries: Tensor) -> Tensor:
        """`(batch, products, queries, patches)` of `(batch, patches, input_dim)` and `(batch, queries, dim)`."""
        parts = (-1, queries.shape[-1])
        weight, bias = self.weight.unflatten(0, parts), self.bias.unflatten(0, parts)
        projected = (queries @ weight.transpose(0, 1).flatten(1)).unflatten(-1, (len(weight), -1)).transpose(1, 2)
        shifts = (queries @ bias.T).transpose(1, 2)
        products = torch.baddbmm(shifts.flatten(1)[..., None], projected.flatten(1, 2), patches.transpose(1, 2))
        return products.unflatten(1, shifts.shape[1:])


class BiasScaling(nn.Module):
    """One learned scale and shift for all attention biases."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, attention_bias: Tensor) -> Tensor:
        """Scale and shift a tensor of any shape."""
        return attention_bias * self.weight[0, 0] + self.bias


class MaskDecoder(nn.Module):
    """Masks and attention biases, decoupled: both are products with the same query vectors (paper, section 3.2)."""

    def __init__(self, config: SANConfig) -> None:
        super().__init__()
        width, dim = config.side_hidden_size, config.mask_dim
        self.bias_shape = (config.attention_bias_layers, config.attention_bias_heads)
        self.query_mlp = MaskDecoderMLP(width, dim, nn.Linear(dim, dim))
        self.mask_mlp = MaskDecoderMLP(width, dim, QueryProducts(dim, dim, 1))
        self.bias_mlp = MaskDecoderMLP(width, dim, QueryProducts(dim, dim, math.prod(self.bias_shape)))
        self.bias_scaling = BiasScaling() if config.rescale_attention_bias else None

    def forward(self, queries: Tensor, patches: Tensor, grid: tuple[int, int]) -> MaskProposals:
        """Decode `(batch, queries, side width)` and `(batch, patches, side width)` on a grid."""
        queries = self.query_mlp(queries)
        mask_logits = self.mask_mlp(patches, queries)[:, 0]
        bias = self.bias_mlp(patches, queries).unflatten(1, self.bias_shape)
        if self.bias_scaling is not None:
            bias = self.bias_scaling(bias)
        return MaskProposals(mask_logits.unflatten(-1, grid), bias.unflatten(-1, grid))


class SideAdapter(nn.Module):
    """Side network on the full image that reuses CLIP's features (paper, figure 3)."""

    def __init__(self, config: SANConfig) -> None:
        super().__init__()
        self.num_queries = config.num_queries
        self.fused_layers = {side: clip for clip, side in config.fusion_map}
        self.deep_supervision_layers = config.deep_supervision_layers
        self.embeddings = SideAdapterEmbeddings(config)
        self.layers = nn.ModuleList(SideAdapterLayer(config) for _ in range(config.side_num_layers))
        self.fusions = nn.ModuleDict({str(side): FeatureFusion(config) for _, side in config.fusion_map})
        self.mask_decoder = MaskDecoder(config)

    def forward(self, pixel_values: Tensor, clip_states: TrunkStates) -> list[MaskProposals]:
        """
        Propose masks and the attention biases that go with them.

        Args:
            pixel_values: `(batch, channels, height, width)`, height and width multiples of the patch size.
            clip_states: CLIP's, from its input to the layer where [SLS] tokens start.

        Returns:
            proposals of the last layer in inference; in training of every deep-supervision layer, the last layer last.
        """

        def fuse(tokens: Tensor, index: int) -> Tensor:
            if index not in self.fused_layers:
                return tokens
            clip_patches = clip_states.patches(self.fused_layers[index])
            features = self.fusions[str(index)](clip_patches, clip_states.grid, grid)
            queries, patches = tokens[:, : self.num_queries], tokens[:, self.num_queries :]
            return torch.cat([queries, patches + features], dim=1)

        tokens, positions, grid = self.embeddings(pixel_values)
        tokens = fuse(tokens, 0)
        decoded = self.deep_supervision_layers if self.training else self.deep_supervision_layers[-1:]
        proposals = []
        for index, layer in enumerate(self.layers, start=1):
            tokens = fuse(layer(tokens + positions), index)
            if index in decoded:
                queries, patches = tokens[:, : self.num_queries], tokens[:, self.num_queries :]
                proposals.append(self.mask_decoder(queries, patches, grid))
        return proposals


__all__ = ["MaskProposals", "SideAdapter"]
