"""Checkpoints of the original: every tensor is accounted for, and no file gets to run code."""

import copy
import io
import json
import pickle
import re

import pytest
import torch
from safetensors.torch import save_file

from modeling_san import conversion
from modeling_san.conversion import convert_checkpoint, download_checkpoint, load_checkpoint


@pytest.fixture(scope="module")
def tiny_config(reference):
    return json.loads((reference / "tiny_config.json").read_text())


@pytest.fixture(scope="module")
def tiny_weights(reference, reference_weights):
    return reference_weights.make_state_dict(reference / "tiny_shapes.json")


def changed(config, section, **values):
    """A copy of a reference config with other values; dots reach into subsections."""
    config = copy.deepcopy(config)
    for path, value in values.items():
        place = config[section]
        *parents, last = path.split(".")
        for parent in parents:
            place = place[parent]
        place[last] = value
    return config


# Every tensor is accounted for


@pytest.mark.parametrize(
    "name",
    [
        "side_adapter_network.vit_model.norm.weight",
        "side_adapter_network.mask_decoder.other_mlp.layers.0.weight",
        "clip_visual_extractor.resblocks.0.ln_3.weight",
        "clip_visual_extractor.resblocks.0.mlp.c_fc.scale",
        "something_else",
    ],
)
def test_a_tensor_without_a_counterpart_is_named(tiny_weights, tiny_config, name):
    with pytest.raises(ValueError, match="does not fit the model") as error:
        convert_checkpoint({**tiny_weights, name: torch.zeros(1)}, tiny_config)
    assert str(error.value).splitlines()[1:] == [f"  unknown: {name}"]


def test_missing_tensors_are_all_listed(tiny_weights, tiny_config):
    weights = dict(tiny_weights)
    del weights["side_adapter_network.query_embed"]
    del weights["clip_rec_head.resblocks.1.attn.in_proj_bias"]
    with pytest.raises(ValueError, match="does not fit the model") as error:
        convert_checkpoint(weights, tiny_config)
    lines = str(error.value).splitlines()[1:]
    assert {line.strip() for line in lines} == {
        "missing: side_adapter.embeddings.query_embedding",
        *(f"missing: vision_model.encoder.layers.5.self_attn.{part}_proj.bias" for part in "qkv"),
    }


def test_wrong_shapes_are_listed_with_both_shapes(tiny_weights, tiny_config):
    weights = {**tiny_weights, "ov_classifier.bg_embed": torch.zeros(1, 7)}
    with pytest.raises(ValueError, match=r"shape of background_embedding: \(1, 7\) instead of \(1, 32\)"):
        convert_checkpoint(weights, tiny_config)


@pytest.mark.parametrize("name", ["backbone.conv1.weight", "image_encoder.cls_token"])
def test_a_checkpoint_of_another_model_is_refused(name):
    with pytest.raises(ValueError, match="not a SAN model of the original implementation or OpenMMLab's"):
        convert_checkpoint({name: torch.zeros(1, 1, 4)})


def test_a_name_of_this_project_or_a_second_one_for_a_tensor_is_unknown(tiny_weights, tiny_config):
    second = "clip_visual_extractor.resblocks.0.norm1.weight"
    with pytest.raises(ValueError, match="does not fit the model") as error:
        convert_checkpoint({**tiny_weights, "logit_scale": torch.zeros(()), second: torch.zeros(64)}, tiny_config)
    assert str(error.value).splitlines()[1:] == [f"  unknown: {second}", "  unknown: logit_scale"]


def test_half_precision_checkpoints_become_float32(tiny_weights, tiny_config):
    model = convert_checkpoint({name: tensor.bfloat16() for name, tensor in tiny_weights.items()}, tiny_config)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training


def test_variants_of_the_original_convert(tiny_weights, tiny_config):
    weights = {
        name: tensor
        for name, tensor in tiny_weights.items()
        if "bias_scaling" not in name and "attn_mlp.layers.2" not in name
    }
    weights["clip_rec_head.sos_token"] = torch.randn(10, 1, 64)
    for kind, shape in (("weight", (256 * 2, 256, 1, 1)), ("bias", (256 * 2,))):
        weights[f"side_adapter_network.mask_decoder.attn_mlp.layers.2.{kind}"] = torch.randn(shape)
    config = changed(
        tiny_config,
        "MODEL.SIDE_ADAPTER",
        **{"ATTN_BIAS.NUM_HEADS": 1, "ATTN_BIAS.NUM_LAYERS": 2, "ATTN_BIAS.RESCALE_ATTN_BIAS": False},
    )
    config = changed(config, "MODEL.SAN", SOS_TOKEN_FORMAT="pos_embedding", REC_DOWNSAMPLE_METHOD="avg")
    model = convert_checkpoint(weights, config)
    assert torch.equal(model.sls_embedding[0, 3], weights["clip_rec_head.sos_token"][3, 0])
    assert model.side_adapter.mask_decoder.bias_scaling is None
    assert (model.config.attention_bias_heads, model.config.attention_bias_layers) == (1, 2)
    assert model.config.attention_bias_pooling == "avg"


# Released architectures


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("vit_b_16", (12, 12, 16, 224, 8, 9, 0.5)),
        ("vit_l_14", (24, 16, 14, 336, 12, 18, 0.7)),
    ],
)
def test_released_architectures_are_recognised_from_shapes(reference, name, facts):
    shapes = json.loads((reference / f"{name}_shapes.json").read_text())
    with torch.device("meta"):
        weights = {key: torch.empty(shape) for key, shape in shapes.items()}
    config = conversion._make_config(weights, None)
    layers, heads, patch_size, image_size, text_heads, start, scale = facts
    vision = config.vision_config
    assert (vision.num_hidden_layers, vision.num_attention_heads) == (layers, heads)
    assert (vision.patch_size, vision.image_size) == (patch_size, image_size)
    assert config.text_config.num_attention_heads == text_heads
    assert (config.sls_start_layer, config.clip_input_scale) == (start, scale)
    # Saying the same in the original's own terms changes nothing.
    told = conversion._make_config(weights, json.loads((reference / f"{name}_config.json").read_text()))
    assert told.to_dict() == config.to_dict()


def test_other_architectures_need_a_reference_config(tiny_weights):
    with pytest.raises(ValueError, match=r"CLIP's width is 64.*768 or 1024.*pass reference_config"):
        convert_checkpoint(tiny_weights)


# Choices of the original without a counterpart


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("MODEL.SAN", "CLIP_FROZEN_EXCLUDE", ["positions"]),
        ("MODEL.SAN", "CLIP_DEEPER_FROZEN_EXCLUDE", ["text_projection"]),
        ("MODEL.SIDE_ADAPTER", "FUSION_TYPE", "concat"),
        ("MODEL.SIDE_ADAPTER", "ATTN_BIAS.MLP_NUM_LAYERS", 2),
        ("MODEL.SIDE_ADAPTER", "ATTN_BIAS.MLP_CHANNELS", 128),
        ("MODEL.SIDE_ADAPTER", "VIT_NAME", "swin_tiny"),
        ("MODEL.SIDE_ADAPTER", "FUSION_MAP", ["0-0"]),
    ],
)
def test_a_choice_without_a_counterpart_is_named(tiny_weights, tiny_config, section, field, value):
    config = changed(tiny_config, section, **{field: value})
    with pytest.raises(ValueError, match=rf"{field.rpartition('.')[2]}.*{re.escape(repr(value))}"):
        convert_checkpoint(tiny_weights, config)


FIRST_HALF = {
    "vision_model.embeddings.",
    "vision_model.pre_layrnorm",
    *(f"vision_model.encoder.layers.{i}." for i in range(4)),
}


@pytest.mark.parametrize(
    ("changes", "trainable"),
    [
        ({"REC_CROSS_ATTN": True}, {"vision_model.embeddings.position_embedding"}),
        ({"CLIP_FROZEN_EXCLUDE": []}, set()),
        ({"CLIP_FROZEN_EXCLUDE": [], "CLIP_DEEPER_FROZEN_EXCLUDE": ["sos_token"]}, set()),
        ({"CLIP_FROZEN_EXCLUDE": ["class_embed"]}, {"vision_model.embeddings.class_embedding"}),
        (
            {"CLIP_FROZEN_EXCLUDE": ["ln_pre"], "CLIP_DEEPER_FROZEN_EXCLUDE": ["ln_post", "proj"]},
            {
                "vision_model.pre_layrnorm",
                "vision_model.post_layernorm",
                "visual_projection",
                *(
                    f"vision_model.encoder.layers.{i}.self_attn.{part}_proj"
                    for i in (4, 5)
                    for part in ("q", "k", "v", "out")
                ),
                *(f"vision_model.encoder.layers.{i}.mlp.fc2" for i in (4, 5)),
            },
        ),
        ({"CLIP_FROZEN_EXCLUDE": ["all"]}, FIRST_HALF),
        (
            {"CLIP_FROZEN_EXCLUDE": ["all"], "CLIP_DEEPER_FROZEN_EXCLUDE": ["all"]},
            FIRST_HALF
            | {"vision_model.encoder.layers.4.", "vision_model.encoder.layers.5.", "vision_model.post_layernorm"}
            | {"visual_projection"},
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_the_original_trains_of_clip_trains_here(tiny_weights, tiny_config, changes, trainable):
    model = convert_checkpoint(tiny_weights, changed(tiny_config, "MODEL.SAN", **changes))
    assert set(model.config.trainable_clip_parameters) == trainable
    clip = {name for name, p in model.named_parameters() if p.requires_grad and name.startswith(("vis", "text"))}
    assert clip == {name for name in dict(model.named_parameters()) if any(part in name for part in trainable)}


def test_a_reference_config_without_a_field_is_refused_by_name(tiny_weights, tiny_config):
    config = copy.deepcopy(tiny_config)
    del config["MODEL.SAN"]["SOS_TOKEN_FORMAT"]
    with pytest.raises(ValueError, match="reference_config has no 'SOS_TOKEN_FORMAT'"):
        convert_checkpoint(tiny_weights, config)


# Files


WEIGHTS = {"a": torch.arange(4.0), "b.c": torch.ones(2, 3)}


@pytest.mark.parametrize(
    ("name", "save", "content"),
    [
        ("weights.pth", torch.save, WEIGHTS),
        ("weights.pth", torch.save, {"model": WEIGHTS, "iteration": 7}),
        ("weights.pth", torch.save, {"state_dict": WEIGHTS, "meta": {}}),
        ("weights.safetensors", save_file, WEIGHTS),
    ],
)
def test_weights_are_found_plain_or_under_a_key(tmp_path, name, save, content):
    save(content, tmp_path / name)
    loaded = load_checkpoint(tmp_path / name)
    assert loaded.keys() == WEIGHTS.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in WEIGHTS.items())


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize(
    "save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2))]
)
def test_a_pickle_that_carries_code_is_refused_and_never_executed(tmp_path, save):
    trace = tmp_path / "executed"
    save({"model": {**WEIGHTS, "evil": Payload(trace)}}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="other Python objects, which are never loaded"):
        load_checkpoint(tmp_path / "weights.pth")
    assert not trace.exists()
    # The payload works: an unguarded reader would have run it.
    pickle.loads(pickle.dumps(Payload(trace)))
    assert trace.exists()


TRUNCATED = io.BytesIO()
torch.save({"weight": torch.randn(1000)}, TRUNCATED)
TRUNCATED = TRUNCATED.getvalue()[:2000]


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x02garbage", TRUNCATED])
def test_a_damaged_file_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as a checkpoint of plain tensors"):
        load_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "fact"), [([1, 2], "a list"), ({"epoch": 3}, "no tensors"), (None, "weights.pth")]
)
def test_a_file_without_weights_is_refused(tmp_path, content, fact):
    if content is not None:
        torch.save(content, tmp_path / "weights.pth")
    with pytest.raises((ValueError, FileNotFoundError), match=fact):
        load_checkpoint(tmp_path / "weights.pth")


# The Hub


def test_unknown_hub_names_are_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="choose hub:vit-b-16 or hub:vit-l-14"):
        download_checkpoint("vit-h-14")


def test_without_a_network_the_error_says_what_to_do(monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(conversion, "hf_hub_download", fail)
    with pytest.raises(OSError, match="connect to the network, or download the file elsewhere and pass its path"):
        download_checkpoint("vit-b-16")
