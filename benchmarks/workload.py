"""A model of the right shapes, and images, words and outputs to feed it; nothing is downloaded."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from modeling_san import SANConfig, SANForOpenVocabSegmentation, SANImageProcessor, SANOutput, SANProcessor
from modeling_san.conversion import RELEASED_CONFIGS
from modeling_san.processing import Segmenter, Vocabulary, load_vocabulary, prompt_templates, vocabulary_names
from reference import clip_tokenizer

from .settings import Settings

TEMPLATES = "vild"

PHOTO_SIZE = (1080, 1920)
"""Height and width of the photograph that preprocessing starts from."""

_CLIP_L_14: dict[str, Any] = {
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 336,
        "projection_dim": 768,
    },
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768},
    "projection_dim": 768,
}
_CONFIGS: dict[str, dict[str, Any]] = {"vit_b_16": {}, "vit_l_14": {**_CLIP_L_14, **RELEASED_CONFIGS[1024]}}


class Workload:
    """
    What the stages work on, made when first asked for.

    Args:
        settings: what to measure.
        folder: where to put the images; it has to stay as long as the workload.
        model: the network, where another workload has it already.
    """

    def __init__(self, settings: Settings, folder: Path, model: SANForOpenVocabSegmentation | None = None) -> None:
        if model is not None:
            self.model = model
        self.settings = settings
        self.device = torch.device(settings.device)
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        self.folder = folder

    @functools.cached_property
    def model(self) -> SANForOpenVocabSegmentation:
        """The network, in evaluation mode."""
        model: Any = make_model(self.settings)
        return model.to(self.device, self.dtype)

    @functools.cached_property
    def processor(self) -> SANProcessor:
        """Resizes to the size that is measured, and has the tokenizer that the text encoder needs."""
        size, config = self.settings.size, self.model.config
        image_processor = SANImageProcessor(
            size={"shortest_edge": size, "longest_edge": 4 * size},
            size_divisor=config.size_divisor,
            mask_stride=config.mask_stride,
        )
        released = self.settings.model in _CONFIGS
        tokenizer = clip_tokenizer() if released else SANProcessor.from_pretrained(self.settings.model).tokenizer
        return SANProcessor(image_processor, tokenizer, templates=TEMPLATES)

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """Labels with unit vectors `(classes, projection_dim)` in random directions."""
        count = self.settings.classes
        return Vocabulary(tuple(make_labels(count)), self._unit_vectors(count), count)

    @functools.cached_property
    def segmenter(self) -> Segmenter:
        """The network, compiled where the settings say so, as images are labelled with it."""
        return Segmenter(self.compiled(self.model), self.processor)

    @functools.cached_property
    def pixel_values(self) -> Tensor:
        """`(batch, 3, size, size)`, noise."""
        return self._randn(self.settings.batch, 3, self.settings.size, self.settings.size)

    @functools.cached_property
    def image_sizes(self) -> Tensor:
        """`(batch, 2)`: nothing is padded."""
        return torch.tensor([[self.settings.size] * 2] * self.settings.batch)

    def prompts(self, templates: int | None = None) -> dict[str, Tensor]:
        """
        The vocabulary as the text encoder takes it, in all templates or the first few of them: `input_ids` and
        `attention_mask` `(classes, templates, tokens)`.
        """
        patterns = prompt_templates(TEMPLATES)[:templates]
        inputs = self.processor(text=make_labels(self.settings.classes), templates=patterns, return_tensors="pt")
        return dict(inputs.to(self.device))

    def images(self, height: int, width: int) -> list[Path]:
        """A JPEG file of that size, as often as the batch has images."""
        path = self.folder / f"{height}x{width}.jpg"
        if not path.is_file():
            make_image(height, width).save(path, quality=90)
        return [path] * self.settings.batch

    def outputs(self, classes: int, size: int) -> SANOutput:
        """
        What post-processing gets, without a network: masks are smooth blobs, and class logits those of unit vectors in
        random directions. Every query then has classes it is fairly sure of: none can be left out.
        """
        config, batch = self.model.config, self.settings.batch
        grid = size // config.mask_stride
        blobs = 4 * self._randn(batch, config.num_queries, 10, 10)
        masks = torch.nn.functional.interpolate(blobs, (grid, grid), mode="bicubic", align_corners=False)
        mask_embeds = self._unit_vectors(batch * config.num_queries).view(batch, config.num_queries, -1)
        return SANOutput(
            masks_queries_logits=masks.to(self.dtype),
            class_queries_logits=100 * mask_embeds @ self._unit_vectors(classes + 1, seed=1).T,
            image_sizes=torch.tensor([[size, size]] * batch),
        )

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, compiled where the settings say so."""
        mode = self.settings.compile
        return function if mode is None else torch.compile(function, mode=mode)

    def _unit_vectors(self, count: int, seed: int = 0) -> Tensor:
        return torch.nn.functional.normalize(self._randn(count, self.model.config.projection_dim, seed=seed), dim=-1)

    def _randn(self, *shape: int, seed: int = 0) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(self.device)


@torch.inference_mode(False)
def make_model(settings: Settings) -> SANForOpenVocabSegmentation:
    """
    The network, with random weights unless the settings name a folder; on the CPU, in evaluation mode.

    Raises:
        ValueError: the folder holds no SAN model.
    """
    torch.manual_seed(0)
    queries = {} if settings.queries is None else {"num_queries": settings.queries}
    if settings.model in _CONFIGS:
        return SANForOpenVocabSegmentation(SANConfig(**_CONFIGS[settings.model], **queries)).eval()
    if not (Path(settings.model) / "config.json").is_file():
        raise ValueError(
            f"model {settings.model}: there is no such folder with a config.json: pass {', '.join(_CONFIGS)} or a "
            "folder that save_pretrained wrote"
        )
    try:
        if queries:  # trained queries are as many as they are
            return SANForOpenVocabSegmentation(SANConfig.from_pretrained(settings.model, **queries)).eval()
        return SANForOpenVocabSegmentation.from_pretrained(settings.model, use_safetensors=True).eval()
    except (OSError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"model {settings.model} cannot be loaded: {error}") from error


def make_labels(count: int) -> list[str]:
    """So many names, which go on where COCO-Stuff's 171 end: those of the other label sets, then pairs of names."""
    sets = sorted(vocabulary_names(), key=lambda name: (name != "coco_stuff_171", name))
    names = list(dict.fromkeys(label for name in sets for label in load_vocabulary(name).classes))
    pairs = (f"{first} {second}" for first, second in itertools.product(names, names))
    return list(itertools.islice(dict.fromkeys(itertools.chain(names, pairs)), count))


def make_image(height: int, width: int) -> Image.Image:
    """Blobs of colour and a little noise, so that JPEG has about as much to decode as in a photograph."""
    random = np.random.default_rng(0)
    blobs = Image.fromarray(random.integers(0, 256, (9, 16, 3), dtype=np.uint8)).resize((width, height))
    noise = random.normal(0, 6, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(blobs) + noise, 0, 255).astype(np.uint8))
