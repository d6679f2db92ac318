"""The model card: what it says, where it has that from, and that nothing from outside breaks it."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from modeling_san import BUILTIN_MODEL, SANConfig, SANForOpenVocabSegmentation
from modeling_san.conversion import RELEASED_CONFIGS
from modeling_san.hub_card import make_model_card
from modeling_san.hub_card.model_card import PUBLISHED_BENCHMARKS, PUBLISHED_RESULTS
from modeling_san.processing.fingerprints import digest_weight_files
from modeling_san.training.evaluate import evaluate
from modeling_san.training.label_sets import load_label_set
from modeling_san.training.recipe import Recipe

REPOSITORY = Path(__file__).resolve().parents[1]
HOSTILE = (
    "x\n---\n# A heading\n```\nlicense: mit\n<script>alert(1)</script> | [a](http://e.vil) {{ 7 * 7 }} `b`",
    "---",
    "{{ card_data }}{% raw %}",
    "\u202e\u2028www.e.vil",
    "car|automobile",
    "- key: value #",
    "",
    "a" * 5000,
)


@pytest.fixture
def folder(make_model, processor, tmp_path):
    """A tiny model with two labels."""
    path = tmp_path / "my-model"
    model = make_model()
    model.set_labels(["sky", "red truck"], processor)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture
def results():
    """What an evaluation leaves, as far as the card reads it."""
    per_class = {"sky": 0.75, "red truck": 0.0, "road": 0.0312, "tree": None}
    return {
        **{"mean_iou": 0.2604, "mean_accuracy": 0.5, "overall_accuracy": 0.8125, "frequency_weighted_iou": 0.625},
        **{"images": 20, "unlabelled_images": 1, "per_class_iou": per_class, "per_class_accuracy": per_class},
        "subsets": {"novel": {"mean_iou": 0.125, "mean_accuracy": 0.25, "classes": 2}},
        **{"model": "/home/me/my-model", "dataset": "/home/me/val.parquet", "split": "validation"},
        **{"tta": True, "limit": 20},
    }


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def section(card, title):
    """The text under a heading, up to the next heading."""
    match = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", card.text, flags=re.MULTILINE | re.DOTALL)
    assert match, f"no section {title!r} in {re.findall('^#+ .*', card.text, flags=re.MULTILINE)}"
    return match[1]


def test_metadata_and_measurements_survive_the_hubs_own_reader(folder, results):
    write(folder / "results.json", results)
    given = {"license": "mit", "base_model": "me/older", "datasets": ["me/data"]}
    card = make_model_card(folder, repo_id="me/my-model", **given)
    read = ModelCard(str(card))
    assert str(read) == str(card)
    data = read.data.to_dict()
    expected = {"library_name": "transformers", "pipeline_tag": "image-segmentation", **given}
    assert {name: data[name] for name in expected} == expected
    [widget] = data["widget"]
    assert widget["src"].startswith("https://")
    assert widget["candidate_labels"] == "sky, red truck"
    [model] = yaml.safe_load(str(card).split("---\n")[1])["model-index"]
    assert model["name"] == "my-model"
    [result] = model["results"]
    assert result["task"]["type"] == "image-segmentation"
    assert result["dataset"]["type"] == "val.parquet"
    assert result["dataset"]["args"] == {"limit": 20, "tta": True}
    values = {metric["name"]: metric["value"] for metric in result["metrics"]}
    assert (values["Mean IoU"], values["Mean IoU of novel"]) == (0.2604, 0.125)
    failures = section(card, "Limits and known failures")
    assert "`red truck` 0.000, `road` 0.031, `sky` 0.750" in failures
    assert "IoU of 0: 1 of 3" in failures


def test_what_an_evaluation_writes_is_what_the_card_reads(folder, make_model, processor, tmp_path, monkeypatch):
    # The library that draws it takes longer to load than everything here
    monkeypatch.setattr("modeling_san.training.evaluate.plot_class_iou", lambda *args, **kwargs: None)
    images = [
        {"image": Image.new("RGB", (64, 48), colour), "annotation": Image.new("L", (64, 48), index)}
        for index, colour in enumerate(("blue", "red"))
    ]
    write(tmp_path / "classes.json", ["sky", "red truck"])
    labels = load_label_set(str(tmp_path / "classes.json"))
    about = {"model": "my-model", "dataset": "me/images", "split": "validation"}
    options = {"output_dir": tmp_path / "evaluation", "progress": False, "overlays": 0, "about": about}
    measured = evaluate(make_model(), processor, images, labels, **options)
    card = make_model_card(folder, results=[tmp_path / "evaluation"])
    text = section(card, "Measured on these weights")
    assert f"| Mean IoU | {measured['mean_iou']:.4f} |" in text
    assert "`me/images`" in text
    assert "2 images" in text


@pytest.mark.parametrize("model", ["/home/me/their-model", "them/my-model"])
def test_another_models_figures_are_not_called_measured_on_these_weights(folder, results, model):
    write(folder / "results.json", {**results, "model": model})
    card = make_model_card(folder, repo_id="me/my-model")
    assert "no measurement of these weights" in section(card, "Measured on these weights")
    assert "0.2604" in section(card, f"Measured on another model, `{model.removeprefix('/home/me/')}`")
    assert "model-index" not in str(card)
    assert "the lowest IoU" not in card.text


def test_figures_of_other_weights_of_the_same_name_are_not_these_weights(folder, results):
    for weights, section_of in (
        (digest_weight_files(folder), "Measured on these weights"),
        ("0" * 32, "Measured on another model, `my-model` with other weights"),
    ):
        write(folder / "results.json", {**results, "weights": weights})
        card = make_model_card(folder)
        assert "0.2604" in section(card, section_of)
        assert ("model-index" in str(card)) == ("these" in section_of)


def test_without_measurements_the_card_says_so_has_no_index_and_changes_nothing_in_the_folder(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    card = make_model_card(folder)
    assert "no measurement of these weights is recorded" in section(card, "Measured on these weights")
    assert "model-index" not in str(card)
    # Nor are the authors' figures quoted for another architecture than theirs
    assert not re.search(r"mIoU|mean IoU|Quoted from the authors", card.text, flags=re.IGNORECASE)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_figures_at_the_end_of_training_go_by_the_recipes_data(folder, results):
    for name in ("model", "dataset", "split", "tta", "limit"):
        del results[name]
    write(folder / "results.json", results)
    recipe = Recipe(dataset="/data/train.parquet", validation="/data/held_out.parquet", output_dir="x", steps=123)
    write(folder / "recipe.yaml", recipe.to_yaml())
    write(folder / "metrics.jsonl", '{"step": 100, "loss": 3.0}\n{"step": 123, "loss": 1.5}\n')
    card = make_model_card(folder)
    assert "`held_out.parquet`" in section(card, "Measured on these weights")
    training = section(card, "Training")
    assert "| dataset | `train.parquet` |" in training
    assert "| steps | `123` |" in training
    assert "step 123 with a loss of 1.5" in training
    assert "/data/" not in card.text
    assert "/data/held_out" not in str(card)


def test_parameters_are_counted_without_stored_embeddings_and_half_precision_is_named(folder, make_model):
    model = make_model()
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert 0 < trainable < total
    SANForOpenVocabSegmentation.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    facts = section(make_model_card(folder), "What it is")
    assert f"| parameters | {total / 1e6:.2f} million |" in facts
    assert f"| {trainable / 1e6:.2f} million: what is added to CLIP" in facts
    assert "| weights | bfloat16, " in facts


@pytest.mark.parametrize("width", [768, 1024])
def test_published_numbers_stand_apart_from_measured_ones(width, folder, results):
    layers = {768: 12, 1024: 24}[width]
    vision = {"hidden_size": width, "num_attention_heads": width // 64, "num_hidden_layers": layers, "patch_size": 16}
    SANConfig(vision_config=vision, **RELEASED_CONFIGS[width]).save_pretrained(folder)
    write(folder / "results.json", results)
    card = make_model_card(folder)
    quoted = section(card, "Quoted from the authors, not measured on these weights")
    for title, values in PUBLISHED_RESULTS[width].items():
        assert f"| {title} | {' | '.join('' if value is None else str(value) for value in values)} |" in quoted
    measured = section(card, "Measured on these weights")
    published = {str(value) for values in PUBLISHED_RESULTS[width].values() for value in values if value}
    assert not [value for value in published if value in measured]
    assert "0.2604" not in quoted
    # What the authors published is no measurement of this repository's weights
    metadata = str(card).split("---\n")[1]
    assert not [value for value in published if value in metadata]


def test_the_card_and_the_documentation_quote_the_same_numbers():
    text = (REPOSITORY / "docs" / "usage.md").read_text(encoding="utf-8")
    assert f"| {' | '.join(PUBLISHED_BENCHMARKS)} |" in text
    for rows in PUBLISHED_RESULTS.values():
        for values in rows.values():
            assert " | ".join(str(value) for value in values if value is not None) in text


def test_names_from_outside_cannot_break_the_card(folder, results):
    config = json.loads((folder / "config.json").read_text())
    names = [*HOSTILE, "sky"]
    config.update(id2label=dict(enumerate(names)), label2id={}, training_labels=names, has_stored_labels=True)
    write(folder / "config.json", config)
    results["per_class_iou"] = {name: index / 10 for index, name in enumerate(names)}
    results.update(dataset=HOSTILE[0], split=HOSTILE[1])
    results["subsets"] = {name: {"mean_iou": 0.5, "mean_accuracy": 0.5, "classes": 1} for name in HOSTILE}
    write(folder / "results.json", results)
    recipe = {"model": HOSTILE[0], "labels": HOSTILE[2], "templates": [HOSTILE[3], "{} |"], "steps": HOSTILE[5]}
    write(folder / "recipe.yaml", yaml.safe_dump(recipe))
    card = make_model_card(folder, license=HOSTILE[0])
    plain = make_model_card(BUILTIN_MODEL)
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    headings = [line for line in card.text.splitlines() if line.startswith("#")]
    assert "# A heading" not in headings
    assert len(headings) == len([line for line in plain.text.splitlines() if line.startswith("#")])
    assert card.text.count("```") == plain.text.count("```")
    assert "49" not in card.text
    assert max(map(len, card.text.splitlines())) < 2500
    assert not re.search("[\u202e\u2028]", card.text)
    # Outside of code nothing of theirs is left; inside, nothing has a meaning
    outside = re.sub(r"```.*?```|`[^`\n]*`", "", card.text, flags=re.DOTALL)
    for piece in ("<script>", "e.vil", "{{", "automobile", "key: value"):
        assert piece not in outside
    # A bar in a name does not add a cell to a table
    for line in card.text.splitlines():
        if line.startswith("| Mean IoU of"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 3


def test_the_built_in_models_card_says_what_it_is():
    card = make_model_card(BUILTIN_MODEL, repo_id="me/my-san")
    recorded = json.loads((BUILTIN_MODEL / "results.json").read_text())
    seen = recorded["bias on"]["seen"], recorded["bias off"]["seen"]
    assert f"| 24 combinations with masks in training | {seen[0]:.3f} | {seen[1]:.3f} |" in card.text
    assert "knows only the 38 words" in card.text
    assert "masks of 24" in section(card, "Training")
    assert card.data.license == "apache-2.0"  # as its README.md says
    assert card.data.widget[0]["src"] == "https://huggingface.co/me/my-san/resolve/main/example.png"


def test_the_examples_on_the_card_run(tmp_path, monkeypatch):
    shutil.copytree(BUILTIN_MODEL, tmp_path / "my-san")
    shutil.copy(REPOSITORY / "hub_card" / "assets" / "demo.png", tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", make_model_card("my-san").text, flags=re.DOTALL)
    assert len(blocks) == 2
    known: dict = {}
    for block in blocks:
        exec(block, known)
    words = re.findall(r"text=\[(.*)\], return", blocks[0])[0]
    found = {words.split('"')[1::2][index] for index in known["label_map"].unique().tolist()}
    assert found == {"wood", "yellow plain", "purple checkered", "pink striped"}
    assert {region["label"] for region in known["regions"]} == found


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("config.json", None, "config.json"),
        ("model.safetensors", None, "model.safetensors"),
        ("config.json", "[" * 100_000, "config.json cannot be read as JSON"),
        ("config.json", '{"model_type": "clip"}', "'clip'"),
        ("config.json", '{"model_type": "san", "num_queries": -1}', "num_queries"),
        ("model.safetensors", "nothing", "model.safetensors cannot be read"),
        ("results.json", "[]", "results.json holds no JSON object"),
        ("results.json", "{}", "no results of `san evaluate`"),
        ("results.json", '{"mean_iou": NaN}', "no results of `san evaluate`"),
        ("results.json", '{"bias on": {"seen": "much"}}', "no results of `san evaluate`"),
        ("recipe.yaml", "!!python/object/apply:os.getcwd []", "not valid YAML"),
        ("README.md", "---\nlicense: [\n---\n", "README.md cannot be read"),
    ],
)
def test_files_that_are_missing_or_cannot_be_read_are_named(folder, name, content, expected):
    if content is None:
        (folder / name).unlink()
    else:
        write(folder / name, content)
    with pytest.raises(ValueError, match=re.escape(expected)) as caught:
        make_model_card(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "fact"), [({"results": ["nowhere"]}, "nowhere"), ({"repo_id": "../../etc"}, "repo")]
)
def test_what_is_given_for_the_card_has_to_make_sense(folder, given, fact):
    with pytest.raises(ValueError, match=fact):
        make_model_card(folder, **given)
