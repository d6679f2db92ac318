# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""Words and pixels side by side with a bridge between them: Mobile-Former's block (Chen et al., CVPR 2022) with the
words of a vocabulary where it has learned tokens, as "CLIP for Lightweight Semantic Segmentation" (Jin and Yang, 2023)
describes it. Nothing depends on the order of the words or on their number.
"""

import torch
from torch import Tensor, nn

from .efficientnet_lite import ConvNorm, InvertedResidual


class ToWords(nn.Module):
    """Words gather from pixels; keys and values are the pixels themselves, unprojected (Mobile-Former, equation 1)."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.output = nn.Linear(size, size), nn.Linear(size, size)
        self.norm = nn.LayerNorm(size)

    def forward(self, words: Tensor, pixels: Tensor) -> Tensor:
        """Words `(batch, classes, size)` that have seen `pixels` `(batch, size, height, width)`."""
        keys = pixels.flatten(2).mT
        return self.norm(words + self.output(_attend(self.query(words), keys, keys, self.heads)))


class AmongWords(nn.Module):
    """Words look at each other; keys and values are the words themselves (Mobile-Former, figure 3), then an MLP."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.output = nn.Linear(size, size), nn.Linear(size, size)
        self.norm = nn.LayerNorm(size)
        self.mlp = nn.Sequential(nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size))
        self.mlp_norm = nn.LayerNorm(size)

    def forward(self, words: Tensor) -> Tensor:
        """Words `(batch, classes, size)` that have seen each other."""
        words = self.norm(words + self.output(_attend(self.query(words), words, words, self.heads)))
        return self.mlp_norm(words + self.mlp(words))


class ToPixels(nn.Module):
    """Pixels gather from words; queries are the pixels themselves, without norm and output projection (equation 2)."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.key, self.value = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, pixels: Tensor, words: Tensor) -> Tensor:
        """Pixels `(batch, size, height, width)` that have seen `words` `(batch, classes, size)`."""
        gathered = _attend(pixels.flatten(2).mT, self.key(words), self.value(words), self.heads)
        return pixels + gathered.mT.unflatten(2, pixels.shape[-2:])


class BridgeBlock(nn.Module):
    """
    To the words, among them, through the convolutions, and back to the pixels.

    Args:
        size: width of pixels and words.
        bridge_heads: of the attention between pixels and words.
        word_heads: of the attention among words.
        directions: one of `BRIDGE_DIRECTIONS`.
    """

    def __init__(self, size: int, bridge_heads: int, word_heads: int, directions: str) -> None:
        super().__init__()
        self.to_words = ToWords(size, bridge_heads) if directions in ("both", "to_words") else None
        self.among_words = AmongWords(size, word_heads)
        self.convolutions = InvertedResidual(size, size, 3, 1, 4, eps=1e-5)
        self.to_pixels = ToPixels(size, bridge_heads) if directions in ("both", "to_pixels") else None

    def forward(self, pixels: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """New pixels `(batch, size, height, width)` and words `(batch, classes, size)` of these."""
        words = self.among_words(words if self.to_words is None else self.to_words(words, pixels))
        pixels = self.convolutions(pixels)
        return pixels if self.to_pixels is None else self.to_pixels(pixels, words), words


class Bridge(nn.Module):
    """
    The smallest map of a pyramid and a vocabulary, fused.

    Args:
        channels: of the map.
        dim: width D of the joint space.
        size, layers, bridge_heads, word_heads, directions: as in [`BridgeConfig`].
        gain: what the image changes of the words' vectors at the start.
    """

    def __init__(
        self,
        channels: int,
        dim: int,
        *,
        size: int,
        layers: int,
        bridge_heads: int,
        word_heads: int,
        directions: str,
        gain: float,
    ) -> None:
        super().__init__()
        self.pixels_in = ConvNorm(channels, size, 1, 1e-5, act=False)
        self.words_in = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, size))
        self.blocks = nn.ModuleList(BridgeBlock(size, bridge_heads, word_heads, directions) for _ in range(layers))
        self.pixels_out = nn.Conv2d(size, dim, 1)
        self.words_out = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, dim))
        self.initial_gain = gain
        self.gain = nn.Parameter(torch.full((dim,), gain))

    def forward(self, features: Tensor, class_embeds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        Fuse.

        Args:
            features: `(batch, channels, height, width)`.
            class_embeds: `(classes, dim)`.

        Returns:
            pixels `(batch, size, height, width)`, unit vectors of the classes in each image `(batch, classes, dim)`,
            and their cosines with each pixel `(batch, classes, height, width)`.
        """
        pixels = self.pixels_in(features)
        # A sum: `expand` and `repeat` would fix the sizes of an exported program
        words = self.words_in(class_embeds) + features.new_zeros(features.shape[0], 1, 1)
        for block in self.blocks:
            pixels, words = block(pixels, words)
        image_embeds = nn.functional.normalize(class_embeds + self.gain * self.words_out(words), dim=-1)
        return pixels, image_embeds, cosines(self.pixels_out(pixels), image_embeds)


class Decoder(nn.Module):
    """
    A feature pyramid network (Lin et al., CVPR 2017) that ends in an embedding for each pixel, compared with words.

    Args:
        channels: of the pyramid's maps at strides 4, 8 and 16, and of the map at stride 32 that comes to it.
        size: its width.
        dim: width of the embeddings.
        stride: at which they are, 4 or 8.
    """

    def __init__(self, channels: list[int], size: int, dim: int, stride: int) -> None:
        super().__init__()
        used = channels if stride == 4 else channels[1:]
        self.lateral = nn.ModuleList(ConvNorm(width, size, 1, 1e-5, act=False) for width in used)
        self.smooth = nn.ModuleList(_separable(size) for _ in used[:-1])
        self.embed = nn.Linear(size, dim, bias=False)

    def forward(self, maps: list[Tensor], class_embeds: Tensor) -> Tensor:
        """
        Cosines of pixels with classes.

        Args:
            maps: of falling size, the decoder's own only.
            class_embeds: `(batch, classes, dim)`, unit vectors.

        Returns:
            `(batch, classes, height / stride, width / stride)`, float32.
        """
        top = self.lateral[-1](maps[-1])
        for lateral, smooth, features in zip(
            reversed(self.lateral[:-1]), reversed(self.smooth), reversed(maps[:-1]), strict=True
        ):
            top = nn.functional.interpolate(top, scale_factor=2.0, mode="bilinear", align_corners=False)
            top = smooth(top + lateral(features))
        # Embeddings are three times as wide as what they are made of, where products and lengths are found as well:
        # t . E f = (t E) . f and |E f|^2 = f . (E'E) f
        top, weight = top.float(), self.embed.weight.float()
        squares = (top * nn.functional.conv2d(top, (weight.T @ weight)[..., None, None])).sum(1, keepdim=True)
        products = torch.bmm(class_embeds.float() @ weight, top.flatten(2)).unflatten(2, top.shape[-2:])
        return products * squares.clamp(min=1e-12).rsqrt()


def cosines(pixels: Tensor, class_embeds: Tensor) -> Tensor:
    """Of pixels `(batch, dim, height, width)` with unit vectors `(batch, classes, dim)`."""
    units = nn.functional.normalize(pixels.float(), dim=1)
    return torch.bmm(class_embeds.float(), units.flatten(2)).unflatten(2, pixels.shape[-2:])


def _separable(size: int) -> nn.Sequential:
    """Two depthwise convolutions, each followed by a pointwise one."""
    pairs = ((ConvNorm(size, size, 3, 1e-5, groups=size), ConvNorm(size, size, 1, 1e-5)) for _ in range(2))
    return nn.Sequential(*(layer for pair in pairs for layer in pair))


def _attend(queries: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    """What `(batch, queries, size)` gather, with scores that are scaled by the width of a head."""
    # Copies whatever the layout, and products that ask for none: so an exported program's sizes stay free
    split = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (queries, keys, values))
    query, key, value = (each.clone(memory_format=torch.contiguous_format).flatten(0, 1) for each in split)
    shares = (torch.bmm(query, key.mT) * query.shape[-1] ** -0.5).softmax(-1)
    gathered = torch.bmm(shares, value).unflatten(0, (-1, heads)).transpose(1, 2)
    return gathered.clone(memory_format=torch.contiguous_format).flatten(2)


__all__ = ["AmongWords", "Bridge", "BridgeBlock", "Decoder", "ToPixels", "ToWords", "cosines"]
