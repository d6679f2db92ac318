"""Tests of the library that do not apply here, each with its reason."""

from transformers.utils import is_torchvision_available

NEWEST = "5.24"
"""The version that the lists are written for."""

_SHAPE = "prompts are (labels, prompts, tokens): each label stands in several templates"

DIFFERENT = {
    "SANImageProcessingTest::test_call_numpy_4_channels": "CLIP sees red, green and blue; four channels are refused",
    "SANProcessorTest::test_call_arguments_not_in_attributes": "`templates` can be replaced for one call",
    "SANProcessorTest::test_kwargs_overrides_default_subprocessor_kwargs_0_images": _SHAPE,
    "SANProcessorTest::test_processor_text_has_no_visual": "text is one vocabulary, not a text for each image",
    "SANProcessorTest::test_subprocessor_defaults_0_text": _SHAPE,
    "SANProcessorTest::test_subprocessor_defaults_preserved_by_kwargs_0_images": _SHAPE,
}
"""What works in another way here, by class and test. These fail; one that passes nowadays is an error."""

if not is_torchvision_available():
    DIFFERENT |= {
        "SANImageProcessingTest::test_new_models_require_torchvision_backend": "this backend needs torchvision",
    }

OLDER = {
    "SANImageProcessingTest::test_pil_can_load_without_torchvision": "looks for the class in a module of transformers",
}
"""As above, of tests that the newest version has no more."""

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
"""Tests of models that pass without building one. One that builds one nowadays is an error."""

ABOUT_CLASSES = (
    "test_config",
    "test_config_attn_implementation_setter",
    "test_generation_tester_mixin_inheritance",
    "test_model_main_input_name",
    "test_num_layers_is_small",
)
"""Tests of models that need none: they look at classes and configurations."""
