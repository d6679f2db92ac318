"""A sibling is a configuration and a model: everything that is built around SAN takes it as it is."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, load_dataset
from datasets import Image as ImageFeature
from huggingface_hub.dataclasses import strict
from PIL import Image
from torch import nn
from transformers import AutoModel, AutoProcessor, CLIPModel, CLIPTextModel, pipeline

from modeling_san import SANOutput, SANProcessor, auto
from modeling_san.clip_trunk import ClipTrunk, make_vision_model
from modeling_san.commands.main import main
from modeling_san.configuration_open_vocabulary import OpenVocabularyConfig
from modeling_san.hub_card.model_card import make_model_card
from modeling_san.open_vocabulary import OpenVocabularyModel

# A configuration and a model: each patch of CLIP is a mask by itself, and CLIP says what it is.


@strict
class PatchConfig(OpenVocabularyConfig):
    model_type = "patches"

    @property
    def mask_stride(self):
        return self.vision_config.patch_size


class PatchForOpenVocabSegmentation(OpenVocabularyModel):
    config_class = PatchConfig
    own_parameters = ("background_embedding",)

    def __init__(self, config):
        super().__init__(config)
        vision, text = config.vision_config, config.text_config
        self.vision_model, self.text_model = make_vision_model(vision), CLIPTextModel._from_config(text)
        self.visual_projection = nn.Linear(vision.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(text.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        self.background_embedding = nn.Parameter(torch.zeros(1, config.projection_dim))
        stored = torch.zeros(len(config.id2label or ()), config.projection_dim) if config.has_stored_labels else None
        self.register_buffer("stored_class_embeds", stored)
        self.post_init()
        self.apply_trainable()

    def forward(
        self, pixel_values, input_ids=None, attention_mask=None, class_embeds=None, image_sizes=None, labels=None
    ):
        class_embeds = self.choose_class_embeds(input_ids, attention_mask, class_embeds)
        trunk = ClipTrunk(self.vision_model, self.visual_projection)
        states = trunk.encode(pixel_values, self.config.num_clip_layers)
        classifier = torch.cat([class_embeds, self.background_embedding])
        logits = self.logit_scale.exp() * trunk.project(states.last[:, 1:]) @ classifier.T
        loss = None
        if labels is not None:
            cells = labels[:, :: self.config.mask_stride, :: self.config.mask_stride].flatten()
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), cells, ignore_index=255)
        patches = torch.eye(logits.shape[1], device=logits.device).unflatten(-1, states.grid)
        masks = (20 * patches - 10).expand(len(logits), -1, -1, -1)
        return SANOutput(loss=loss, masks_queries_logits=masks, class_queries_logits=logits, image_sizes=image_sizes)


@pytest.fixture(scope="module", autouse=True)
def registered():
    """What a line in `auto.py` does."""
    auto.register_model(PatchConfig, PatchForOpenVocabSegmentation)


@pytest.fixture(scope="module")
def clip(make_config, tokenizer, tmp_path_factory):
    """The folder of a tiny CLIP."""
    config = make_config()
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    fields = {"vision_config": config.vision_config, "text_config": config.text_config}
    CLIPModel(CLIPModel.config_class(projection_dim=config.projection_dim, **fields)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Three images whose left half is a road and whose right half is sky, as parquet."""
    label_map = np.zeros((32, 64), np.uint8)
    label_map[:, 32:] = 1
    images = [Image.fromarray(np.stack([label_map * 150 + shade] * 3, axis=-1)) for shade in (20, 60, 100)]
    columns = {"image": images, "annotation": [Image.fromarray(label_map)] * 3}
    path = tmp_path_factory.mktemp("data") / "halves.parquet"
    Dataset.from_dict(columns, features=Features(dict.fromkeys(columns, ImageFeature()))).to_parquet(path)
    images[0].save(path.with_name("image.png"))
    return path


@pytest.fixture(scope="module")
def trained(clip, dataset, tmp_path_factory):
    """What `san train` makes of a CLIP, in eight steps."""
    folder = tmp_path_factory.mktemp("trained")
    (labels := folder / "labels.json").write_text(json.dumps(["road", "sky"]))
    arguments = ["--model_type", "patches", "--clip", clip, "--templates", "{}", "--config_overrides"]
    arguments += ['{"trainable_clip_parameters": []}', "--dataset", dataset, "--labels", labels, "--short_side", "32"]
    arguments += ["--crop_size", "32", "--steps", "8", "--batch_size", "2", "--learning_rate", "0.01"]
    arguments += ["--trainable", "vision_model.encoder.layers.3", "--workers", "0", "--cpu", "True"]
    assert main(["train", *map(str, arguments), "--output", str(folder / "run")]) == 0
    return folder / "run"


def test_it_is_trained_from_a_clip_and_learns(trained):
    losses = [json.loads(line).get("loss") for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] or len(losses) == 1
    model = AutoModel.from_pretrained(trained)
    assert isinstance(model, PatchForOpenVocabSegmentation)
    assert model.config.stored_labels == ("road", "sky")
    processor = AutoProcessor.from_pretrained(trained)
    assert isinstance(processor, SANProcessor)
    assert processor.image_processor.mask_stride == 16


def test_it_is_trained_further(trained, dataset, tmp_path):
    arguments = ["--model", trained, "--dataset", dataset, "--labels", trained.parent / "labels.json", "--steps", "1"]
    arguments += ["--batch_size", "1", "--workers", "0", "--cpu", "True", "--output", tmp_path / "run"]
    assert main(["train", *map(str, arguments)]) == 0
    assert AutoModel.from_pretrained(tmp_path / "run").config.model_type == "patches"


def test_commands_take_it(trained, dataset, tmp_path):
    image = dataset.with_name("image.png")
    model = ["--model", str(trained)]
    assert main(["segment", str(image), *model, "--output", str(tmp_path / "images")]) == 0
    summary = json.loads((tmp_path / "images" / "image.json").read_text())
    assert summary["labels"] == ["road", "sky"]
    rows = ["segment-dataset", "--dataset", str(dataset), "--labels", "road, sky, car", *model]
    assert main([*rows, "--output", str(tmp_path / "rows")]) == 0
    found = load_dataset("parquet", data_files=str(tmp_path / "rows" / "part-*.parquet"), split="train")
    assert len(found) == 3
    labels = ["--labels", str(trained.parent / "labels.json"), "--split", "train", "--overlays", "0"]
    assert main(["evaluate", "--dataset", str(dataset), *labels, *model, "--output", str(tmp_path / "figures")]) == 0
    assert 0 <= json.loads((tmp_path / "figures" / "results.json").read_text())["mean_iou"] <= 1


def test_the_pipeline_takes_it(trained, dataset):
    segment = pipeline("open-vocabulary-segmentation", model=str(trained))
    assert {part["label"] for part in segment(str(dataset.with_name("image.png")), ["car", "tree"])} <= {"car", "tree"}


def test_the_hub_takes_it(trained):
    card = make_model_card(trained)
    assert "patches" in card.data.tags
    assert "Side Adapter" not in str(card)
