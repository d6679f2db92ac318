"""What is saved comes back: exactly, in parts, in other types, with other labels, or with one clear error."""

import copy
import json
import logging
import pickle

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from conftest import trained_names
from safetensors import safe_open
from torch.testing import assert_close
from transformers import AutoProcessor

from modeling_san import SANConfig, SANForOpenVocabSegmentation, SANForSemanticSegmentation, SANProcessor

LABELS = ["sky", "road", "red car", "tree", "truck"]
OTHERS = ["tree", "sky", "car", "truck", "road"]
CLASSES = [SANForOpenVocabSegmentation, SANForSemanticSegmentation]
both_classes = pytest.mark.parametrize("model_class", CLASSES, ids=["words", "semantic"])


@pytest.fixture(scope="module")
def saved(make_model, processor):
    """A model with five labels stored."""
    model = make_model(num_clip_prompts=2, sls_token_format="learnable_token")
    model.set_labels(LABELS, processor)
    return model


@pytest.fixture(scope="module")
def folder(saved, processor, tmp_path_factory):
    """Where the model and its processor are saved; not to be changed."""
    folder = tmp_path_factory.mktemp("saved")
    saved.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def image():
    return torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(3))


def assert_same_weights(model, other):
    ours, expected = model.state_dict(), other.state_dict()
    assert ours.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(ours[name], tensor)] == []


def described(config):
    """A config without what saving adds to it."""
    added = {"architectures", "auto_map", "custom_pipelines", "_name_or_path", "dtype", "transformers_version"}
    return {
        name: value for name, value in json.loads(config.to_json_string(use_diff=False)).items() if name not in added
    }


# Round trips


@both_classes
@torch.no_grad()
def test_weights_labels_and_config_come_back_exactly(saved, folder, image, model_class):
    loaded, report = model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is model_class
    assert_same_weights(loaded, saved)
    assert torch.equal(loaded.stored_class_embeds, saved.stored_class_embeds)
    assert loaded.config.id2label == dict(enumerate(LABELS))
    assert loaded.config.label2id == {label: index for index, label in enumerate(LABELS)}
    ours, expected = described(loaded.config), described(saved.config)
    for part in ("vision_config", "text_config"):
        expected[part].pop("dtype"), ours[part].pop("dtype")
        expected[part].pop("_name_or_path", None), ours[part].pop("_name_or_path", None)
    assert ours == expected
    assert torch.equal(loaded(image).class_queries_logits, saved(image).class_queries_logits)


def test_the_processor_comes_back_with_its_templates(folder, processor):
    for loaded in (SANProcessor.from_pretrained(folder), AutoProcessor.from_pretrained(folder)):
        assert type(loaded) is SANProcessor
        assert loaded.templates == ["a photo of a {}.", "{}"] == processor.templates
        ours, expected = (each(text=["sky", "red car|truck"]) for each in (loaded, processor))
        assert torch.equal(ours["input_ids"], expected["input_ids"])
        assert torch.equal(ours["attention_mask"], expected["attention_mask"])
        assert loaded.image_processor.to_dict() == processor.image_processor.to_dict()


@both_classes
def test_one_class_saves_what_the_other_loads(folder, saved, model_class, tmp_path):
    [other] = [each for each in CLASSES if each is not model_class]
    model_class.from_pretrained(folder).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [model_class.__name__]
    assert_same_weights(other.from_pretrained(tmp_path), saved)


def test_saving_in_parts_and_whole_replace_each_other(saved, make_model, tmp_path):
    first = make_model(seed=5)
    for model in (first, saved, first):
        in_parts = model is first
        model.save_pretrained(tmp_path, **({"max_shard_size": "40KB"} if in_parts else {}))
        files = [file.name for file in tmp_path.glob("*.safetensors*")]
        assert len(files) > 2 if in_parts else files == ["model.safetensors"]
        for model_class in CLASSES:
            assert_same_weights(model_class.from_pretrained(tmp_path), model)
    assert not SANConfig.from_pretrained(tmp_path).has_stored_labels


def test_every_tensor_is_stored_once_frozen_ones_too(saved, folder):
    expected = {name: parameter.numel() for name, parameter in saved.named_parameters()}
    expected["stored_class_embeds"] = saved.stored_class_embeds.numel()
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {name: file.get_tensor(name).numel() for name in file.keys()} == expected  # noqa: SIM118
    header = int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    assert (folder / "model.safetensors").stat().st_size == 8 + header + 4 * sum(expected.values())


@both_classes
def test_what_is_frozen_stays_frozen(saved, folder, model_class):
    expected = trained_names(saved)
    assert any(name.startswith("vision_model.") for name in expected)
    assert not any(name.startswith("text_model.") for name in expected)
    for options in ({}, {"id2label": {0: "sky"}}, {"device_map": "auto"}, {"dtype": torch.bfloat16}):
        loaded = model_class.from_pretrained(folder, **options)
        assert trained_names(loaded) == expected
        assert not loaded.train().vision_model.encoder.layers[0].self_attn.training
    loaded = model_class.from_pretrained(folder, trainable_clip_parameters=["visual_projection"])
    assert trained_names(loaded) - expected == {"visual_projection.weight"}
    assert expected - trained_names(loaded) == {"vision_model.embeddings.position_embedding.weight"}


# Types, devices, attention


@both_classes
@torch.no_grad()
def test_the_type_is_the_asked_one_or_the_saved_one(folder, model_class, image, tmp_path):
    for dtype in (torch.bfloat16, torch.float16, "bfloat16"):
        loaded = model_class.from_pretrained(folder, dtype=dtype)
        expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        assert {tensor.dtype for tensor in (*loaded.parameters(), loaded.stored_class_embeds)} == {expected}
        assert loaded.config.dtype == loaded.vision_model.config.dtype == expected
        named = model_class.from_pretrained(folder, dtype=dtype, id2label={0: "sky", 1: "road"})
        assert (len(named.stored_class_embeds), named.stored_class_embeds.dtype) == (2, expected)
    loaded(image)
    loaded.save_pretrained(tmp_path)
    again = model_class.from_pretrained(tmp_path, dtype="auto")
    assert again.dtype == torch.bfloat16
    assert_same_weights(again, loaded)
    assert model_class.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32
    assert model_class.from_pretrained(folder, dtype="auto").dtype == torch.float32


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
@torch.no_grad()
def test_a_device_map_changes_nothing_but_the_place(saved, folder, image, device_map):
    device_type = "cuda" if device_map == "auto" and torch.cuda.is_available() else "cpu"
    for model_class, options in zip(CLASSES, ({}, {"id2label": dict(enumerate(OTHERS))}), strict=True):
        loaded = model_class.from_pretrained(folder, device_map=device_map, **options)
        assert {tensor.device.type for tensor in loaded.state_dict().values()} == {device_type}
        outputs = loaded(image.to(device_type))
        assert_close(outputs.mask_embeds.cpu(), saved(image).mask_embeds, atol=1e-4, rtol=1e-4)


@both_classes
@torch.no_grad()
def test_the_asked_attention_is_that_of_every_part(folder, model_class, image):
    answers = []
    for attention in ("eager", "sdpa"):
        loaded = model_class.from_pretrained(folder, attn_implementation=attention)
        configs = (loaded.config, *(part.config for part in (loaded.vision_model, loaded.text_model)))
        nested = (loaded.config.vision_config, loaded.config.text_config)
        side = (layer.attention.config for layer in loaded.side_adapter.layers)
        assert {config._attn_implementation for config in (*configs, *nested, *side)} == {attention}
        assert {config._attn_implementation for config in copy.deepcopy(configs)} == {attention}
        answers.append(loaded(image).class_queries_logits)
    assert_close(answers[0], answers[1], atol=1e-3, rtol=1e-4)


@both_classes
@pytest.mark.parametrize("attention", ["nonsense", "flash_attention_2", "flex_attention"])
def test_attention_that_cannot_take_a_bias_is_refused(folder, model_class, attention):
    with pytest.raises(ValueError, match=r"nonsense|Flash Attention|flex_attention"):
        model_class.from_pretrained(folder, attn_implementation=attention)


# Elsewhere than where the model runs


def offload_with_a_map(model, folder):
    """Load all but the parameters of the model's own to a disk."""
    model.save_pretrained(folder)
    places = {name: "cpu" for name in model.state_dict() if "." not in name}
    places |= {name: "disk" for name, _ in model.named_children()}
    return SANForOpenVocabSegmentation.from_pretrained(folder, device_map=places, offload_folder=folder / "offloaded")


@pytest.mark.parametrize(
    "place",
    [
        lambda model, folder: cpu_offload(model, torch.device("cpu")),
        lambda model, folder: disk_offload(model, folder, torch.device("cpu")),
        offload_with_a_map,
    ],
    ids=["cpu_offload", "disk_offload", "device_map"],
)
@torch.no_grad()
def test_offloaded_models_answer_as_whole_ones(saved, processor, image, tmp_path, place):
    text = dict(processor(text=OTHERS))
    expected = [saved(image).class_queries_logits, saved(image, **text).class_queries_logits]
    model = place(copy.deepcopy(saved), tmp_path)
    assert_close(model(image).class_queries_logits, expected[0], atol=1e-4, rtol=1e-4)
    assert_close(model(image, **text).class_queries_logits, expected[1], atol=1e-4, rtol=1e-4)
    model.set_labels(OTHERS, processor)
    assert_close(model(image).class_queries_logits, expected[1], atol=1e-4, rtol=1e-4)


# Other sizes


@both_classes
def test_other_sizes_are_started_anew_when_asked_for_and_refused_otherwise(saved, folder, model_class, caplog):
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        model_class.from_pretrained(folder, num_queries=9)
    loaded, report = model_class.from_pretrained(
        folder, num_queries=9, ignore_mismatched_sizes=True, output_loading_info=True
    )
    embeddings = loaded.side_adapter.embeddings
    assert embeddings.query_embedding.shape == embeddings.query_position_embedding.shape == (1, 9, 24)
    assert loaded.sls_embedding.shape == (1, 9, 32)
    mismatched = {name for name, *_ in report["mismatched_keys"]}
    queries = {"side_adapter.embeddings.query_embedding", "side_adapter.embeddings.query_position_embedding"}
    assert mismatched == {*queries, "sls_embedding"}
    for name in mismatched:
        assert 0.01 < loaded.get_parameter(name).std() < 0.03, "the range of a new model is 0.02"
    others = {name: tensor for name, tensor in loaded.state_dict().items() if name not in mismatched}
    assert all(torch.equal(tensor, saved.state_dict()[name]) for name, tensor in others.items())
    assert trained_names(loaded) == trained_names(saved)


@both_classes
@pytest.mark.parametrize(
    ("options", "kind", "name"),
    [
        ({"num_clip_prompts": 1}, "mismatched_keys", "prompt_embedding"),
        ({"side_num_layers": 4}, "missing_keys", "side_adapter.layers.3"),
        ({"sls_token_format": "cls_token"}, "unexpected_keys", "sls_embedding"),
    ],
    ids=["other shapes", "missing", "left over"],
)
def test_weights_that_are_not_the_configs_are_refused_unless_asked_for(folder, model_class, options, kind, name):
    with pytest.raises(RuntimeError, match=f"weights too few.*{name}.*ignore_mismatched_sizes") as caught:
        model_class.from_pretrained(folder, **options)
    assert "\n" not in str(caught.value)
    _, report = model_class.from_pretrained(folder, ignore_mismatched_sizes=True, output_loading_info=True, **options)
    assert name in str(report[kind])
    model_class.from_pretrained(folder, ignore_mismatched_sizes=True, **options)


def test_a_weight_that_is_missing_is_refused(saved, processor, tmp_path):
    state = saved.state_dict()
    del state["visual_projection.weight"]
    saved.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(RuntimeError, match=r"1 weights too few.*visual_projection\.weight"):
        SANForOpenVocabSegmentation.from_pretrained(tmp_path)


# Labels at load time


@both_classes
@torch.no_grad()
def test_other_names_are_encoded_even_when_they_are_as_many(saved, folder, processor, model_class, caplog):
    expected = saved.get_class_embeds(**processor(text=OTHERS))
    with caplog.at_level(logging.WARNING, logger="transformers"):
        loaded = model_class.from_pretrained(folder, id2label=dict(enumerate(OTHERS)))
    assert_close(loaded.stored_class_embeds, expected)
    assert loaded.config.id2label == dict(enumerate(OTHERS))
    assert loaded.config.label2id["truck"] == 3
    assert "UNEXPECTED" not in caplog.text
    fewer = model_class.from_pretrained(folder, id2label={"0": "road", "1": "sky"}, label2id={"road": 0, "sky": 1})
    assert_close(fewer.stored_class_embeds, expected[[4, 1]])
    assert fewer.config.id2label == {0: "road", 1: "sky"}


@both_classes
def test_a_config_with_other_names_is_not_changed_by_loading(folder, model_class):
    config = SANConfig.from_pretrained(folder, id2label={0: "sky"})
    before = copy.deepcopy(config.to_dict())
    assert len(model_class.from_pretrained(folder, config=config).stored_class_embeds) == 1
    assert config.to_dict() == before
    assert config.has_stored_labels


@both_classes
@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"id2label": {0: "sky", 2: "road"}}, "id2label has the positions 0, 2: number the labels"),
        ({"num_labels": 3}, "the 3 labels have no names"),
        ({"id2label": {}}, "the 0 labels have no names"),
        ({"id2label": {0: "sky", 1: "road", 2: "Sky "}}, "is given 2 times"),
        ({"id2label": {0: "sky", 1: " "}}, "label 1 .* is empty"),
    ],
    ids=["gap", "placeholders", "none", "twice", "blank"],
)
def test_labels_that_name_nothing_are_refused_in_one_sentence(folder, model_class, options, hint):
    with pytest.raises(ValueError, match=hint) as caught:
        model_class.from_pretrained(folder, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tokenizer_only", [False, True])
def test_new_labels_without_a_processor_are_refused_in_one_sentence(saved, processor, tmp_path, tokenizer_only):
    saved.save_pretrained(tmp_path)
    if tokenizer_only:
        # It would encode names without their templates.
        processor.tokenizer.save_pretrained(tmp_path)
    for model_class in CLASSES:
        assert_same_weights(model_class.from_pretrained(tmp_path), saved)
        with pytest.raises(OSError, match=r"no processor in .* to encode id2label with") as caught:
            model_class.from_pretrained(tmp_path, id2label={0: "sky"})
        assert "\n" not in str(caught.value)


def test_labels_make_a_vocabulary_where_none_was_stored(make_model, processor, tmp_path):
    make_model().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert SANForSemanticSegmentation.from_pretrained(tmp_path).stored_class_embeds is None
    loaded = SANForSemanticSegmentation.from_pretrained(tmp_path, id2label={0: "sky", 1: "road"})
    loaded.save_pretrained(tmp_path)
    again = SANForSemanticSegmentation.from_pretrained(tmp_path)
    assert_same_weights(again, loaded)
    assert again.config.id2label == {0: "sky", 1: "road"}


@both_classes
@pytest.mark.parametrize(
    "names",
    [{"id2label": ["road", "sky"]}, {"label2id": {"road": 0, "sky": 1}}, {"id2label": {"0": "road", "1": "sky"}}],
)
def test_labels_may_be_named_either_way(folder, model_class, names):
    loaded = model_class.from_pretrained(folder, **names)
    assert loaded.config.stored_labels == ("road", "sky")
    assert loaded.config.label2id == {"road": 0, "sky": 1}
    assert loaded.stored_class_embeds.shape[0] == 2


def test_a_model_with_names_that_were_never_encoded_is_saved_and_loaded(make_config, tmp_path):
    config = make_config(id2label={0: "sky", 1: "road"})
    assert config.stored_labels is None
    SANForSemanticSegmentation(config).save_pretrained(tmp_path)
    loaded = SANForSemanticSegmentation.from_pretrained(tmp_path)
    assert loaded.config.id2label == {0: "sky", 1: "road"}
    # Only names that a caller gives have to be encoded
    with pytest.raises(OSError, match="no processor"):
        SANForSemanticSegmentation.from_pretrained(tmp_path, id2label={0: "sky", 1: "road"})


# Unusual ways


@both_classes
def test_loading_leaves_nothing_on_the_meta_device(make_config, folder, model_class):
    with torch.device("meta"):
        empty = model_class(make_config())
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    assert trained_names(empty) >= {"background_embedding"}
    for options in ({}, {"device_map": "auto"}, {"num_queries": 4, "ignore_mismatched_sizes": True}):
        loaded = model_class.from_pretrained(folder, **options)
        assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))


@both_classes
@torch.no_grad()
def test_a_copy_shares_nothing(folder, image, processor, model_class):
    loaded = model_class.from_pretrained(folder)
    copied = copy.deepcopy(loaded)
    expected = loaded(image).class_queries_logits
    for parameter in loaded.parameters():
        parameter.zero_()
    loaded.set_labels(["road"], processor)
    assert torch.equal(copied(image).class_queries_logits, expected)
    assert copied.config.id2label == dict(enumerate(LABELS))
    assert trained_names(copied) == trained_names(loaded)


@torch.no_grad()
def test_config_processor_and_model_can_be_pickled(saved, processor, image):
    config = pickle.loads(pickle.dumps(saved.config))
    assert config.to_dict() == saved.config.to_dict()
    assert config.vision_config.hidden_size == saved.config.vision_config.hidden_size
    unpickled = pickle.loads(pickle.dumps(processor))
    assert torch.equal(unpickled(text=LABELS)["input_ids"], processor(text=LABELS)["input_ids"])
    assert unpickled.templates == processor.templates
    again = pickle.loads(pickle.dumps(saved))
    assert torch.equal(again(image).class_queries_logits, saved(image).class_queries_logits)
