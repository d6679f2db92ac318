# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints of the original implementation, and OpenMMLab's edition of them, as [`SANForOpenVocabSegmentation`]."""

import math
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPVisionConfig

from .configuration_san import SANConfig
from .modeling_san import SANForOpenVocabSegmentation

HUB_REPOSITORY = "Mendel192/san"
HUB_FILES = {"vit-b-16": "san_vit_b_16.pth", "vit-l-14": "san_vit_large_14.pth"}
"""Names that `hub:` understands, and the files that hold the released weights."""

RELEASED_CONFIGS: dict[int, dict[str, Any]] = {
    768: {},
    1024: {
        "clip_input_scale": 0.7,
        "sls_start_layer": 18,
        "fusion_map": [[0, 0], [6, 1], [12, 2], [18, 3]],
    },
}
"""What tells the released models from the defaults of [`SANConfig`], by CLIP's width: ViT-B/16 and ViT-L/14-336."""

_TINY_CLIP_HEADS = {"tinyclip": (4, 4)}
_CLIP_HEAD_DIM = 64
_UNUSED = (
    "criterion.empty_weight",  # class weights of the loss, which follow from the config
    "ov_classifier.attn_mask",  # the causal mask, which transformers makes itself
)

# Patterns in names and what replaces them, one after the other.
_FROM_OPENMMLAB = (
    (r"^image_encoder\.cls_token$", "clip_visual_extractor.class_embedding"),
    (r"^image_encoder\.pos_embed$", "clip_visual_extractor.positional_embedding"),
    (r"^image_encoder\.patch_embed\.projection\.", "clip_visual_extractor.conv1."),
    (r"^image_encoder\.layers\.", "clip_visual_extractor.resblocks."),
    (r"^image_encoder\.", "clip_visual_extractor."),
    (r"^decode_head\.rec_with_attnbias\.proj\.weight$", "clip_rec_head.proj"),
    (r"^decode_head\.rec_with_attnbias\.layers\.", "clip_rec_head.resblocks."),
    (r"^decode_head\.rec_with_attnbias\.", "clip_rec_head."),
    (r"^text_encoder\.transformer\.", "ov_classifier.transformer.resblocks."),
    (r"^text_encoder\.", "ov_classifier."),
    (
        r"^decode_head\.side_adapter_network\.patch_embed\.projection\.",
        "side_adapter_network.vit_model.patch_embed.proj.",
    ),
    (r"^decode_head\.side_adapter_network\.pos_embed$", "side_adapter_network.vit_model.pos_embed"),
    (r"^decode_head\.side_adapter_network\.encode_layers\.", "side_adapter_network.vit_model.blocks."),
    (r"^decode_head\.side_adapter_network\.conv_clips\.", "side_adapter_network.fusion_layers.layer_"),
    (r"^decode_head\.side_adapter_network\.", "side_adapter_network."),
    (r"(fusion_layers\.layer_\d+)\.0\.", r"\1.input_proj.0."),
    (r"(fusion_layers\.layer_\d+)\.1\.conv\.", r"\1.input_proj.1."),
    (r"\.ln([12])\.", r".ln_\1."),
    (r"\.norms\.0\.", ".ln_1."),
    (r"\.norms\.1\.", ".ln_2."),
    (r"\.(attn|attentions\.0)\.attn\.", ".attn."),
    (r"\.(ffn|ffns\.0)\.layers\.0\.0\.", ".mlp.c_fc."),
    (r"\.(ffn|ffns\.0)\.layers\.1\.", ".mlp.c_proj."),
    (r"(vit_model\.blocks\.\d+\.attn)\.in_proj_", r"\1.qkv."),
    (r"(vit_model\.blocks\.\d+\.attn)\.out_proj\.", r"\1.proj."),
)
_FROM_ORIGINAL = (
    (r"^clip_visual_extractor\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^clip_visual_extractor\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^clip_visual_extractor\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^clip_visual_extractor\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^clip_visual_extractor\.resblocks\.", "vision_model.encoder.layers."),
    (r"^clip_rec_head\.ln_post\.", "vision_model.post_layernorm."),
    (r"^clip_rec_head\.proj$", "visual_projection.weight"),
    (r"^clip_rec_head\.sos_token$", "sls_embedding"),
    (r"^ov_classifier\.transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^ov_classifier\.positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ov_classifier\.token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^ov_classifier\.ln_final\.", "text_model.final_layer_norm."),
    (r"^ov_classifier\.text_projection$", "text_projection.weight"),
    (r"^ov_classifier\.logit_scale$", "logit_scale"),
    (r"^ov_classifier\.bg_embed$", "background_embedding"),
    (r"^side_adapter_network\.query_embed$", "side_adapter.embeddings.query_embedding"),
    (r"^side_adapter_network\.query_pos_embed$", "side_adapter.embeddings.query_position_embedding"),
    (r"^side_adapter_network\.vit_model\.pos_embed$", "side_adapter.embeddings.position_embedding"),
    (r"^side_adapter_network\.vit_model\.patch_embed\.proj\.", "side_adapter.embeddings.patch_embedding."),
    (r"^side_adapter_network\.vit_model\.blocks\.", "side_adapter.layers."),
    (r"^side_adapter_network\.fusion_layers\.layer_", "side_adapter.fusions."),
    (r"^side_adapter_network\.mask_decoder\.", "side_adapter.mask_decoder."),
    (r"\.(ln_|norm)([12])\.", r".layer_norm\2."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.(in_proj_|out_proj\.)", r".self_attn.\1"),
    (r"\.attn\.qkv\.", ".attention.qkv."),
    (r"\.attn\.proj\.", ".attention.projection."),
    (r"\.input_proj\.0\.", ".layer_norm."),
    (r"\.input_proj\.1\.", ".projection."),
    (r"\.pix_mlp\.", ".mask_mlp."),
    (r"\.attn_mlp\.", ".bias_mlp."),
    (r"_mlp\.layers\.0\.", "_mlp.fc1."),
    (r"_mlp\.layers\.1\.", "_mlp.fc2."),
    (r"_mlp\.layers\.2\.", "_mlp.fc3."),
)
# What differs in shape too: by the original's names, and by this project's
_OPENMMLAB_SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "clip_visual_extractor.class_embedding": torch.flatten,
    "clip_visual_extractor.positional_embedding": lambda tensor: tensor.flatten(0, -2),
    "clip_rec_head.proj": lambda tensor: tensor.T,
}
_ORIGINAL_SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "visual_projection.weight": lambda tensor: tensor.T,
    "text_projection.weight": lambda tensor: tensor.T,
    "sls_embedding": lambda tensor: tensor.transpose(0, 1),
    "side_adapter.embeddings.position_embedding": lambda tensor: tensor.transpose(1, 2).unflatten(
        -1, (math.isqrt(tensor.shape[1]), -1)
    ),
}


def load_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """
    Read the weights of a `.pth` or `.safetensors` file, executing nothing that the file holds.

    Args:
        path: the file; weights may sit under a `model` or `state_dict` key.

    Returns:
        tensors by name.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where the file is no checkpoint of plain tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file: pass a .pth or .safetensors checkpoint.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path} cannot be read as a checkpoint of plain tensors: it may be damaged, or hold other Python "
            "objects, which are never loaded."
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not weights by name.")
    tensors = {name: value for name, value in checkpoint.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{path} holds no tensors: is it a training state without the model?")
    return tensors


def download_checkpoint(name: str) -> Path:
    """
    Fetch a released checkpoint from the Hub, or find it in the local cache.

    Args:
        name: a key of `HUB_FILES`.

    Returns:
        path of the `.pth` file.

    Raises:
        ValueError: for another name.
        OSError: where the Hub cannot be reached and the file is not in the cache.
    """
    if name not in HUB_FILES:
        raise ValueError(f"hub:{name} is unknown: choose {' or '.join(f'hub:{known}' for known in HUB_FILES)}.")
    try:
        return Path(hf_hub_download(HUB_REPOSITORY, HUB_FILES[name]))
    except Exception as error:
        # Which exception says "no network" differs between versions of the client and its transport.
        raise OSError(
            f"{HUB_FILES[name]} could not be fetched from the Hub repository {HUB_REPOSITORY}, and is not in the "
            "local cache: connect to the network, or download the file elsewhere and pass its path."
        ) from error


def convert_checkpoint(
    state_dict: Mapping[str, Tensor], reference_config: Mapping[str, Any] | None = None
) -> SANForOpenVocabSegmentation:
    """
    Build the model that a state dict of the original implementation describes.

    Args:
        state_dict: tensors under the original's names or OpenMMLab's.
        reference_config: the original's `MODEL.SAN` and `MODEL.SIDE_ADAPTER` sections; without it the released
            ViT-B/16 and ViT-L/14-336 are recognised from their shapes.

    Returns:
        the model in evaluation mode, float32.

    Raises:
        ValueError: lists tensors that are missing, unknown or of the wrong shape; or says which choice of
            `reference_config` has no counterpart.
    """
    if any(name.startswith("image_encoder.") for name in state_dict):
        state_dict = dict(_from_openmmlab(*item) for item in state_dict.items())
    config = _make_config(state_dict, reference_config)
    with torch.device("meta"):
        expected = SANForOpenVocabSegmentation(config).state_dict()
    converted: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in state_dict.items():
        if name in _UNUSED:
            continue
        targets = _from_original(name, tensor, config.sls_start_layer)
        if name in targets or targets.keys() - expected.keys() or targets.keys() & converted.keys():
            unknown.append(name)
        else:
            converted |= targets
    problems = [f"unknown: {name}" for name in sorted(unknown)]
    problems += [f"missing: {name}" for name in sorted(expected.keys() - converted.keys())]
    problems += [
        f"shape of {name}: {tuple(tensor.shape)} instead of {tuple(expected[name].shape)}"
        for name, tensor in sorted(converted.items())
        if tensor.shape != expected[name].shape
    ]
    if problems:
        raise ValueError("the checkpoint does not fit the model:\n  " + "\n  ".join(problems))
    return SANForOpenVocabSegmentation.from_pretrained(
        None, config=config, state_dict={name: tensor.float() for name, tensor in converted.items()}
    )


def _rename(name: str, rules: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _from_openmmlab(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    name = _rename(name, _FROM_OPENMMLAB)
    return name, _OPENMMLAB_SHAPES[name](tensor) if name in _OPENMMLAB_SHAPES else tensor


def _from_original(name: str, tensor: Tensor, start_layer: int) -> dict[str, Tensor]:
    """What one of the original's tensors becomes; where its name is unknown, under a name that the model has not."""
    # The original counts CLIP's deep layers from 0 again
    name = re.sub(
        r"^clip_rec_head\.resblocks\.(\d+)",
        lambda match: f"clip_visual_extractor.resblocks.{start_layer + int(match[1])}",
        name,
    )
    name = _rename(name, _FROM_ORIGINAL)
    if "self_attn.in_proj_" in name:
        chunks = zip("qkv", tensor.chunk(3), strict=True)
        return {name.replace("in_proj_", f"{part}_proj."): chunk.contiguous() for part, chunk in chunks}
    if name in _ORIGINAL_SHAPES:
        tensor = _ORIGINAL_SHAPES[name](tensor)
    elif tensor.shape[2:] == (1, 1):
        # A 1 x 1 convolution, which is a linear layer
        tensor = tensor.flatten(1)
    return {name: tensor.contiguous()}


def _make_config(state_dict: Mapping[str, Tensor], reference_config: Mapping[str, Any] | None) -> SANConfig:
    try:
        conv = state_dict["clip_visual_extractor.conv1.weight"]
        positions = state_dict["clip_visual_extractor.positional_embedding"]
        projection = state_dict["clip_rec_head.proj"]
        tokens = state_dict["ov_classifier.token_embedding.weight"]
        text_positions = state_dict["ov_classifier.positional_embedding"]
        vision_mlp = state_dict["clip_visual_extractor.resblocks.0.mlp.c_fc.weight"]
        text_mlp = state_dict["ov_classifier.transformer.resblocks.0.mlp.c_fc.weight"]
    except KeyError as error:
        raise ValueError(
            f"the checkpoint holds no {error}: it is not a SAN model of the original implementation or OpenMMLab's."
        ) from None
    width, text_width = len(conv), tokens.shape[1]
    if reference_config is None and width not in RELEASED_CONFIGS:
        raise ValueError(
            f"CLIP's width is {width}, and the released models have {' or '.join(map(str, RELEASED_CONFIGS))}: pass "
            "reference_config."
        )
    options = RELEASED_CONFIGS[width] if reference_config is None else _read_reference_config(reference_config)
    clip_name = "" if reference_config is None else reference_config["MODEL.SAN"].get("CLIP_MODEL_NAME", "")
    heads, text_heads = _TINY_CLIP_HEADS.get(clip_name, (width // _CLIP_HEAD_DIM, text_width // _CLIP_HEAD_DIM))
    shallow, deep = (_count_blocks(state_dict, tower) for tower in ("clip_visual_extractor", "clip_rec_head"))
    vision_config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=len(vision_mlp),
        num_hidden_layers=shallow + deep,
        num_attention_heads=heads,
        patch_size=conv.shape[-1],
        image_size=math.isqrt(len(positions) - 1) * conv.shape[-1],
        projection_dim=projection.shape[1],
    )
    text_config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=text_width,
        intermediate_size=len(text_mlp),
        num_hidden_layers=_count_blocks(state_dict, "ov_classifier.transformer"),
        num_attention_heads=text_heads,
        max_position_embeddings=len(text_positions),
        projection_dim=projection.shape[1],
        # The released CLIP vocabulary ends with its start and end tokens.
        bos_token_id=len(tokens) - 2,
        eos_token_id=len(tokens) - 1,
        pad_token_id=len(tokens) - 1,
    )
    config = SANConfig(
        vision_config=vision_config.to_dict(),
        text_config=text_config.to_dict(),
        projection_dim=projection.shape[1],
        **options,
    )
    if reference_config is not None:
        config.trainable_clip_parameters = _read_trainable(reference_config["MODEL.SAN"], state_dict, config)
    return config


def _read_trainable(san: Mapping[str, Any], state_dict: Mapping[str, Tensor], config: SANConfig) -> list[str]:
    """
    What the original does not freeze of CLIP's two halves, as `trainable_clip_parameters`.

    An entry of the original's lists stands for the tensors of its half whose names hold it, "all" for every one.
    """
    trainable: dict[str, None] = {}
    halves = {"CLIP_FROZEN_EXCLUDE": "clip_visual_extractor.", "CLIP_DEEPER_FROZEN_EXCLUDE": "clip_rec_head."}
    for field, prefix in halves.items():
        if field not in san:
            raise ValueError(f"reference_config has no '{field}'.")
        for entry in san[field]:
            # The learned [SLS] tokens, which train here anyway, are there in some variants only
            found = ["sls_embedding"] if entry == "sos_token" else []
            for name in state_dict:
                if name.startswith(prefix) and (entry == "all" or entry in name.removeprefix(prefix)):
                    found += _from_original(name, state_dict[name], config.sls_start_layer)
            if not found:
                raise ValueError(f"{field} is {list(san[field])!r}: no parameter of CLIP's is called {entry!r}.")
            modules = (re.sub(r"\.(weight|bias)$", "", name) for name in found if name != "sls_embedding")
            if entry == "all":
                modules = (re.sub(r"(encoder\.layers\.\d+|embeddings)\..*", r"\1.", name) for name in modules)
            trainable.update(dict.fromkeys(modules))
    return list(trainable)


def _count_blocks(state_dict: Mapping[str, Tensor], tower: str) -> int:
    pattern = re.compile(re.escape(tower) + r"\.resblocks\.(\d+)\.")
    return len({match[1] for name in state_dict if (match := pattern.match(name))})


def _read_reference_config(reference_config: Mapping[str, Any]) -> dict[str, Any]:
    """The original's configuration keys as fields of [`SANConfig`]."""
    try:
        san, side = reference_config["MODEL.SAN"], reference_config["MODEL.SIDE_ADAPTER"]
        vit = re.fullmatch(r"vit_w(\d+)n(\d+)d(\d+)_patch(\d+)", side["VIT_NAME"])
        bias = side["ATTN_BIAS"]
        if vit is None:
            raise ValueError(f"VIT_NAME {side['VIT_NAME']!r} is not of the form vit_w240n6d8_patch16.")
        _refuse_other_variants(side)
        side_width, side_heads, side_depth, patch_size = map(int, vit.groups())
        pairs = [re.fullmatch(r"(\d+)->(\d+)", pair) for pair in side["FUSION_MAP"]]
        if not all(pairs):
            raise ValueError(f"FUSION_MAP {side['FUSION_MAP']} is not a list of entries like '3->1'.")
        return {
            "asymmetric_input": san["ASYMETRIC_INPUT"],
            "clip_input_scale": san["CLIP_RESOLUTION"],
            "sls_start_layer": san["FEATURE_LAST_LAYER_IDX"],
            "sls_token_format": san["SOS_TOKEN_FORMAT"],
            "size_divisor": san["SIZE_DIVISIBILITY"],
            "attention_bias_pooling": san["REC_DOWNSAMPLE_METHOD"],
            "class_weight": san["CLASS_WEIGHT"],
            "mask_weight": san["MASK_WEIGHT"],
            "dice_weight": san["DICE_WEIGHT"],
            "no_object_weight": san["NO_OBJECT_WEIGHT"],
            "train_num_points": san["TRAIN_NUM_POINTS"],
            "oversample_ratio": san["OVERSAMPLE_RATIO"],
            "importance_sample_ratio": san["IMPORTANCE_SAMPLE_RATIO"],
            "num_queries": side["NUM_QUERIES"],
            "side_hidden_size": side_width,
            "side_num_heads": side_heads,
            "side_num_layers": side_depth,
            "side_patch_size": patch_size,
            "side_image_size": side["IMAGE_SIZE"],
            "fusion_map": [[int(pair[1]), int(pair[2])] for pair in pairs if pair],
            "deep_supervision_layers": side["DEEP_SUPERVISION_IDXS"],
            "mask_dim": bias["EMBED_CHANNELS"],
            "attention_bias_heads": bias["NUM_HEADS"],
            "attention_bias_layers": bias["NUM_LAYERS"],
            "rescale_attention_bias": bias["RESCALE_ATTN_BIAS"],
        }
    except KeyError as error:
        raise ValueError(f"reference_config has no {error}.") from None


def _refuse_other_variants(side: Mapping[str, Any]) -> None:
    """Raise for choices of the original that have no counterpart here."""
    bias = side["ATTN_BIAS"]
    expected = {
        "FUSION_TYPE": (side["FUSION_TYPE"], "add"),
        "MLP_NUM_LAYERS": (bias["MLP_NUM_LAYERS"], 3),
        "MLP_CHANNELS": (bias["MLP_CHANNELS"], bias["EMBED_CHANNELS"]),
    }
    for name, (given, supported) in expected.items():
        if given != supported:
            raise ValueError(f"{name} is {given!r}: only {supported!r} has a counterpart here.")


__all__ = ["HUB_FILES", "HUB_REPOSITORY", "convert_checkpoint", "download_checkpoint", "load_checkpoint"]
