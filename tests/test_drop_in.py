"""Code written for semantic segmentation runs on SAN as it runs on others: nothing changes but the model's name.

Two ways of working, each as a function of the name alone: that of transformers' guide to the task (the image processor
makes the images ready) and that of its example scripts (the script cuts images of one size itself, and trains with
`Trainer` or a loop of its own). SegFormer goes through the same functions, so that they cannot lean on SAN.
"""

import evaluate
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from PIL import Image
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    Trainer,
    TrainingArguments,
    default_data_collator,
    pipeline,
)

import modeling_san  # noqa: F401
from drawn_world.world import CLASS_NAMES, draw_scene, world_dataset
from modeling_san import BUILTIN_MODEL, SANForOpenVocabSegmentation, SANProcessor
from modeling_san.training.mean_iou import MEAN_IOU

pytestmark = pytest.mark.slow

# Not the order in which the built-in model stores them: the vocabulary is what the code asks for
NAMES = ("water", "red plain", "grass", "blue striped", "yellow dotted")
DRAWN = {"combinations": NAMES[1::2] + NAMES[4:], "backgrounds": NAMES[:3:2], "max_regions": 2}
SIZE = 64


@pytest.fixture(scope="module")
def segformer(tmp_path_factory):
    """A tiny SegFormer that knows nothing, with an image processor."""
    from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil

    folder = tmp_path_factory.mktemp("segformer")
    torch.manual_seed(0)
    config = SegformerConfig(
        hidden_sizes=[8, 16, 16, 16], depths=[1] * 4, decoder_hidden_size=16, num_labels=len(NAMES)
    )
    SegformerForSemanticSegmentation(config).save_pretrained(folder)
    SegformerImageProcessorPil(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def san(tmp_path_factory):
    """The built-in model for smaller images, saved into a folder of its own."""
    folder = tmp_path_factory.mktemp("san")
    SANForOpenVocabSegmentation.from_pretrained(BUILTIN_MODEL).save_pretrained(folder)
    SANProcessor.from_pretrained(BUILTIN_MODEL, size={"shortest_edge": SIZE}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=["segformer", "san"])
def checkpoint(request):
    folder = request.getfixturevalue(request.param)
    if request.param == "segformer":
        try:
            AutoImageProcessor.from_pretrained(folder)
        except ValueError:
            pytest.skip("this transformers makes SegFormer's image processor with torchvision only")
    return folder


def draw_data(first_value):
    """Six drawn images with label maps that count the names from `first_value`."""
    drawn = world_dataset(6, seed=3, size=SIZE, **DRAWN)
    values = np.zeros(len(CLASS_NAMES), np.uint8)
    for position, name in enumerate(NAMES):
        values[CLASS_NAMES.index(name)] = position + first_value
    rows = {"image": [], "annotation": []}
    for row in drawn:
        rows["image"].append(row["image"])
        rows["annotation"].append(Image.fromarray(values[np.asarray(row["annotation"])]))
    return Dataset.from_dict(rows, features=drawn.features)


def make_compute_metrics(id2label, metric):
    """Scores of logits that are smaller than the label maps."""

    def compute_metrics(prediction):
        logits, labels = prediction
        enlarged = interpolate(torch.from_numpy(logits), size=labels.shape[-2:], mode="bilinear", align_corners=False)
        scores = metric.compute(
            predictions=enlarged.argmax(dim=1).numpy(),
            references=labels,
            num_labels=len(id2label),
            ignore_index=255,
            reduce_labels=False,
        )
        of_classes = scores.pop("per_category_iou").tolist()
        return {"mean_iou": scores["mean_iou"]} | {f"iou_{id2label[i]}": iou for i, iou in enumerate(of_classes)}

    return compute_metrics


def options(folder):
    """Four steps on two images each, with a checkpoint and an evaluation at the end."""
    return TrainingArguments(
        output_dir=folder,
        learning_rate=5e-4,
        max_steps=4,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        eval_strategy="steps",
        save_strategy="steps",
        save_steps=4,
        eval_steps=4,
        logging_steps=1,
        eval_accumulation_steps=1,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )


def follow_the_guide(checkpoint, folder):
    """The steps of the guide: label maps that count from 1, transforms on the fly, Trainer, inference, pipeline."""
    parts = draw_data(first_value=1).train_test_split(test_size=2, seed=0)
    train, test = parts["train"], parts["test"]
    image = test[0]["image"]
    id2label = dict(enumerate(NAMES))
    label2id = {name: position for position, name in id2label.items()}

    image_processor = AutoImageProcessor.from_pretrained(checkpoint, do_reduce_labels=True)

    def prepare(batch):
        return image_processor(list(batch["image"]), list(batch["annotation"]))

    train.set_transform(prepare)
    test.set_transform(prepare)
    model = AutoModelForSemanticSegmentation.from_pretrained(checkpoint, id2label=id2label, label2id=label2id)
    trainer = Trainer(
        model=model,
        args=options(folder),
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=make_compute_metrics(id2label, evaluate.load(MEAN_IOU)),
    )
    trainer.train()
    trainer.save_model()
    image_processor.save_pretrained(folder)

    pixel_values = image_processor(image, return_tensors="pt").pixel_values
    with torch.no_grad():
        logits = model(pixel_values=pixel_values).logits.cpu()
    enlarged = interpolate(logits, size=image.size[::-1], mode="bilinear", align_corners=False)
    segments = pipeline("image-segmentation", model=folder, device="cpu")(image)
    return trainer, logits, enlarged.argmax(dim=1)[0], segments


def cut(image, label_map, size, generator):
    """A random square of an image and its label map, filled with 0 and 255 where they are smaller."""
    pixels, labels = np.asarray(image.convert("RGB"), np.float32), np.asarray(label_map, np.int64)
    missing = [(0, max(0, size - length)) for length in labels.shape]
    pixels = np.pad(pixels, [*missing, (0, 0)])
    labels = np.pad(labels, missing, constant_values=255)
    top, left = (int(generator.integers(0, length - size + 1)) for length in labels.shape)
    return pixels[top : top + size, left : left + size], labels[top : top + size, left : left + size]


def prepare_like_the_scripts(checkpoint):
    """What both scripts share: config, model, and data that is made ready without the image processor."""
    id2label = dict(enumerate(NAMES))
    # The scripts have the positions as text here
    label2id = {name: str(position) for position, name in id2label.items()}
    hub = {"cache_dir": None, "revision": "main", "token": None, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(checkpoint, label2id=label2id, id2label=id2label, **hub)
    model = AutoModelForSemanticSegmentation.from_pretrained(checkpoint, config=config, **hub)
    image_processor = AutoImageProcessor.from_pretrained(checkpoint, do_reduce_labels=False, **hub)
    if "shortest_edge" in image_processor.size:
        height = image_processor.size["shortest_edge"]
    else:
        height = image_processor.size["height"]
    mean, std = np.array(image_processor.image_mean), np.array(image_processor.image_std)
    generator = np.random.default_rng(0)
    # Images become larger than what is cut of them, so that some squares are filled at the border
    size = height + 32

    def transform(batch):
        pairs = [cut(*pair, size, generator) for pair in zip(batch["image"], batch["annotation"], strict=True)]
        pixels = [((pixels / 255 - mean) / std).transpose(2, 0, 1) for pixels, _ in pairs]
        return {
            "pixel_values": torch.tensor(np.stack(pixels), dtype=torch.float),
            "labels": torch.tensor(np.stack([labels for _, labels in pairs])),
        }

    parts = draw_data(first_value=0).train_test_split(test_size=2, seed=0)
    parts["train"].set_transform(transform)
    parts["test"].set_transform(transform)
    return id2label, model, image_processor, parts["train"], parts["test"]


def run_the_trainer_script(checkpoint, folder):
    """The example script that uses Trainer."""
    id2label, model, image_processor, train, test = prepare_like_the_scripts(checkpoint)
    trainer = Trainer(
        model=model,
        args=options(folder),
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=make_compute_metrics(id2label, evaluate.load(MEAN_IOU)),
        processing_class=image_processor,
        data_collator=default_data_collator,
    )
    result = trainer.train()
    trainer.save_model()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.create_model_card(finetuned_from=checkpoint, dataset="drawn", tags=["image-segmentation", "vision"])
    return trainer, metrics


def run_the_loop_script(checkpoint, folder):
    """The example script with a loop of its own on Accelerate."""
    accelerator = Accelerator(cpu=True)
    id2label, model, image_processor, train, test = prepare_like_the_scripts(checkpoint)
    train_loader = DataLoader(train, shuffle=True, collate_fn=default_data_collator, batch_size=2)
    test_loader = DataLoader(test, collate_fn=default_data_collator, batch_size=2)
    optimizer = torch.optim.AdamW(list(model.parameters()), lr=2e-4)
    model, optimizer, train_loader, test_loader = accelerator.prepare(model, optimizer, train_loader, test_loader)
    metric = evaluate.load(MEAN_IOU)
    losses = []
    for _ in range(4):
        model.train()
        for batch in train_loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.detach().float().item())
        model.eval()
        for batch in test_loader:
            with torch.no_grad():
                outputs = model(**batch)
            size = batch["labels"].shape[-2:]
            predictions = interpolate(outputs.logits, size=size, mode="bilinear", align_corners=False).argmax(dim=1)
            predictions, references = accelerator.gather_for_metrics((predictions, batch["labels"]))
            metric.add_batch(predictions=predictions, references=references)
        scores = metric.compute(num_labels=len(id2label), ignore_index=255, reduce_labels=False)
    unwrapped = accelerator.unwrap_model(model)
    unwrapped.save_pretrained(folder, is_main_process=accelerator.is_main_process, save_function=accelerator.save)
    image_processor.save_pretrained(folder)
    return losses, scores


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_loads_with_its_labels(folder):
    loaded = AutoModelForSemanticSegmentation.from_pretrained(folder)
    assert loaded.config.id2label == dict(enumerate(NAMES))
    assert AutoImageProcessor.from_pretrained(folder).image_mean is not None
    return loaded


def test_the_guide_runs(checkpoint, tmp_path):
    trainer, logits, label_map, segments = follow_the_guide(checkpoint, str(tmp_path))
    assert logits.shape == (1, len(NAMES), SIZE // 4, SIZE // 4)
    assert label_map.shape == (SIZE, SIZE)
    # The stock pipeline finds the same regions as the upsampled logits
    of_pipeline = np.full(label_map.shape, -1)
    for segment in segments:
        of_pipeline[np.asarray(segment["mask"]) > 0] = NAMES.index(segment["label"])
    assert (label_map.numpy() == of_pipeline).mean() >= 0.98
    losses = losses_of(trainer)
    assert len(losses) == 4
    assert all(map(np.isfinite, losses))
    [scores] = [entry for entry in trainer.state.log_history if "eval_mean_iou" in entry]
    assert {f"eval_iou_{name}" for name in NAMES} <= set(scores)
    assert_loads_with_its_labels(str(tmp_path))


def test_the_script_with_trainer_runs(checkpoint, tmp_path):
    trainer, metrics = run_the_trainer_script(checkpoint, str(tmp_path))
    assert 0 <= metrics["eval_mean_iou"] <= 1
    assert len(losses_of(trainer)) == 4
    assert "image-segmentation" in (tmp_path / "README.md").read_text()
    assert_loads_with_its_labels(str(tmp_path / "checkpoint-4"))
    # What was trained is what was saved
    loaded = assert_loads_with_its_labels(str(tmp_path)).eval()
    pixels = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixels).logits, trainer.model.eval()(pixels).logits)


def test_the_script_with_its_own_loop_runs_and_the_loss_falls(checkpoint, tmp_path):
    losses, scores = run_the_loop_script(checkpoint, str(tmp_path))
    assert len(losses) == 8
    assert sum(losses[-2:]) < sum(losses[:2])
    assert 0 <= scores["mean_iou"] <= 1
    assert_loads_with_its_labels(str(tmp_path))


@pytest.fixture(scope="module")
def builtin():
    """The built-in model under its own labels, and its processor."""
    model = AutoModelForSemanticSegmentation.from_pretrained(BUILTIN_MODEL)
    return model.eval(), SANProcessor.from_pretrained(BUILTIN_MODEL)


def both_maps(builtin, size, index):
    """Label maps of one drawn image: by upsampled logits, cut where there is padding, and by post-processing."""
    model, processor = builtin
    image = Image.fromarray(draw_scene(11, index, size=size).image)
    inputs = processor(images=image, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    padded = inputs["pixel_values"].shape[-2:]
    height, width = inputs["image_sizes"][0].tolist()
    logits = outputs.logits
    if (height, width) != tuple(padded):
        logits = interpolate(logits, size=padded, mode="bilinear", align_corners=False)[..., :height, :width]
    by_logits = interpolate(logits, size=size, mode="bilinear", align_corners=False).argmax(dim=1)[0]
    [by_processor] = processor.post_process_semantic_segmentation(outputs, target_sizes=[size])
    return by_logits, by_processor


@pytest.mark.parametrize("size", [(128, 128), (128, 176), (256, 256), (96, 120), (131, 200)])
def test_the_upsampled_argmax_is_the_segmentation(builtin, size):
    pairs = [both_maps(builtin, size, index) for index in range(6)]
    assert all(by_logits.shape == size for by_logits, _ in pairs)
    agreement = [(by_logits == by_processor).float().mean().item() for by_logits, by_processor in pairs]
    assert sum(agreement) / len(agreement) >= 0.98
    # More than one region, or agreement would mean nothing
    assert any(len(by_processor.unique()) > 1 for _, by_processor in pairs)


def test_new_names_for_a_folder_without_a_tokenizer_are_one_clear_line(san, tmp_path):
    AutoModelForSemanticSegmentation.from_pretrained(san).save_pretrained(tmp_path)
    AutoImageProcessor.from_pretrained(san).save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"there is no processor in .* to encode id2label with"):
        AutoModelForSemanticSegmentation.from_pretrained(str(tmp_path), id2label={0: "sky", 1: "road"})


def test_trainer_measures_the_loss_of_the_open_vocabulary_class(tmp_path):
    """Trainer waits for all parameters that are called labels."""
    images = [{"pixel_values": torch.zeros(3, 64, 64), "labels": torch.eye(64, dtype=torch.long)}] * 2
    arguments = TrainingArguments(tmp_path, report_to="none", use_cpu=True, disable_tqdm=True)
    model = SANForOpenVocabSegmentation.from_pretrained(BUILTIN_MODEL)
    trainer = Trainer(model, arguments, eval_dataset=images, compute_metrics=lambda prediction: {"called": 1.0})
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] > 0
    assert metrics["eval_called"] == 1


def test_arrays_are_refused_in_a_sentence():
    model = SANForOpenVocabSegmentation.from_pretrained(BUILTIN_MODEL)
    inputs = SANProcessor.from_pretrained(BUILTIN_MODEL)(images=Image.new("RGB", (64, 64)))
    with pytest.raises(TypeError, match="return_tensors"):
        model(pixel_values=np.asarray(inputs["pixel_values"]))


def test_the_stock_pipeline_asks_nothing_where_the_package_is_there(tmp_path, monkeypatch):
    model = AutoModelForSemanticSegmentation.from_pretrained(BUILTIN_MODEL, id2label={0: "grass", 1: "red plain"})
    model.save_pretrained(tmp_path)
    AutoImageProcessor.from_pretrained(BUILTIN_MODEL).save_pretrained(tmp_path)
    monkeypatch.setattr("builtins.input", pytest.fail)
    segments = pipeline("image-segmentation", model=str(tmp_path))(Image.new("RGB", (64, 64), "red"))
    assert {segment["label"] for segment in segments} <= {"grass", "red plain"}
