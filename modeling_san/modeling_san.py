# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""SAN: CLIP recognises, a side adapter says where (paper, section 3)."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel
from transformers import initialization as init
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple
from transformers.utils.import_utils import is_torchdynamo_exporting

from .attention_bias import recognize_regions
from .clip_trunk import ClipTrunk, TrunkStates, make_vision_model
from .configuration_san import SANConfig
from .loss_san import SANLoss, masks_from_label_map
from .open_vocabulary import (
    ImageBatch,
    OpenVocabularyModel,
    are_placeholders,
    merge_batches,
    named_labels,
    record_on_request,
    refuse_unknown_arguments,
    split_by_padded_size,
    split_for_caches,
)
from .pooling import longest_window, pool_attention_bias, scale_linearly, whole_scale
from .side_adapter import (
    BiasScaling,
    MaskProposals,
    QueryProducts,
    SideAdapter,
    SideAdapterAttention,
    SideAdapterEmbeddings,
    SideAdapterLayer,
)

_MAPS = ("masks_queries_logits", "attention_bias")
"""Outputs that have a height and a width."""


@dataclass
class SANOutput(ModelOutput):
    """
    What the model says of a batch.

    Attributes:
        loss (`Tensor` of shape `()`, *optional*):
            Sum of all weighted terms; given when labels are.
        masks_queries_logits (`Tensor` of shape `(batch, queries, height / 16, width / 16)`):
            One mask per query; 0 outside an image's own padded size where sizes are mixed.
        class_queries_logits (`Tensor` of shape `(batch, queries, classes + 1)`):
            What CLIP says of each mask, "no object" last.
        mask_embeds (`Tensor` of shape `(batch, queries, projection_dim)`):
            Unit vectors: the [SLS] tokens in the joint space of images and words.
        class_embeds (`Tensor` of shape `(classes, projection_dim)`):
            Unit vectors of the classes, to pass again as `class_embeds`.
        attention_bias (`Tensor` of shape `(batch, bias layers, bias heads, queries, height / 16, width / 16)`):
            Biases as predicted, before pooling.
        image_sizes (`Tensor` of shape `(batch, 2)`, *optional*):
            Height and width of each image before padding, as given; post-processing crops the padding with it.
        auxiliary_logits (`list[dict[str, Tensor]]`, *optional*):
            `masks_queries_logits` and `class_queries_logits` of the earlier deep-supervision layers; in training.
        loss_dict (`dict[str, Tensor]`, *optional*):
            The weighted terms by name; `_0`, `_1`, ... belong to the auxiliary outputs in order.
        hidden_states (`tuple[Tensor]`, *optional*):
            CLIP's, with `output_hidden_states`: its embeddings and the output of each layer, `(batch, tokens, CLIP
            width)`. Tokens are [CLS] and patches; after `sls_start_layer` also [SLS] tokens (those of each auxiliary
            output, then the final ones) and prompts.
        attentions (`tuple[Tensor]`, *optional*):
            CLIP's, with `output_attentions`: the weights in each layer, `(batch, heads, tokens, tokens)`, of the
            tokens above.
        side_hidden_states (`tuple[Tensor]`, *optional*):
            The side adapter's, with `output_hidden_states`: the output of each layer, before features of CLIP are
            added, `(batch, queries + patches, side width)`.
        side_attentions (`tuple[Tensor]`, *optional*):
            The side adapter's, with `output_attentions`: the weights in each layer, `(batch, side heads, queries +
            patches, queries + patches)`.
    """

    loss: Tensor | None = None
    masks_queries_logits: Tensor | None = None
    class_queries_logits: Tensor | None = None
    mask_embeds: Tensor | None = None
    class_embeds: Tensor | None = None
    attention_bias: Tensor | None = None
    image_sizes: Tensor | None = None
    auxiliary_logits: list[dict[str, Tensor]] | None = None
    loss_dict: dict[str, Tensor] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    side_hidden_states: tuple[Tensor, ...] | None = None
    side_attentions: tuple[Tensor, ...] | None = None


@dataclass
class SANSemanticSegmenterOutput(ModelOutput):
    """
    What [`SANForSemanticSegmentation`] says of a batch: [`SANOutput`] without `class_embeds`, and with

    Attributes:
        logits (`Tensor` of shape `(batch, classes, height / 4, width / 4)`):
            Logarithms of the classes' scores.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    masks_queries_logits: Tensor | None = None
    class_queries_logits: Tensor | None = None
    mask_embeds: Tensor | None = None
    attention_bias: Tensor | None = None
    image_sizes: Tensor | None = None
    auxiliary_logits: list[dict[str, Tensor]] | None = None
    loss_dict: dict[str, Tensor] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    side_hidden_states: tuple[Tensor, ...] | None = None
    side_attentions: tuple[Tensor, ...] | None = None


class SANKwargs(TransformersKwargs, total=False):
    """
    Further arguments of a call. No parameters of `forward`, where `Trainer` would wait for all that are called labels.

    Attributes:
        mask_labels (`Sequence[Tensor]`): for each image `(masks, height, width)` of 0 and 1 ...
        class_labels (`Sequence[Tensor]`): ... and `(masks,)`, the class of each mask.
    """

    mask_labels: Sequence[Tensor] | None
    class_labels: Sequence[Tensor] | None


class SANPreTrainedModel(OpenVocabularyModel):
    """Initialisation and what transformers knows of SAN models."""

    config: SANConfig
    config_class = SANConfig
    base_model_prefix = "san"
    main_input_name = "pixel_values"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["CLIPTextEmbeddings", "CLIPEncoderLayer", "AnySizeVisionEmbeddings", "SideAdapterLayer"]
    _can_record_outputs = {
        "hidden_states": CLIPEncoderLayer,
        "attentions": CLIPAttention,
        "side_hidden_states": SideAdapterLayer,
        "side_attentions": SideAdapterAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, SideAdapterLayer):
            for linear in (module.attention.qkv, module.attention.projection, module.mlp.fc1, module.mlp.fc2):
                init.trunc_normal_(linear.weight, std=std)
                init.zeros_(linear.bias)
        elif isinstance(module, SideAdapterEmbeddings):
            for embedding in (module.position_embedding, module.query_embedding, module.query_position_embedding):
                init.trunc_normal_(embedding, std=std)
        elif isinstance(module, QueryProducts):
            init.normal_(module.weight, std=std)
            init.zeros_(module.bias)
        elif isinstance(module, BiasScaling):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, SANForOpenVocabSegmentation):
            init.normal_(module.background_embedding, std=self.config.projection_dim**-0.5)
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
            init.normal_(module.visual_projection.weight, std=self.config.vision_config.hidden_size**-0.5)
            init.normal_(module.text_projection.weight, std=self.config.text_config.hidden_size**-0.5)
            for tokens in (module.sls_embedding, module.prompt_embedding):
                if tokens is not None:
                    init.trunc_normal_(tokens, std=std)
            if module.stored_class_embeds is not None:
                init.zeros_(module.stored_class_embeds)


class SANForOpenVocabSegmentation(SANPreTrainedModel):
    """
    Label every pixel with one of the names in a vocabulary that is given with the call.

    Args:
        config ([`SANConfig`]): shapes and choices.

    Example:

    ```python
    >>> from PIL import Image
    >>> from modeling_san import BUILTIN_MODEL, SANForOpenVocabSegmentation, SANProcessor

    >>> model = SANForOpenVocabSegmentation.from_pretrained(BUILTIN_MODEL)
    >>> processor = SANProcessor.from_pretrained(BUILTIN_MODEL)
    >>> image = Image.new("RGB", (160, 120), "red")
    >>> inputs = processor(images=image, text=["red plain", "grass"], return_tensors="pt")
    >>> outputs = model(**inputs)
    >>> [label_map] = processor.post_process_semantic_segmentation(outputs, target_sizes=[(120, 160)])
    >>> tuple(label_map.shape)
    (120, 160)
    ```
    """

    # A saved model carries this code, so that it loads where the package is not installed.
    _auto_class = "AutoModel"  # type: ignore[assignment]
    own_parameters = ("side_adapter.", "background_embedding", "sls_embedding", "prompt_embedding")

    def __init__(self, config: SANConfig) -> None:
        super().__init__(config)
        vision, text = config.vision_config, config.text_config
        self.vision_model = make_vision_model(vision)
        self.text_model = CLIPTextModel._from_config(text)
        self.visual_projection = nn.Linear(vision.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(text.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.side_adapter = SideAdapter(config)
        self.background_embedding = nn.Parameter(torch.zeros(1, config.projection_dim))
        learned = config.sls_token_format != "cls_token"
        self.sls_embedding = nn.Parameter(torch.zeros(1, config.num_queries, vision.hidden_size)) if learned else None
        prompts = (config.num_recognition_layers, config.num_clip_prompts, vision.hidden_size)
        self.prompt_embedding = nn.Parameter(torch.zeros(prompts)) if config.num_clip_prompts else None
        stored = torch.zeros(len(config.id2label or ()), config.projection_dim) if config.has_stored_labels else None
        self.register_buffer("stored_class_embeds", stored)
        self.post_init()
        self.apply_trainable()

    @property
    def trunk(self) -> ClipTrunk:
        """CLIP's image encoder, layer by layer."""
        return ClipTrunk(self.vision_model, self.visual_projection)

    def get_input_embeddings(self) -> nn.Module:
        """CLIP's patch embedding, where images enter the part that is frozen."""
        return self.vision_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace CLIP's patch embedding."""
        self.vision_model.set_input_embeddings(value)

    def add_clip_prompts(self, num_prompts: int) -> None:
        """
        Give CLIP's deep layers learned prompt tokens that [SLS] tokens see, in place of any that it has.

        Args:
            num_prompts: tokens in each layer after `config.sls_start_layer`.

        Raises:
            ValueError: for less than one.
        """
        if num_prompts < 1:
            raise ValueError(f"num_prompts is {num_prompts}: give at least 1.")
        layers = self.vision_model.encoder.layers[self.config.sls_start_layer :]
        prompts = self.background_embedding.new_empty(len(layers), num_prompts, self.config.vision_config.hidden_size)
        self.prompt_embedding = nn.Parameter(init.trunc_normal_(prompts, std=self.config.initializer_range))
        self.config.num_clip_prompts = num_prompts

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        """
        What CLIP says of whole images, as `CLIPModel.get_image_features`.

        Args:
            pixel_values: `(batch, 3, height, width)`, as for `forward`; CLIP sees the smaller image, as there.
            kwargs: of `CLIPVisionModel`, such as `output_hidden_states` and `return_dict`.

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` `(batch, projection_dim)`, not normalised, and
            `last_hidden_state` `(batch, 1 + patches, CLIP width)`.

        Raises:
            ValueError: for images of a wrong shape.
        """
        self._check_pixel_values(pixel_values)
        clip_pixels = self.shrink_for_clip(pixel_values.to(self.dtype))
        outputs = self.vision_model(clip_pixels, interpolate_pos_encoding=True, return_dict=True, **kwargs)
        outputs.pooler_output = self.visual_projection(outputs.pooler_output)
        return outputs

    @record_on_request("side")
    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        class_embeds: Tensor | None = None,
        image_sizes: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Unpack[SANKwargs],
    ) -> SANOutput:
        """
        Segment a batch of images with one vocabulary.

        Args:
            pixel_values: `(batch, 3, height, width)`, normalised, height and width multiples of the side patch size.
            input_ids: prompts of the vocabulary, `(classes, prompts, tokens)`.
            attention_mask: same shape as `input_ids`.
            class_embeds: `(classes, projection_dim)` from `get_class_embeds`, instead of `input_ids`. With neither,
                the stored labels are used.
            image_sizes: `(batch, 2)`, height and width of each image before padding. Each image is run on its own
                padded size, so that what shares a batch never changes its answer.
            labels: `(batch, height, width)` class indices, `config.semantic_loss_ignore_index` = no label.
            kwargs: `mask_labels` and `class_labels` instead of `labels`, see [`SANKwargs`]; `output_hidden_states` and
                `output_attentions`, whether to return what each layer of CLIP and of the side adapter says, by default
                as the config has it (sdpa has no attentions to return); `return_dict=False` gives a tuple; a few that
                `Trainer` and data sets add are ignored.

        Returns:
            [`SANOutput`].

        Raises:
            TypeError: for an argument that is unknown.
            ValueError: for inputs of the wrong shape, or without a vocabulary; where hidden states or attentions are
                asked of images of several padded sizes.
        """
        mask_labels, class_labels = kwargs.pop("mask_labels", None), kwargs.pop("class_labels", None)
        wishes = [kwargs.pop(name) for name in list(kwargs) if name.startswith("output_")]
        refuse_unknown_arguments(type(self), kwargs)
        self._check_pixel_values(pixel_values)
        class_embeds = self.choose_class_embeds(input_ids, attention_mask, class_embeds)
        batches: Sequence[ImageBatch] = split_by_padded_size(pixel_values, image_sizes, self.config.size_divisor)
        if any(wish is not False for wish in wishes):
            _refuse_several_sizes(batches)
        elif not self.training:
            batches = split_for_caches(batches, pixel_values.device)

        parts = [self.segment(batch.cut(pixel_values).to(self.dtype), class_embeds) for batch in batches]
        stride = self.config.side_patch_size
        grid = (pixel_values.shape[-2] // stride, pixel_values.shape[-1] // stride)
        *auxiliary, final = [merge_batches(outputs, batches, _MAPS, grid) for outputs in zip(*parts, strict=True)]

        loss_dict = None
        if labels is not None or mask_labels is not None or class_labels is not None:
            targets = self._make_targets(labels, mask_labels, class_labels, pixel_values, len(class_embeds))
            loss_dict = self.compute_loss([*auxiliary, final], *targets, batches)
        return SANOutput(
            loss=None if loss_dict is None else torch.stack(list(loss_dict.values())).sum(),
            **final,
            class_embeds=class_embeds,
            image_sizes=image_sizes,
            auxiliary_logits=auxiliary or None,
            loss_dict=loss_dict,
        )

    def segment(self, pixel_values: Tensor, class_embeds: Tensor) -> list[dict[str, Tensor]]:
        """
        Images of one size through the network (paper, figure 2).

        Args:
            pixel_values: `(batch, 3, height, width)`, in the model's precision.
            class_embeds: `(classes, projection_dim)`, float32.

        Returns:
            `masks_queries_logits`, `class_queries_logits`, `mask_embeds` and `attention_bias` as in [`SANOutput`] of
            each decoded layer of the side adapter, the final one last.
        """
        clip_pixels = self.shrink_for_clip(pixel_values)
        clip_states = self.trunk.encode(clip_pixels, self.config.sls_start_layer)
        proposals = self.side_adapter(pixel_values, clip_states)
        mask_embeds = self.recognize(clip_states, [proposal.attention_bias for proposal in proposals])
        return self.classify(proposals, mask_embeds, class_embeds)

    def shrink_for_clip(self, pixel_values: Tensor) -> Tensor:
        """CLIP's smaller image, `(batch, 3, scale * height, scale * width)`, of `(batch, 3, height, width)`."""
        scale = self.config.clip_input_scale
        if not self.config.asymmetric_input or scale == 1:
            return pixel_values
        if is_torchdynamo_exporting():
            # The sizes of an exported program are symbols, and follow from whole numbers only
            fraction = whole_scale(scale)
            for dim in (-2, -1):
                target = pixel_values.shape[dim] * fraction.numerator // fraction.denominator
                pixel_values = scale_linearly(pixel_values, scale, target, dim)
            return pixel_values
        return nn.functional.interpolate(pixel_values, scale_factor=scale, mode="bilinear", align_corners=False)

    def recognize(self, clip_states: TrunkStates, attention_biases: Sequence[Tensor]) -> list[Tensor]:
        """
        Let CLIP say what each masked region is (paper, section 3.2).

        Args:
            clip_states: CLIP's first K layers.
            attention_biases: sets of biases, each `(batch, bias layers, bias heads, queries, h, w)`. All sets share
                one pass, as [SLS] tokens do not see one another.

        Returns:
            for each set unit vectors `(batch, queries, projection_dim)` in float32.
        """
        pooled = [self._pool(bias, clip_states.grid) for bias in attention_biases]
        sls_tokens = torch.cat([self._start_sls_tokens(clip_states.cls_token)] * len(pooled), dim=1)
        sls_tokens = recognize_regions(
            self.trunk.layers_from(self.config.sls_start_layer),
            clip_states.last,
            sls_tokens,
            torch.cat(pooled, dim=3).unbind(1),
            self.prompt_embedding,
        )
        return list(self.trunk.project(sls_tokens).chunk(len(pooled), dim=1))

    def classify(
        self, proposals: Sequence[MaskProposals], mask_embeds: Sequence[Tensor], class_embeds: Tensor
    ) -> list[dict[str, Tensor]]:
        """Compare what CLIP says of each region with the classes and "no object"; see `segment`."""
        no_object = nn.functional.normalize(self.background_embedding.float(), dim=-1)
        classifier = torch.cat([class_embeds, no_object])
        scale = self.logit_scale.float().exp()
        return [
            {
                "masks_queries_logits": proposal.mask_logits,
                "class_queries_logits": scale * embeds @ classifier.T,
                "mask_embeds": embeds,
                "attention_bias": proposal.attention_bias,
            }
            for proposal, embeds in zip(proposals, mask_embeds, strict=True)
        ]

    def compute_loss(
        self,
        outputs: Sequence[dict[str, Tensor]],
        mask_labels: Sequence[Tensor],
        class_labels: Sequence[Tensor],
        batches: Sequence[ImageBatch],
    ) -> dict[str, Tensor]:
        """
        Weighted loss terms of every decoder output (paper, section 3.4).

        Args:
            outputs: `masks_queries_logits` and `class_queries_logits` of each decoded side layer, the final one last.
            mask_labels: for each image `(masks, height, width)`.
            class_labels: for each image `(masks,)`.
            batches: the images by padded size.

        Returns:
            terms by name, those of the earlier outputs with `_0`, `_1`, ... behind.
        """
        *auxiliary, final = outputs
        criterion = SANLoss(self.config, final["class_queries_logits"].shape[-1] - 1).to(self.device)
        terms = {}
        for suffix, output in [("", final), *((f"_{index}", output) for index, output in enumerate(auxiliary))]:
            losses = criterion(
                output["masks_queries_logits"], output["class_queries_logits"], mask_labels, class_labels, batches
            )
            terms.update({name + suffix: loss for name, loss in losses.items()})
        return terms

    def _pool(self, attention_bias: Tensor, clip_grid: tuple[int, int]) -> Tensor:
        """Biases of all layers on CLIP's grid, `(batch, bias layers, bias heads, queries, patches)`."""
        config, window = self.config, None
        if is_torchdynamo_exporting():
            scale = whole_scale(config.clip_input_scale if config.asymmetric_input else 1)
            patch_size: Any = config.vision_config.patch_size
            window = longest_window(scale, patch_size, config.side_patch_size, config.size_divisor)
        pooled = pool_attention_bias(attention_bias.flatten(1, 2), clip_grid, config.attention_bias_pooling, window)
        return pooled.unflatten(1, attention_bias.shape[1:3])

    def _start_sls_tokens(self, cls_token: Tensor) -> Tensor:
        if self.sls_embedding is None:
            return cls_token.expand(-1, self.config.num_queries, -1)
        if self.config.sls_token_format == "learnable_token":
            return self.sls_embedding.expand(cls_token.shape[0], -1, -1)
        return cls_token + self.sls_embedding

    def _check_pixel_values(self, pixel_values: Tensor) -> None:
        channels, patch_size = self.config.vision_config.num_channels, self.config.side_patch_size
        if not isinstance(pixel_values, Tensor):
            raise TypeError(
                f"pixel_values are a {type(pixel_values).__name__}: the model takes tensors, so pass "
                'return_tensors="pt" to the processor.'
            )
        shape = tuple(pixel_values.shape)
        if len(shape) != 4 or 0 in shape or shape[1] != channels:
            raise ValueError(f"pixel_values have shape {shape}: expected (batch, {channels}, height, width).")
        if shape[2] % patch_size or shape[3] % patch_size:
            raise ValueError(
                f"pixel_values are {shape[2]} x {shape[3]} pixels: height and width must be multiples of "
                f"{patch_size}; SANProcessor pads them."
            )

    def _make_targets(
        self,
        labels: Tensor | None,
        mask_labels: Sequence[Tensor] | None,
        class_labels: Sequence[Tensor] | None,
        pixel_values: Tensor,
        num_labels: int,
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Masks and their classes for each image, checked; made of label maps where those are given."""
        batch, _, *size = pixel_values.shape
        if labels is not None:
            if mask_labels is not None or class_labels is not None:
                raise ValueError("both labels and mask_labels / class_labels were given: pass one kind.")
            if labels.shape != (batch, *size):
                raise ValueError(
                    f"labels have shape {tuple(labels.shape)}: expected {(batch, *size)}, the size of pixel_values."
                )
            ignore_index = self.config.semantic_loss_ignore_index
            pairs = [masks_from_label_map(label_map, num_labels, ignore_index) for label_map in labels]
            return [masks for masks, _ in pairs], [classes for _, classes in pairs]
        if mask_labels is None or class_labels is None:
            raise ValueError("mask_labels and class_labels belong together: one of them is missing.")
        if len(mask_labels) != batch or len(class_labels) != batch:
            raise ValueError(
                f"{len(mask_labels)} mask_labels and {len(class_labels)} class_labels for {batch} images: give one "
                "entry for each image."
            )
        for index, (masks, classes) in enumerate(zip(mask_labels, class_labels, strict=True)):
            if masks.shape != (len(classes), *size):
                raise ValueError(
                    f"mask_labels[{index}] has shape {tuple(masks.shape)}: expected {(len(classes), *size)}, one mask "
                    "for each of class_labels at the size of pixel_values."
                )
            if not ((classes >= 0) & (classes < num_labels)).all():
                raise ValueError(
                    f"class_labels[{index}] holds {classes.tolist()}: expected values from 0 to {num_labels - 1}."
                )
        return mask_labels, class_labels


class SANForSemanticSegmentation(SANForOpenVocabSegmentation):
    """
    The same network for code that is written for semantic segmentation: one vocabulary, one map of logits.

    The vocabulary is the one stored with the checkpoint. One given at load time replaces it, encoded with the
    processor in the checkpoint's folder: `from_pretrained(folder, id2label={0: "sky", 1: "road"})`.

    Args:
        config ([`SANConfig`]): shapes and choices.

    Example:

    ```python
    >>> from PIL import Image
    >>> from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation
    >>> from modeling_san import BUILTIN_MODEL

    >>> image_processor = AutoImageProcessor.from_pretrained(BUILTIN_MODEL)
    >>> model = AutoModelForSemanticSegmentation.from_pretrained(BUILTIN_MODEL, id2label={0: "red plain", 1: "grass"})
    >>> inputs = image_processor([Image.new("RGB", (128, 128), "red")], return_tensors="pt")
    >>> model(**inputs).logits.shape
    torch.Size([1, 2, 32, 32])
    ```
    """

    _auto_class = "AutoModelForSemanticSegmentation"

    def __init__(self, config: SANConfig) -> None:
        config = copy.deepcopy(config)
        super().__init__(config)
        # An evaluation loop gets the logits and nothing else.
        config.keys_to_ignore_at_inference = [
            *type(config).keys_to_ignore_at_inference,
            "masks_queries_logits",
            "class_queries_logits",
            "image_sizes",
        ]

    @classmethod
    def _labels_to_store(cls, config: SANConfig, saved: SANConfig) -> list[str] | None:
        if saved.has_stored_labels and config.has_stored_labels:
            return super()._labels_to_store(config, saved)
        # Nothing is stored, and calls bring no words
        return None if are_placeholders(config.id2label) else named_labels(config.id2label)

    @can_return_tuple
    def forward(  # type: ignore[override]
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        image_sizes: Tensor | None = None,
        **kwargs: Unpack[SANKwargs],
    ) -> SANSemanticSegmenterOutput:
        """
        Segment a batch of images.

        Args:
            pixel_values: `(batch, 3, height, width)`, as for [`SANForOpenVocabSegmentation`].
            labels: `(batch, height, width)` class indices, `config.semantic_loss_ignore_index` = no label.
            image_sizes: `(batch, 2)`, height and width of each image before padding.
            kwargs: further arguments of [`SANForOpenVocabSegmentation.forward`]; see there.

        Returns:
            [`SANSemanticSegmenterOutput`] with `logits` `(batch, classes, height / 4, width / 4)`, the
            logarithms of the scores: their argmax after bilinear upsampling to `(height, width)`, cut to `image_sizes`
            where images are padded, is the segmentation, up to pixels at the borders of regions, where
            post-processing interpolates masks instead.
        """
        output = super().forward(pixel_values, labels=labels, image_sizes=image_sizes, return_dict=True, **kwargs)
        masks = self._enlarge_masks(output.masks_queries_logits.float(), pixel_values, image_sizes)
        probabilities = output.class_queries_logits.float().softmax(-1)[..., :-1]
        scores = probabilities.transpose(1, 2) @ masks.sigmoid().flatten(2)
        logits = scores.clamp(min=torch.finfo(scores.dtype).tiny).log().unflatten(-1, masks.shape[-2:])
        # Pipelines cut each tensor of a batch into the images' parts, and this one has none
        rest = {name: value for name, value in output.items() if name != "class_embeds"}
        return SANSemanticSegmenterOutput(logits=logits, **rest)

    def _enlarge_masks(self, masks: Tensor, pixel_values: Tensor, image_sizes: Tensor | None) -> Tensor:
        """Masks at a quarter of the size, each image's by itself: none looks beyond the border it has alone."""
        batches = split_by_padded_size(pixel_values, image_sizes, self.config.size_divisor)
        parts = []
        for batch in batches:
            size = (batch.size[0] // 4, batch.size[1] // 4)
            cells = batch.cut(masks, self.config.side_patch_size)
            parts.append({"masks": nn.functional.interpolate(cells, size, mode="bilinear", align_corners=False)})
        frame = (pixel_values.shape[-2] // 4, pixel_values.shape[-1] // 4)
        return merge_batches(parts, batches, ["masks"], frame)["masks"]


def _refuse_several_sizes(batches: Sequence[ImageBatch]) -> None:
    if len(batches) > 1:
        raise ValueError(
            "output_hidden_states and output_attentions take images of one padded size at a time, and these are "
            f"{', '.join(f'{height} x {width}' for height, width in (batch.size for batch in batches))}: pass each "
            "size by itself."
        )


# Where the pipeline for image segmentation looks up which models it supports, of the library's own and of others.
MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES.setdefault(SANConfig.model_type, SANForSemanticSegmentation.__name__)

__all__ = [
    "SANForOpenVocabSegmentation",
    "SANForSemanticSegmentation",
    "SANKwargs",
    "SANOutput",
    "SANPreTrainedModel",
    "SANSemanticSegmenterOutput",
]
