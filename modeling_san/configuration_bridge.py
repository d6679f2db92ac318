# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the lightweight model."""

from collections.abc import Iterator
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from .configuration_open_vocabulary import OpenVocabularyConfig
from .efficientnet_lite import EfficientNetLiteConfig

TEXT_POOLINGS = ("mean", "end")
BRIDGE_DIRECTIONS = ("both", "to_words", "to_pixels", "none")


@strict
class BridgeConfig(OpenVocabularyConfig):
    r"""
    Configuration of a [`BridgeForOpenVocabSegmentation`]; the defaults are EfficientNet-Lite0 with all-MiniLM-L6-v2.

    Args:
        vision_config (`dict` or `PreTrainedConfig`, *optional*):
            The image encoder: [`EfficientNetLiteConfig`], or the config of any backbone of transformers whose
            `out_features` are four maps at strides 4, 8, 16 and 32.
        text_config (`dict` or `PreTrainedConfig`, *optional*):
            The text encoder: the config of any text model of transformers.
        text_pooling (`str`, defaults to `"mean"`):
            How a prompt's tokens become one vector: `"mean"`, as in sentence encoders, or `"end"`, the model's own
            pooling, as CLIP's end-of-text token.
        projection_dim (`int`, defaults to 384):
            Width D of the joint space: that of the text encoder's vectors, where it has no projection.
        bridge_size (`int`, defaults to 256):
            Width of the bridge, of its pixels and its words.
        bridge_layers (`int`, defaults to 3):
            Blocks of the bridge.
        bridge_directions (`str`, defaults to `"both"`):
            What flows over it: `"both"`, `"to_words"`, `"to_pixels"`, or `"none"`, to compare them.
        bridge_heads, word_heads (`int`, default to 2 and 4):
            Heads of the attention between pixels and words, and among words.
        decoder_size (`int`, defaults to 128):
            Width of the decoder.
        evidence_size (`int`, defaults to 64):
            Width of what the decoder gets of the words that the bridge found at each pixel.
        decoder_stride (`int`, defaults to 8):
            Pixels of the image for each cell of the logits, in each direction: 4 or 8.
        loss_stride (`int`, defaults to 2):
            Labels of every so many-th pixel count in training, in each direction.
        auxiliary_weight (`float`, defaults to 0.4):
            Weight of the loss of the bridge's own scores (DenseCLIP).
        auxiliary_temperature (`float`, defaults to 0.07):
            Temperature of these.
        context_gain (`float`, defaults to 1e-4):
            What the image changes of the words' vectors at the start of training, as a factor (DenseCLIP).
    """

    model_type = "bridge"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}
    attribute_map = {}
    carried_classes = {
        "AutoConfig": "configuration_bridge.BridgeConfig",
        "AutoModel": "modeling_bridge.BridgeForOpenVocabSegmentation",
    }
    keys_to_ignore_at_inference = ["class_embeds", "image_sizes", "score_map", "loss_dict"]

    projection_dim: int = 384
    trainable_clip_parameters: list[str] | tuple[str, ...] = ()
    text_pooling: str = "mean"
    bridge_size: int = 256
    bridge_layers: int = 3
    bridge_directions: str = "both"
    bridge_heads: int = 2
    word_heads: int = 4
    decoder_size: int = 128
    evidence_size: int = 64
    decoder_stride: int = 8
    loss_stride: int = 2
    auxiliary_weight: float | int = 0.4
    auxiliary_temperature: float = 0.07
    context_gain: float = 1e-4

    def make_part_configs(self) -> None:
        """Turn dictionaries and None into configs of the backbone and the text encoder."""
        vision, text = self.vision_config, self.text_config
        if vision is None or isinstance(vision, dict):
            fields = {"model_type": EfficientNetLiteConfig.model_type, **(vision or {})}
            own = fields["model_type"] == EfficientNetLiteConfig.model_type
            self.vision_config = EfficientNetLiteConfig(**fields) if own else _make_config(fields)
        if text is None or isinstance(text, dict):
            sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
            self.text_config = _make_config(text or {"model_type": "bert", **sizes})

    @property
    def mask_stride(self) -> int:
        """Logits have a cell for each of the decoder's."""
        return self.decoder_stride

    def _requirements(self) -> Iterator[tuple[bool, str]]:
        """What must hold, and what to say where it does not; each may rely on those before it."""
        yield from super()._requirements()
        for name in ("bridge_size", "bridge_heads", "word_heads", "decoder_size", "evidence_size", "loss_stride"):
            yield getattr(self, name) >= 1, f"{name} is {getattr(self, name)}: it must be at least 1."
        for name in ("bridge_layers", "auxiliary_weight"):
            yield getattr(self, name) >= 0, f"{name} is {getattr(self, name)}: it must be at least 0."
        for name in ("bridge_heads", "word_heads"):
            yield (
                self.bridge_size % getattr(self, name) == 0,
                f"bridge_size {self.bridge_size} does not divide into {getattr(self, name)} heads: make it a multiple "
                f"of {name}.",
            )
        for name, choices in (
            ("text_pooling", TEXT_POOLINGS),
            ("bridge_directions", BRIDGE_DIRECTIONS),
            ("decoder_stride", (4, 8)),
        ):
            value, listed = getattr(self, name), ", ".join(map(repr, choices))
            yield value in choices, f"{name} is {value!r}: choose one of {listed}."
        yield (
            self.size_divisor % 32 == 0,
            f"size_divisor is {self.size_divisor}: it must be a multiple of 32, the stride of the smallest map.",
        )
        yield (
            self.auxiliary_temperature > 0,
            f"auxiliary_temperature is {self.auxiliary_temperature}: it must be above 0.",
        )


def _make_config(fields: dict[str, Any]) -> PreTrainedConfig:
    """The config that a dictionary with its `model_type` describes."""
    fields = dict(fields)
    model_type = fields.pop("model_type", None)
    if not isinstance(model_type, str):
        raise ValueError(f"a part's config has no model_type among {', '.join(fields) or 'its fields'}: add it.")
    return AutoConfig.for_model(model_type, **fields)


__all__ = ["BRIDGE_DIRECTIONS", "TEXT_POOLINGS", "BridgeConfig"]
