"""Configuration of the Side Adapter Network."""

import os
from collections.abc import Iterator
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import CLIPTextConfig, CLIPVisionConfig, PreTrainedConfig

SLS_TOKEN_FORMATS = ("cls_token", "learnable_token", "pos_embedding")
ATTENTION_BIAS_POOLINGS = ("max", "avg", "bilinear", "bicubic", "nearest")

AUTO_MAP = {
    "AutoConfig": "configuration_san.SANConfig",
    "AutoModel": "modeling_san.SANForOpenVocabSegmentation",
    "AutoModelForSemanticSegmentation": "modeling_san.SANForSemanticSegmentation",
}
"""Where a saved folder's own copy of the code has the classes, for those who load it without the package."""

CUSTOM_PIPELINES = {
    "open-vocabulary-segmentation": {
        "impl": "pipeline_san.OpenVocabularySegmentationPipeline",
        "pt": ["AutoModel"],
        "type": "multimodal",
    }
}
"""The same for the pipeline, whose code is saved with the processor."""

# Whether this is a folder's own copy of the code. The package's configs do not name the pipeline: transformers would
# prefer a folder's code to the pipeline that the package registers.
_CARRIED = __name__.startswith("transformers_modules.")


@strict
class SANConfig(PreTrainedConfig):
    r"""
    Everything that shapes a [`SANForOpenVocabSegmentation`]. The defaults are the released ViT-B/16 model.

    Args:
        vision_config (`dict` or `CLIPVisionConfig`, *optional*):
            CLIP's image encoder; ViT-B/16 when omitted.
        text_config (`dict` or `CLIPTextConfig`, *optional*):
            CLIP's text encoder; the one of ViT-B/16 when omitted.
        projection_dim (`int`, defaults to 512):
            Width D of the joint embedding of images and words.
        logit_scale_init_value (`float`, defaults to 4.6052):
            Logarithm of the factor between cosine similarities and class logits; 4.6052 is ln 100, CLIP's own.
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
        size_divisor (`int`, defaults to 32):
            Images are padded to a multiple of this; a multiple of `side_patch_size`.
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
        semantic_loss_ignore_index (`int`, defaults to 255):
            Value in `labels` that marks pixels without a label.
        trainable_clip_parameters (`list[str]`, defaults to `["vision_model.embeddings.position_embedding"]`):
            CLIP parameters that train: those whose name contains one of these strings (`["vision_model"]` trains the
            whole image encoder, `[]` none of CLIP).
        has_stored_labels (`bool`, defaults to `False`):
            Whether the checkpoint carries embeddings of the labels in `id2label`. Set by
            [`SANForOpenVocabSegmentation.set_labels`]; `stored_labels` reads both.
        training_labels (`list[str]`, *optional*):
            Names that a small checkpoint was trained on, where it knows few words; tools warn about others.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of the side adapter's initial weights.

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
    _auto_class: ClassVar[str | None] = "AutoConfig"
    sub_configs = {"vision_config": CLIPVisionConfig, "text_config": CLIPTextConfig}
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

    # Dictionaries and None are accepted too, and are CLIP's own classes once the config is made.
    vision_config: CLIPVisionConfig | Any = None
    text_config: CLIPTextConfig | Any = None
    projection_dim: int = 512
    logit_scale_init_value: float = 4.6052

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
    size_divisor: int = 32
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
    semantic_loss_ignore_index: int = 255

    trainable_clip_parameters: list[str] | tuple[str, ...] = ("vision_model.embeddings.position_embedding",)
    has_stored_labels: bool = False
    training_labels: list[str] | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        """Turn dictionaries into CLIP's config classes and fill in what follows from them."""
        if self.vision_config is None:
            self.vision_config = CLIPVisionConfig(patch_size=16)
        elif isinstance(self.vision_config, dict):
            self.vision_config = CLIPVisionConfig(**self.vision_config)
        if self.text_config is None:
            self.text_config = CLIPTextConfig()
        elif isinstance(self.text_config, dict):
            self.text_config = CLIPTextConfig(**self.text_config)
        if self.attention_bias_heads is None:
            self.attention_bias_heads = self.vision_config.num_attention_heads
        # JSON knows lists only; one form makes a saved and loaded config equal to the original.
        self.fusion_map = [list(pair) for pair in self.fusion_map]
        self.deep_supervision_layers = list(self.deep_supervision_layers)
        self.trainable_clip_parameters = list(self.trainable_clip_parameters)
        self.id2label, self.label2id = _label_maps(self.id2label, self.label2id)
        if not _CARRIED:
            kwargs.pop("custom_pipelines", None)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As every config; labels given besides may come one way only: as `id2label`, a list too, or as `label2id`."""
        if kwargs.get("id2label") is not None or kwargs.get("label2id") is not None:
            kwargs["id2label"], kwargs["label2id"] = _label_maps(kwargs.get("id2label"), kwargs.get("label2id"))
        return super().from_dict(config_dict, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Write config.json, which names the classes of the code that is saved with it."""
        self.auto_map = dict(AUTO_MAP)
        self.custom_pipelines = {task: dict(entry) for task, entry in CUSTOM_PIPELINES.items()}
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            if not _CARRIED:
                del self.custom_pipelines

    def to_dict(self) -> dict[str, Any]:
        """What is saved; not what evaluation loops leave out, which the model's class decides."""
        saved = super().to_dict()
        saved.pop("keys_to_ignore_at_inference", None)
        return saved

    @property
    def stored_labels(self) -> tuple[str, ...] | None:
        """The labels whose embeddings are stored with the model, by index; None where there are none."""
        return tuple(label for _, label in sorted((self.id2label or {}).items())) if self.has_stored_labels else None

    @property
    def num_clip_layers(self) -> int:
        """Layers of CLIP's image encoder."""
        return self.vision_config.num_hidden_layers

    @property
    def num_recognition_layers(self) -> int:
        """CLIP layers that [SLS] tokens pass through."""
        return self.num_clip_layers - self.sls_start_layer

    def validate_architecture(self) -> None:
        """Refuse combinations that cannot work; part of the validation of strict configs."""
        for holds, message in self._requirements():
            if not holds:
                raise ValueError(message)

    def _requirements(self) -> Iterator[tuple[bool, str]]:
        """What must hold, and what to say where it does not; each may rely on those before it."""
        for name in (
            *("projection_dim", "num_queries", "mask_dim", "train_num_points", "size_divisor"),
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


def _label_maps(id2label: Any, label2id: Any) -> tuple[dict[int, str] | None, dict[str, int] | None]:
    """Both maps, of whichever is given; `id2label` may be a list, and has the last word."""
    if id2label is None and label2id is None:
        return None, None
    if id2label is None:
        id2label = {index: label for label, index in label2id.items()}
    elif not isinstance(id2label, dict):
        id2label = dict(enumerate(id2label))
    id2label = {int(index): label for index, label in id2label.items()}
    return id2label, {label: index for index, label in id2label.items()}


__all__ = ["SANConfig"]
