"""What users would pick instead, from transformers with random weights, beside SAN in the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    EomtConfig,
    EomtForUniversalSegmentation,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SegformerConfig,
    SegformerForSemanticSegmentation,
)

from modeling_san import BridgeConfig, BridgeForOpenVocabSegmentation
from reference import clip_tokenizer

from .measure import Measurement, Meter
from .report import COLUMNS, format_measurement, format_table
from .settings import Settings
from .stages import STAGES, Run
from .workload import Workload, make_labels

LABELS = (1, 20, 171)

CLIPSEG: dict[str, Any] = {"vision_config": {"patch_size": 16, "image_size": 352}}
"""As the published clipseg-rd64: ViT-B/16 on 352 x 352 pixels."""

EOMT: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_blocks": 3,
    "num_queries": 100,
    "image_size": 640,
}
"""EoMT-B on 640 x 640 pixels, as published for semantic segmentation."""

MASK2FORMER: dict[str, Any] = {}
"""The library's default: Swin-S, 100 queries."""

MASK2FORMER_SIDE = 640


def measure_others(
    settings: Settings, labels: Sequence[int], folder: Path, meter: Meter
) -> Iterator[tuple[str, int, Measurement]]:
    """
    Measure networks for one image, SAN first; all in the settings' number format and on their device.

    Yields:
        title, number of labels and measurement.
    """
    settings = replace(settings, batch=1)

    def make_san(stage: str) -> Callable[[Settings, int], Run]:
        return lambda settings, count: STAGES[stage].prepare(Workload(replace(settings, classes=count), folder))

    makers: dict[str, Callable[[Settings, int], Run]] = {
        "SAN": make_san("network"),
        "SAN's text, once": make_san("text"),
        "lightweight": make_lightweight,
        "SegFormer-B0": make_segformer,
        "CLIPSeg": make_clipseg,
        "EoMT-B": make_eomt,
        "Mask2Former": make_mask2former,
    }
    for title, make in makers.items():
        for count in labels:
            yield title, count, meter.measure(make(settings, count))


def make_lightweight(settings: Settings, labels: int) -> Run:
    """The lightweight model, with labels encoded beforehand."""
    config = BridgeConfig()
    class_embeds = torch.nn.functional.normalize(torch.randn(labels, config.projection_dim), dim=-1)
    model = BridgeForOpenVocabSegmentation(config)
    return _run(model, settings.size, settings, class_embeds=class_embeds.to(settings.device))


def make_segformer(settings: Settings, labels: int) -> Run:
    """SegFormer-B0, the library's default, which knows the labels it was trained on."""
    return _run(SegformerForSemanticSegmentation(SegformerConfig(num_labels=labels)), settings.size, settings)


def make_clipseg(settings: Settings, labels: int) -> Run:
    """CLIPSeg, which takes image and text once for each label."""
    tokens = clip_tokenizer()(make_labels(labels), padding=True, return_tensors="pt").to(settings.device)
    model = CLIPSegForImageSegmentation(CLIPSegConfig(**CLIPSEG))
    return _run(model, CLIPSEG["vision_config"]["image_size"], settings, labels, **tokens)


def make_eomt(settings: Settings, labels: int) -> Run:
    """EoMT-B, which knows the labels it was trained on."""
    return _run(EomtForUniversalSegmentation(EomtConfig(**EOMT, num_labels=labels)), EOMT["image_size"], settings)


def make_mask2former(settings: Settings, labels: int) -> Run:
    """Mask2Former, which knows the labels it was trained on."""
    model = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(**MASK2FORMER, num_labels=labels))
    return _run(model, MASK2FORMER_SIDE, settings)


def format_others(others: Mapping[str, Mapping[str, Measurement]], settings: Settings) -> str:
    """A table with one row for each model and number of labels."""
    rows = [
        [title, count, *format_measurement(measured)]
        for title, measurements in others.items()
        for count, measured in measurements.items()
    ]
    side = CLIPSEG["vision_config"]["image_size"]
    return (
        f"{format_table(['one image through the network', 'labels', *COLUMNS], rows)}\n\n"
        f"SAN and the lightweight model at {settings.size} x {settings.size} pixels with labels encoded beforehand, "
        f"SegFormer-B0 at the same size, CLIPSeg at {side} x {side} "
        f"and with its text in every call, EoMT-B at {EOMT['image_size']} and Mask2Former at {MASK2FORMER_SIDE}. "
        "SegFormer, EoMT and Mask2Former know a fixed list of labels; CLIPSeg's work grows with each label."
    )


def _run(model: Any, side: int, settings: Settings, times: int = 1, **inputs: Any) -> Run:
    """A model on noise of a side in pixels, `times` over."""
    dtype = getattr(torch, settings.dtype)
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)).to(settings.device, dtype)
    ready = model.eval().to(settings.device, dtype)
    if settings.compile is not None:
        ready = torch.compile(ready, mode=settings.compile)
    return lambda: ready(pixel_values=pixels.expand(times, -1, -1, -1), **inputs)
