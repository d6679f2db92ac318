# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""SAN as one program for other runtimes: images in, label maps and scores out.

[`SegmentationProgram`] puts all that happens between the bytes of an image and the labels of its pixels around the
model's own `segment`, in operations whose shapes follow from those of the images: one program takes every size.
"""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import UserError
from torch.fx.experimental import _config
from torch.onnx import OnnxExporterError
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from .pooling import scale_linearly

if TYPE_CHECKING:
    from modeling_san import SANForOpenVocabSegmentation

MAX_ONNX_BYTES = 2**31 - 2**24
"""What the weights in one ONNX file may take: protocol buffers end at 2 GiB, and the graph wants its share."""

_NOISY_LOGGERS = ("torch", "onnxscript", "onnx_ir", "onnx", "root")


class SegmentationProgram(nn.Module):
    """
    What `SANProcessor`, `SANForOpenVocabSegmentation` and the post-processing do, in one forward pass.

    Args:
        model: in evaluation mode.
        class_embeds: `(classes, projection_dim)`, as `model.get_class_embeds` returns; None makes them the second
            input.
        image_mean, image_std: of the processor.
        all_scores: whether to return the scores of all classes as well.

    Raises:
        ValueError: the model is training, or of a kind that has no `segment` (images and embeddings in, outputs out).
    """

    pixel_scale: Tensor
    pixel_shift: Tensor
    class_embeds: Tensor

    def __init__(
        self,
        model: SANForOpenVocabSegmentation,
        class_embeds: Tensor | None = None,
        *,
        image_mean: Sequence[float] = OPENAI_CLIP_MEAN,
        image_std: Sequence[float] = OPENAI_CLIP_STD,
        all_scores: bool = False,
    ) -> None:
        super().__init__()
        if model.training:
            raise ValueError("the model is training: call model.eval() before it is exported.")
        if not hasattr(model, "segment"):
            raise ValueError(f"a model of type {model.config.model_type} cannot be exported.")
        self.model = model
        self.all_scores = all_scores
        mean, std = (torch.tensor(values, device=model.device)[:, None, None] for values in (image_mean, image_std))
        self.register_buffer("pixel_scale", 1 / (255 * std), persistent=False)
        self.register_buffer("pixel_shift", mean / std, persistent=False)
        embeds = None if class_embeds is None else class_embeds.detach().to(model.device)
        self.register_buffer("class_embeds", embeds, persistent=False)

    def forward(self, images: Tensor, class_embeds: Tensor | None = None) -> tuple[Tensor, ...]:
        """
        Label every pixel.

        Args:
            images: `(batch, 3, height, width)`, red, green and blue from 0 to 255, upright, already resized.
            class_embeds: `(classes, projection_dim)`, where the program was made without.

        Returns:
            `(batch, height, width)` best class of each pixel, int64; `(batch, height, width)` its score, float32; and
            with `all_scores` also `(batch, classes, height, width)`.
        """
        class_embeds = self.class_embeds if class_embeds is None else class_embeds
        [outputs] = self.model.segment(self.prepare(images), class_embeds.float())
        class_logits = outputs.get("class_queries_logits")
        if class_logits is None:
            # Each class is a mask, as in post-processing
            masks = torch.logit(outputs["logits"].float().softmax(dim=1), eps=1e-6)
        else:
            masks = outputs["masks_queries_logits"].float()
        return self.label_pixels(masks, class_logits, images.shape[-2], images.shape[-1])

    def prepare(self, images: Tensor) -> Tensor:
        """Normalise `(batch, 3, height, width)` and pad it with 0 to multiples of the size divisor."""
        pixels = images.float() * self.pixel_scale - self.pixel_shift
        divisor = self.model.config.size_divisor
        height, width = images.shape[-2:]
        rows, columns = ((side + divisor - 1) // divisor * divisor for side in (height, width))
        return nn.functional.pad(pixels, (0, columns - width, 0, rows - height)).to(self.model.dtype)

    def label_pixels(
        self, mask_logits: Tensor, class_logits: Tensor | None, height: int, width: int
    ) -> tuple[Tensor, ...]:
        """
        From masks to labels: masks are enlarged, cropped, and weighed with their classes' probabilities.

        Each cell of the masks becomes `stride` rows of pixels. All first rows are labelled together, then all second
        rows, and so on: the scores of all classes exist for one part in `stride` of the image at a time.

        Args:
            mask_logits: `(batch, queries, h, w)` of the padded image.
            class_logits: `(batch, queries, classes + 1)`; None where each mask is a class.
            height, width: of the image.
        """
        stride = self.model.config.mask_stride
        probabilities = None if class_logits is None else class_logits.softmax(dim=-1)[..., :-1].transpose(1, 2)
        masks = scale_linearly(mask_logits, stride, width, -1)
        parts = []
        for rows in _enlarge_rows(masks, stride):
            scores = rows.sigmoid()
            if probabilities is not None:
                scores = (probabilities @ scores.flatten(2)).unflatten(-1, rows.shape[-2:])
            best_score, best = scores.max(dim=1)
            parts.append((best, best_score, scores) if self.all_scores else (best, best_score))
        # (..., h, stride, width) -> (..., height, width); picked by index, as a slice's length would be hard to follow
        kept = torch.arange(height, device=mask_logits.device)
        return tuple(
            torch.stack(part, dim=-2).flatten(-3, -2).index_select(-2, kept) for part in zip(*parts, strict=True)
        )


def export_program(
    model: SANForOpenVocabSegmentation, class_embeds: Tensor | None = None, **options: Any
) -> torch.export.ExportedProgram:
    """
    Trace a model with `torch.export`, for any batch, height and width.

    Args:
        model: in evaluation mode.
        class_embeds: `(classes, projection_dim)`, to be part of the program; None makes them its second input.
        options: further ones of [`SegmentationProgram`].

    Returns:
        a program that takes `(batch, 3, height, width)` uint8 images, resized as the processor would, and returns
        labels int64 and scores float32, both `(batch, height, width)`; see `SegmentationProgram.forward`.

    Raises:
        ValueError: the model is training, has a configuration that cannot be exported, or PyTorch is too old.

    Example:

    ```python
    >>> import torch
    >>> from modeling_san import BUILTIN_MODEL, SANForOpenVocabSegmentation
    >>> from modeling_san.export import export_program

    >>> model = SANForOpenVocabSegmentation.from_pretrained(BUILTIN_MODEL).eval()
    >>> program = export_program(model, model.stored_class_embeds)
    >>> labels, scores = program.module()(torch.zeros(1, 3, 100, 150, dtype=torch.uint8))
    >>> tuple(labels.shape)
    (1, 100, 150)
    >>> package = torch._inductor.aoti_compile_and_package(program, package_path="san.pt2")
    >>> labels, scores = torch._inductor.aoti_load_package(package)(torch.zeros(1, 3, 128, 99, dtype=torch.uint8))
    ```
    """
    if not hasattr(torch.compiler, "is_exporting"):
        raise ValueError(f"PyTorch {torch.__version__} is too old to export this model: install torch>=2.8.")
    module = SegmentationProgram(model, class_embeds, **options).eval()
    divisor = model.config.size_divisor
    images = torch.zeros(2, 3, 5 * divisor - 3, 7 * divisor - 5, dtype=torch.uint8, device=model.device)
    batch, height, width, classes = (torch.export.Dim(name, min=1) for name in ("batch", "height", "width", "classes"))
    shapes: tuple[dict[int, Any], ...] = ({0: batch, 2: height, 3: width},)
    inputs: tuple[Tensor, ...] = (images,)
    if class_embeds is None:
        inputs += (torch.zeros(5, model.config.projection_dim, device=model.device),)
        shapes += ({0: classes},)
    # Lengths of 1 are like any other: without this the tracer would take them for a case of its own
    any_length = _config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    with torch.no_grad(), any_length, quiet():
        try:
            return torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
        except UserError as error:
            raise ValueError(
                f"PyTorch cannot trace this model for images of any size: {_first_line(error)}"
            ) from error


def write_onnx(
    program: torch.export.ExportedProgram, path: str | Path, metadata: Mapping[str, Any], opset: int | None = None
) -> int:
    """
    Write a program of `export_program` as one ONNX file.

    Args:
        program: what to write.
        path: where to.
        metadata: stored in the file, strings as they are and everything else as JSON.
        opset: version of the operators, which is returned; None takes PyTorch's choice.

    Raises:
        ValueError: the weights are too large for one file, or an operation is unknown to ONNX.
        OSError: the file cannot be written.
    """
    import onnx

    size = sum(tensor.nbytes for tensor in [*program.state_dict.values(), *program.constants.values()])
    if size > MAX_ONNX_BYTES:
        raise ValueError(f"the model has {size / 2**30:.1f} GiB of weights: an ONNX file takes less than 2 GiB.")
    outputs = ["labels", "scores", "all_scores"][: len(program.graph_signature.user_outputs)]
    with quiet(), torch.no_grad():
        try:
            written = torch.onnx.export(
                program, (), dynamo=True, output_names=outputs, opset_version=opset, external_data=False, verbose=False
            )
        except OnnxExporterError as error:
            raise ValueError(f"PyTorch cannot write this model as ONNX: {_first_line(error)}") from error
    if written is None:
        raise ValueError("PyTorch did not export the program to ONNX.")
    proto = written.model_proto
    # Each node carries the source lines it came from, with the paths of this machine
    for node in [*proto.graph.node, *(node for function in proto.functions for node in function.node)]:
        del node.metadata_props[:]
        node.doc_string = ""
    _name_free_sizes(proto.graph)
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    onnx.save(proto, path)
    return next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))


def quantize_onnx(source: str | Path, target: str | Path) -> None:
    """
    Store the weights of a file's matrix products in 8 bits; activations are quantised as they come.

    What is saved is size. Labels change where two classes are close, and scores by a few thousandths on average; the
    command measures both. Weights are unsigned, since CPUs without instructions for 8-bit products add signed ones in
    pairs of 16 bits, which overflow: scores were then off by ten times as much.

    Args:
        source: a file of `write_onnx`.
        target: the smaller file.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with quiet():
        # Weights that several products share are transposed in the graph, where quantisation would not find them
        quant_pre_process(source, target, skip_symbolic_shape=True)
        quantize_dynamic(
            target, target, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True, weight_type=QuantType.QUInt8
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep warnings and the exporters' logs off the terminal."""
    loggers = [logging.getLogger(name) for name in _NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _name_free_sizes(graph: Any) -> None:
    """Give the free sizes their names again, which the exporter numbers."""
    wanted = {"images": ("batch", "", "height", "width"), "class_embeds": ("classes", "")}
    shapes = [value.type.tensor_type.shape.dim for value in [*graph.input, *graph.output, *graph.value_info]]
    names = {
        size.dim_param: name
        for value in graph.input
        for size, name in zip(value.type.tensor_type.shape.dim, wanted[value.name], strict=True)
        if name
    }
    for size in (size for shape in shapes for size in shape):
        if size.dim_param in names:
            size.dim_param = names[size.dim_param]


def _first_line(error: Exception) -> str:
    """What an exporter complains about, without the pages that follow."""
    return next((line for line in map(str.strip, str(error).splitlines()) if line), type(error).__name__)


def _enlarge_rows(maps: Tensor, factor: int) -> Iterator[Tensor]:
    """Interpolate `maps` linearly to `factor` times the height: rows 0, factor, 2 factor, ... first, then 1, ..."""
    height = maps.shape[-2]
    maps = nn.functional.pad(maps, (0, 0, 1, 1), mode="replicate")
    for offset in range(factor):
        # Distance of the pixel's centre from that of the row before
        position = (offset + 0.5) / factor + 0.5
        below = int(position)
        start, end = (maps.narrow(-2, first, height) for first in (below, below + 1))
        yield torch.lerp(start, end, position - below)


__all__ = ["SegmentationProgram", "export_program", "quantize_onnx", "write_onnx"]
