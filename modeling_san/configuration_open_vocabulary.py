# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""What all configurations share: a CLIP, labels that may be stored, and the code that a folder carries."""

import os
from collections.abc import Iterator
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import CLIPTextConfig, CLIPVisionConfig, PreTrainedConfig

CUSTOM_PIPELINES: dict[str, dict[str, Any]] = {
    "open-vocabulary-segmentation": {
        "impl": "pipeline_san.OpenVocabularySegmentationPipeline",
        "pt": ["AutoModel"],
        "type": "multimodal",
    }
}
"""Where a saved folder's own copy of the code has the pipeline, which is saved with the processor."""

# Whether this is a folder's own copy of the code. The package's configs do not name the pipeline: transformers would
# prefer a folder's code to the pipeline that the package registers.
_CARRIED = __name__.startswith("transformers_modules.")


@strict
class OpenVocabularyConfig(PreTrainedConfig):
    r"""
    Base of the configurations. A sibling adds its own fields, `carried_classes` and `mask_stride`.

    Args:
        vision_config (`dict` or `CLIPVisionConfig`, *optional*):
            CLIP's image encoder; ViT-B/16 when omitted.
        text_config (`dict` or `CLIPTextConfig`, *optional*):
            CLIP's text encoder; the one of ViT-B/16 when omitted.
        projection_dim (`int`, defaults to 512):
            Width D of the joint embedding of images and words.
        logit_scale_init_value (`float`, defaults to 4.6052):
            Logarithm of the factor between cosine similarities and class logits; 4.6052 is ln 100, CLIP's own.
        size_divisor (`int`, defaults to 32):
            Images are padded to a multiple of this; a multiple of `mask_stride`.
        semantic_loss_ignore_index (`int`, defaults to 255):
            Value in `labels` that marks pixels without a label.
        trainable_clip_parameters (`list[str]`, defaults to `["vision_model.embeddings.position_embedding"]`):
            CLIP parameters that train: those whose name contains one of these strings (`["vision_model"]` trains the
            whole image encoder, `[]` none of CLIP).
        has_stored_labels (`bool`, defaults to `False`):
            Whether the checkpoint carries embeddings of the labels in `id2label`. Set by
            [`OpenVocabularyModel.set_labels`]; `stored_labels` reads both.
        training_labels (`list[str]`, *optional*):
            Names that a small checkpoint was trained on, where it knows few words; tools warn about others.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of the initial weights of what is added to CLIP.

    Raises:
        ValueError or a strict-dataclass validation error that names the field and what to change.
    """

    sub_configs = {"vision_config": CLIPVisionConfig, "text_config": CLIPTextConfig}
    # By which transformers counts hidden states from the end
    attribute_map = {"num_hidden_layers": "num_clip_layers"}
    _auto_class: ClassVar[str | None] = "AutoConfig"
    carried_classes: ClassVar[dict[str, str]] = {}
    """Where a saved folder's own copy of the code has the classes, for those who load it without the package."""

    # Dictionaries and None are accepted too, and are CLIP's own classes once the config is made.
    vision_config: CLIPVisionConfig | Any = None
    text_config: CLIPTextConfig | Any = None
    projection_dim: int = 512
    logit_scale_init_value: float = 4.6052
    size_divisor: int = 32
    semantic_loss_ignore_index: int = 255
    trainable_clip_parameters: list[str] | tuple[str, ...] = ("vision_model.embeddings.position_embedding",)
    has_stored_labels: bool = False
    training_labels: list[str] | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        """Turn dictionaries into config classes and fill in what follows from them."""
        self.make_part_configs()
        # JSON knows lists only; one form makes a saved and loaded config equal to the original.
        self.trainable_clip_parameters = list(self.trainable_clip_parameters)
        self.id2label, self.label2id = _label_maps(self.id2label, self.label2id)
        if not _CARRIED:
            kwargs.pop("custom_pipelines", None)
        super().__post_init__(**kwargs)

    def make_part_configs(self) -> None:
        """Turn dictionaries and None into configs of the image and the text encoder; CLIP's, but in siblings."""
        if self.vision_config is None:
            self.vision_config = CLIPVisionConfig(patch_size=16)
        elif isinstance(self.vision_config, dict):
            self.vision_config = CLIPVisionConfig(**self.vision_config)
        if self.text_config is None:
            self.text_config = CLIPTextConfig()
        elif isinstance(self.text_config, dict):
            self.text_config = CLIPTextConfig(**self.text_config)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As every config; labels given besides may come one way only: as `id2label`, a list too, or as `label2id`."""
        if kwargs.get("id2label") is not None or kwargs.get("label2id") is not None:
            kwargs["id2label"], kwargs["label2id"] = _label_maps(kwargs.get("id2label"), kwargs.get("label2id"))
        return super().from_dict(config_dict, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Write config.json, which names the classes of the code that is saved with it."""
        self.auto_map = dict(self.carried_classes)
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
    def mask_stride(self) -> int:
        """Pixels of the network's input for each cell of its masks, in each direction."""
        raise NotImplementedError

    def validate_architecture(self) -> None:
        """Refuse combinations that cannot work; part of the validation of strict configs."""
        for holds, message in self._requirements():
            if not holds:
                raise ValueError(message)

    def _requirements(self) -> Iterator[tuple[bool, str]]:
        """What must hold, and what to say where it does not; each may rely on those before it."""
        for name in ("projection_dim", "size_divisor"):
            yield getattr(self, name) >= 1, f"{name} is {getattr(self, name)}: it must be at least 1."


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


__all__ = ["CUSTOM_PIPELINES", "OpenVocabularyConfig"]
