"""
The built-in model, from nothing: a tiny CLIP on the drawn world, then SAN beside it.

CLIP reads captions that mention every combination of a colour and a pattern. SAN learns masks of part of them only, so
the others show what the method is for: naming what no mask was ever given for.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import CLIPModel, CLIPTokenizer

from drawn_world.pretrain_clip import masked_recognition_accuracy, pretrain_clip, zero_shot_accuracy
from drawn_world.world import (
    BACKGROUNDS,
    CLASS_NAMES,
    NEVER_SEEN_COMBINATIONS,
    SEEN_COMBINATIONS,
    draw_scene,
    world_dataset,
)
from modeling_san.builtin import format_results
from modeling_san.modeling_san import SANForOpenVocabSegmentation
from modeling_san.processing import SANProcessor, Segmenter
from modeling_san.training.metrics import RESULTS_FILE, ConfusionMatrix
from modeling_san.training.recipe import Recipe, read_recipe
from modeling_san.training.train import train

RECIPE = Path(__file__).with_name("recipe.yaml")

SAN_SEED = 2
EVALUATION_SEED = 90_011
"""Worlds apart from the one CLIP is trained on, and from each other."""

LEAST = {"zero_shot_accuracy": 0.9, "masked_recognition_accuracy": 0.6}
"""What CLIP must reach before SAN is trained on it; chance is 1 in 32 and 1 in 38."""


class UndertrainedError(RuntimeError):
    """CLIP did not learn enough for SAN to be worth training."""


def check_clip(clip: CLIPModel, tokenizer: CLIPTokenizer) -> dict[str, float]:
    """
    Whether CLIP knows enough for SAN to be worth training.

    Returns:
        `zero_shot_accuracy` on single regions and `masked_recognition_accuracy` with true masks as bias.

    Raises:
        UndertrainedError: where one of them is too low.
    """
    first_layer = read_recipe(RECIPE)["config_overrides"]["sls_start_layer"]
    recognition = masked_recognition_accuracy(clip, tokenizer, first_layer=first_layer)
    figures = {
        "zero_shot_accuracy": zero_shot_accuracy(clip, tokenizer),
        "masked_recognition_accuracy": recognition["regions"],
    }
    for name, value in figures.items():
        print(f"CLIP {name.replace('_', ' ')}: {value:.3f} (needs {LEAST[name]})")
        if value < LEAST[name]:
            raise UndertrainedError(
                f"CLIP's {name} is {value:.3f}, below {LEAST[name]}: remove the folder `clip` of the output and train "
                "for more steps."
            )
    return figures


def make_model(
    folder: Path,
    *,
    clip_steps: int = 800,
    san_steps: int = 2500,
    num_images: int = 8000,
    seed: int = 0,
    cpu: bool = False,
    progress: bool = True,
) -> dict[str, dict[str, float]]:
    """
    Train the built-in model and save it in `folder/model`, ready for `from_pretrained`; `main` says what the rest is.

    A second call goes on where the first was cut: it takes up CLIP from `folder/clip`, the scenes, and SAN's latest
    checkpoint.

    Returns:
        the figures that are printed and saved as `results.json`.

    Raises:
        UndertrainedError: where CLIP did not learn enough.
    """
    if not (folder / "clip" / "model.safetensors").is_file():
        device = "cpu" if cpu else None
        pretrain_clip(folder / "clip", steps=clip_steps, seed=seed, device=device, progress=progress)
    clip = CLIPModel.from_pretrained(folder / "clip").eval()
    figures = {"clip": check_clip(clip, CLIPTokenizer.from_pretrained(folder / "clip"))}

    names = [*SEEN_COMBINATIONS, *BACKGROUNDS]
    scenes, labels = folder / "scenes.parquet", folder / "labels.json"
    if not scenes.is_file():
        dataset = world_dataset(num_images, seed=SAN_SEED, names=names, combinations=SEEN_COMBINATIONS)
        dataset.to_parquet(scenes)
    labels.write_text(json.dumps(names))
    options = {
        **read_recipe(RECIPE),
        "clip": str(folder / "clip"),
        "dataset": str(scenes),
        "labels": str(labels),
        "output_dir": str(folder / "san"),
        "resume": "auto",
        "steps": san_steps,
        "warmup_steps": min(100, san_steps // 10),
        "seed": seed,
        "cpu": cpu,
    }
    if not train(Recipe(**options), progress=progress)["finished"]:
        raise SystemExit("stopped; the same command goes on.")

    model = SANForOpenVocabSegmentation.from_pretrained(folder / "san").eval()
    processor = SANProcessor.from_pretrained(folder / "san")
    # CLIP has read all words, also those that no mask was given for
    model.config.training_labels = list(CLASS_NAMES)
    model.set_labels(CLASS_NAMES, processor)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    figures["bias on"] = evaluate_on_fresh_scenes(model, processor, progress=progress)
    with attention_bias_off(model):
        figures["bias off"] = evaluate_on_fresh_scenes(model, processor, progress=progress)
    (folder / "model" / RESULTS_FILE).write_text(json.dumps(figures, indent=2) + "\n")
    print(format_results(figures))
    return figures


def evaluate_on_fresh_scenes(
    model: SANForOpenVocabSegmentation,
    processor: SANProcessor,
    *,
    num_images: int = 400,
    seed: int = EVALUATION_SEED,
    batch_size: int = 16,
    progress: bool = True,
) -> dict[str, float]:
    """
    Mean IoU on `num_images` fresh images of the world `seed`, of a model with the world's names stored.

    Returns:
        `seen`, `never seen` and `backgrounds`: means over those classes.
    """
    confusion = ConfusionMatrix(len(CLASS_NAMES))
    segmenter = Segmenter(model, processor)
    vocabulary = segmenter.vocabulary()
    for start in tqdm(range(0, num_images, batch_size), desc="evaluating", unit="batch", disable=not progress):
        scenes = [draw_scene(seed, index) for index in range(start, min(start + batch_size, num_images))]
        found = segmenter([scene.image for scene in scenes], vocabulary)
        for scene, segmentation in zip(scenes, found, strict=True):
            confusion.update(segmentation.label_map, scene.label_map)
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
    before = {name: value.clone() for name, value in scaling.state_dict().items()}
    scaling.load_state_dict({name: torch.zeros_like(value) for name, value in before.items()})
    try:
        yield
    finally:
        scaling.load_state_dict(before)


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m drawn_world.make_model FOLDER`."""
    parser = argparse.ArgumentParser(prog="python -m drawn_world.make_model", description=__doc__)
    parser.add_argument("folder", type=Path, help="what to fill; a second call goes on where the first was cut")
    parser.add_argument("--clip-steps", type=int, default=800, help="of CLIP's pre-training (default: %(default)s)")
    parser.add_argument("--san-steps", type=int, default=2500, help="of SAN's training (default: %(default)s)")
    parser.add_argument("--num-images", type=int, default=8000, help="scenes SAN learns from (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all random choices (default: %(default)s)")
    parser.add_argument("--cpu", action="store_true", help="keep off GPUs")
    try:
        make_model(**vars(parser.parse_args(arguments)))
    except UndertrainedError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
