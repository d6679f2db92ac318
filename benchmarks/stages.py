"""The parts of a segmentation that are measured, each through the project's public names."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from modeling_san import SANForOpenVocabSegmentation, SANOutput

from .machine import REPOSITORY
from .workload import PHOTO_SIZE, Workload

Run = Callable[[], Any]

LARGE_CLASSES, LARGE_SIDE = 847, 1024


@dataclass(frozen=True)
class Stage:
    """
    One part.

    Attributes:
        title: what it is called in tables.
        prepare: makes all that the stage takes as given, and returns the function that is measured.
        in_process: False where it computes in another process, whose memory is not measured.
        is_network: whether its floating-point operations are worth counting.
    """

    title: str
    prepare: Callable[[Workload], Run]
    in_process: bool = True
    is_network: bool = False


def _text(work: Workload) -> Run:
    prompts, encode = work.prompts(), work.compiled(work.model.get_class_embeds)
    return lambda: encode(**prompts)


def _preprocessing(work: Workload) -> Run:
    paths, processor = work.images(*PHOTO_SIZE), work.processor.image_processor
    return lambda: processor(images=paths, return_tensors="pt")


def _pil(work: Workload) -> Run:
    """What PIL takes for the same images by itself: preprocessing can hardly be faster."""
    paths = work.images(*PHOTO_SIZE)
    height, width = work.processor.image_processor.resized_size(*PHOTO_SIZE)

    def run() -> None:
        for path in paths:
            with Image.open(path) as image:
                image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)

    return run


def _clip(work: Workload) -> Run:
    model, pixels = work.model, work.pixel_values.to(work.dtype)
    encode = work.compiled(lambda pixels: _encode(model, pixels))
    return lambda: encode(pixels)


def _side_adapter(work: Workload) -> Run:
    pixels = work.pixel_values.to(work.dtype)
    states, adapt = _encode(work.model, pixels), work.compiled(work.model.side_adapter)
    return lambda: adapt(pixels, states)


def _recognition(work: Workload) -> Run:
    pixels = work.pixel_values.to(work.dtype)
    states = _encode(work.model, pixels)
    biases = [work.model.side_adapter(pixels, states)[-1].attention_bias]
    recognize = work.compiled(work.model.recognize)
    return lambda: recognize(states, biases)


def _encode(model: SANForOpenVocabSegmentation, pixels: Tensor) -> Any:
    """CLIP's states, which the stages after it take as given."""
    return model.trunk.encode(model.shrink_for_clip(pixels), model.config.sls_start_layer)


def _network(work: Workload) -> Run:
    model, pixels = work.compiled(work.model), work.pixel_values
    inputs = {"class_embeds": work.vocabulary.class_embeds, "image_sizes": work.image_sizes}
    return lambda: model(pixels, **inputs)


def _post_processing(work: Workload) -> Run:
    return _post_process(work, work.outputs(work.settings.classes, work.settings.size), work.settings.target)


def _large_post_processing(work: Workload) -> Run:
    return _post_process(work, work.outputs(LARGE_CLASSES, LARGE_SIDE), (LARGE_SIDE, LARGE_SIDE))


def _post_process(work: Workload, outputs: SANOutput, target: tuple[int, int]) -> Run:
    targets, processor = [target] * work.settings.batch, work.processor
    return lambda: processor.post_process_semantic_segmentation(outputs, target_sizes=targets)


def _end_to_end(work: Workload) -> Run:
    paths = work.images(work.settings.size, work.settings.size)
    segmenter, vocabulary, targets = work.segmenter, work.vocabulary, [work.settings.target] * work.settings.batch
    return lambda: segmenter.segment(replace(segmenter.prepare(paths), target_sizes=targets), vocabulary)


def _full_scores(work: Workload) -> Run:
    """End to end as it would be without blocks: how much memory these save."""
    paths = work.images(work.settings.size, work.settings.size)
    model, segmenter, vocabulary = work.compiled(work.model), work.segmenter, work.vocabulary

    def run() -> list[Tensor]:
        images = segmenter.prepare(paths)
        pixels, embeds = images.pixel_values.to(work.device), vocabulary.class_embeds
        outputs = model(pixels, image_sizes=images.image_sizes, class_embeds=embeds)
        return label_maps_from_full_scores(outputs, work.settings.target)

    return run


def _process(*command: str) -> Callable[[Workload], Run]:
    return lambda work: lambda: subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)


def _importing(what: str) -> Stage:
    """A new Python that imports something and ends."""
    return Stage(f"start: {what}", _process(sys.executable, "-c", what), in_process=False)


STAGES = {
    "text": Stage("text encoding", _text, is_network=True),
    "preprocessing": Stage("preprocessing of a 1920 x 1080 JPEG", _preprocessing),
    "pil": Stage("  PIL alone: decode and resize", _pil),
    "clip": Stage("CLIP to layer K", _clip, is_network=True),
    "side_adapter": Stage("side adapter", _side_adapter, is_network=True),
    "recognition": Stage("recognition", _recognition, is_network=True),
    "network": Stage("network as a whole", _network, is_network=True),
    "post_processing": Stage("post-processing", _post_processing),
    "post_processing_large": Stage("post-processing, 847 classes, 1024 x 1024", _large_post_processing),
    "end_to_end": Stage("end to end, file to label map", _end_to_end),
    "full_scores": Stage("  the same with full-size scores", _full_scores),
    "import_torch": _importing("import torch"),
    "import_san": _importing("import modeling_san"),
    "import_model": _importing("from modeling_san import SANForOpenVocabSegmentation"),
    "help": Stage(
        "start: san --help", _process(str(Path(sys.executable).with_name("san")), "--help"), in_process=False
    ),
}
"""By the names that the command line knows, in the order they are measured."""


@torch.inference_mode()
def label_maps_from_full_scores(outputs: SANOutput, target: tuple[int, int]) -> list[Tensor]:
    """
    Post-processing written down as plainly as the paper has it, holding the scores of all classes at once.

    Args:
        outputs: of the network, with `image_sizes`, for images without padding.
        target: height and width of the label maps.

    Returns:
        maps `(height, width)` of class indices.
    """
    label_maps = []
    parts: Any = (outputs.masks_queries_logits, outputs.class_queries_logits, outputs.image_sizes)
    for masks, classes, size in zip(*parts, strict=True):
        resized = masks[None].float()
        for wanted in (size.tolist(), target):
            resized = nn.functional.interpolate(resized, wanted, mode="bilinear", align_corners=False)
        probabilities = classes.float().softmax(-1)[:, :-1]
        scores = torch.einsum("qc,qhw->chw", probabilities, resized[0].sigmoid())
        label_maps.append(scores.argmax(0))
    return label_maps
