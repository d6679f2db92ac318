# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the Side Adapter Network."""

from collections.abc import Iterator
from typing import Any

from huggingface_hub.dataclasses import strict

from .configuration_open_vocabulary import OpenVocabularyConfig

SLS_TOKEN_FORMATS = ("cls_token", "learnable_token", "pos_embedding")
ATTENTION_BIAS_POOLINGS = ("max", "avg", "bilinear", "bicubic", "nearest")


@strict
class SANConfig(OpenVocabularyConfig):
    r"""
    Everything that shapes a [`SANForOpenVocabSegmentation`]. The defaults are the released ViT-B/16 model.

    CLIP itself, labels and what trains are fields of [`OpenVocabularyConfig`].

    Args:
        asymmetric_input (`bool`, defaults to `True`):
            Whether CLIP sees a smaller image than the side adapter (paper, section 3.1).
        clip_input_scale (`float`, defaults to 0.5):
            Side length of CLIP's image relative to the side adapter's, in (0, 1]; 0.7 for ViT-L/14. Without
            `asymmetric_input` it is not used.
        sls_start_layer (`int`, defaults to 9):
            K: the [SLS] tokens start on the output of this CLIP layer and pass through all later ones.
        sls_token_format (`str`, defaults to `"cls_token"`):
            What [SLS] tokens start as: `"cls_token"`, copies of [CLS]; `"learnable_token"`, learned tokens;
            `"pos_embedding"`, learned tokens added to [CLS].
        num_queries (`int`, defaults to 100):
            Q: mask proposals per image.
        num_clip_prompts (`int`, defaults to 0):
            Learned prompt tokens that [SLS] tokens see in each CLIP layer after `sls_start_layer`; the paper has none.
        side_hidden_size (`int`, defaults to 240), side_num_layers (`int`, defaults to 8),
        side_num_heads (`int`, defaults to 6), side_mlp_ratio (`float`, defaults to 4.0):
            Shape of the side adapter's vision transformer.
        side_image_size (`int`, defaults to 640), side_patch_size (`int`, defaults to 16):
            The learned position grid has `side_image_size / side_patch_size` cells a side; other image sizes
            resize it.
        side_layer_norm_eps (`float`, defaults to 1e-6):
            Epsilon of the side adapter's layer norms.
        fusion_map (`list[list[int]]`, defaults to `[[0, 0], [3, 1], [6, 2], [9, 3]]`):
            Pairs `[clip_layer, side_layer]`: the patches after that CLIP layer are added to the side adapter's patches
            after that side layer (0 = before the first).
        deep_supervision_layers (`list[int]`, defaults to `[7, 8]`):
            Side layers whose output is decoded in training, ascending; the last one must be the final layer and is the
            one used in inference.
        mask_dim (`int`, defaults to 256):
            Width of the mask decoder's three MLPs and of their products.
        attention_bias_heads (`int`, *optional*):
            Attention biases per layer: one for each of CLIP's heads (the default) or 1, shared by all heads.
        attention_bias_layers (`int`, defaults to 1):
            1: all deep CLIP layers share one bias; otherwise one for each layer after `sls_start_layer`.
        rescale_attention_bias (`bool`, defaults to `True`):
            Whether a learned scale and shift follow the biases.
        attention_bias_pooling (`str`, defaults to `"max"`):
            How a bias comes to CLIP's patch grid: `"max"` or `"avg"` adaptive pooling, or `"bilinear"`, `"bicubic"` or
            `"nearest"` interpolation.
        class_weight (`float`, defaults to 2.0), mask_weight (`float`, defaults to 5.0),
        dice_weight (`float`, defaults to 5.0), no_object_weight (`float`, defaults to 0.1):
            Weights of the loss terms, the first three in matching too.
        train_num_points (`int`, defaults to 12544), oversample_ratio (`float`, defaults to 3.0),
        importance_sample_ratio (`float`, defaults to 0.75):
            Points on which masks are compared, how many candidates are drawn for each, and the share chosen by
            uncertainty.

    Raises:
        ValueError or a strict-dataclass validation error that names the field and what to change.

    Example:

    ```python
    >>> from modeling_san import SANConfig

    >>> config = SANConfig(num_queries=50)
    >>> config.vision_config.hidden_size
    768
    ```
    """

    model_type = "san"
    carried_classes = {
        "AutoConfig": "configuration_san.SANConfig",
        "AutoModel": "modeling_san.SANForOpenVocabSegmentation",
        "AutoModelForSemanticSegmentation": "modeling_san.SANForSemanticSegmentation",
    }
    # What an evaluation loop need not gather over a whole data set; `Trainer` adds to it and wants a list.
    keys_to_ignore_at_inference = [
        "mask_embeds",
        "class_embeds",
        "attention_bias",
        "auxiliary_logits",
        "loss_dict",
        "hidden_states",
        "attentions",
        "side_hidden_states",
        "side_attentions",
    ]

    asymmetric_input: bool = True
    clip_input_scale: float | int = 0.5
    sls_start_layer: int = 9
    sls_token_format: str = "cls_token"

    num_queries: int = 100
    num_clip_prompts: int = 0
    side_hidden_size: int = 240
    side_num_layers: int = 8
    side_num_heads: int = 6
    side_mlp_ratio: float | int = 4.0
    side_image_size: int = 640
    side_patch_size: int = 16
    side_layer_norm_eps: float = 1e-6
    fusion_map: list[list[int]] | tuple[tuple[int, int], ...] = ((0, 0), (3, 1), (6, 2), (9, 3))
    deep_supervision_layers: list[int] | tuple[int, ...] = (7, 8)

    mask_dim: int = 256
    attention_bias_heads: int | Any = None
    attention_bias_layers: int = 1
    rescale_attention_bias: bool = True
    attention_bias_pooling: str = "max"

    class_weight: float | int = 2.0
    mask_weight: float | int = 5.0
    dice_weight: float | int = 5.0
    no_object_weight: float | int = 0.1
    train_num_points: int = 12544
    oversample_ratio: float | int = 3.0
    importance_sample_ratio: float | int = 0.75

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in what follows from CLIP's configs."""
        super().__post_init__(**kwargs)
        if self.attention_bias_heads is None:
            self.attention_bias_heads = self.vision_config.num_attention_heads
        # JSON knows lists only; one form makes a saved and loaded config equal to the original.
        self.fusion_map = [list(pair) for pair in self.fusion_map]
        self.deep_supervision_layers = list(self.deep_supervision_layers)

    @property
    def mask_stride(self) -> int:
        """Masks have a cell for each patch of the side adapter."""
        return self.side_patch_size

    @property
    def num_recognition_layers(self) -> int:
        """CLIP layers that [SLS] tokens pass through."""
        return self.num_clip_layers - self.sls_start_layer

    def _requirements(self) -> Iterator[tuple[bool, str]]:
        """What must hold, and what to say where it does not; each may rely on those before it."""
        yield from super()._requirements()
        for name in (
            *("num_queries", "mask_dim", "train_num_points"),
            *("side_hidden_size", "side_num_layers", "side_num_heads", "side_image_size", "side_patch_size"),
        ):
            yield getattr(self, name) >= 1, f"{name} is {getattr(self, name)}: it must be at least 1."
        for name, choices in (
            ("sls_token_format", SLS_TOKEN_FORMATS),
            ("attention_bias_pooling", ATTENTION_BIAS_POOLINGS),
        ):
            value, listed = getattr(self, name), ", ".join(map(repr, choices))
            yield value in choices, f"{name} is {value!r}: choose one of {listed}."

        layers, start = self.num_clip_layers, self.sls_start_layer
        yield (
            0 < start < layers,
            f"sls_start_layer is {start}: choose a CLIP layer from 1 to {layers - 1}, so that at least one of the "
            f"{layers} layers is left for recognition.",
        )
        yield (
            0 < self.clip_input_scale <= 1,
            f"clip_input_scale is {self.clip_input_scale}: it must lie in (0, 1], as CLIP sees the same or a smaller "
            "image.",
        )
        yield (
            self.num_clip_prompts >= 0,
            f"num_clip_prompts is {self.num_clip_prompts}: it must be 0, for no prompts, or more.",
        )

        yield (
            self.side_hidden_size % self.side_num_heads == 0,
            f"side_hidden_size {self.side_hidden_size} does not divide into {self.side_num_heads} heads: make it a "
            "multiple of side_num_heads.",
        )
        patch_size, last, supervised = self.side_patch_size, self.side_num_layers, self.deep_supervision_layers
        for name in ("side_image_size", "size_divisor"):
            size = getattr(self, name)
            yield size % patch_size == 0, f"{name} {size} is not a multiple of side_patch_size {patch_size}."
        for pair in self.fusion_map:
            yield (
                len(pair) == 2 and 0 <= pair[0] <= start and 0 <= pair[1] <= last,
                f"fusion_map holds {pair}: each entry is [clip_layer, side_layer] with clip_layer from 0 to "
                f"sls_start_layer ({start}) and side_layer from 0 to side_num_layers ({last}).",
            )
        yield (
            len({side_layer for _, side_layer in self.fusion_map}) == len(self.fusion_map),
            f"fusion_map {self.fusion_map} names a side layer twice: give each side layer at most one CLIP layer.",
        )
        yield (
            supervised == sorted({*supervised, last}) and supervised[0] >= 1,
            f"deep_supervision_layers is {supervised}: list side layers in ascending order, from 1 to {last}, ending "
            f"with the final layer {last}.",
        )

        heads, recognition_layers = self.vision_config.num_attention_heads, self.num_recognition_layers
        yield (
            self.attention_bias_heads in (1, heads),
            f"attention_bias_heads is {self.attention_bias_heads}: use {heads} (one bias for each head of CLIP) or 1 "
            "(one for all heads).",
        )
        yield (
            self.attention_bias_layers in (1, recognition_layers),
            f"attention_bias_layers is {self.attention_bias_layers}: use {recognition_layers} (one bias for each CLIP "
            "layer after sls_start_layer) or 1 (one for all of them).",
        )

        matching = {name: getattr(self, name) for name in ("class_weight", "mask_weight", "dice_weight")}
        for name, weight in {**matching, "no_object_weight": self.no_object_weight}.items():
            yield weight >= 0, f"{name} is {weight}: loss weights cannot be negative."
        yield any(matching.values()), f"{', '.join(matching)} are all 0: at least one must be positive for matching."
        yield self.oversample_ratio >= 1, f"oversample_ratio is {self.oversample_ratio}: it must be at least 1."
        yield (
            0 <= self.importance_sample_ratio <= 1,
            f"importance_sample_ratio is {self.importance_sample_ratio}: it is a share, from 0 to 1.",
        )


__all__ = ["SANConfig"]
