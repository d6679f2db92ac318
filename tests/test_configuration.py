"""Configurations: the defaults are the released model, and what cannot work is refused with a hint."""

import re

import pytest
from conftest import TINY_VISION
from transformers import CLIPTextConfig, CLIPVisionConfig

from modeling_san import SANConfig


def test_the_defaults_are_the_released_vit_b_16():
    config = SANConfig()
    vision, text = config.vision_config, config.text_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (768, 12, 12)
    assert (vision.patch_size, vision.image_size, vision.hidden_act) == (16, 224, "quick_gelu")
    assert (text.hidden_size, text.num_hidden_layers, text.vocab_size, text.eos_token_id) == (512, 12, 49408, 49407)
    assert config.projection_dim == 512
    assert (config.asymmetric_input, config.clip_input_scale) == (True, 0.5)
    assert (config.sls_start_layer, config.num_recognition_layers, config.sls_token_format) == (9, 3, "cls_token")
    assert (config.num_queries, config.side_hidden_size, config.side_num_layers) == (100, 240, 8)
    assert (config.side_num_heads, config.side_mlp_ratio, config.side_layer_norm_eps) == (6, 4.0, 1e-6)
    assert (config.side_image_size, config.side_patch_size, config.size_divisor) == (640, 16, 32)
    assert config.fusion_map == [[0, 0], [3, 1], [6, 2], [9, 3]]
    assert config.deep_supervision_layers == [7, 8]
    assert (config.attention_bias_heads, config.attention_bias_layers) == (12, 1)
    assert (config.rescale_attention_bias, config.attention_bias_pooling, config.mask_dim) == (True, "max", 256)
    assert (config.class_weight, config.mask_weight, config.dice_weight, config.no_object_weight) == (2, 5, 5, 0.1)
    assert (config.train_num_points, config.oversample_ratio, config.importance_sample_ratio) == (12544, 3.0, 0.75)
    assert config.trainable_clip_parameters == ["vision_model.embeddings.position_embedding"]
    assert config.semantic_loss_ignore_index == 255


def test_saving_and_loading_keeps_every_field(make_config, tmp_path):
    config = make_config(
        sls_token_format="pos_embedding",
        attention_bias_heads=1,
        attention_bias_layers=2,
        attention_bias_pooling="bicubic",
        asymmetric_input=False,
        trainable_clip_parameters=("visual_projection", "layers.3"),
        training_labels=["sky", "road"],
        id2label={0: "sky", 1: "road", 2: "car"},
    )
    config.save_pretrained(tmp_path)
    loaded = SANConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert isinstance(loaded.vision_config, CLIPVisionConfig)
    assert isinstance(loaded.text_config, CLIPTextConfig)
    assert loaded.vision_config.hidden_size == TINY_VISION["hidden_size"]
    assert loaded.sls_token_format == "pos_embedding"
    assert loaded.fusion_map == [[0, 0], [2, 1]]
    assert loaded.trainable_clip_parameters == ["visual_projection", "layers.3"]
    assert (loaded.id2label, loaded.num_labels) == ({0: "sky", 1: "road", 2: "car"}, 3)


def test_clips_configs_are_taken_as_objects_and_as_dictionaries(make_config):
    as_dict = make_config()
    as_object = make_config(vision_config=CLIPVisionConfig(**TINY_VISION))
    assert as_object.vision_config.to_dict() == as_dict.vision_config.to_dict()


def test_configs_do_not_share_lists():
    first, second = SANConfig(), SANConfig()
    first.fusion_map.append([1, 4])
    assert second.fusion_map == [[0, 0], [3, 1], [6, 2], [9, 3]]


def test_biases_have_one_head_for_each_of_clips_unless_told_otherwise(make_config):
    assert make_config().attention_bias_heads == TINY_VISION["num_attention_heads"]
    assert make_config(attention_bias_heads=1).attention_bias_heads == 1


WRONG = [
    ({"sls_start_layer": 0}, "sls_start_layer is 0: choose a CLIP layer from 1 to 3"),
    ({"clip_input_scale": 0}, "clip_input_scale is 0: it must lie in (0, 1]"),
    ({"clip_input_scale": 1.5}, "clip_input_scale is 1.5: it must lie in (0, 1]"),
    ({"projection_dim": 0}, "projection_dim is 0: it must be at least 1"),
    ({"sls_token_format": "cls"}, "choose one of 'cls_token', 'learnable_token', 'pos_embedding'"),
    ({"num_queries": 0}, "num_queries is 0: it must be at least 1"),
    ({"num_clip_prompts": -1}, "num_clip_prompts is -1"),
    ({"side_hidden_size": 0}, "side_hidden_size is 0: it must be at least 1"),
    ({"side_num_heads": 0}, "side_num_heads is 0: it must be at least 1"),
    ({"side_patch_size": 0}, "side_patch_size is 0: it must be at least 1"),
    ({"side_num_heads": 5}, "side_hidden_size 24 does not divide into 5 heads: make it a multiple"),
    ({"side_image_size": 100}, "side_image_size 100 is not a multiple of side_patch_size 16"),
    ({"size_divisor": 24}, "size_divisor 24 is not a multiple of side_patch_size 16"),
    ({"fusion_map": [[3, 0]]}, "clip_layer from 0 to sls_start_layer (2)"),
    ({"fusion_map": [[0, 4]]}, "side_layer from 0 to side_num_layers (3)"),
    ({"fusion_map": [[0, 0, 1]]}, "each entry is [clip_layer, side_layer]"),
    ({"fusion_map": [[0, 1], [2, 1]]}, "names a side layer twice: give each side layer at most one CLIP layer"),
    ({"deep_supervision_layers": []}, "list side layers in ascending order, from 1 to 3, ending with"),
    ({"deep_supervision_layers": [2]}, "ending with the final layer 3"),
    ({"deep_supervision_layers": [0, 3]}, "from 1 to 3"),
    ({"deep_supervision_layers": [3, 3]}, "in ascending order"),
    ({"attention_bias_heads": 2}, "attention_bias_heads is 2: use 4 (one bias for each head of CLIP) or 1"),
    ({"attention_bias_layers": 3}, "attention_bias_layers is 3: use 2 (one bias for each CLIP layer after"),
    ({"attention_bias_pooling": "min"}, "choose one of 'max', 'avg', 'bilinear', 'bicubic', 'nearest'"),
    ({"mask_weight": -1.0}, "mask_weight is -1.0: loss weights cannot be negative"),
    ({"class_weight": 0, "mask_weight": 0, "dice_weight": 0}, "at least one must be positive for matching"),
    ({"train_num_points": 0}, "train_num_points is 0: it must be at least 1"),
    ({"oversample_ratio": 0.5}, "oversample_ratio is 0.5: it must be at least 1"),
    ({"importance_sample_ratio": 1.5}, "importance_sample_ratio is 1.5: it is a share, from 0 to 1"),
]


@pytest.mark.parametrize(("changes", "hint"), WRONG, ids=[f"{changes}" for changes, _ in WRONG])
def test_a_wrong_combination_is_refused_with_a_hint(make_config, changes, hint):
    with pytest.raises(Exception, match=re.escape(hint)):
        make_config(**changes)


@pytest.mark.parametrize(("field", "value"), [("num_queries", "many"), ("asymmetric_input", "yes"), ("fusion_map", 3)])
def test_a_value_of_the_wrong_type_is_refused_by_name(make_config, field, value):
    with pytest.raises(Exception, match=field):
        make_config(**{field: value})


def test_an_unknown_clip_parameter_is_refused_with_an_example(make_model):
    with pytest.raises(ValueError, match=r"holds 'vision_model.layer9'.*use for example \"vision_model\""):
        make_model(trainable_clip_parameters=["vision_model.layer9"])
    # The side adapter trains anyway: naming it is a misunderstanding worth telling.
    with pytest.raises(ValueError, match="in no parameter name of CLIP"):
        make_model(trainable_clip_parameters=["side_adapter"])
