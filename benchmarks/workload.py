"""A model of the right shapes, and images, words and outputs to feed it; nothing is downloaded."""

from __future__ import annotations

import functools
import itertools
import re
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPTokenizer

from modeling_san import SANConfig, SANForOpenVocabSegmentation, SANImageProcessor, SANOutput, SANProcessor
from modeling_san.processing import load_vocabulary, prompt_templates, vocabulary_names

from .settings import Settings

TEMPLATES = "vild"
FIRST_VOCABULARY = "coco_stuff_171"

PHOTO_SIZE = (1080, 1920)
"""Height and width of the photograph that preprocessing starts from."""

_LOGIT_SCALE = 100
_BLOB_CELLS = 10
_BLOB_LOGIT = 4.0

_VIT_L_14: dict[str, Any] = {
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 336,
        "projection_dim": 768,
    },
    "text_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "projection_dim": 768,
    },
    "projection_dim": 768,
    "clip_input_scale": 0.7,
    "sls_start_layer": 18,
    "fusion_map": [[0, 0], [6, 1], [12, 2], [18, 3]],
}
_CONFIGS: dict[str, dict[str, Any]] = {"vit_b_16": {}, "vit_l_14": _VIT_L_14}


class Workload:
    """
    What the stages work on, made when first asked for.

    Args:
        settings: what to measure.
        folder: where to put the images; it has to stay as long as the workload.
        model: the network, where another workload has it already.

    Raises:
        ValueError: the model or the tokenizer cannot be loaded.
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
    def image_processor(self) -> SANImageProcessor:
        """Resizes to the size that is measured, and knows the network's grid."""
        size, config = self.settings.size, self.model.config
        return SANImageProcessor(
            size={"shortest_edge": size, "longest_edge": 4 * size},
            size_divisor=config.size_divisor,
            mask_stride=config.side_patch_size,
        )

    @functools.cached_property
    def class_embeds(self) -> Tensor:
        """Unit vectors `(classes, projection_dim)` in random directions."""
        return self._unit_vectors(self.settings.classes)

    @functools.cached_property
    def pixel_values(self) -> Tensor:
        """`(batch, 3, size, size)`, noise."""
        size = self.settings.size
        return self._randn(self.settings.batch, 3, size, size)

    @functools.cached_property
    def image_sizes(self) -> Tensor:
        """`(batch, 2)`: nothing is padded."""
        return torch.tensor([[self.settings.size] * 2] * self.settings.batch)

    def prompts(self, templates: int | None = None) -> dict[str, Tensor]:
        """
        The vocabulary as the text encoder takes it.

        Args:
            templates: how many of the templates to use; None takes all.

        Returns:
            `input_ids` and `attention_mask` `(classes, templates, tokens)`.
        """
        labels, patterns = make_labels(self.settings.classes), prompt_templates(TEMPLATES)[:templates]
        if self.settings.tokenizer is not None:
            processor = SANProcessor(tokenizer=load_tokenizer(self.settings.tokenizer), templates=patterns)
            prompts = dict(processor.tokenize_labels(labels))
        else:
            prompts = made_up_prompts(labels, patterns, self.model.config.text_config)
        return {name: tensor.to(self.device) for name, tensor in prompts.items()}

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

        Args:
            classes: of the vocabulary.
            size: side of the square image.
        """
        config, batch = self.model.config, self.settings.batch
        grid = size // config.side_patch_size
        blobs = _BLOB_LOGIT * self._randn(batch, config.num_queries, _BLOB_CELLS, _BLOB_CELLS)
        masks = torch.nn.functional.interpolate(blobs, (grid, grid), mode="bicubic", align_corners=False)
        mask_embeds = self._unit_vectors(batch * config.num_queries).view(batch, config.num_queries, -1)
        return SANOutput(
            masks_queries_logits=masks.to(self.dtype),
            class_queries_logits=_LOGIT_SCALE * mask_embeds @ self._unit_vectors(classes + 1, seed=1).T,
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


def make_workload_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder for images, removed when its context ends."""
    return tempfile.TemporaryDirectory(prefix="san-benchmarks-")


@torch.inference_mode(False)
def make_model(settings: Settings) -> SANForOpenVocabSegmentation:
    """
    The network, with random weights unless the settings name a folder; on the processor, in evaluation mode.

    Raises:
        ValueError: the folder holds no SAN model.
    """
    torch.manual_seed(0)
    if settings.model in _CONFIGS:
        return SANForOpenVocabSegmentation(SANConfig(**_CONFIGS[settings.model], **_changes(settings))).eval()
    folder = Path(settings.model)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"model {settings.model}: there is no such folder with a config.json: pass {', '.join(_CONFIGS)} or a "
            "folder that save_pretrained wrote"
        )
    try:
        if settings.queries is None:
            return SANForOpenVocabSegmentation.from_pretrained(folder, use_safetensors=True).eval()
        config = SANConfig.from_pretrained(folder, **_changes(settings))
    except (OSError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"model {settings.model} cannot be loaded: {error}") from error
    # Trained queries are as many as they are
    return SANForOpenVocabSegmentation(config).eval()


def load_tokenizer(folder: str) -> CLIPTokenizer:
    """
    CLIP's tokenizer.

    Raises:
        ValueError: the folder holds none.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"tokenizer {folder}: there is no such folder: leave --tokenizer out for made-up token ids")
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        # The library makes a tokenizer that knows no word, and says nothing
        raise ValueError(f"tokenizer {folder} holds no tokenizer files: pass a folder that save_pretrained wrote")
    return tokenizer


def make_labels(count: int) -> list[str]:
    """
    Names that go on where COCO-Stuff's 171 end: those of the other label sets, then pairs of names.

    Args:
        count: how many.
    """
    sets = sorted(vocabulary_names(), key=lambda name: (name != FIRST_VOCABULARY, name))
    names = list(dict.fromkeys(label for name in sets for label in load_vocabulary(name).classes))
    pairs = (f"{first} {second}" for first, second in itertools.product(names, names))
    labels: dict[str, None] = {}
    for label in itertools.chain(names, pairs):
        if len(labels) == count:
            break
        labels[label] = None
    return list(labels)


def made_up_prompts(labels: Sequence[str], templates: Sequence[str], text_config: Any) -> dict[str, Tensor]:
    """
    Prompts as a tokenizer would give them, with a number for each word that is drawn from its letters.

    What matters for speed is as with CLIP's tokenizer: words at the start that prompts share, prompts that occur
    twice, and lengths. For 171 labels of COCO-Stuff in 14 templates these are 10.28 tokens on average and 13 at most;
    CLIP's tokenizer, which splits rare words, gives 10.32 and 13.

    Args:
        labels: class names.
        templates: each with one `{}`.
        text_config: of the text encoder that reads them.

    Returns:
        `input_ids` and `attention_mask`, `(labels, templates, tokens)`; tokens are as many as the longest prompt has.
    """
    limit = text_config.max_position_embeddings - 2
    bos, eos = int(text_config.bos_token_id), int(text_config.eos_token_id)
    usable = [token for token in range(text_config.vocab_size) if token not in (bos, eos)]
    prompts = [_word_ids(template.format(label), usable)[:limit] for label in labels for template in templates]
    longest = max(map(len, prompts)) + 2
    ids = np.full((len(prompts), longest), eos, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, words in enumerate(prompts):
        ids[row, : len(words) + 1] = np.array([bos, *words])
        mask[row, : len(words) + 2] = 1
    shape = (len(labels), len(templates), longest)
    return {
        "input_ids": torch.from_numpy(ids).view(shape),
        "attention_mask": torch.from_numpy(mask).view(shape),
    }


def make_image(height: int, width: int) -> Image.Image:
    """Blobs of colour and a little noise, so that JPEG has about as much to decode as in a photograph."""
    random = np.random.default_rng(0)
    blobs = Image.fromarray(random.integers(0, 256, (9, 16, 3), dtype=np.uint8)).resize((width, height))
    noise = random.normal(0, 6, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(blobs) + noise, 0, 255).astype(np.uint8))


def _changes(settings: Settings) -> dict[str, Any]:
    return {} if settings.queries is None else {"num_queries": settings.queries}


def _word_ids(prompt: str, usable: Sequence[int]) -> list[int]:
    """A number for each word, digit and run of punctuation."""
    words = re.findall(r"[a-z]+|\d|[^\sa-z\d]+", prompt.lower())
    return [usable[zlib.crc32(word.encode()) % len(usable)] for word in words]
