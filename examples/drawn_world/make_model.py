"""The built-in model, from nothing: a tiny CLIP on the drawn world, then SAN beside it.

CLIP reads captions that mention every combination of a colour and a pattern. SAN learns masks of part of them only, so
the others show what the method is for: naming what no mask was ever given for.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPModel, CLIPTokenizer

from drawn_world.pretrain_clip import (
    CLIP_RESIZE_FACTOR,
    GATE_TEMPLATES,
    IMAGE_SIZE,
    masked_recognition_accuracy,
    pretrain_clip,
    zero_shot_accuracy,
)
from drawn_world.world import (
    BACKGROUNDS,
    CLASS_NAMES,
    NEVER_SEEN_COMBINATIONS,
    SEEN_COMBINATIONS,
    draw_scene,
)
from modeling_san.builtin import format_results
from modeling_san.modeling_san import SANForOpenVocabSegmentation
from modeling_san.processing import SANImageProcessor, SANProcessor
from modeling_san.training.label_sets import IGNORE_INDEX
from modeling_san.training.metrics import RESULTS_FILE, ConfusionMatrix
from modeling_san.training.trainer import run_training

SAN_SEED = 2
EVALUATION_SEED = 90_011
"""Worlds apart from the one CLIP is trained on, and from each other."""

LEAST_ZERO_SHOT = 0.9
LEAST_MASKED_RECOGNITION = 0.6
"""What CLIP must reach before SAN is trained on it; chance is 1 in 32 and 1 in 38."""

SAN_OPTIONS: dict[str, Any] = {
    "clip_input_scale": CLIP_RESIZE_FACTOR,
    "sls_start_layer": 2,
    "num_queries": 20,
    "side_hidden_size": 96,
    "side_num_layers": 5,
    "side_num_heads": 4,
    "side_image_size": IMAGE_SIZE,
    "side_patch_size": 8,
    "size_divisor": 16,
    "fusion_map": [[0, 0], [1, 1], [2, 2]],
    "deep_supervision_layers": [4, 5],
    "mask_dim": 64,
    "train_num_points": 1024,
}
"""The built-in model's shape, as fields of [`SANConfig`]."""


class UndertrainedError(RuntimeError):
    """CLIP did not learn enough for SAN to be worth training."""


class WorldImages(torch.utils.data.Dataset):
    """
    Scenes of the drawn world as training examples.

    Args:
        num_images: length.
        class_names: the vocabulary; images hold no other names.
        image_processor: normalises images.
        seed: which world.
    """

    def __init__(
        self, num_images: int, class_names: list[str], image_processor: SANImageProcessor, seed: int = SAN_SEED
    ) -> None:
        self.num_images = num_images
        self.combinations = [name for name in class_names if name not in BACKGROUNDS]
        self.image_processor = image_processor
        self.seed = seed
        self.new_index = torch.full((256,), IGNORE_INDEX, dtype=torch.int64)
        for new, name in enumerate(class_names):
            self.new_index[CLASS_NAMES.index(name)] = new

    def __len__(self) -> int:
        """Number of images."""
        return self.num_images

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`pixel_values` `(3, 128, 128)` and `labels` `(128, 128)` of image `index`."""
        scene = draw_scene(self.seed, index, combinations=self.combinations, size=IMAGE_SIZE)
        pixel_values = self.image_processor(scene.image, return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixel_values, "labels": self.new_index[torch.from_numpy(scene.label_map).long()]}


def make_processor(tokenizer: CLIPTokenizer) -> SANProcessor:
    """The built-in model's processor: small images, and the templates its CLIP was checked with."""
    image_processor = SANImageProcessor(
        size={"shortest_edge": IMAGE_SIZE, "longest_edge": 4 * IMAGE_SIZE},
        size_divisor=SAN_OPTIONS["size_divisor"],
        mask_stride=SAN_OPTIONS["side_patch_size"],
    )
    return SANProcessor(image_processor, tokenizer, templates=list(GATE_TEMPLATES))


def check_clip(clip: CLIPModel, tokenizer: CLIPTokenizer) -> dict[str, float]:
    """
    Whether CLIP knows enough for SAN to be worth training.

    Args:
        clip: the pre-trained model.
        tokenizer: its tokenizer.

    Returns:
        `zero_shot_accuracy` on single regions and `masked_recognition_accuracy` with true masks as bias.

    Raises:
        UndertrainedError: where one of them is too low.
    """
    figures = {
        "zero_shot_accuracy": zero_shot_accuracy(clip, tokenizer),
        "masked_recognition_accuracy": masked_recognition_accuracy(
            clip, tokenizer, first_layer=SAN_OPTIONS["sls_start_layer"]
        )["regions"],
    }
    least = {"zero_shot_accuracy": LEAST_ZERO_SHOT, "masked_recognition_accuracy": LEAST_MASKED_RECOGNITION}
    for name, value in figures.items():
        print(f"CLIP {name.replace('_', ' ')}: {value:.3f} (needs {least[name]})")
        if value < least[name]:
            raise UndertrainedError(
                f"CLIP's {name} is {value:.3f}, below {least[name]}: remove the folder `clip` of the output and train "
                "for more steps."
            )
    return figures


def train_demo(
    output_dir: str | Path,
    *,
    clip_steps: int = 800,
    san_steps: int = 2500,
    batch_size: int = 16,
    learning_rate: float = 6e-4,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> dict[str, dict[str, float]]:
    """
    Train the built-in model and save it, ready for `from_pretrained`.

    A folder `clip` beside the result keeps the first stage; a second call takes it up instead of training it again.

    Args:
        output_dir: folder for the result.
        clip_steps: optimisation steps of CLIP's pre-training.
        san_steps: optimisation steps of SAN.
        batch_size: images a step of SAN.
        learning_rate: of SAN.
        seed: of all random choices.
        device: `"cpu"` keeps the run off a GPU.
        progress: whether to show progress bars.

    Returns:
        the figures that are printed and saved as `results.json`.

    Raises:
        UndertrainedError: where CLIP did not learn enough.
    """
    output_dir = Path(output_dir)
    clip_dir = output_dir / "clip"
    start = time.monotonic()
    if (clip_dir / "model.safetensors").is_file():
        print(f"taking up CLIP from {clip_dir}")
    else:
        pretrain_clip(clip_dir, steps=clip_steps, seed=seed, device=device, progress=progress)
    clip = CLIPModel.from_pretrained(clip_dir).eval()
    tokenizer = CLIPTokenizer.from_pretrained(clip_dir)
    figures = {"clip": check_clip(clip, tokenizer)}

    processor = make_processor(tokenizer)
    names = [*SEEN_COMBINATIONS, *BACKGROUNDS]
    torch.manual_seed(seed)
    model = SANForOpenVocabSegmentation.from_clip(clip, **SAN_OPTIONS)
    model.set_labels(names, processor)
    run_training(
        model,
        WorldImages(san_steps * batch_size, names, processor.image_processor),
        steps=san_steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        warmup_steps=min(100, san_steps // 10),
        seed=seed,
        device=device,
        progress=progress,
    )
    model.config.training_labels = list(CLASS_NAMES)
    model.set_labels(CLASS_NAMES, processor)
    model.save_pretrained(output_dir)
    processor.save_pretrained(output_dir)

    figures["bias on"] = evaluate_demo(model, processor, progress=progress)
    with attention_bias_off(model):
        figures["bias off"] = evaluate_demo(model, processor, progress=progress)
    (output_dir / RESULTS_FILE).write_text(json.dumps(figures, indent=2) + "\n")
    print(format_results(figures))
    print(f"{(time.monotonic() - start) / 60:.0f} minutes")
    return figures


@torch.inference_mode()
def evaluate_demo(
    model: SANForOpenVocabSegmentation,
    processor: SANProcessor,
    *,
    num_images: int = 400,
    seed: int = EVALUATION_SEED,
    batch_size: int = 16,
    progress: bool = True,
) -> dict[str, float]:
    """
    Mean IoU on fresh images that hold all combinations, among all names.

    Args:
        model: a model with the world's names stored.
        processor: its processor.
        num_images: how many images to draw.
        seed: which world.
        batch_size: images at once.
        progress: whether to show a progress bar.

    Returns:
        `seen`, `never seen` and `backgrounds`: means over those classes.
    """
    confusion = ConfusionMatrix(len(CLASS_NAMES))
    bar = tqdm(total=num_images, desc="evaluating", unit="image", disable=not progress)
    for start in range(0, num_images, batch_size):
        scenes = [draw_scene(seed, index) for index in range(start, min(start + batch_size, num_images))]
        inputs = processor(images=[scene.image for scene in scenes], return_tensors="pt").to(model.device)
        maps = processor.post_process_semantic_segmentation(
            model(**inputs), target_sizes=[scene.label_map.shape for scene in scenes]
        )
        for scene, label_map in zip(scenes, maps, strict=True):
            confusion.update(label_map.cpu(), torch.from_numpy(scene.label_map))
        bar.update(len(scenes))
    bar.close()
    groups = {"seen": SEEN_COMBINATIONS, "never seen": NEVER_SEEN_COMBINATIONS, "backgrounds": BACKGROUNDS}
    return {group: confusion.mean_iou([CLASS_NAMES.index(name) for name in names]) for group, names in groups.items()}


@contextmanager
def attention_bias_off(model: SANForOpenVocabSegmentation) -> Iterator[None]:
    """
    Within the context, [SLS] tokens look at the whole image: every attention bias is 0.

    Raises:
        ValueError: where the model's biases are not rescaled.
    """
    scaling = model.side_adapter.mask_decoder.bias_scaling
    if scaling is None:
        raise ValueError("the model was made with rescale_attention_bias=False: its bias has no scale to set to 0.")
    before = scaling.weight.detach().clone(), scaling.bias.detach().clone()
    with torch.no_grad():
        scaling.weight.zero_()
        scaling.bias.zero_()
    try:
        yield
    finally:
        with torch.no_grad():
            scaling.weight.copy_(before[0])
            scaling.bias.copy_(before[1])


__all__ = [
    "RESULTS_FILE",
    "SAN_OPTIONS",
    "UndertrainedError",
    "WorldImages",
    "attention_bias_off",
    "check_clip",
    "evaluate_demo",
    "make_processor",
    "train_demo",
]
