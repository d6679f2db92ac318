"""SAN: CLIP recognises, a side adapter says where (paper, section 3)."""

import copy
import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import (
    AutoProcessor,
    CLIPModel,
    CLIPTextModel,
    CLIPVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers import initialization as init
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, ModelOutput, can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .attention_bias import pool_attention_bias, recognize_regions
from .configuration_san import SANConfig
from .loss_san import Group, SANLoss, masks_from_label_map
from .prompt_encoder import encode_prompts
from .side_adapter import MaskDecoder, SideAdapter, SideAdapterAttention, SideAdapterEmbeddings, SideAdapterLayer
from .text_cache_san import cached_class_embeds

TEXT_BATCH_SIZE = 512
"""Prompts encoded at once; bounds the memory that long vocabularies take."""

_PIXELS_AT_ONCE = 2 * 640 * 640
"""That a processor runs through the network together: a tenth faster than eight images of 640 x 640 at once."""

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class LabelProcessor(Protocol):
    """What `set_labels` asks of a processor: [`SANProcessor`] or anything that makes prompts of labels."""

    def __call__(self, *, text: Sequence[str], return_tensors: str) -> Any:
        """Return `input_ids` and `attention_mask` of shape `(labels, prompts, tokens)`."""


@dataclass
class SANOutput(ModelOutput):
    """
    What the model says of a batch.

    Attributes:
        loss (`Tensor` of shape `()`, *optional*):
            Sum of all weighted terms; given when labels are.
        logits (`Tensor` of shape `(batch, classes, height / 4, width / 4)`, *optional*):
            Logarithms of the classes' scores, from [`SANForSemanticSegmentation`] only.
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
    logits: Tensor | None = None
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


def _record_on_request(forward: Callable[..., SANOutput]) -> Callable[..., SANOutput]:
    """Let `output_hidden_states` and `output_attentions` mean both networks; without them nothing is hooked."""
    recorded = capture_outputs(forward, tie_last_hidden_states=False)

    @functools.wraps(forward)
    def wrapper(
        self: "SANForOpenVocabSegmentation",
        *args: Any,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> SANOutput:
        hidden_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        attentions = self.config.output_attentions if output_attentions is None else output_attentions
        if not hidden_states and not attentions:
            return forward(self, *args, **kwargs)
        if attentions and "sdpa" in (self.config._attn_implementation, self.vision_model.config._attn_implementation):
            raise ValueError(
                'output_attentions needs attn_implementation="eager", as "sdpa" keeps no attention weights: load the '
                'model with it, or call model.set_attn_implementation("eager").'
            )
        return recorded(
            self,
            *args,
            output_hidden_states=hidden_states,
            output_side_hidden_states=hidden_states,
            output_attentions=attentions,
            output_side_attentions=attentions,
            return_dict=True,
            **kwargs,
        )

    return wrapper


class SANPreTrainedModel(PreTrainedModel):
    """Initialisation, loading and saving, shared by SAN models."""

    config: SANConfig
    config_class = SANConfig
    base_model_prefix = "san"
    main_input_name = "pixel_values"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["CLIPTextEmbeddings", "CLIPEncoderLayer", "CLIPVisionEmbeddings", "SideAdapterLayer"]
    _can_record_outputs = {
        "hidden_states": CLIPEncoderLayer,
        "attentions": CLIPAttention,
        "side_hidden_states": SideAdapterLayer,
        "side_attentions": SideAdapterAttention,
    }

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: for custom code transformers skips modules without parameters of their own, as CLIP's and our layers."""
        return False

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """Save as every transformers model, and remove weights of an earlier save, in one file or in parts."""
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        whole, index = (Path(save_directory, name) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
        if kwargs.get("variant") is None and is_main_process and whole.exists() and index.exists():
            # Parts of an earlier save are gone by now, so that parts are what was saved; loading would take the file
            in_parts = any(whole.parent.glob(f"{whole.stem}-*-of-*{whole.suffix}"))
            (whole if in_parts else index).unlink()

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
        elif isinstance(module, MaskDecoder):
            if module.bias_scaling is not None:
                init.ones_(module.bias_scaling.weight)
                init.zeros_(module.bias_scaling.bias)
        elif isinstance(module, SANForOpenVocabSegmentation):
            init.normal_(module.background_embedding, std=self.config.projection_dim**-0.5)
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
            init.normal_(module.visual_projection.weight, std=self.config.vision_config.hidden_size**-0.5)
            init.normal_(module.text_projection.weight, std=self.config.text_config.hidden_size**-0.5)
            if module.sls_embedding is not None:
                init.trunc_normal_(module.sls_embedding, std=std)
            if module.prompt_embedding is not None:
                init.trunc_normal_(module.prompt_embedding, std=std)
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
    # The stored vocabulary, where another one was given.
    _keys_to_ignore_on_load_unexpected = ["stored_class_embeds"]
    # `forward` swallows further keyword arguments but does not scale its loss by them: `Trainer` has to divide the
    # loss by the number of accumulated batches itself.
    accepts_loss_kwargs = False

    def __init__(self, config: SANConfig) -> None:
        super().__init__(config)
        vision, text = config.vision_config, config.text_config
        self.vision_model = CLIPVisionModel._from_config(vision)
        self.text_model = CLIPTextModel._from_config(text)
        self.visual_projection = nn.Linear(vision.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(text.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.side_adapter = SideAdapter(config)
        self.background_embedding = nn.Parameter(torch.zeros(1, config.projection_dim))
        learned_sls = config.sls_token_format != "cls_token"
        self.sls_embedding = (
            nn.Parameter(torch.zeros(1, config.num_queries, vision.hidden_size)) if learned_sls else None
        )
        stored = torch.zeros(len(config.id2label or ()), config.projection_dim) if config.has_stored_labels else None
        prompts = (vision.num_hidden_layers - config.sls_start_layer, config.num_clip_prompts, vision.hidden_size)
        self.prompt_embedding = nn.Parameter(torch.zeros(prompts)) if config.num_clip_prompts else None
        self.register_buffer("stored_class_embeds", stored)
        self.post_init()
        self.freeze_clip()

    @classmethod
    def from_clip(cls, clip: CLIPModel, **config_kwargs: Any) -> "SANForOpenVocabSegmentation":
        """
        Put a new side adapter beside a trained CLIP.

        Args:
            clip: any `CLIPModel`; its weights are copied.
            config_kwargs: fields of [`SANConfig`] other than CLIP's own.

        Returns:
            the model, ready to train.
        """
        config = SANConfig(
            vision_config=clip.vision_model.config.to_dict(),
            text_config=clip.text_model.config.to_dict(),
            projection_dim=clip.visual_projection.out_features,
            logit_scale_init_value=clip.logit_scale.item(),
            **config_kwargs,
        )
        model = cls(config)
        model.load_state_dict(clip.state_dict(), strict=False)
        return model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """
        Load as every transformers model; what is frozen in a new model is frozen in a loaded one. Names in `id2label`
        other than the stored ones replace them as the vocabulary.

        Raises:
            ValueError: where the labels to store have no names, or positions other than 0, 1, 2 ...
            OSError: where there are labels to store, and no processor beside the model to encode them with.
        """
        source, labels = pretrained_model_name_or_path, None
        places = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
        if (saved := _read_config(source, places)) is not None:
            if not isinstance(config, PreTrainedConfig):
                # Not the dtype: a config takes its name only, and would look for one that is called "auto"
                kept = places | {name: kwargs.pop(name) for name in ("dtype", "torch_dtype") if name in kwargs}
                config, kwargs = SANConfig.from_pretrained(config or source, return_unused_kwargs=True, **kwargs)
                kwargs.update(kept)
            labels = cls._labels_to_store(config, saved)
        if labels is not None:
            # Code that came with the checkpoint stays with it; the package's own never runs another's.
            from_checkpoint = cls.__module__.startswith("transformers_modules.")
            processor = _load_processor(source, trust_remote_code=from_checkpoint, **places)
            config = copy.deepcopy(config)
            config.has_stored_labels = False
        loaded = super().from_pretrained(source, *args, config=config, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # Loading replaces parameters and with them their requires_grad.
        model.freeze_clip()
        if labels is not None:
            model.set_labels(labels, processor)
        return loaded

    @classmethod
    def _labels_to_store(cls, config: SANConfig, saved: SANConfig) -> list[str] | None:
        """Names that a checkpoint's stored embeddings are not of, to be encoded in their place."""
        if not (saved.has_stored_labels and config.has_stored_labels):
            return None
        labels = _named_labels(config.id2label)
        return None if labels == _named_labels(saved.id2label) else labels

    def freeze_clip(self) -> None:
        """
        Let gradients reach what SAN adds to CLIP, and of CLIP `config.trainable_clip_parameters` only.

        Raises:
            ValueError: where an entry of `trainable_clip_parameters` names no parameter of CLIP.
        """
        own = ("side_adapter.", "background_embedding", "sls_embedding", "prompt_embedding")
        patterns = self.config.trainable_clip_parameters
        clip_names = [name for name, _ in self.named_parameters() if not name.startswith(own)]
        for pattern in patterns:
            if not any(pattern in name for name in clip_names):
                raise ValueError(
                    f"trainable_clip_parameters holds {pattern!r}, which is in no parameter name of CLIP: use for "
                    'example "vision_model", "visual_projection" or "vision_model.encoder.layers.11".'
                )
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith(own) or any(pattern in name for pattern in patterns))
        self.train(self.training)

    def get_input_embeddings(self) -> nn.Module:
        """CLIP's patch embedding, where images enter the part that is frozen."""
        return self.vision_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace CLIP's patch embedding."""
        self.vision_model.set_input_embeddings(value)

    def text_trains(self) -> bool:
        """Whether the text encoder trains: stored label embeddings grow stale then, and batches bring prompts."""
        parts = (self.text_model, self.text_projection)
        return any(parameter.requires_grad for part in parts for parameter in part.parameters())

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

    def train(self, mode: bool = True) -> "SANForOpenVocabSegmentation":
        """Switch to training; parts that hold frozen parameters only stay in evaluation mode."""
        super().train(mode)
        for module in (*self.vision_model.modules(), *self.text_model.modules()):
            own = list(module.parameters())
            if own and not any(parameter.requires_grad for parameter in own):
                module.training = False
        return self

    def get_class_embeds(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """
        Encode a vocabulary: prompts are encoded, normalised, averaged for each class and normalised again (paper,
        section 3.3). What the processor encoded before is read from disk, see `SAN_TEXT_CACHE` in `text_cache_san`.

        Args:
            input_ids: `(classes, prompts, tokens)`, or `(classes, tokens)` for one prompt each.
            attention_mask: same shape; a prompt whose row is all 0 is left out of its class's average. Padding needs
                no mask: CLIP's text encoder is causal, and what follows the end-of-text token changes nothing.

        Returns:
            unit vectors `(classes, projection_dim)`.

        Raises:
            ValueError: for other shapes, or no classes.
        """
        if input_ids.dim() == 2:
            input_ids = input_ids[:, None]
            attention_mask = None if attention_mask is None else attention_mask[:, None]
        if input_ids.dim() != 3 or 0 in input_ids.shape:
            raise ValueError(
                f"input_ids have shape {tuple(input_ids.shape)}: expected (classes, prompts, tokens) with at least "
                'one of each, as processor(text=["sky", "road"]) makes them.'
            )
        return cached_class_embeds(self, input_ids, attention_mask, self._encode_classes)

    @torch.no_grad()
    def set_labels(self, labels: Sequence[str], processor: LabelProcessor) -> None:
        """
        Store a vocabulary with the model: it is saved and loaded with it and used when a call brings no text.

        Args:
            labels: class names, in the order of their indices.
            processor: turns the labels into prompts.
        """
        inputs = processor(text=list(labels), return_tensors="pt")
        class_embeds = self.get_class_embeds(
            inputs["input_ids"].to(self.device), inputs["attention_mask"].to(self.device)
        )
        self.stored_class_embeds = class_embeds.to(self.background_embedding.dtype)
        self.config.has_stored_labels = True
        self.config.id2label = dict(enumerate(labels))
        self.config.label2id = {label: index for index, label in enumerate(labels)}

    @can_return_tuple
    @_record_on_request
    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        class_embeds: Tensor | None = None,
        image_sizes: Tensor | None = None,
        labels: Tensor | None = None,
        mask_labels: Sequence[Tensor] | None = None,
        class_labels: Sequence[Tensor] | None = None,
        *,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
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
            mask_labels: instead of `labels`, for each image `(masks, height, width)` of 0 and 1 ...
            class_labels: ... and `(masks,)`, the class of each mask.
            output_hidden_states: whether to return what each layer of CLIP and of the side adapter says; by default
                as the config has it.
            output_attentions: the same for attention weights, which eager attention has only.
            kwargs: `return_dict=False` gives a tuple; others are ignored, so that data sets may carry further columns.

        Returns:
            [`SANOutput`].

        Raises:
            ValueError: for inputs of the wrong shape, or without a vocabulary; where hidden states or attentions are
                asked of images of several padded sizes, or attentions of other than eager attention.
        """
        self._check_pixel_values(pixel_values)
        class_embeds = self._choose_class_embeds(input_ids, attention_mask, class_embeds)
        classifier = torch.cat([class_embeds, nn.functional.normalize(self.background_embedding.float(), dim=-1)])
        groups = self._group_by_padded_size(pixel_values, image_sizes)
        if len(groups) > 1 and (output_hidden_states or output_attentions):
            raise ValueError(
                "output_hidden_states and output_attentions take images of one padded size at a time, and these are "
                f"{', '.join(f'{height} x {width}' for _, (height, width) in groups)}: pass each size by itself."
            )

        recorded = bool(output_hidden_states or output_attentions)
        runs = groups if recorded or self.training else _split_for_caches(groups, pixel_values.device)
        predictions = []
        for indices, (height, width) in runs:
            whole = len(runs) == 1 and (height, width) == pixel_values.shape[-2:]
            pixels = pixel_values if whole else pixel_values[indices, :, :height, :width]
            pixels = pixels.to(self.dtype)
            clip_pixels = self.shrink_for_clip(pixels)
            clip_grid = self.clip_grid(clip_pixels)
            clip_hidden_states = self.get_clip_hidden_states(clip_pixels)
            proposals = self.side_adapter(pixels, clip_hidden_states, clip_grid)
            attention_biases = [proposal.attention_bias for proposal in proposals]
            mask_embeds = self.recognize(clip_hidden_states[-1], attention_biases, clip_grid, recorded)
            predictions.append(
                [
                    {
                        "masks_queries_logits": proposal.mask_logits,
                        "class_queries_logits": self.logit_scale.float().exp() * embeds @ classifier.T,
                        "mask_embeds": embeds,
                        "attention_bias": proposal.attention_bias,
                    }
                    for proposal, embeds in zip(proposals, mask_embeds, strict=True)
                ]
            )
        grid = tuple(side // self.config.side_patch_size for side in pixel_values.shape[-2:])
        *auxiliary, final = [_merge_groups(parts, runs, grid) for parts in zip(*predictions, strict=True)]

        loss_dict = None
        if labels is not None or mask_labels is not None or class_labels is not None:
            targets = self._make_targets(labels, mask_labels, class_labels, pixel_values, len(class_embeds))
            loss_dict = self.compute_loss([*auxiliary, final], *targets, groups)
        return SANOutput(
            loss=None if loss_dict is None else torch.stack(list(loss_dict.values())).sum(),
            **final,
            class_embeds=class_embeds,
            image_sizes=image_sizes,
            auxiliary_logits=auxiliary or None,
            loss_dict=loss_dict,
        )

    def shrink_for_clip(self, pixel_values: Tensor) -> Tensor:
        """CLIP's smaller image, `(batch, 3, scale * height, scale * width)`, of `(batch, 3, height, width)`."""
        if not self.config.asymmetric_input or self.config.clip_input_scale == 1:
            return pixel_values
        return nn.functional.interpolate(
            pixel_values, scale_factor=self.config.clip_input_scale, mode="bilinear", align_corners=False
        )

    def clip_grid(self, clip_pixels: Tensor) -> tuple[int, int]:
        """Rows and columns of CLIP's patches on `(batch, 3, height, width)`."""
        patch_size = self.vision_model.embeddings.patch_size
        return clip_pixels.shape[-2] // patch_size, clip_pixels.shape[-1] // patch_size

    def get_clip_hidden_states(self, clip_pixels: Tensor) -> list[Tensor]:
        """CLIP's hidden states h_0 ... h_K of `(batch, 3, height, width)`, each `(batch, 1 + patches, CLIP width)`."""
        embeddings = self.vision_model.embeddings(clip_pixels, interpolate_pos_encoding=True)
        hidden_states = [self.vision_model.pre_layrnorm(embeddings)]
        for layer in self.vision_model.encoder.layers[: self.config.sls_start_layer]:
            hidden_states.append(self._run_clip_layer(layer, hidden_states[-1], None))
        return hidden_states

    def recognize(
        self,
        hidden_states: Tensor,
        attention_biases: Sequence[Tensor],
        clip_grid: tuple[int, int],
        whole_layers: bool = False,
    ) -> list[Tensor]:
        """
        Let CLIP say what each masked region is (paper, section 3.2).

        Args:
            hidden_states: h_K, `(batch, 1 + patches, CLIP width)`.
            attention_biases: sets of biases, each `(batch, bias layers, bias heads, queries, h, w)`. All sets share
                one pass, as [SLS] tokens do not see one another.
            clip_grid: rows and columns of CLIP's patches.
            whole_layers: whether to call CLIP's layers as they are, so that hooks on them see all tokens. The answer
                is the same up to rounding, and later.

        Returns:
            for each set unit vectors `(batch, queries, projection_dim)` in float32.
        """
        pooled = torch.cat([self._pool(bias, clip_grid) for bias in attention_biases], dim=3).unbind(1)
        sls_tokens = self._start_sls_tokens(hidden_states[:, :1]).repeat(1, len(attention_biases), 1)
        layers = self.vision_model.encoder.layers[self.config.sls_start_layer :]
        call = self._run_clip_layer if whole_layers else None
        sls_tokens = recognize_regions(
            layers, hidden_states, sls_tokens, pooled, self.prompt_embedding, call, checkpointing=self.training
        )
        embeds = self.visual_projection(self.vision_model.post_layernorm(sls_tokens))
        return list(nn.functional.normalize(embeds.float(), dim=-1).chunk(len(attention_biases), dim=1))

    def compute_loss(
        self,
        outputs: Sequence[dict[str, Tensor]],
        mask_labels: Sequence[Tensor],
        class_labels: Sequence[Tensor],
        groups: Sequence[Group],
    ) -> dict[str, Tensor]:
        """
        Weighted loss terms of every decoder output (paper, section 3.4).

        Args:
            outputs: `masks_queries_logits` and `class_queries_logits` of each decoded side layer, the final one last.
            mask_labels: for each image `(masks, height, width)`.
            class_labels: for each image `(masks,)`.
            groups: indices and padded sizes of the images, in pixels.

        Returns:
            terms by name, those of the earlier outputs with `_0`, `_1`, ... behind.
        """
        final = outputs[-1]
        patch_size = self.config.side_patch_size
        cells = [(indices, (height // patch_size, width // patch_size)) for indices, (height, width) in groups]
        criterion = SANLoss(self.config, final["class_queries_logits"].shape[-1] - 1).to(self.device)
        terms = {}
        for suffix, output in [("", final), *((f"_{index}", output) for index, output in enumerate(outputs[:-1]))]:
            losses = criterion(
                output["masks_queries_logits"], output["class_queries_logits"], mask_labels, class_labels, cells
            )
            terms.update({name + suffix: loss for name, loss in losses.items()})
        return terms

    def _run_clip_layer(self, layer: Any, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        # Frozen layers are in evaluation mode, where transformers does not checkpoint; gradients still pass through
        # them on their way to the biases and the position embedding.
        if self.training and layer.gradient_checkpointing and not layer.training:
            return layer._gradient_checkpointing_func(layer.__call__, hidden_states, attention_mask)
        return layer(hidden_states, attention_mask)

    def _encode_classes(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.text_trains()):
            chunks = input_ids.flatten(0, 1).split(TEXT_BATCH_SIZE)
            if torch.is_grad_enabled() or torch.compiler.is_compiling():
                # Hooks and checkpointing are there for whole layers, and a tree's shape depends on what the words are
                pooled = [self.text_model(chunk).pooler_output for chunk in chunks]
            else:
                pooled = [encode_prompts(self.text_model, chunk) for chunk in chunks]
            prompts = nn.functional.normalize(self.text_projection(torch.cat(pooled)).float(), dim=-1)
            prompts = prompts.view(*input_ids.shape[:2], -1)
            if attention_mask is not None:
                prompts = prompts * attention_mask.any(-1, keepdim=True)
            return nn.functional.normalize(prompts.sum(1), dim=-1)

    def _pool(self, attention_bias: Tensor, clip_grid: tuple[int, int]) -> Tensor:
        """Biases of all layers on CLIP's grid, `(batch, bias layers, bias heads, queries, patches)`."""
        pooled = pool_attention_bias(attention_bias.flatten(1, 2), clip_grid, self.config.attention_bias_pooling)
        return pooled.unflatten(1, attention_bias.shape[1:3])

    def _start_sls_tokens(self, cls_token: Tensor) -> Tensor:
        if self.sls_embedding is None:
            return cls_token.expand(-1, self.config.num_queries, -1)
        if self.config.sls_token_format == "learnable_token":
            return self.sls_embedding.expand(len(cls_token), -1, -1)
        return cls_token + self.sls_embedding

    def _choose_class_embeds(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, class_embeds: Tensor | None
    ) -> Tensor:
        if class_embeds is not None and input_ids is not None:
            raise ValueError("both class_embeds and input_ids were given: pass one of them.")
        if input_ids is not None:
            return self.get_class_embeds(input_ids, attention_mask)
        if class_embeds is None:
            class_embeds = self.stored_class_embeds
        if class_embeds is None:
            raise ValueError(
                "no vocabulary: pass input_ids (processor(text=[...]) makes them) or class_embeds; or store labels "
                "once with model.set_labels(labels, processor), or name them when the model is loaded: "
                'from_pretrained(folder, id2label={0: "sky", 1: "road"}).'
            )
        if class_embeds.dim() != 2 or len(class_embeds) == 0 or class_embeds.shape[1] != self.config.projection_dim:
            raise ValueError(
                f"class_embeds have shape {tuple(class_embeds.shape)}: expected (classes, "
                f"{self.config.projection_dim}) with at least one class, as get_class_embeds returns."
            )
        return class_embeds.float()

    def _check_pixel_values(self, pixel_values: Tensor) -> None:
        channels, patch_size = self.config.vision_config.num_channels, self.config.side_patch_size
        shape = tuple(pixel_values.shape)
        if len(shape) != 4 or 0 in shape or shape[1] != channels:
            raise ValueError(f"pixel_values have shape {shape}: expected (batch, {channels}, height, width).")
        if shape[2] % patch_size or shape[3] % patch_size:
            raise ValueError(
                f"pixel_values are {shape[2]} x {shape[3]} pixels: height and width must be multiples of "
                f"{patch_size}; SANProcessor pads them."
            )

    def _group_by_padded_size(self, pixel_values: Tensor, image_sizes: Tensor | None) -> list[Group]:
        """Indices and padded size of the images that can run together."""
        batch, _, height, width = pixel_values.shape
        together: list[Group] = [(list(range(batch)), (height, width))]
        if image_sizes is None:
            return together
        if image_sizes.shape != (batch, 2):
            raise ValueError(
                f"image_sizes have shape {tuple(image_sizes.shape)}: expected ({batch}, 2), the height and width of "
                "each image before padding."
            )
        divisor = self.config.size_divisor
        padded = (image_sizes + divisor - 1) // divisor * divisor
        if torch.compiler.is_compiling():
            # Sizes are data, which a graph without breaks cannot branch on; it can insist that they are all the same.
            frame = torch.tensor([height, width], device=padded.device)
            torch._assert_async((padded == frame).all(), "a compiled model takes images of one padded size at a time")
            return together
        groups: dict[tuple[int, int], list[int]] = {}
        for index, (rows, columns) in enumerate(padded.tolist()):
            if not (0 < rows <= height and 0 < columns <= width):
                raise ValueError(
                    f"image_sizes[{index}] is {tuple(image_sizes[index].tolist())}, which padded to a multiple of "
                    f"{divisor} does not fit pixel_values of {height} x {width}."
                )
            groups.setdefault((rows, columns), []).append(index)
        return [(indices, size) for size, indices in groups.items()]

    def _make_targets(
        self,
        labels: Tensor | None,
        mask_labels: Sequence[Tensor] | None,
        class_labels: Sequence[Tensor] | None,
        pixel_values: Tensor,
        num_labels: int,
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        batch, _, height, width = pixel_values.shape
        if labels is not None:
            if mask_labels is not None or class_labels is not None:
                raise ValueError("both labels and mask_labels / class_labels were given: pass one kind.")
            if tuple(labels.shape) != (batch, height, width):
                raise ValueError(
                    f"labels have shape {tuple(labels.shape)}: expected {(batch, height, width)}, the size of "
                    "pixel_values."
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
            if tuple(masks.shape) != (len(classes), height, width):
                raise ValueError(
                    f"mask_labels[{index}] has shape {tuple(masks.shape)}: expected {(len(classes), height, width)}, "
                    "one mask for each of class_labels at the size of pixel_values."
                )
            if len(classes) and not bool(((classes >= 0) & (classes < num_labels)).all()):
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
    >>> from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation
    >>> from modeling_san import BUILTIN_MODEL

    >>> image_processor = AutoImageProcessor.from_pretrained(BUILTIN_MODEL)
    >>> model = AutoModelForSemanticSegmentation.from_pretrained(BUILTIN_MODEL, id2label={0: "red plain", 1: "grass"})
    >>> model(**image_processor([Image.new("RGB", (128, 128), "red")])).logits.shape
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
        return None if _are_placeholders(config.id2label) else _named_labels(config.id2label)

    @can_return_tuple
    def forward(  # type: ignore[override]
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        image_sizes: Tensor | None = None,
        **kwargs: Any,
    ) -> SANOutput:
        """
        Segment a batch of images.

        Args:
            pixel_values: `(batch, 3, height, width)`, as for [`SANForOpenVocabSegmentation`].
            labels: `(batch, height, width)` class indices, `config.semantic_loss_ignore_index` = no label.
            image_sizes: `(batch, 2)`, height and width of each image before padding.
            kwargs: further arguments of [`SANForOpenVocabSegmentation.forward`]; others are ignored.

        Returns:
            [`SANOutput`] without `class_embeds`, and with `logits` `(batch, classes, height / 4, width / 4)`, the
            logarithms of the scores: their argmax after bilinear upsampling to `(height, width)`, cut to `image_sizes`
            where images are padded, is the segmentation, up to pixels at the borders of regions, where
            post-processing interpolates masks instead.
        """
        output = super().forward(pixel_values, labels=labels, image_sizes=image_sizes, return_dict=True, **kwargs)
        masks = self._enlarge_masks(output.masks_queries_logits.float(), pixel_values, image_sizes)
        probabilities = output.class_queries_logits.float().softmax(-1)[..., :-1]
        scores = probabilities.transpose(1, 2) @ masks.sigmoid().flatten(2)
        output.logits = scores.clamp(min=torch.finfo(scores.dtype).tiny).log().unflatten(-1, masks.shape[-2:])
        # Pipelines cut each tensor of a batch into the images' parts, and this one has none
        return SANOutput(**{name: value for name, value in output.items() if name != "class_embeds"})

    def _enlarge_masks(self, masks: Tensor, pixel_values: Tensor, image_sizes: Tensor | None) -> Tensor:
        """Masks at a quarter of the size, each image's by itself: none looks beyond the border it has alone."""
        frame = tuple(side // 4 for side in pixel_values.shape[-2:])
        groups = self._group_by_padded_size(pixel_values, image_sizes)
        parts = []
        for indices, (height, width) in groups:
            cells = masks if len(groups) == 1 else masks[indices]
            cells = cells[..., : height // self.config.side_patch_size, : width // self.config.side_patch_size]
            size = (height // 4, width // 4)
            parts.append({"masks": nn.functional.interpolate(cells, size, mode="bilinear", align_corners=False)})
        return _merge_groups(parts, groups, frame)["masks"]


def _read_config(source: Any, places: dict[str, Any]) -> SANConfig | None:
    """The config saved with a checkpoint; None where there is none, as in folders of adapters."""
    if source is None:
        return None
    try:
        saved, _ = SANConfig.get_config_dict(source, **places)
    except OSError:
        return None
    return SANConfig.from_dict(saved)


def _load_processor(source: Any, **options: Any) -> LabelProcessor:
    missing = (
        f"there is no processor in {source} to encode id2label with: save one there with processor.save_pretrained, "
        "or load without id2label and call model.set_labels(labels, processor)."
    )
    try:
        processor = AutoProcessor.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        raise OSError(missing) from error
    # Where there are files of a tokenizer only, that is what comes, and it knows no templates
    if not isinstance(processor, ProcessorMixin):
        raise OSError(missing)
    return processor


def _are_placeholders(id2label: dict[Any, str] | None) -> bool:
    """Whether these are the names that every config starts with."""
    return all(label == f"LABEL_{position}" for position, label in (id2label or {}).items())


def _named_labels(id2label: dict[Any, str] | None) -> list[str]:
    """Names by position; positions with a gap and names that are none raise."""
    # Positions read from a JSON file are strings
    id2label = {str(position): label for position, label in (id2label or {}).items()}
    positions = [str(position) for position in range(len(id2label))]
    if set(id2label) != set(positions):
        raise ValueError(f"id2label has the positions {', '.join(id2label)}: number the labels 0, 1, 2 and so on.")
    if _are_placeholders(id2label):
        raise ValueError(
            f"the {len(id2label)} labels have no names, which are what this model goes by: pass them, for example "
            'id2label={0: "sky", 1: "road"}.'
        )
    return [id2label[position] for position in positions]


def _split_for_caches(groups: Sequence[Group], device: torch.device) -> Sequence[Group]:
    """On a processor few images at a time: what many need between two layers would not stay in its caches."""
    if device.type != "cpu" or torch.compiler.is_compiling():
        return groups
    split = []
    for indices, (height, width) in groups:
        count = max(1, _PIXELS_AT_ONCE // (height * width))
        split += [(indices[start : start + count], (height, width)) for start in range(0, len(indices), count)]
    return split


def _merge_groups(
    parts: Sequence[dict[str, Tensor]], groups: Sequence[Group], grid: tuple[int, ...]
) -> dict[str, Any]:
    """Batch tensors again, in the images' order; maps smaller than `grid` are filled with 0 at right and bottom."""
    order = torch.tensor([index for indices, _ in groups for index in indices]).argsort()
    merged = {}
    for name in parts[0]:
        tensors = [part[name] for part in parts]
        if name in ("masks", "masks_queries_logits", "attention_bias"):
            tensors = [_fill_to(tensor, grid) for tensor in tensors]
        merged[name] = tensors[0] if len(parts) == 1 else torch.cat(tensors)[order.to(tensors[0].device)]
    return merged


def _fill_to(maps: Tensor, grid: tuple[int, ...]) -> Tensor:
    height, width = maps.shape[-2:]
    if (height, width) == grid:
        return maps
    return nn.functional.pad(maps, (0, grid[1] - width, 0, grid[0] - height))


# Where the pipeline for image segmentation looks up which models it supports, of the library's own and of others.
MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES.setdefault(SANConfig.model_type, SANForSemanticSegmentation.__name__)

__all__ = ["SANForOpenVocabSegmentation", "SANForSemanticSegmentation", "SANOutput", "SANPreTrainedModel"]
