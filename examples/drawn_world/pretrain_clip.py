"""Contrastive pre-training of a tiny CLIP on the drawn world, and the two gates that it has to pass.

The model is transformers' own `CLIPModel` and the objective CLIP's own, with one difference: in a world of 38 names
many captions of a batch are true of many of its images. Every true caption counts as a positive, not only the one
that was written for the image.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, get_cosine_schedule_with_warmup
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from drawn_world.captions import caption_scene
from drawn_world.tokenizer import build_tokenizer
from drawn_world.world import (
    BACKGROUNDS,
    CLASS_NAMES,
    COMBINATIONS,
    Scene,
    draw_scene,
    draw_texture,
)
from modeling_san.attention_bias import recognize_regions
from modeling_san.processing.device import pick_device_and_dtype

_Content = tuple[tuple[str, ...], str | None]
"""Names of an image's regions, and of its background if it has one."""

IMAGE_SIZE = 128
"""Height and width of a drawn image, in pixels."""

CLIP_RESIZE_FACTOR = 0.5
"""CLIP sees images shrunk by this factor, as it does inside SAN."""

TRAINING_SEED = 1
"""The world that CLIP is pre-trained on."""

GATE_SEED = 90_001
"""The world that the gates draw from; training never sees it."""

GATE_TEMPLATES = ("a photo of {}", "a photo of a {}.", "there is a {} in the scene")


def demo_clip_config(tokenizer: CLIPTokenizer) -> CLIPConfig:
    """The tiny CLIP: 2.2 million parameters, 64 x 64 pixels in 8 x 8 patches, six vision and three text layers."""
    special_tokens = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": tokenizer.model_max_length,
            "projection_dim": 96,
            **special_tokens,
        },
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "image_size": round(IMAGE_SIZE * CLIP_RESIZE_FACTOR),
            "patch_size": 8,
            "projection_dim": 96,
        },
        projection_dim=96,
    )


def draw_pool(
    num_images: int, seed: int = TRAINING_SEED, *, workers: int = 2, progress: bool = True
) -> tuple[torch.Tensor, list[_Content]]:
    """Draw the images of CLIP's pre-training: an exact function of `seed` and `num_images`.

    A third shows one texture only, so that a patch alone says what it is; the others one to three regions.

    Args:
        num_images: number of images; each takes 12 kB of memory.
        seed: which world.
        workers: processes that draw; 0 draws in this one.
        progress: whether to show a progress bar.

    Returns:
        `uint8` tensor `(images, 3, 64, 64)`, and the names of each image's regions and background.
    """
    draw = partial(_draw_for_clip, seed)
    bar = partial(tqdm, total=num_images, desc="drawing images", unit="image", disable=not progress)
    if workers == 0:
        drawn = list(bar(map(draw, range(num_images))))
    else:
        with ProcessPoolExecutor(workers) as executor:
            drawn = list(bar(executor.map(draw, range(num_images), chunksize=64)))
    images, contents = zip(*drawn, strict=True)
    return torch.from_numpy(np.stack(images)), list(contents)


def _draw_for_clip(seed: int, index: int) -> tuple[np.ndarray, _Content]:
    scene = draw_texture(seed, index) if index % 3 == 0 else draw_scene(seed, index)
    # Half the size, bilinear and without antialias, is the mean of two by two pixels.
    image = scene.image.astype(np.float32).reshape(IMAGE_SIZE // 2, 2, IMAGE_SIZE // 2, 2, 3).mean((1, 3))
    return np.rint(image).astype(np.uint8).transpose(2, 0, 1), (scene.regions, scene.background)


def make_batch(
    images: torch.Tensor, contents: Sequence[_Content], tokenizer: CLIPTokenizer, rng: np.random.Generator
) -> dict[str, torch.Tensor]:
    """Images of the pool, half of them mirrored, with freshly written captions.

    Returns:
        `pixel_values` `(batch, 3, 64, 64)`, `input_ids` and `attention_mask` `(batch, tokens)`, and `is_true`
        `(batch, batch)`: whether the caption of the column is true of the image of the row.
    """
    mirrored = torch.from_numpy(rng.random(len(images)) < 0.5)
    images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    captions = [caption_scene(rng, regions, background) for regions, background in contents]
    present = _multi_hot([{*regions, background} for regions, background in contents])
    mentioned = _multi_hot([caption.names for caption in captions])
    return {
        "pixel_values": normalize(images.float() / 255),
        **tokenizer([caption.text for caption in captions], padding=True, return_tensors="pt"),
        # A caption is true of an image if nothing that it mentions is absent there.
        "is_true": (1 - present) @ mentioned.T == 0,
    }


def _multi_hot(name_sets: Sequence[Collection[str | None]]) -> torch.Tensor:
    return torch.tensor([[float(name in names) for name in CLASS_NAMES] for names in name_sets])


def contrastive_loss(logits_per_image: torch.Tensor, is_true: torch.Tensor) -> torch.Tensor:
    """CLIP's symmetric cross-entropy with the target shared out evenly among all true pairs.

    Args:
        logits_per_image: `(images, captions)`.
        is_true: `(images, captions)`, with at least one true pair in each row and column.
    """
    targets = is_true.to(logits_per_image.dtype)
    per_image = F.cross_entropy(logits_per_image, targets / targets.sum(1, keepdim=True))
    per_text = F.cross_entropy(logits_per_image.T, targets.T / targets.T.sum(1, keepdim=True))
    return (per_image + per_text) / 2


def pretrain_clip(
    output_dir: str | Path,
    *,
    steps: int = 800,
    batch_size: int = 128,
    num_images: int = 16_000,
    learning_rate: float = 1.5e-3,
    weight_decay: float = 0.05,
    seed: int = 0,
    device: str | torch.device | None = None,
    workers: int = 2,
    progress: bool = True,
) -> CLIPModel:
    """Pre-train the tiny CLIP and save it with its tokenizer, as a folder that `from_pretrained` reads.

    Args:
        output_dir: folder for the result.
        steps: of optimisation.
        batch_size: images, and captions, a step.
        num_images: of the pool that is drawn in advance.
        learning_rate: AdamW's, at the end of the warm-up.
        weight_decay: AdamW's, on matrices only.
        seed: of the weights, the order of images and the captions.
        device: see [`pick_device_and_dtype`].
        workers: processes that draw the pool.
        progress: whether to show progress bars.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: if the pool is smaller than a batch.
    """
    if num_images < batch_size:
        raise ValueError(f"num_images={num_images}: expected at least batch_size={batch_size}.")
    device, dtype = pick_device_and_dtype(device)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    tokenizer = build_tokenizer()
    model = CLIPModel(demo_clip_config(tokenizer))
    # Not `model.to`: transformers' own wrapper of it hides its type.
    torch.nn.Module.to(model, device)
    model.train()
    images, contents = draw_pool(num_images, workers=workers, progress=progress)
    parameters = list(model.parameters())
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=steps // 20, num_training_steps=steps)

    bar = tqdm(range(steps), desc="pre-training CLIP", unit="step", disable=not progress)
    order = rng.permutation(num_images)
    for _ in bar:
        if len(order) < batch_size:
            order = rng.permutation(num_images)
        positions, order = order[:batch_size], order[batch_size:]
        batch = make_batch(images[positions], [contents[position] for position in positions], tokenizer, rng)
        batch = {name: value.to(device) for name, value in batch.items()}
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            image_embeds = embed_images(model, batch["pixel_values"])
            text_embeds = embed_tokens(model, batch["input_ids"], batch["attention_mask"])
        logits = model.logit_scale.exp() * image_embeds.float() @ text_embeds.float().T
        loss = contrastive_loss(logits, batch["is_true"])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        hits = batch["is_true"].gather(1, logits.argmax(1, keepdim=True))
        bar.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{hits.float().mean().item():.3f}", refresh=False)

    model.eval()
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return model


# ------------------------------------------------------------------------------------------------------------- gates


@torch.no_grad()
def zero_shot_accuracy(
    model: CLIPModel, tokenizer: CLIPTokenizer, *, num_images: int = 640, seed: int = GATE_SEED
) -> float:
    """Gate 1: the share of fresh one-region images whose combination, of all 32, CLIP names.

    Of `num_images` images of the world `seed`, every combination is in equally many, up to one.
    """
    classes = embed_names(model, tokenizer, COMBINATIONS)
    hits = 0
    for start in range(0, num_images, 128):
        wanted = [index % len(COMBINATIONS) for index in range(start, min(start + 128, num_images))]
        scenes = [
            draw_scene(seed, index, combinations=[COMBINATIONS[label]], max_regions=1)
            for index, label in enumerate(wanted, start)
        ]
        found = (embed_images(model, _pixel_values(scenes, model.device)) @ classes.T).argmax(1).tolist()
        hits += sum(one == label for one, label in zip(found, wanted, strict=True))
    return hits / num_images


@torch.no_grad()
def masked_recognition_accuracy(
    model: CLIPModel,
    tokenizer: CLIPTokenizer,
    *,
    first_layer: int = 2,
    min_coverage: float = 0.8,
    num_images: int = 400,
    seed: int = GATE_SEED + 1,
) -> dict[str, float]:
    """Gate 2: recognition of each region from its true mask, in images of two and three regions, among all names.

    In layers after `first_layer` a copy of [CLS] attends to itself and to the patches of its region, which is what
    SAN's attention bias has to bring about.

    Args:
        model: the pre-trained CLIP.
        tokenizer: its tokenizer.
        first_layer: number of layers before the copies start (SAN's K).
        min_coverage: see [`patches_of_regions`]. Patches on an outline show two textures; a learned bias can leave
            them out, so most of what they cost here is not lost to SAN.
        num_images: of the world `seed`.
        seed: which world to draw from.

    Returns:
        `regions` and `backgrounds`: share of them that are named right; `unmasked`: the share of regions that [CLS]
        itself, which attends to everything, names right.
    """
    classes = embed_names(model, tokenizer, CLASS_NAMES)
    right: dict[str, list[bool]] = {"regions": [], "backgrounds": [], "unmasked": []}
    for start in range(0, num_images, 64):
        numbers = range(start, min(start + 64, num_images))
        scenes = [draw_scene(seed, index, min_regions=2, max_regions=3) for index in numbers]
        pixel_values = _pixel_values(scenes, model.device)
        side = pixel_values.shape[-1] // model.vision_model.embeddings.patch_size
        longest = max(len(scene.names) for scene in scenes)
        masks = torch.zeros(len(scenes), longest, IMAGE_SIZE, IMAGE_SIZE)
        for mask, scene in zip(masks, scenes, strict=True):
            for query, name in enumerate(scene.names):
                mask[query] = torch.from_numpy(scene.label_map == CLASS_NAMES.index(name))
        patches = patches_of_regions(masks, side, min_coverage).to(model.device)
        embeds = embed_regions(model, pixel_values, patches, first_layer)
        found = (embeds @ classes.T).argmax(-1).tolist()
        unmasked = (embed_images(model, pixel_values) @ classes.T).argmax(-1).tolist()
        for scene, labels, whole in zip(scenes, found, unmasked, strict=True):
            for name, label in zip(scene.names, labels, strict=False):
                kind = "backgrounds" if name in BACKGROUNDS else "regions"
                right[kind].append(CLASS_NAMES[label] == name)
                if kind == "regions":
                    right["unmasked"].append(CLASS_NAMES[whole] == name)
    return {kind: float(np.mean(hits)) for kind, hits in right.items()}


def patches_of_regions(masks: torch.Tensor, side: int, min_coverage: float = 0.0) -> torch.Tensor:
    """Bring masks to CLIP's grid of patches.

    Args:
        masks: `(batch, regions, height, width)`, 1 inside a region and 0 outside.
        side: patches along a side.
        min_coverage: share of a patch that the region has to cover. With 0 any pixel will do, as in SAN's max pooling.
            A region always keeps the patch that it covers most.

    Returns:
        `(batch, regions, side, side)`, of type bool. A mask without any pixel has no patch.
    """
    coverage = F.adaptive_avg_pool2d(masks, side)
    largest = coverage.amax(dim=(-2, -1), keepdim=True)
    return (coverage > 0) & (coverage >= largest.clamp(max=min_coverage))


def embed_regions(
    model: CLIPModel, pixel_values: torch.Tensor, patches: torch.Tensor, first_layer: int
) -> torch.Tensor:
    """Embed regions with one copy of [CLS] each that attends, after `first_layer` layers, to its region only.

    Args:
        model: a CLIP.
        pixel_values: `(batch, 3, height, width)` as CLIP sees them.
        patches: `(batch, regions, height / patch size, width / patch size)`, true for the patches of a region.
        first_layer: number of layers before the copies start.

    Returns:
        `(batch, regions, projection_dim)`, of unit length. Without any patch a copy attends to itself alone.
    """
    vision = model.vision_model
    hidden_states = vision.pre_layrnorm(vision.embeddings(pixel_values))
    for layer in vision.encoder.layers[:first_layer]:
        hidden_states = layer(hidden_states, attention_mask=None)
    copies = hidden_states[:, :1].expand(-1, patches.shape[1], -1)
    bias = torch.zeros(patches.shape, dtype=hidden_states.dtype, device=patches.device)
    bias = bias.masked_fill(~patches, float("-inf")).flatten(2)[:, None]
    copies = recognize_regions(vision.encoder.layers[first_layer:], hidden_states, copies, [bias])
    return F.normalize(model.visual_projection(vision.post_layernorm(copies)), dim=-1)


# -------------------------------------------------------------------------------------------------------- embeddings


def normalize(images: torch.Tensor) -> torch.Tensor:
    """Normalise `(..., 3, height, width)` in 0 ... 1 with CLIP's mean and spread of each colour."""
    mean = images.new_tensor(OPENAI_CLIP_MEAN)[:, None, None]
    std = images.new_tensor(OPENAI_CLIP_STD)[:, None, None]
    return (images - mean) / std


def _pixel_values(scenes: Sequence[Scene], device: torch.device) -> torch.Tensor:
    """Scenes as CLIP sees them inside SAN."""
    images = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2).to(device)
    pixels = normalize(images.float() / 255)
    return F.interpolate(pixels, scale_factor=CLIP_RESIZE_FACTOR, mode="bilinear", align_corners=False)


def embed_images(model: CLIPModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Embed `(batch, 3, 64, 64)` images: `(batch, projection_dim)`, of unit length."""
    return F.normalize(model.get_image_features(pixel_values=pixel_values).pooler_output, dim=-1)


def embed_tokens(model: CLIPModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Embed tokenized `(batch, tokens)` sentences: `(batch, projection_dim)`, of unit length."""
    features = model.get_text_features(input_ids=input_ids, attention_mask=attention_mask)
    return F.normalize(features.pooler_output, dim=-1)


def embed_names(
    model: CLIPModel, tokenizer: CLIPTokenizer, names: Sequence[str], templates: Sequence[str] = GATE_TEMPLATES
) -> torch.Tensor:
    """Embed class names, averaged over prompt templates: `(names, projection_dim)`, of unit length."""
    sentences = [template.format(name) for name in names for template in templates]
    tokens = tokenizer(sentences, padding=True, truncation=True, return_tensors="pt").to(model.device)
    embeds = embed_tokens(model, tokens["input_ids"], tokens["attention_mask"])
    return F.normalize(embeds.unflatten(0, (len(names), len(templates))).mean(1), dim=-1)
