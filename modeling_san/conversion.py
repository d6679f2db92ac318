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
    r"criterion\.empty_weight",  # class weights of the loss, which follow from the config
    r"ov_classifier\.attn_mask",  # the causal mask, which transformers makes itself
)

# OpenMMLab's names, made the original's. Its converter renames layers only; see _OPENMMLAB_SHAPES for the rest.
_OPENMMLAB_RULES = (
    (r"image_encoder\.cls_token", r"clip_visual_extractor.class_embedding"),
    (r"image_encoder\.pos_embed", r"clip_visual_extractor.positional_embedding"),
    (r"image_encoder\.patch_embed\.projection\.weight", r"clip_visual_extractor.conv1.weight"),
    (r"image_encoder\.ln_pre\.(\w+)", r"clip_visual_extractor.ln_pre.\1"),
    (r"image_encoder\.layers\.(\d+)\.ln(\d)\.(\w+)", r"clip_visual_extractor.resblocks.\1.ln_\2.\3"),
    (r"image_encoder\.layers\.(\d+)\.attn\.attn\.(.+)", r"clip_visual_extractor.resblocks.\1.attn.\2"),
    (r"image_encoder\.layers\.(\d+)\.ffn\.layers\.0\.0\.(\w+)", r"clip_visual_extractor.resblocks.\1.mlp.c_fc.\2"),
    (r"image_encoder\.layers\.(\d+)\.ffn\.layers\.1\.(\w+)", r"clip_visual_extractor.resblocks.\1.mlp.c_proj.\2"),
    (r"decode_head\.side_adapter_network\.(query_embed|query_pos_embed)", r"side_adapter_network.\1"),
    (r"decode_head\.side_adapter_network\.pos_embed", r"side_adapter_network.vit_model.pos_embed"),
    (
        r"decode_head\.side_adapter_network\.patch_embed\.projection\.(\w+)",
        r"side_adapter_network.vit_model.patch_embed.proj.\1",
    ),
    (
        r"decode_head\.side_adapter_network\.encode_layers\.(\d+)\.ln(\d)\.(\w+)",
        r"side_adapter_network.vit_model.blocks.\1.norm\2.\3",
    ),
    (
        r"decode_head\.side_adapter_network\.encode_layers\.(\d+)\.attn\.attn\.in_proj_(\w+)",
        r"side_adapter_network.vit_model.blocks.\1.attn.qkv.\2",
    ),
    (
        r"decode_head\.side_adapter_network\.encode_layers\.(\d+)\.attn\.attn\.out_proj\.(\w+)",
        r"side_adapter_network.vit_model.blocks.\1.attn.proj.\2",
    ),
    (
        r"decode_head\.side_adapter_network\.encode_layers\.(\d+)\.ffn\.layers\.0\.0\.(\w+)",
        r"side_adapter_network.vit_model.blocks.\1.mlp.fc1.\2",
    ),
    (
        r"decode_head\.side_adapter_network\.encode_layers\.(\d+)\.ffn\.layers\.1\.(\w+)",
        r"side_adapter_network.vit_model.blocks.\1.mlp.fc2.\2",
    ),
    (
        r"decode_head\.side_adapter_network\.conv_clips\.(\d+)\.0\.(\w+)",
        r"side_adapter_network.fusion_layers.layer_\1.input_proj.0.\2",
    ),
    (
        r"decode_head\.side_adapter_network\.conv_clips\.(\d+)\.1\.conv\.(\w+)",
        r"side_adapter_network.fusion_layers.layer_\1.input_proj.1.\2",
    ),
    (r"decode_head\.side_adapter_network\.mask_decoder\.(.+)", r"side_adapter_network.mask_decoder.\1"),
    (r"decode_head\.rec_with_attnbias\.proj\.weight", r"clip_rec_head.proj"),
    (r"decode_head\.rec_with_attnbias\.sos_token", r"clip_rec_head.sos_token"),
    (r"decode_head\.rec_with_attnbias\.ln_post\.(\w+)", r"clip_rec_head.ln_post.\1"),
    (r"decode_head\.rec_with_attnbias\.layers\.(\d+)\.(.+)", r"clip_rec_head.resblocks.\1.\2"),
    (r"text_encoder\.transformer\.(\d+)\.(.+)", r"ov_classifier.transformer.resblocks.\1.\2"),
    (r"text_encoder\.(.+)", r"ov_classifier.\1"),
)
_OPENMMLAB_BLOCK_PARTS = {
    "norms.0.": "ln_1.",
    "norms.1.": "ln_2.",
    "attentions.0.attn.": "attn.",
    "ffns.0.layers.0.0.": "mlp.c_fc.",
    "ffns.0.layers.1.": "mlp.c_proj.",
}
_OPENMMLAB_SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "clip_visual_extractor.class_embedding": torch.flatten,
    "clip_visual_extractor.positional_embedding": lambda tensor: tensor.flatten(0, -2),
    "clip_rec_head.proj": lambda tensor: tensor.T,
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
        state_dict = _from_openmmlab(state_dict)
    config = _make_config(state_dict, reference_config)
    converted, origins, unknown = _rename(state_dict, config)
    model = SANForOpenVocabSegmentation(config)
    expected = model.state_dict()
    unknown |= {origins[name] for name in converted.keys() - expected.keys()}
    problems = [f"unknown: {name}" for name in sorted(unknown)]
    problems += [f"missing: {name}" for name in sorted(expected.keys() - converted.keys())]
    problems += [
        f"shape of {name}: {tuple(converted[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & converted.keys())
        if converted[name].shape != expected[name].shape
    ]
    if problems:
        raise ValueError("the checkpoint does not fit the model:\n  " + "\n  ".join(problems))
    model.load_state_dict({name: tensor.float() for name, tensor in converted.items()})
    return model.eval()


def _from_openmmlab(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state_dict.items():
        new_name = _apply_rules(name, _OPENMMLAB_RULES) or name
        for theirs, original in _OPENMMLAB_BLOCK_PARTS.items():
            new_name = new_name.replace(theirs, original)
        renamed[new_name] = _OPENMMLAB_SHAPES.get(new_name, lambda same: same)(tensor)
    return renamed


def _apply_rules(name: str, rules: Iterable[tuple[str, str]]) -> str | None:
    for pattern, replacement in rules:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    return None


def _rename(state_dict: Mapping[str, Tensor], config: SANConfig) -> tuple[dict[str, Tensor], dict[str, str], set[str]]:
    """The original's tensors under this project's names, what each was called, and the names that no rule knows."""
    converted: dict[str, Tensor] = {}
    origins: dict[str, str] = {}
    unknown: set[str] = set()
    for name, tensor in state_dict.items():
        if any(re.fullmatch(pattern, name) for pattern in _UNUSED):
            continue
        targets = _targets(name, tensor, config)
        if not targets:
            unknown.add(name)
        converted.update(targets)
        origins.update(dict.fromkeys(targets, name))
    return converted, origins, unknown


_CLIP_BLOCK_RULES = (
    (r"ln_1\.(\w+)", r"layer_norm1.\1"),
    (r"ln_2\.(\w+)", r"layer_norm2.\1"),
    (r"attn\.out_proj\.(\w+)", r"self_attn.out_proj.\1"),
    (r"mlp\.c_fc\.(\w+)", r"mlp.fc1.\1"),
    (r"mlp\.c_proj\.(\w+)", r"mlp.fc2.\1"),
)
_PLAIN_RULES = (
    (r"clip_visual_extractor\.class_embedding", r"vision_model.embeddings.class_embedding"),
    (r"clip_visual_extractor\.positional_embedding", r"vision_model.embeddings.position_embedding.weight"),
    (r"clip_visual_extractor\.conv1\.weight", r"vision_model.embeddings.patch_embedding.weight"),
    (r"clip_visual_extractor\.ln_pre\.(\w+)", r"vision_model.pre_layrnorm.\1"),
    (r"clip_rec_head\.ln_post\.(\w+)", r"vision_model.post_layernorm.\1"),
    (r"ov_classifier\.positional_embedding", r"text_model.embeddings.position_embedding.weight"),
    (r"ov_classifier\.token_embedding\.weight", r"text_model.embeddings.token_embedding.weight"),
    (r"ov_classifier\.ln_final\.(\w+)", r"text_model.final_layer_norm.\1"),
    (r"ov_classifier\.logit_scale", r"logit_scale"),
    (r"ov_classifier\.bg_embed", r"background_embedding"),
    (r"side_adapter_network\.query_embed", r"side_adapter.embeddings.query_embedding"),
    (r"side_adapter_network\.query_pos_embed", r"side_adapter.embeddings.query_position_embedding"),
    (r"side_adapter_network\.vit_model\.patch_embed\.proj\.(\w+)", r"side_adapter.embeddings.patch_embedding.\1"),
    (
        r"side_adapter_network\.vit_model\.blocks\.(\d+)\.norm([12])\.(\w+)",
        r"side_adapter.layers.\1.layer_norm\2.\3",
    ),
    (r"side_adapter_network\.vit_model\.blocks\.(\d+)\.attn\.qkv\.(\w+)", r"side_adapter.layers.\1.attention.qkv.\2"),
    (
        r"side_adapter_network\.vit_model\.blocks\.(\d+)\.attn\.proj\.(\w+)",
        r"side_adapter.layers.\1.attention.projection.\2",
    ),
    (r"side_adapter_network\.vit_model\.blocks\.(\d+)\.mlp\.(fc[12])\.(\w+)", r"side_adapter.layers.\1.mlp.\2.\3"),
    (
        r"side_adapter_network\.fusion_layers\.layer_(\d+)\.input_proj\.0\.(\w+)",
        r"side_adapter.fusions.\1.layer_norm.\2",
    ),
    (r"side_adapter_network\.mask_decoder\.bias_scaling\.(\w+)", r"side_adapter.mask_decoder.bias_scaling.\1"),
)
_TRANSPOSED = {
    "clip_rec_head.proj": "visual_projection.weight",
    "ov_classifier.text_projection": "text_projection.weight",
}
_DECODER_MLPS = {"query_mlp": "query_mlp", "pix_mlp": "mask_mlp", "attn_mlp": "bias_mlp"}


def _targets(name: str, tensor: Tensor, config: SANConfig) -> dict[str, Tensor]:
    """What one of the original's tensors becomes; empty where the name is unknown."""
    if new_name := _apply_rules(name, _PLAIN_RULES):
        return {new_name: tensor}
    if name in _TRANSPOSED:
        return {_TRANSPOSED[name]: tensor.T.contiguous()}
    if name == "clip_rec_head.sos_token":
        return {"sls_embedding": tensor.transpose(0, 1).contiguous()}
    if name == "side_adapter_network.vit_model.pos_embed":
        side = math.isqrt(tensor.shape[1])
        grid = tensor.transpose(1, 2).unflatten(-1, (side, -1)).contiguous()
        return {"side_adapter.embeddings.position_embedding": grid}
    if match := re.fullmatch(r"side_adapter_network\.fusion_layers\.layer_(\d+)\.input_proj\.1\.(\w+)", name):
        side_layer, kind = match.groups()
        return {f"side_adapter.fusions.{side_layer}.projection.{kind}": _without_kernel(tensor)}
    if match := re.fullmatch(r"side_adapter_network\.mask_decoder\.(\w+_mlp)\.layers\.([012])\.(\w+)", name):
        mlp, layer, kind = match.groups()
        if mlp in _DECODER_MLPS:
            new_name = f"side_adapter.mask_decoder.{_DECODER_MLPS[mlp]}.fc{int(layer) + 1}.{kind}"
            return {new_name: _without_kernel(tensor)}
    return _clip_block_targets(name, tensor, config)


def _without_kernel(tensor: Tensor) -> Tensor:
    """The weight of a 1 x 1 convolution as that of a linear layer."""
    return tensor.flatten(1) if tensor.dim() == 4 else tensor


def _clip_block_targets(name: str, tensor: Tensor, config: SANConfig) -> dict[str, Tensor]:
    pattern = r"(clip_visual_extractor|clip_rec_head|ov_classifier\.transformer)\.resblocks\.(\d+)\.(.+)"
    match = re.fullmatch(pattern, name)
    if not match:
        return {}
    tower, index, rest = match[1], int(match[2]), match[3]
    if tower == "clip_rec_head":
        index += config.sls_start_layer
    encoder = "text_model" if tower.startswith("ov_classifier") else "vision_model"
    prefix = f"{encoder}.encoder.layers.{index}."
    if match := re.fullmatch(r"attn\.in_proj_(\w+)", rest):
        return {
            f"{prefix}self_attn.{part}_proj.{match[1]}": chunk.contiguous()
            for part, chunk in zip("qkv", tensor.chunk(3), strict=True)
        }
    new_name = _apply_rules(rest, _CLIP_BLOCK_RULES)
    return {prefix + new_name: tensor} if new_name else {}


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
                    found += _targets(name, state_dict[name], config)
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
