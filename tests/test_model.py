"""The whole model: what trains, what a batch may not change, what is refused, and what survives saving."""

import copy
import re

import numpy as np
import pytest
import torch
from conftest import TINY, TINY_TEXT, TINY_VISION, trained_names
from PIL import Image
from torch import nn
from torch.testing import assert_close
from transformers import CLIPConfig, CLIPModel, Trainer, TrainingArguments
from transformers.models.mask2former.modeling_mask2former import Mask2FormerHungarianMatcher

from modeling_san import SANConfig, SANForOpenVocabSegmentation, SANForSemanticSegmentation, open_vocabulary
from modeling_san.loss_san import masks_from_label_map

LABELS = ["sky", "road", "red car", "tree", "truck"]
POSITIONS = "vision_model.embeddings.position_embedding.weight"


def make_image(height, width, seed=0):
    """Smooth colours with a little noise, so that every region of it says something else."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((width, height))
    noise = random.normal(0, 6, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8))


def make_label_map(height, width, labels=(0, 2, 3), seed=0):
    """Stripes of labels, some pixels of them without."""
    label_map = np.take(labels, np.arange(width) * len(labels) // width).astype(np.int64)[None].repeat(height, 0)
    label_map[:4, :7] = 255
    return label_map


def label_batch(*label_maps, size):
    """Label maps in one tensor (batch, *size), padded with 255."""
    batch = torch.full((len(label_maps), *size), 255)
    for canvas, label_map in zip(batch, label_maps, strict=True):
        canvas[: label_map.shape[0], : label_map.shape[1]] = torch.from_numpy(label_map)
    return batch


def losses_of(model, seed=0, **inputs):
    """The loss terms of one training pass, points drawn the same way every time."""
    torch.manual_seed(seed)
    return model(**inputs).loss_dict


# What trains


def test_of_157_8_million_parameters_of_the_released_model_8_37_million_train():
    with torch.device("meta"):
        parameters = list(SANForOpenVocabSegmentation(SANConfig()).parameters())
    assert round(sum(parameter.numel() for parameter in parameters) / 1e6, 1) == 157.8
    assert round(sum(parameter.numel() for parameter in parameters if parameter.requires_grad) / 1e6, 2) == 8.37


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {POSITIONS}),
        (
            {"sls_token_format": "learnable_token", "num_clip_prompts": 1},
            {POSITIONS, "sls_embedding", "prompt_embedding"},
        ),
        ({"trainable_clip_parameters": []}, set()),
        (
            {"trainable_clip_parameters": ["logit_scale", "text_projection"]},
            {"logit_scale", "text_projection.weight"},
        ),
    ],
)
def test_what_is_added_to_clip_trains_and_of_clip_what_the_config_chooses(make_model, changes, expected):
    model = make_model(**changes)
    assert all(parameter.requires_grad for parameter in model.side_adapter.parameters())
    others = {name for name in trained_names(model) if not name.startswith("side_adapter.")}
    assert others == {"background_embedding", *expected}


def test_frozen_parts_stay_in_evaluation_mode(model, make_model):
    part = make_model(trainable_clip_parameters=["vision_model.encoder.layers.3"]).train()
    assert [layer.self_attn.training for layer in part.vision_model.encoder.layers] == [False, False, False, True]
    model.train()
    for encoder in (model.vision_model, model.text_model):
        own = [module for module in encoder.modules() if list(module.parameters(recurse=False))]
        assert not any(module.training for module in own if not any(p.requires_grad for p in module.parameters()))
        # Dropout is asked of the attention; a layer's own mode only says whether its activations are kept
        assert not any(layer.self_attn.training or layer.mlp.training for layer in encoder.encoder.layers)
    assert model.side_adapter.training
    assert all(layer.training for layer in model.side_adapter.layers)
    model.eval()
    assert not any(module.training for module in model.modules())


def test_dropout_in_frozen_parts_does_not_blur_training(make_model, class_embeds):
    model = make_model(vision_config={**TINY_VISION, "attention_dropout": 0.5}).train()
    image = torch.randn(1, 3, 64, 64)
    first, again = (model(image, class_embeds=class_embeds) for _ in range(2))
    assert torch.equal(first.class_queries_logits, again.class_queries_logits)


def test_gradients_reach_exactly_what_trains(make_model, processor):
    model = make_model(
        sls_token_format="pos_embedding", trainable_clip_parameters=[POSITIONS.removesuffix(".weight"), "text_model"]
    ).train()
    labels = torch.from_numpy(make_label_map(64, 64))[None]
    inputs = processor(images=make_image(64, 64), text=LABELS, do_resize=False)
    model(**inputs, labels=labels).loss.backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == trained_names(model)
    assert model.get_parameter(POSITIONS).grad.any()
    assert model.sls_embedding.grad.any()
    assert model.text_model.encoder.layers[0].mlp.fc1.weight.grad.any()


def test_only_training_decodes_the_deep_supervision_layers(model, class_embeds):
    image = torch.randn(1, 3, 64, 64)
    assert model(image, class_embeds=class_embeds).auxiliary_logits is None
    [auxiliary] = model.train()(image, class_embeds=class_embeds).auxiliary_logits
    assert auxiliary["masks_queries_logits"].shape == (1, 6, 4, 4)
    assert auxiliary["class_queries_logits"].shape == (1, 6, 6)


# What shares a batch


IMAGES = [(64, 96), (100, 90), (64, 81), (40, 128), (97, 70)]


@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_batch_mates_do_not_change_an_answer(model, processor, training):
    model.train(training)
    images = [make_image(*size, seed=index) for index, size in enumerate(IMAGES)]
    together = model(**processor(images=images, text=LABELS, do_resize=False))
    scores = processor.post_process_semantic_scores(together)
    for index, image in enumerate(images):
        alone = model(**processor(images=image, text=LABELS, do_resize=False))
        [expected] = processor.post_process_semantic_scores(alone)
        assert scores[index].shape == expected.shape == (5, *IMAGES[index])
        assert_close(scores[index], expected, atol=1e-4, rtol=0)
        assert_close(together.class_queries_logits[index], alone.class_queries_logits[0], atol=1e-3, rtol=0)


@pytest.mark.parametrize("sizes", [[(64, 96)], [(64, 96), (64, 96)], [(64, 96), (100, 90)]])
@torch.no_grad()
def test_a_larger_frame_does_not_change_an_answer(model, processor, sizes):
    # A batch of one image cut out of a larger batch keeps that batch's frame.
    images = [make_image(*size, seed=index) for index, size in enumerate(sizes)]
    tight = processor(images=images, text=LABELS, do_resize=False)
    roomy = processor(images=images, text=LABELS, do_resize=False, pad_size={"height": 160, "width": 192})
    expected, ours = model(**tight), model(**roomy)
    assert ours.masks_queries_logits.shape[-2:] == ours.attention_bias.shape[-2:] == (10, 12)
    assert_close(ours.class_queries_logits, expected.class_queries_logits, atol=1e-3, rtol=0)
    for index in range(len(sizes)):
        ours_scores, scores = (processor.post_process_semantic_scores(each)[index] for each in (ours, expected))
        assert_close(ours_scores, scores, atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_order_of_a_mixed_batch_is_kept(model, processor):
    images = [make_image(*size, seed=index) for index, size in enumerate(IMAGES)]
    inputs = processor(images=images, text=LABELS, do_resize=False)
    order = [3, 0, 4, 2, 1]
    shuffled = {**inputs, "pixel_values": inputs["pixel_values"][order], "image_sizes": inputs["image_sizes"][order]}
    straight, mixed = model(**inputs), model(**shuffled)
    for name in ("class_queries_logits", "masks_queries_logits", "mask_embeds", "attention_bias"):
        assert_close(mixed[name], straight[name][order], atol=1e-3, rtol=1e-4)


def spy_on_matching(monkeypatch):
    """Every call of the matcher: the sizes of its masks and the pairs it chose."""
    calls = []
    match = Mask2FormerHungarianMatcher.forward

    def keep(self, masks, *args, **kwargs):
        pairs = match(self, masks, *args, **kwargs)
        calls.append((tuple(masks.shape[-2:]), [(q.tolist(), t.tolist()) for q, t in pairs]))
        return pairs

    monkeypatch.setattr(Mask2FormerHungarianMatcher, "forward", keep)
    return calls


def same_numbers_for_a_size(*size, **options):
    """Stands in for `torch.rand`: what an image gets does not depend on which come before it."""
    return torch.empty(*size).uniform_(generator=torch.Generator().manual_seed(sum(size)))


@pytest.mark.parametrize("room", [{}, {"pad_size": {"height": 160, "width": 160}}])
def test_in_training_too_each_image_is_matched_as_if_alone(model, processor, monkeypatch, room):
    model.train()
    calls = spy_on_matching(monkeypatch)
    monkeypatch.setattr(torch, "rand", same_numbers_for_a_size)
    sizes = [(64, 96), (100, 90), (97, 128)]
    images = [make_image(*size, seed=index) for index, size in enumerate(sizes)]
    maps = [make_label_map(*sizes[index], labels=labels) for index, labels in enumerate([(0, 2, 3), (4,), (1, 3)])]
    outputs = model(**processor(images=images, segmentation_maps=maps, text=LABELS, do_resize=False, **room))
    assert outputs.loss.isfinite()
    outputs.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.requires_grad)
    final = calls[: len(calls) // 2]  # the other half is the auxiliary output's
    assert [size for size, _ in final] == [(4, 6), (8, 6), (8, 8)]
    together = [pairs for _, group in final for pairs in group]
    for index, image in enumerate(images):
        calls.clear()
        model(**processor(images=image, segmentation_maps=[maps[index]], text=LABELS, do_resize=False))
        assert calls[0][1] == [together[index]]


def test_a_larger_frame_does_not_change_the_loss(model, processor):
    model.train()
    images, maps = [make_image(64, 96)], [make_label_map(64, 96)]
    tight, roomy = (
        processor(images=images, segmentation_maps=maps, text=LABELS, do_resize=False, **room)
        for room in ({}, {"pad_size": {"height": 160, "width": 128}})
    )
    expected, ours = losses_of(model, **tight), losses_of(model, **roomy)
    for name, term in expected.items():
        assert_close(ours[name], term, rtol=1e-4, atol=1e-5)


# Labels


def test_label_maps_and_masks_of_them_give_the_same_loss(model, processor):
    model.train()
    sizes = [(64, 96), (90, 70)]
    images = [make_image(*size, seed=index) for index, size in enumerate(sizes)]
    maps = [make_label_map(64, 96), make_label_map(90, 70, labels=(1, 4))]
    with_masks = processor(images=images, segmentation_maps=maps, text=LABELS, do_resize=False)
    plain = processor(images=images, text=LABELS, do_resize=False)
    labels = label_batch(*maps, size=plain["pixel_values"].shape[-2:])
    torch.manual_seed(0)
    outputs, expected = model(**plain, labels=labels), losses_of(model, **with_masks)
    terms = {f"loss_{kind}{suffix}" for kind in ("cross_entropy", "mask", "dice") for suffix in ("", "_0")}
    assert outputs.loss_dict.keys() == expected.keys() == terms
    for name, term in expected.items():
        assert_close(outputs.loss_dict[name], term, msg=lambda text, name=name: f"{name}: {text}")
    assert outputs.loss.item() == pytest.approx(sum(term.item() for term in outputs.loss_dict.values()), rel=1e-5)
    evaluated = model.eval()(**plain, labels=labels)
    assert evaluated.loss_dict.keys() == {"loss_cross_entropy", "loss_mask", "loss_dice"}


def test_a_label_map_becomes_one_mask_for_each_class_it_holds():
    label_map = torch.tensor([[3, 3, 255], [0, 3, 255]], dtype=torch.uint8)
    masks, classes = masks_from_label_map(label_map, num_labels=4, ignore_index=255)
    assert classes.tolist() == [0, 3]
    assert masks.tolist() == [[[0, 0, 0], [1, 0, 0]], [[1, 1, 0], [0, 1, 0]]]


def test_the_ignore_index_is_the_configs(make_model, class_embeds):
    model = make_model(semantic_loss_ignore_index=4).train()
    image = torch.randn(1, 3, 64, 64)
    loss = model(image, class_embeds=class_embeds, labels=torch.full((1, 64, 64), 4)).loss
    assert loss == 0
    with pytest.raises(ValueError, match="and 4 marks pixels to ignore"):
        model(image, class_embeds=class_embeds, labels=torch.full((1, 64, 64), 255))


def test_loss_weights_scale_their_terms(make_model, class_embeds):
    image, labels = torch.randn(1, 3, 64, 64), torch.from_numpy(make_label_map(64, 64))[None]
    # All three doubled, matching stays the same.
    plain, doubled = (
        losses_of(
            make_model(class_weight=2.0 * factor, mask_weight=5.0 * factor, dice_weight=5.0 * factor).train(),
            pixel_values=image,
            class_embeds=class_embeds,
            labels=labels,
        )
        for factor in (1, 2)
    )
    for name, term in plain.items():
        assert_close(doubled[name], 2 * term)


def test_an_unlabelled_image_contributes_nothing_and_breaks_nothing(model, class_embeds):
    model.train()
    images, labels = torch.randn(2, 3, 64, 64), torch.full((2, 64, 64), 255)
    labels[0] = torch.from_numpy(make_label_map(64, 64))
    alone = losses_of(model, pixel_values=images[:1], class_embeds=class_embeds, labels=labels[:1])
    both = losses_of(model, pixel_values=images, class_embeds=class_embeds, labels=labels)
    for name, term in alone.items():
        assert_close(both[name], term, rtol=1e-4, atol=1e-5)
    pixels = images.clone().requires_grad_()
    model(pixels, class_embeds=class_embeds, labels=labels).loss.backward()
    assert pixels.grad[0].any()
    assert not pixels.grad[1].any()


@pytest.mark.parametrize("kind", ["labels", "mask_labels"])
def test_a_batch_without_any_label_has_loss_zero_and_zero_gradients(model, class_embeds, kind):
    model.train()
    nothing = {
        "labels": {"labels": torch.full((2, 64, 64), 255)},
        "mask_labels": {
            "mask_labels": [torch.zeros(0, 64, 64)] * 2,
            "class_labels": [torch.zeros(0, dtype=torch.int64)] * 2,
        },
    }
    loss = model(torch.randn(2, 3, 64, 64), class_embeds=class_embeds, **nothing[kind]).loss
    assert loss == 0
    loss.backward()
    # Every trained parameter takes part, which is what training on several devices waits for.
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


# Vocabularies


@torch.no_grad()
def test_all_ways_to_give_a_vocabulary_agree(model, processor):
    image = processor(images=make_image(64, 96), do_resize=False)
    text = processor(text=LABELS)
    by_ids = model(**image, **text)
    by_embeds = model(**image, class_embeds=model.get_class_embeds(**text))
    model.set_labels(LABELS, processor)
    by_labels = model(**image)
    assert_close(by_embeds.class_queries_logits, by_ids.class_queries_logits)
    assert_close(by_labels.class_queries_logits, by_ids.class_queries_logits)
    assert by_ids.class_queries_logits.shape == (1, 6, len(LABELS) + 1)
    # What a call brings goes before what is stored
    assert model(**image, **processor(text=["sky"])).class_queries_logits.shape[-1] == 2


@torch.no_grad()
def test_class_logits_are_scaled_cosines_with_the_background_last(model, class_embeds):
    outputs = model(torch.randn(1, 3, 64, 64), class_embeds=class_embeds)
    embeds = outputs.mask_embeds[0]
    assert_close(embeds.norm(dim=-1), torch.ones(6))
    background = model.background_embedding[0] / model.background_embedding.norm()
    for query in range(6):
        for index, direction in ((2, class_embeds[2]), (5, background)):
            expected = 100 * (embeds[query] @ direction)
            assert_close(outputs.class_queries_logits[0, query, index], expected, rtol=1e-3, atol=1e-2)


@torch.no_grad()
def test_class_embeds_are_means_of_normalised_prompts(model, processor, tokenizer):
    prompts = ["a photo of a red car.", "red car"]
    pooled = [model.text_model(torch.tensor([tokenizer(prompt).input_ids])).pooler_output for prompt in prompts]
    units = [nn.functional.normalize(model.text_projection(each), dim=-1) for each in pooled]
    expected = nn.functional.normalize((units[0] + units[1]) / 2, dim=-1)
    assert_close(model.get_class_embeds(**processor(text=["red car"])), expected)


@torch.no_grad()
def test_synonyms_are_averaged_and_do_not_touch_other_labels(model, processor):
    one = model.get_class_embeds(**processor(text=["sky", "car", "truck"]))
    both = model.get_class_embeds(**processor(text=["sky", "car|truck"]))
    # The label without a synonym has rows that its attention mask leaves out.
    assert_close(both[0], one[0])
    assert both[1] @ one[1] > 0.5
    assert both[1] @ one[2] > 0.5
    assert not torch.allclose(both[1], one[1], atol=1e-3)


@torch.no_grad()
def test_absent_prompts_are_left_out_whatever_their_tokens(model, processor, tokenizer):
    text = processor(text=["sky", "car|truck"])
    expected = model.get_class_embeds(**text)
    absent = ~text["attention_mask"].bool().any(-1)
    assert absent.any()
    text["input_ids"][absent] = torch.randint(0, len(tokenizer) - 2, text["input_ids"][absent].shape)
    text["input_ids"][absent, -1] = tokenizer.eos_token_id
    assert_close(model.get_class_embeds(**text), expected)


@pytest.mark.parametrize("token", ["<|endoftext|>", "sky</w>", "<|startoftext|>"])
@torch.no_grad()
def test_padding_after_the_end_of_text_changes_nothing(model, processor, tokenizer, token):
    text = processor(text=LABELS)
    expected = model.get_class_embeds(**text)
    padding = torch.full((*text["input_ids"].shape[:2], 4), tokenizer.convert_tokens_to_ids(token))
    longer = torch.cat([text["input_ids"], padding], dim=-1)
    assert_close(model.get_class_embeds(longer), expected)
    mask = nn.functional.pad(text["attention_mask"], (0, 4))
    assert_close(model.get_class_embeds(longer, mask), expected)


@torch.no_grad()
def test_a_long_vocabulary_is_encoded_in_parts_with_the_same_result(model, processor, monkeypatch):
    text = processor(text=LABELS)
    expected = model.get_class_embeds(**text)
    monkeypatch.setattr(open_vocabulary, "TEXT_BATCH_SIZE", 3)
    assert_close(model.get_class_embeds(**text), expected)


@torch.no_grad()
def test_one_prompt_for_each_class_may_come_without_its_axis(model, processor):
    text = processor(text=LABELS, templates=["a photo of a {}."])
    flat = {name: tensor[:, 0] for name, tensor in text.items()}
    assert_close(model.get_class_embeds(**flat), model.get_class_embeds(**text))


@torch.no_grad()
def test_other_classes_do_not_change_a_classs_logits(model, processor):
    image = processor(images=make_image(64, 64), do_resize=False)
    few, many = (model(**image, **processor(text=labels)).class_queries_logits for labels in (LABELS[:2], LABELS))
    assert_close(few[..., :2], many[..., :2], atol=1e-4, rtol=1e-4)
    assert_close(few[..., -1], many[..., -1], atol=1e-4, rtol=1e-4)


# Saving and loading


@torch.no_grad()
def test_stored_labels_survive_saving_and_may_be_replaced(model, processor, tmp_path):
    image = processor(images=make_image(64, 64), do_resize=False)
    model.set_labels(LABELS, processor)
    expected = model(**image).class_queries_logits
    model.save_pretrained(tmp_path)
    loaded = SANForOpenVocabSegmentation.from_pretrained(tmp_path)
    assert torch.equal(loaded(**image).class_queries_logits, expected)
    for labels in (["tree", "road"], [*LABELS, "photo", "red truck"]):
        loaded.set_labels(labels, processor)
        loaded.save_pretrained(tmp_path)
        again = SANForOpenVocabSegmentation.from_pretrained(tmp_path)
        assert again.config.num_labels == len(labels)
        assert list(again.config.id2label.values()) == labels
        logits = again(**image, **processor(text=labels)).class_queries_logits
        assert_close(again(**image).class_queries_logits, logits)


@torch.no_grad()
def test_every_weight_of_a_clip_comes_along(processor, tokenizer):
    torch.manual_seed(5)
    text = {**TINY_TEXT, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    clip = CLIPModel(CLIPConfig(vision_config=TINY_VISION, text_config=text, projection_dim=16))
    clip.logit_scale.fill_(2.5)
    choices = {name: value for name, value in TINY.items() if name != "projection_dim"}
    model = SANForOpenVocabSegmentation.from_clip(clip.eval(), **choices)
    ours = model.state_dict()
    for name, tensor in clip.state_dict().items():
        assert torch.equal(ours[name], tensor), name
    assert model.config.num_queries == TINY["num_queries"]
    assert POSITIONS in trained_names(model)
    # What CLIP says of words is what SAN says of them.
    text = processor(text=["sky", "red car"], templates=["{}"])
    expected = clip.get_text_features(text["input_ids"][:, 0]).pooler_output
    assert_close(model.get_class_embeds(**text), nn.functional.normalize(expected, dim=-1))
    assert_close(model.get_text_features(text["input_ids"][:, 0]).pooler_output, expected)
    # And of whole images, which it sees at half their size.
    image = torch.randn(2, 3, 96, 160)
    ours = model.get_image_features(image, output_hidden_states=True)
    theirs = clip.get_image_features(
        nn.functional.interpolate(image, scale_factor=0.5, mode="bilinear"), interpolate_pos_encoding=True
    )
    assert_close(ours.pooler_output, theirs.pooler_output)
    assert_close(ours.last_hidden_state, theirs.last_hidden_state)
    assert len(ours.hidden_states) == TINY_VISION["num_hidden_layers"] + 1
    # Its weights are copies: training one does not change the other.
    model.vision_model.embeddings.position_embedding.weight.add_(1)
    assert not torch.equal(model.vision_model.embeddings.position_embedding.weight, clip.state_dict()[POSITIONS])


# Outputs


@torch.no_grad()
def test_the_side_adapter_sees_more_than_clip(model, class_embeds):
    seen = []
    hook = model.vision_model.embeddings.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    outputs = model(torch.randn(1, 3, 96, 128), class_embeds=class_embeds)
    hook.remove()
    assert seen == [(1, 3, 48, 64)]
    assert outputs.masks_queries_logits.shape == (1, 6, 6, 8)


@torch.no_grad()
def test_without_asymmetric_input_clip_sees_the_same_image(make_model, class_embeds):
    model = make_model(asymmetric_input=False)
    image = torch.randn(1, 3, 64, 64)
    assert model.shrink_for_clip(image) is image
    assert model(image, class_embeds=class_embeds).mask_embeds.isfinite().all()


@torch.no_grad()
def test_columns_that_trainer_and_data_sets_add_are_ignored(model, class_embeds):
    columns = {"file_name": ["a.jpg"], "image": [None], "num_items_in_batch": 3}
    assert model(torch.randn(1, 3, 64, 64), class_embeds=class_embeds, **columns).loss is None


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("class_embedding", "class_embeds"),
        ("label", "labels"),
        ("image_size", "image_sizes"),
        ("banana", "pixel_values"),
    ],
)
@pytest.mark.parametrize("model_class", [SANForOpenVocabSegmentation, SANForSemanticSegmentation])
def test_a_misspelt_argument_is_an_error_that_names_the_nearest(model, processor, model_class, given, meant):
    model.set_labels(LABELS, processor)
    model = model_class._from_config(copy.deepcopy(model.config)).eval()
    with pytest.raises(TypeError, match=rf"{given}.*{meant}"):
        model(torch.randn(1, 3, 64, 64), **{given: torch.eye(16)})


# Wrong inputs


def good(**changes):
    inputs = {"pixel_values": torch.zeros(2, 3, 64, 64), "class_embeds": torch.eye(16)[:5], **changes}
    return {name: value for name, value in inputs.items() if value is not None}


MASKS = [torch.zeros(2, 64, 64)] * 2
CLASSES = [torch.tensor([0, 1])] * 2
WRONG = [
    ({"pixel_values": torch.zeros(3, 64, 64)}, "pixel_values have shape (3, 64, 64): expected (batch, 3"),
    ({"pixel_values": torch.zeros(1, 1, 64, 64)}, "expected (batch, 3, height, width)"),
    ({"pixel_values": torch.zeros(0, 3, 64, 64)}, "pixel_values have shape (0, 3, 64, 64)"),
    ({"pixel_values": torch.zeros(1, 3, 60, 64)}, "60 x 64 pixels: height and width must be multiples of 16"),
    ({"class_embeds": None}, "no vocabulary: pass input_ids"),
    ({"input_ids": torch.zeros(1, 1, 5).long()}, "both class_embeds and input_ids were given"),
    ({"class_embeds": torch.zeros(5, 7)}, "class_embeds have shape (5, 7): expected (classes, 16)"),
    ({"class_embeds": torch.zeros(0, 16)}, "with at least one class"),
    ({"class_embeds": torch.zeros(16)}, "class_embeds have shape (16,)"),
    ({"class_embeds": None, "input_ids": torch.zeros(0, 1, 5).long()}, "input_ids have shape (0, 1, 5)"),
    ({"class_embeds": None, "input_ids": torch.zeros(4).long()}, "expected (classes, prompts, tokens)"),
    ({"image_sizes": torch.tensor([[64, 64]])}, "image_sizes have shape (1, 2): expected (2, 2)"),
    ({"image_sizes": torch.tensor([[64, 64], [65, 64]])}, "image_sizes[1] is (65, 64), which padded to a multiple"),
    ({"image_sizes": torch.tensor([[0, 64], [64, 64]])}, "image_sizes[0] is (0, 64)"),
    ({"labels": torch.zeros(2, 32, 64).long()}, "labels have shape (2, 32, 64): expected (2, 64, 64)"),
    ({"labels": torch.full((2, 64, 64), 5)}, "labels hold [5], but there are 5 class names (0 to 4)"),
    ({"labels": torch.full((2, 64, 64), -1)}, "labels hold [-1]"),
    ({"labels": torch.zeros(2, 64, 64).long(), "mask_labels": MASKS}, "both labels and mask_labels / class_labels"),
    ({"mask_labels": MASKS}, "belong together: one of them is missing"),
    ({"class_labels": CLASSES}, "belong together: one of them is missing"),
    ({"mask_labels": MASKS[:1], "class_labels": CLASSES}, "1 mask_labels and 2 class_labels for 2 images"),
    ({"mask_labels": [MASKS[0], torch.zeros(3, 64, 64)], "class_labels": CLASSES}, "mask_labels[1] has shape (3, 64"),
    ({"mask_labels": [torch.zeros(2, 32, 32)] * 2, "class_labels": CLASSES}, "expected (2, 64, 64)"),
    ({"mask_labels": MASKS, "class_labels": [torch.tensor([0, 5])] * 2}, "holds [0, 5]: expected values from 0 to 4"),
]


@pytest.mark.parametrize(("changes", "hint"), WRONG, ids=[hint[:60] for _, hint in WRONG])
def test_wrong_inputs_are_refused_with_what_was_expected(model, changes, hint):
    with pytest.raises(ValueError, match=re.escape(hint)):
        model(**good(**changes))


# transformers' Trainer


class Images(torch.utils.data.Dataset):
    """Images of several sizes in one frame, with label maps."""

    def __init__(self, processor, count):
        sizes = [IMAGES[index % len(IMAGES)] for index in range(count)]
        self.items = []
        for index, (height, width) in enumerate(sizes):
            frame = {"pad_size": {"height": 128, "width": 128}, "do_resize": False}
            inputs = processor(images=make_image(height, width, seed=index), **frame)
            labels = label_batch(make_label_map(height, width, labels=(0, 1 + index % 3)), size=(128, 128))
            self.items.append({**{name: tensor[0] for name, tensor in inputs.items()}, "labels": labels[0]})

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def make_trainer(model, processor, folder, **arguments):
    defaults = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        # By default Trainer waits for every argument named label, and a batch has one kind of them.
        "label_names": ["labels"],
    }
    return Trainer(
        model=model,
        args=TrainingArguments(**{**defaults, **arguments}),
        train_dataset=Images(processor, 8),
        eval_dataset=Images(processor, 3),
    )


def test_trainer_trains_and_evaluates(make_model, processor, tmp_path):
    model = make_model(train_num_points=64)
    model.set_labels(LABELS, processor)
    before = copy.deepcopy(model.state_dict())
    trainer = make_trainer(model, processor, tmp_path, eval_strategy="steps", eval_steps=1)
    assert np.isfinite(trainer.train().training_loss)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed <= trained_names(model)
    assert "background_embedding" in changed
    assert POSITIONS in changed
    evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 2
    assert np.isfinite(evaluations).all()
    predictions = trainer.predict(Images(processor, 3))
    masks, logits, sizes = predictions.predictions
    assert masks.shape == (3, 6, 8, 8)
    assert logits.shape == (3, 6, len(LABELS) + 1)
    assert sizes.tolist() == [list(size) for size in IMAGES[:3]]
    assert predictions.label_ids.shape == (3, 128, 128)


def test_accumulated_batches_do_not_add_up_to_a_larger_loss(make_model, processor, tmp_path):
    def first_loss(steps):
        model = make_model(train_num_points=64)
        model.set_labels(LABELS, processor)
        options = {"max_steps": 1, "learning_rate": 0.0, "max_grad_norm": 1e9}
        trainer = make_trainer(model, processor, tmp_path, gradient_accumulation_steps=steps, **options)
        trainer.train()
        return trainer.state.log_history[0]

    one, four = first_loss(1), first_loss(4)
    # Different images, but of one kind: four times the loss or the gradient could not be missed.
    assert four["loss"] < 2.5 * one["loss"]
    assert four["grad_norm"] < 2.5 * one["grad_norm"]


@torch.no_grad()
def test_products_with_queries_are_products_with_what_a_linear_layer_makes_of_patches(model):
    """The weights of the mask decoder's last layers are multiplied with the queries first, which are few."""
    decoder, grid = model.side_adapter.mask_decoder, (4, 6)
    queries, patches = torch.randn(2, 3, 24), torch.randn(2, 24, 24)
    proposals = decoder(queries, patches, grid)
    vectors = decoder.query_mlp(queries)
    for mlp, ours in ((decoder.mask_mlp, proposals.mask_logits), (decoder.bias_mlp, proposals.attention_bias)):
        hidden = nn.functional.relu(mlp.fc2(nn.functional.relu(mlp.fc1(patches))))
        keys = nn.functional.linear(hidden, mlp.fc3.weight, mlp.fc3.bias).unflatten(-1, (-1, 16))
        products = torch.einsum("bqd,bpnd->bnqp", vectors, keys)
        if mlp is decoder.bias_mlp:
            products = decoder.bias_scaling.weight * products + decoder.bias_scaling.bias
        assert_close(ours.flatten(), products.flatten(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("call", "error", "fact"),
    [
        (lambda model, processor: model.set_labels("sky, road", processor), TypeError, "list"),
        (lambda model, processor: model.get_class_embeds("sky"), TypeError, "str"),
        (lambda model, processor: model.get_class_embeds(processor(text=["sky"])), TypeError, "BatchEncoding|Feature"),
        (lambda model, processor: type(model).from_clip("some/clip"), TypeError, "CLIPModel"),
        (lambda model, processor: model.resize_token_embeddings(9), NotImplementedError, "fixed"),
        (lambda model, processor: processor.post_process_panoptic_segmentation(None), NotImplementedError, "classes"),
    ],
)
def test_what_people_try_is_answered_in_a_sentence(make_model, processor, call, error, fact):
    with pytest.raises(error, match=fact):
        call(make_model(), processor)


def test_any_iterable_of_labels_is_stored_and_words_that_were_not_read_are_named(make_model, processor, caplog):
    model = make_model()
    model.set_labels((label for label in ("sky", "red truck")), processor)
    assert model.config.id2label == {0: "sky", 1: "red truck"}
    assert not caplog.text
    model.config.training_labels = ["sky|heaven", "Red  Truck"]
    model.set_labels(("heaven", "red truck", "car"), processor)
    assert "not trained on 'car':" in caplog.text
    assert model.get_decoder() is model


def test_only_the_semantic_class_has_logits(make_model, processor):
    inputs = processor(images=Image.new("RGB", (64, 64)), text="sky, road", return_tensors="pt")
    with pytest.raises(AttributeError, match="logits"):
        _ = make_model()(**inputs).logits
