"""Tests of the library that do not apply here, each with its reason. `*` stands for anything."""

DIFFERENT: dict[str, str] = {}
"""`class::test` of what works in another way here. These fail; one that passes nowadays is an error while it is listed."""

EMPTY = {
    "test_get_audio_features_*": "SAN hears nothing",
    "test_get_video_features_*": "SAN looks at one image at a time",
    "test_get_image_features_pooler_output": "about image features inside generated text",
    "test_multimodal_outputs_are_returned": "about models that generate text",
    "test_model_base_model_prefix": "about models that generate text",
    "test_inputs_embeds_matches_input_ids": "about language models that take `inputs_embeds`",
    "test_problem_types": "about the classification of sequences",
    "test_load_with_mismatched_shapes": "about the classification of sequences",
    "test_can_load_ignoring_mismatched_shapes": "about the classification of sequences",
}
"""Tests of models that pass without building one. An entry that builds one nowadays is an error while it is listed."""

ABOUT_CLASSES = {
    "test_config",
    "test_config_attn_implementation_setter",
    "test_generation_tester_mixin_inheritance",
    "test_model_main_input_name",
    "test_num_layers_is_small",
}
"""Tests of models that need none: they look at classes and configurations."""
