"""The one place of inference: vocabularies are encoded once, and what is labelled is what the plain recipe gives."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from modeling_san import BUILTIN_MODEL, SANForOpenVocabSegmentation, SANProcessor
from modeling_san.processing import (
    SANImageProcessor,
    Segmentation,
    Segmenter,
    Vocabulary,
    segmenter,
    views_san,
    vocabulary_san,
)
from modeling_san.processing.views_san import view_sizes

LABELS = ["sky", "road", "car|truck", "tree"]


def random_image(width=50, height=40, seed=2):
    """An image of patches, so that its regions differ."""
    patches = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize((width, height), Image.Resampling.NEAREST)


def assert_same(found, expected):
    assert found.labels == expected.labels
    assert torch.equal(found.label_map, expected.label_map)
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-5, rtol=0)


@pytest.fixture(scope="session")
def processor(tokenizer):
    image_processor = SANImageProcessor(size={"shortest_edge": 64, "longest_edge": 256})
    return SANProcessor(image_processor, tokenizer, templates=["a photo of a {}.", "{}"])


@pytest.fixture
def model(make_model):
    """One that finds several labels in an image of patches."""
    return make_model(seed=3, logit_scale_init_value=1.0)


@pytest.fixture
def segment(model, processor):
    return Segmenter(model, processor)


@pytest.fixture
def encoded(model):
    """How many labels were encoded, each time that the text encoder ran."""
    calls = []
    model.text_projection.register_forward_hook(lambda _module, _inputs, output: calls.append(len(output)))
    return calls


# Vocabularies


def test_a_vocabulary_is_what_the_model_makes_of_the_prompts(segment, model, processor):
    vocabulary = segment.vocabulary(["Sky", " road"])
    with torch.no_grad():
        expected = model.get_class_embeds(**processor(text=["sky", "road"]))
    torch.testing.assert_close(vocabulary.class_embeds, expected)
    assert vocabulary.labels == vocabulary.shown_labels == ("Sky", " road")
    assert segment.vocabulary("Sky, road").labels == ("Sky", "road")


@pytest.fixture
def few_names(monkeypatch):
    """Three names that labels are extended by."""
    monkeypatch.setattr(vocabulary_san, "_coco_names", lambda things: ["tree", "sky", "car"])


def test_added_names_fold_into_other(segment, few_names):
    vocabulary = segment.vocabulary(["Sky", "road"], extend="coco-stuff")
    assert vocabulary.labels == ("Sky", "road", "tree", "car")
    assert vocabulary.num_own == 2
    assert torch.equal(vocabulary.class_embeds, segment.vocabulary("sky, road, tree, car").class_embeds)
    assert vocabulary.shown_labels == ("Sky", "road", "other")
    assert vocabulary.fold(torch.tensor([[0, 1], [2, 3]])).tolist() == [[0, 1], [2, 2]]


def test_added_names_join_a_label_that_is_called_other():
    vocabulary = Vocabulary(("Other ", "sky", "wall"), torch.zeros(3, 4), num_own=2)
    assert vocabulary.shown_labels == ("Other ", "sky")
    assert vocabulary.fold(torch.tensor([0, 1, 2])).tolist() == [0, 1, 0]


def test_a_vocabulary_is_encoded_once_whatever_its_spelling(segment, processor, encoded):
    first = segment.vocabulary(LABELS)
    assert segment.vocabulary([label.upper() for label in LABELS]).class_embeds is first.class_embeds
    assert segment.vocabulary(LABELS, templates=list(processor.templates)).class_embeds is first.class_embeds
    assert len(encoded) == 1
    for others, options in ((LABELS[::-1], {}), (LABELS[:2], {}), (LABELS, {"templates": ["{}"]})):
        segment.vocabulary(others, **options)
    assert len(encoded) == 4


def test_the_least_recently_used_vocabulary_is_forgotten_first(segment, encoded, monkeypatch):
    monkeypatch.setattr(segmenter, "KEPT_VOCABULARIES", 2)
    for label in ("sky", "road", "sky", "car", "sky"):
        segment.vocabulary(label)
    assert len(encoded) == 3
    segment.vocabulary("road")
    assert len(encoded) == 4


def test_the_labels_of_all_vocabularies_kept_are_bounded(segment, monkeypatch):
    monkeypatch.setattr(segmenter, "KEPT_LABELS", 6)
    for labels in (["sky", "road"], ["car", "tree"], ["red", "truck"], ["sky", "road", "car", "tree", "red"]):
        segment.vocabulary(labels)
        assert sum(map(len, segment._kept._entries.values())) <= 6


def change_weights(model):
    with torch.no_grad():
        model.text_projection.weight.neg_()


def load_weights(model):
    state = {name: value + 0.5 for name, value in model.text_model.state_dict().items() if value.is_floating_point()}
    model.text_model.load_state_dict(state, strict=False)


@pytest.mark.parametrize("change", [change_weights, load_weights, nn.Module.bfloat16])
def test_a_text_encoder_that_changed_encodes_anew(segment, model, processor, encoded, change):
    segment.vocabulary(LABELS)
    change(model)
    vocabulary = segment.vocabulary(LABELS)
    assert len(encoded) == 2
    assert torch.equal(vocabulary.class_embeds, Segmenter(model, processor).vocabulary(LABELS).class_embeds)


def test_embeddings_that_are_kept_carry_no_gradients(make_model, processor):
    trainable = make_model(trainable_clip_parameters=["text_model", "text_projection"])
    assert Segmenter(trainable, processor).vocabulary(LABELS).class_embeds.grad_fn is None


def test_long_vocabularies_are_encoded_in_parts_to_the_same_embeddings(segment, processor, monkeypatch):
    monkeypatch.setattr(segmenter, "_LABELS_AT_ONCE", 3)
    labels = ["sky", "red truck", "a", "tree", "a photo of a car", "road", "red"]
    with torch.no_grad():
        expected = segment.model.get_class_embeds(**processor(text=labels))
    torch.testing.assert_close(segment.vocabulary(labels).class_embeds, expected, atol=1e-6, rtol=0)


def test_stored_labels_are_taken_as_they_are_stored(segment, model, processor, encoded):
    with pytest.raises(ValueError, match="set_labels"):
        segment.vocabulary()
    model.set_labels(LABELS, processor)
    encoded.clear()
    assert segment.vocabulary().labels == tuple(LABELS)
    assert segment.vocabulary().class_embeds is model.stored_class_embeds
    assert not encoded
    templated = segment.vocabulary(templates=["{}"])
    assert torch.equal(templated.class_embeds, segment.vocabulary(LABELS, templates=["{}"]).class_embeds)


def test_words_that_a_model_was_not_trained_on_are_named(segment, model):
    assert segment.unknown_words(LABELS) == []
    model.config.training_labels = ["sky|heaven", "car"]
    assert segment.unknown_words(["Heaven", "car|truck", "tree"]) == ["truck", "tree"]


def test_what_cannot_segment_is_refused(model, processor):
    with pytest.raises(ValueError, match="CLIPVisionModel"):
        Segmenter(model.vision_model, processor)
    with pytest.raises(ValueError, match="NoneType"):
        Segmenter(model, None)


# Segmentations


def test_pixels_have_the_label_and_score_of_the_processor(segment, model, processor):
    image = random_image()
    with torch.no_grad():
        outputs = model(**processor(images=image, text=LABELS))
    [label_map], [scores] = processor.post_process_with_scores(outputs, [(40, 50)])
    [found] = segment(image, segment.vocabulary(LABELS))
    assert found.size == (40, 50)
    assert torch.equal(found.label_map, label_map)
    torch.testing.assert_close(found.scores, scores)


def test_what_shares_a_batch_never_changes_an_answer(segment):
    vocabulary = segment.vocabulary(LABELS)
    images = [random_image(*size, seed=seed) for seed, size in enumerate([(50, 40), (40, 90), (33, 33), (50, 40)])]
    alone = [segment(image, vocabulary)[0] for image in images]
    for together in (
        segment(images, vocabulary),
        segment.segment([segment.prepare(image) for image in images], vocabulary),
    ):
        for found, expected in zip(together, alone, strict=True):
            assert_same(found, expected)


def test_pixels_below_the_threshold_become_other(segment):
    image, vocabulary = random_image(), segment.vocabulary(LABELS)
    [plain] = segment(image, vocabulary)
    threshold = float(plain.scores.median())
    [found] = segment(image, vocabulary, threshold=threshold)
    assert found.labels == (*LABELS, "other")
    assert torch.equal(found.label_map, plain.label_map.masked_fill(plain.scores < threshold, 4))
    assert_same(found.resized(found.size), found)


@pytest.mark.parametrize("threshold", [-0.1, 1.01, float("nan"), "0.5", True])
def test_a_threshold_that_is_no_share_is_refused(segment, threshold):
    with pytest.raises(ValueError, match="threshold"):
        segment(random_image(), segment.vocabulary(LABELS), threshold=threshold)


def test_many_views_are_the_mean_of_their_scores(segment, model, processor):
    image, vocabulary = random_image(), segment.vocabulary(LABELS)
    means = torch.zeros(len(LABELS), 40, 50)
    sizes = view_sizes(dict(processor.image_processor.size))
    for size in sizes:
        for mirrored in (False, True):
            view = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image
            with torch.no_grad():
                outputs = model(**processor(images=view, size=size), class_embeds=vocabulary.class_embeds)
            [scores] = processor.post_process_semantic_scores(outputs, [(40, 50)])
            means += (scores.flip(-1) if mirrored else scores) / (2 * len(sizes))
    [found] = segment(image, vocabulary, tta=True)
    best, label_map = means.max(0)
    torch.testing.assert_close(found.scores, best, atol=1e-4, rtol=0)
    clear = means.topk(2, dim=0).values.diff(dim=0)[0] < -1e-4
    assert torch.equal(found.label_map[clear], label_map[clear])
    for refused in (lambda: found.resized((4, 4)), lambda: found.heat_map("sky")):
        with pytest.raises(ValueError, match="tta"):
            refused()


def mean_of_windows(segment, image, vocabulary, window):
    """Scores of all classes, window by window, each with the weight of a roof that falls to its ends."""
    pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    totals, weights = torch.zeros(len(vocabulary.labels), height, width), torch.zeros(height, width)
    for top in starts(height, window):
        for left in starts(width, window):
            part = Image.fromarray(pixels[top : top + window, left : left + window])
            with torch.no_grad():
                outputs = segment.model(**segment.processor(images=part), class_embeds=vocabulary.class_embeds)
            [scores] = segment.processor.post_process_semantic_scores(outputs, [part.size[::-1]])
            sides = [roof(length, window) for length in scores.shape[1:]]
            weight = sides[0][:, None] * sides[1]
            rows, columns = slice(top, top + window), slice(left, left + window)
            totals[:, rows, columns] += scores * weight
            weights[rows, columns] += weight
    return totals / weights


def starts(length, window):
    """As few windows as overlap by a third, from end to end."""
    count = 1
    while count * window - (count - 1) * (window // 3) < length:
        count += 1
    return [round(index * (length - window) / max(count - 1, 1)) for index in range(count)]


def roof(length, window):
    if length < window:
        return torch.ones(length)
    return torch.tensor([min(i + 0.5, window - i - 0.5, window // 3) for i in range(window)])


@pytest.mark.parametrize("size", [(200, 90), (64, 300), (70, 50), (131, 133)])
def test_windows_are_the_weighted_mean_of_their_scores(segment, size):
    image, vocabulary = random_image(*size), segment.vocabulary(LABELS)
    [found] = segment(image, vocabulary, window=64)
    expected = mean_of_windows(segment, image, vocabulary, 64)
    torch.testing.assert_close(found.scores, expected.amax(0), atol=1e-4, rtol=0)
    clear = expected.topk(2, dim=0).values.diff(dim=0)[0] < -1e-4
    assert torch.equal(found.label_map[clear], expected.argmax(0)[clear])
    with pytest.raises(ValueError, match="window"):
        found.resized((4, 4))


def test_an_image_within_its_window_is_seen_as_a_whole(segment):
    images, vocabulary = [random_image(), random_image(100, 90)], segment.vocabulary(LABELS)
    found = segment(images, vocabulary, window=100)
    for one, image in zip(found, images, strict=True):
        assert_same(one, segment(image, vocabulary)[0])


def test_windows_may_be_seen_at_many_sizes(segment):
    image, vocabulary = random_image(90, 64), segment.vocabulary(LABELS)
    [windows] = segment(image, vocabulary, window=64)
    [both] = segment(image, vocabulary, window=64, tta=True)
    assert not torch.equal(windows.scores, both.scores)
    [left] = segment(image.crop((0, 0, 64, 64)), vocabulary, tta=True)
    # Where one window sees alone
    torch.testing.assert_close(both.scores[:, :20], left.scores[:, :20], atol=1e-4, rtol=0)


def test_the_memory_of_windows_does_not_grow_with_the_height(segment, monkeypatch):
    vocabulary, most = segment.vocabulary(LABELS), []
    blocks = views_san._blocks
    monkeypatch.setattr(views_san, "_blocks", lambda views, *args: most.append(len(views)) or blocks(views, *args))
    segment(random_image(64, 1500), vocabulary, window=64)
    assert max(most) == 2


@pytest.mark.parametrize("window", [0, 63, -640, 640.0, True, "640"])
def test_a_window_that_is_none_is_refused(segment, window):
    with pytest.raises(ValueError, match=r"window is .*at least 64"):
        segment(random_image(), segment.vocabulary(LABELS), window=window)


def test_each_image_may_have_a_vocabulary_of_its_own(segment):
    images = [random_image(*size, seed=seed) for seed, size in enumerate([(50, 40), (50, 40), (33, 33)])]
    own = [segment.vocabulary(labels) for labels in (LABELS, ["red", "a"], LABELS)]
    expected = [segment(image, vocabulary)[0] for image, vocabulary in zip(images, own, strict=True)]
    prepared = [segment.prepare(image) for image in images]
    for found in (segment(images, own), segment.segment(prepared, own)):
        for one, alone in zip(found, expected, strict=True):
            assert_same(one, alone)
    for wrong, hint in (
        (own[:2], "2 vocabularies for 3 images"),
        ("sky", "vocabulary is 'sky'"),
        ([LABELS], "segmenter"),
    ):
        with pytest.raises(ValueError, match=hint):
            segment(images, wrong)


def test_heat_maps_are_the_scores_of_each_label_and_the_sum_of_those_added(segment, model, processor, few_names):
    image, vocabulary = random_image(), segment.vocabulary(["sky", "road"], extend="coco-stuff")
    with torch.no_grad():
        outputs = model(**processor(images=image), class_embeds=vocabulary.class_embeds)
    [scores] = processor.post_process_semantic_scores(outputs, [(40, 50)])
    [found] = segment(image, vocabulary)
    torch.testing.assert_close(found.heat_map("road"), scores[1].clamp(max=1), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.heat_map("other"), scores[2:].sum(0).clamp(max=1), atol=1e-5, rtol=0)
    assert torch.equal(found.heat_map(1), found.heat_map("road"))
    for label in ("cloud", 3, -1):
        with pytest.raises(ValueError, match=str(label)):
            found.heat_map(label)


def test_where_nothing_was_added_other_has_an_empty_heat_map(segment):
    [found] = segment(random_image(), segment.vocabulary(LABELS), threshold=1.0)
    assert not found.heat_map("other").any()


def test_another_size_is_what_the_processor_gives_for_it(segment, model, processor):
    image, vocabulary = random_image(), segment.vocabulary(LABELS)
    with torch.no_grad():
        outputs = model(**processor(images=image), class_embeds=vocabulary.class_embeds)
    [found] = segment(image, vocabulary)
    assert torch.equal(
        found.resized((31, 77)).label_map, processor.post_process_semantic_segmentation(outputs, [(31, 77)])[0]
    )


def labelled(label_map, scores, labels=LABELS):
    """A segmentation made by hand."""
    vocabulary = Vocabulary(tuple(labels), torch.zeros(len(labels), 4), len(labels))
    return Segmentation(torch.tensor(label_map), torch.tensor(scores), tuple(labels), vocabulary)


def test_segments_are_the_labels_present_with_their_areas_and_mean_scores():
    found = labelled([[0, 3, 3, 3]], [[0.5, 0.2, 0.4, 0.6]], ["sky", "red car", "other", "road"])
    road, sky = found.segments()
    assert (road.label, road.index, road.pixels, road.area) == ("road", 3, 3, 0.75)
    assert (road.score, sky.score) == pytest.approx((0.4, 0.5))
    assert [segment["label"] for segment in found.summary(image="a.png")["segments"]] == ["road", "sky"]
    assert np.asarray(found.mask(3)).tolist() == [[0, 255, 255, 255]]
    assert np.asarray(found.label_image()).tolist() == [[0, 3, 3, 3]]


def test_scores_of_segments_stay_within_one_where_masks_overlap():
    [segment] = labelled([[0, 0]], [[2.5, 0.5]]).segments()
    assert segment.score == pytest.approx(0.75)


def test_threads_share_a_segmenter(segment, encoded):
    image = random_image()
    vocabularies = [["sky", "road"], ["road", "sky"], ["car", "tree", "red"], ["truck"]]

    def run(index):
        return segment(image, segment.vocabulary(vocabularies[index % 4]))[0]

    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(run, range(12)))
    assert len(encoded) == 4
    for index, result in enumerate(results):
        assert_same(result, run(index))


def test_copies_of_a_segmenter_start_empty_and_give_the_same(segment):
    [expected] = segment(random_image(), segment.vocabulary(LABELS))
    for other in (copy.deepcopy(segment), pickle.loads(pickle.dumps(segment))):
        assert len(other._kept) == 0
        assert_same(other(random_image(), other.vocabulary(LABELS))[0], expected)


def test_scores_that_are_no_numbers_are_refused_with_the_weights_that_make_them():
    model = SANForOpenVocabSegmentation.from_pretrained(BUILTIN_MODEL).eval()
    segmenter = Segmenter(model, SANProcessor.from_pretrained(BUILTIN_MODEL))
    vocabulary = segmenter.vocabulary("grass, water")
    with torch.no_grad():
        model.visual_projection.weight *= float("nan")
    for options in ({}, {"tta": True}):
        with pytest.raises(ValueError, match=r"visual_projection\.weight"):
            segmenter(Image.new("RGB", (96, 64), "green"), vocabulary, **options)


def test_words_that_were_never_read_give_one_warning(caplog):
    model = SANForOpenVocabSegmentation.from_pretrained(BUILTIN_MODEL).eval()
    segmenter = Segmenter(model, SANProcessor.from_pretrained(BUILTIN_MODEL))
    for labels in ("red plain, grass", "grass, car|truck", "grass, car|truck"):
        segmenter.vocabulary(labels)
    [record] = caplog.records
    assert "not trained on: car, truck;" in record.getMessage()
