# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""The lightweight model: a small backbone, any text encoder, and a bridge between their features."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoBackbone, AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs

from .bridge import Bridge, Decoder
from .configuration_bridge import BridgeConfig
from .efficientnet_lite import EfficientNetLite, EfficientNetLiteConfig
from .open_vocabulary import (
    OpenVocabularyModel,
    merge_batches,
    record_on_request,
    refuse_unknown_arguments,
    split_by_padded_size,
    split_for_caches,
)


@dataclass
class BridgeOutput(ModelOutput):
    """
    What the model says of a batch.

    Attributes:
        loss (`Tensor` of shape `()`, *optional*):
            Sum of all weighted terms; given when labels are.
        logits (`Tensor` of shape `(batch, classes, height / stride, width / stride)`):
            Cosines of each pixel with each class, times `logit_scale`; 0 outside an image's own padded size where
            sizes are mixed.
        score_map (`Tensor` of shape `(batch, classes, height / 32, width / 32)`):
            Cosines of the bridge's own pixels with each class.
        class_embeds (`Tensor` of shape `(classes, projection_dim)`):
            Unit vectors of the classes, to pass again as `class_embeds`.
        image_sizes (`Tensor` of shape `(batch, 2)`, *optional*):
            Height and width of each image before padding, as given; post-processing crops the padding with it.
        loss_dict (`dict[str, Tensor]`, *optional*):
            The weighted terms by name.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    score_map: Tensor | None = None
    class_embeds: Tensor | None = None
    image_sizes: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None


class BridgeForOpenVocabSegmentation(OpenVocabularyModel):
    """
    Label every pixel with one of the names in a vocabulary that is given with the call.

    Args:
        config ([`BridgeConfig`]): shapes and choices.
    """

    config: BridgeConfig
    config_class = BridgeConfig
    base_model_prefix = "bridge_model"
    main_input_name = "pixel_values"
    input_modalities = ["image", "text"]
    _supports_sdpa = True
    _no_split_modules = ["InvertedResidual", "BridgeBlock"]
    # A saved model carries this code, so that it loads where the package is not installed.
    _auto_class = "AutoModel"  # type: ignore[assignment]
    own_parameters = ("bridge.", "decoder.", "evidence.")

    def __init__(self, config: BridgeConfig) -> None:
        super().__init__(config)
        vision, text = config.vision_config, config.text_config
        if isinstance(vision, EfficientNetLiteConfig):
            self.vision_model: Any = EfficientNetLite(vision)
        else:
            self.vision_model = AutoBackbone.from_config(vision)
        channels = list(self.vision_model.channels)[-4:]
        self.text_model: Any = AutoModel.from_config(text)
        is_clip = config.text_pooling == "end"
        self.text_projection = (
            nn.Linear(text.hidden_size, config.projection_dim, bias=False) if is_clip else nn.Identity()
        )
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        size, dim = config.bridge_size, config.projection_dim
        self.bridge = Bridge(
            channels[-1],
            dim,
            size=size,
            layers=config.bridge_layers,
            bridge_heads=config.bridge_heads,
            word_heads=config.word_heads,
            directions=config.bridge_directions,
            gain=config.context_gain,
        )
        self.evidence = nn.Conv2d(dim, config.evidence_size, 1)
        top = channels[-1] + size + config.evidence_size
        self.decoder = Decoder([*channels[:-1], top], config.decoder_size, dim, config.decoder_stride)
        stored = torch.zeros(len(config.id2label or ()), dim) if config.has_stored_labels else None
        self.register_buffer("stored_class_embeds", stored)
        self.post_init()
        self.apply_trainable()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Bridge):
            init.constant_(module.gain, module.initial_gain)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, BridgeForOpenVocabSegmentation):
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
            if module.stored_class_embeds is not None:
                init.zeros_(module.stored_class_embeds)

    @classmethod
    def from_parts(
        cls, backbone: PreTrainedModel, text_model: PreTrainedModel, **config_kwargs: Any
    ) -> "BridgeForOpenVocabSegmentation":
        """
        Put a new network between a trained backbone and a trained text encoder.

        Args:
            backbone: an [`EfficientNetLite`], or what `AutoBackbone` loads with four maps at strides 4 to 32.
            text_model: a text encoder; its weights are copied, as the backbone's are.
            config_kwargs: further fields of the config.

        Returns:
            the model, ready to train.
        """
        parts = {"vision_config": backbone.config.to_dict(), "text_config": text_model.config.to_dict()}
        config = cls.config_class(**{"projection_dim": text_model.config.hidden_size, **parts, **config_kwargs})
        model = cls(config)
        model.vision_model.load_state_dict(backbone.state_dict())
        model.text_model.load_state_dict(text_model.state_dict(), strict=False)
        return model

    def get_input_embeddings(self) -> nn.Module:
        """The text encoder's."""
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the text encoder's."""
        self.text_model.set_input_embeddings(value)

    def encode_prompts(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """What the text encoder makes of `(prompts, tokens)`: `(prompts, projection_dim)`."""
        outputs = self.text_model(input_ids=input_ids, attention_mask=attention_mask)
        if self.config.text_pooling == "end":
            return self.text_projection(outputs.pooler_output)
        weights = attention_mask[..., None].to(outputs.last_hidden_state.dtype)
        # A row of padding alone is left out later
        return self.text_projection((outputs.last_hidden_state * weights).sum(1) / weights.sum(1).clamp(min=1))

    def encode_images(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """
        What the backbone says of images, which may be kept where it is frozen and passed as `feature_maps`.

        Args:
            pixel_values: `(batch, 3, height, width)`, both sides multiples of 32.

        Returns:
            maps at strides 4, 8, 16 and 32.
        """
        maps = self.vision_model(pixel_values)
        return tuple(getattr(maps, "feature_maps", maps))[-4:]

    @record_on_request()
    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        class_embeds: Tensor | None = None,
        image_sizes: Tensor | None = None,
        labels: Tensor | None = None,
        feature_maps: Sequence[Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BridgeOutput:
        """
        Segment a batch of images with one vocabulary.

        Args:
            pixel_values: `(batch, 3, height, width)`, normalised, height and width multiples of 32.
            input_ids: prompts of the vocabulary, `(classes, prompts, tokens)`.
            attention_mask: same shape as `input_ids`.
            class_embeds: `(classes, projection_dim)` from `get_class_embeds`, instead of `input_ids`. With neither,
                the stored labels are used.
            image_sizes: `(batch, 2)`, height and width of each image before padding. Each image is run on its own
                padded size, so that what shares a batch never changes its answer.
            labels: `(batch, height, width)` class indices, `config.semantic_loss_ignore_index` = no label.
            feature_maps: what `encode_images` returned for images of one size, instead of `pixel_values`.
            kwargs: `return_dict=False` gives a tuple; a few that `Trainer` and data sets add are ignored.

        Returns:
            [`BridgeOutput`].

        Raises:
            TypeError: for an argument that is unknown.
            ValueError: for inputs of the wrong shape, or without a vocabulary.
        """
        for name in [name for name in kwargs if name.startswith("output_")]:
            kwargs.pop(name)
        refuse_unknown_arguments(type(self), kwargs)
        if (pixel_values is None) == (feature_maps is None):
            raise ValueError("pass pixel_values, or feature_maps of encode_images instead.")
        class_embeds = self.choose_class_embeds(input_ids, attention_mask, class_embeds)
        if pixel_values is None:
            maps = [each.to(self.dtype) for each in feature_maps or ()]
            outputs: Mapping[str, Any] = self.decode(maps, class_embeds)
        else:
            self._check_pixel_values(pixel_values)
            batches: Any = split_by_padded_size(pixel_values, image_sizes, self.config.size_divisor)
            if not self.training:
                batches = split_for_caches(batches, pixel_values.device)
            parts = [self.segment(batch.cut(pixel_values).to(self.dtype), class_embeds)[0] for batch in batches]
            outputs = self._merge(parts, batches, pixel_values.shape[-2:])
        loss_dict = None if labels is None else self.compute_loss(outputs, labels)
        return BridgeOutput(
            loss=None if loss_dict is None else torch.stack(list(loss_dict.values())).sum(),
            **outputs,
            class_embeds=class_embeds,
            image_sizes=image_sizes,
            loss_dict=loss_dict,
        )

    def segment(self, pixel_values: Tensor, class_embeds: Tensor) -> list[dict[str, Tensor]]:
        """
        Images of one size through the network.

        Args:
            pixel_values: `(batch, 3, height, width)`, in the model's precision.
            class_embeds: `(classes, projection_dim)`, float32.

        Returns:
            `logits` and `score_map` as in [`BridgeOutput`], as the only entry.
        """
        return [self.decode(self.encode_images(pixel_values), class_embeds)]

    def decode(self, feature_maps: Sequence[Tensor], class_embeds: Tensor) -> dict[str, Tensor]:
        """
        From the backbone's maps to logits.

        Args:
            feature_maps: as of `encode_images`.
            class_embeds: `(classes, projection_dim)`.
        """
        *maps, smallest = feature_maps
        pixels, image_embeds, score_map = self.bridge(smallest, class_embeds.to(smallest.dtype))
        shares = (score_map / self.config.auxiliary_temperature).softmax(1)
        found = torch.bmm(image_embeds.float().mT, shares.flatten(2)).unflatten(2, shares.shape[2:]).to(smallest.dtype)
        top = torch.cat([smallest, pixels, self.evidence(found)], dim=1)
        maps = maps if self.config.decoder_stride == 4 else maps[1:]
        logits = self.logit_scale.float().exp() * self.decoder([*maps, top], image_embeds)
        return {"logits": logits, "score_map": score_map}

    def compute_loss(self, outputs: Mapping[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """
        Cross-entropy of the logits and, by `config.auxiliary_weight`, of the bridge's scores (DenseCLIP).

        Args:
            outputs: `logits` and `score_map`.
            labels: `(batch, height, width)`.
        """
        config, step = self.config, self.config.loss_stride
        labels = labels[:, ::step, ::step]
        terms = {"loss_cross_entropy": self._cross_entropy(outputs["logits"], labels)}
        if config.auxiliary_weight:
            auxiliary = self._cross_entropy(outputs["score_map"] / config.auxiliary_temperature, labels)
            terms["loss_score_map"] = config.auxiliary_weight * auxiliary
        return terms

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean over the labelled pixels; a batch without any is a loss of 0."""
        logits = nn.functional.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)
        ignored = self.config.semantic_loss_ignore_index
        total = nn.functional.cross_entropy(logits, labels, ignore_index=ignored, reduction="sum")
        return total / (labels != ignored).sum().clamp(min=1)

    def _merge(self, parts: Sequence[Mapping[str, Tensor]], batches: Any, frame: Any) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for name, stride in (("logits", self.config.decoder_stride), ("score_map", 32)):
            grid = (frame[0] // stride, frame[1] // stride)
            merged |= merge_batches([{name: part[name]} for part in parts], batches, (name,), grid)
        return merged

    def _check_pixel_values(self, pixel_values: Any) -> None:
        shape = tuple(pixel_values.shape)
        if len(shape) != 4 or shape[1] != 3 or 0 in shape or shape[2] % 32 or shape[3] % 32:
            raise ValueError(
                f"pixel_values have shape {shape}: expected (batch, 3, height, width) with height and width multiples "
                "of 32, as the processor makes them."
            )


__all__ = ["BridgeForOpenVocabSegmentation", "BridgeOutput"]
