"""The model that ships with the package does what the README says of it."""

import json

import pytest
import torch

from drawn_world.make_model import RESULTS_FILE, attention_bias_off, evaluate_on_fresh_scenes
from drawn_world.world import CLASS_NAMES, draw_scene
from modeling_san import BUILTIN_MODEL, SANForOpenVocabSegmentation, SANProcessor

FRESH_SEED = 424_242
"""A world that neither training nor the published figures have seen."""


@pytest.fixture(scope="module")
def model():
    return SANForOpenVocabSegmentation.from_pretrained(BUILTIN_MODEL).eval()


@pytest.fixture(scope="module")
def processor():
    return SANProcessor.from_pretrained(BUILTIN_MODEL)


@pytest.fixture(scope="module")
def scores(model, processor):
    return evaluate_on_fresh_scenes(model, processor, num_images=160, seed=FRESH_SEED, progress=False)


def test_it_takes_at_most_12_megabytes():
    assert sum(path.stat().st_size for path in BUILTIN_MODEL.iterdir()) <= 12_000_000


def test_it_segments_combinations_it_had_masks_for(scores):
    assert scores["seen"] >= 0.60


def test_it_segments_combinations_it_never_had_masks_for(scores):
    assert scores["never seen"] >= 0.40


def test_the_attention_bias_makes_the_difference(model, processor, scores):
    scale = model.side_adapter.mask_decoder.bias_scaling.weight
    before = scale.clone()
    with attention_bias_off(model):
        assert scale.item() == 0
        without = evaluate_on_fresh_scenes(model, processor, num_images=48, seed=FRESH_SEED, progress=False)
    assert torch.equal(scale, before)
    assert scores["seen"] >= 3 * without["seen"]
    assert scores["never seen"] >= 3 * without["never seen"]


def test_its_published_figures_agree_with_fresh_images(scores):
    published = json.loads((BUILTIN_MODEL / RESULTS_FILE).read_text())["bias on"]
    for group, score in scores.items():
        assert published[group] == pytest.approx(score, abs=0.1)


@torch.inference_mode()
def test_words_and_stored_labels_give_the_same_answer(model, processor):
    scene = draw_scene(FRESH_SEED, 0)
    stored = model(**processor(images=scene.image, return_tensors="pt"))
    spoken = model(**processor(images=scene.image, text=list(CLASS_NAMES), return_tensors="pt"))
    torch.testing.assert_close(stored.class_queries_logits, spoken.class_queries_logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("word", ["zebra crossing", "naïve façade", "сарай", "空", "🚲", "x" * 20])
def test_its_tokenizer_encodes_any_word(processor, word):
    tokenizer = processor.tokenizer
    ids = tokenizer(word)["input_ids"]
    assert max(ids) < len(tokenizer)
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == word
