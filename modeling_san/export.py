"""SAN as one program for other runtimes: images in, label maps and scores out.

[`SegmentationProgram`] puts everything between the bytes of an image and the labels of its pixels into one module:
normalisation, padding, the network and the post-processing. It is written in operations whose shapes follow from those
of the images, so that a program exported once takes every height, width and batch.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch._dynamo.exc import UserError
from torch.fx.experimental import _config
from torch.onnx import OnnxExporterError
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from .attention_bias import pool_attention_bias, recognize_regions

if TYPE_CHECKING:
    from modeling_san import SANConfig, SANForOpenVocabSegmentation

MAX_ONNX_BYTES = 2**31 - 2**24
"""What the weights in one ONNX file may take: protocol buffers end at 2 GiB, and the graph wants its share."""

_LARGEST_SIDE = 2**14
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
        ValueError: the model is training, or has a scale that cannot be computed in whole numbers (`_whole_scale`).
    """

    pixel_scale: Tensor
    pixel_shift: Tensor
    classifier: Tensor

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
        self.model = model
        self.all_scores = all_scores
        self.clip_scale = _whole_scale(model.config)
        self.longest_window = _longest_window(model.config, self.clip_scale)
        mean, std = (torch.tensor(values, device=model.device)[:, None, None] for values in (image_mean, image_std))
        self.register_buffer("pixel_scale", 1 / (255 * std), persistent=False)
        self.register_buffer("pixel_shift", mean / std, persistent=False)
        classifier = None if class_embeds is None else self.make_classifier(class_embeds.to(model.device)).detach()
        self.register_buffer("classifier", classifier, persistent=False)

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
        model = self.model
        pixels = self.prepare(images)
        clip_pixels = self.shrink_for_clip(pixels)
        clip_grid = model.clip_grid(clip_pixels)
        clip_hidden_states = self.get_clip_hidden_states(clip_pixels, clip_grid)
        proposals = model.side_adapter(pixels, clip_hidden_states, clip_grid)[-1]
        mask_embeds = self.recognize(clip_hidden_states[-1], proposals.attention_bias, clip_grid)
        classifier = self.classifier if class_embeds is None else self.make_classifier(class_embeds)
        class_logits = model.logit_scale.float().exp() * mask_embeds @ classifier.T
        return self.label_pixels(proposals.mask_logits.float(), class_logits, images.shape[-2], images.shape[-1])

    def make_classifier(self, class_embeds: Tensor) -> Tensor:
        """`(classes + 1, projection_dim)` of `(classes, projection_dim)`: "no object" comes last."""
        return torch.cat(
            [class_embeds.float(), nn.functional.normalize(self.model.background_embedding.float(), dim=-1)]
        )

    def prepare(self, images: Tensor) -> Tensor:
        """Normalise `(batch, 3, height, width)` and pad it with 0 to multiples of the size divisor."""
        pixels = images.float() * self.pixel_scale - self.pixel_shift
        divisor = self.model.config.size_divisor
        height, width = images.shape[-2:]
        rows, columns = ((side + divisor - 1) // divisor * divisor for side in (height, width))
        return nn.functional.pad(pixels, (0, columns - width, 0, rows - height)).to(self.model.dtype)

    def shrink_for_clip(self, pixels: Tensor) -> Tensor:
        """CLIP's smaller image; `interpolate` by a factor, of which the exporter cannot follow the sizes."""
        if self.clip_scale == 1:
            return pixels
        for dim in (-2, -1):
            target = pixels.shape[dim] * self.clip_scale.numerator // self.clip_scale.denominator
            pixels = _interpolate(pixels, target, self.model.config.clip_input_scale, dim)
        return pixels

    def get_clip_hidden_states(self, clip_pixels: Tensor, clip_grid: tuple[int, int]) -> list[Tensor]:
        """
        As the model's own.

        CLIP's embeddings ask whether an image has the size of its pre-training; here positions are always resized.
        """
        vision, embeddings = self.model.vision_model, self.model.vision_model.embeddings
        table = embeddings.position_embedding.weight
        side = round((len(table) - 1) ** 0.5)
        positions = table[1:].T.reshape(1, -1, side, side)
        positions = nn.functional.interpolate(positions, clip_grid, mode="bicubic", align_corners=False)
        patches = embeddings.patch_embedding(clip_pixels) + positions
        cls_token = (embeddings.class_embedding + table[0]).expand(clip_pixels.shape[0], 1, -1)
        hidden_states = [vision.pre_layrnorm(torch.cat([cls_token, patches.flatten(2).transpose(1, 2)], dim=1))]
        for layer in vision.encoder.layers[: self.model.config.sls_start_layer]:
            hidden_states.append(layer(hidden_states[-1], None))
        return hidden_states

    def recognize(self, hidden_states: Tensor, attention_bias: Tensor, clip_grid: tuple[int, int]) -> Tensor:
        """As the model's own, with pooling for which the exporter need not know the sizes."""
        model = self.model
        method, window = model.config.attention_bias_pooling, self.longest_window
        biases = [pool_attention_bias(bias, clip_grid, method, window) for bias in attention_bias.unbind(1)]
        cls_token = hidden_states[:, :1]
        if model.sls_embedding is None:
            sls_tokens = cls_token.expand(-1, model.config.num_queries, -1)
        elif model.config.sls_token_format == "learnable_token":
            sls_tokens = model.sls_embedding.expand(cls_token.shape[0], -1, -1)
        else:
            sls_tokens = cls_token + model.sls_embedding
        layers = model.vision_model.encoder.layers[model.config.sls_start_layer :]
        sls_tokens = recognize_regions(layers, hidden_states, sls_tokens, biases, model.prompt_embedding)
        embeds = model.visual_projection(model.vision_model.post_layernorm(sls_tokens))
        return nn.functional.normalize(embeds.float(), dim=-1)

    def label_pixels(self, mask_logits: Tensor, class_logits: Tensor, height: int, width: int) -> tuple[Tensor, ...]:
        """
        From masks to labels: masks are enlarged, cropped, and weighed with their classes' probabilities.

        Each cell of the masks becomes `stride` rows of pixels. All first rows are labelled together, then all second
        rows, and so on: the scores of all classes exist for one part in `stride` of the image at a time.

        Args:
            mask_logits: `(batch, queries, h, w)` of the padded image.
            class_logits: `(batch, queries, classes + 1)`.
            height: of the image.
            width: of the image.

        Returns:
            see `forward`.
        """
        stride = self.model.config.side_patch_size
        probabilities = class_logits.softmax(dim=-1)[..., :-1].transpose(1, 2)
        masks = _interpolate(mask_logits, width, stride, -1)
        parts = []
        for rows in _enlarge_rows(masks, stride):
            scores = (probabilities @ rows.sigmoid().flatten(2)).unflatten(-1, rows.shape[-2:])
            best_score, best = scores.max(dim=1)
            parts.append((best, best_score, scores) if self.all_scores else (best, best_score))
        # (..., h, stride, width) -> (..., height, width); picked by index, as a slice's length would be hard to follow
        kept = torch.arange(height, device=mask_logits.device)
        return tuple(
            torch.stack(part, dim=-2).flatten(-3, -2).index_select(-2, kept) for part in zip(*parts, strict=True)
        )


def export_program(
    model: SANForOpenVocabSegmentation,
    class_embeds: Tensor | None = None,
    *,
    image_mean: Sequence[float] = OPENAI_CLIP_MEAN,
    image_std: Sequence[float] = OPENAI_CLIP_STD,
    all_scores: bool = False,
) -> torch.export.ExportedProgram:
    """
    Trace a model with `torch.export`, for any batch, height and width.

    Args:
        model: in evaluation mode.
        class_embeds: `(classes, projection_dim)`, to be part of the program; None makes them its second input.
        image_mean, image_std: of the processor.
        all_scores: whether the program returns the scores of all classes as well.

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
    module = SegmentationProgram(
        model, class_embeds, image_mean=image_mean, image_std=image_std, all_scores=all_scores
    ).eval()
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
        program: the program.
        path: of the file; an existing one is replaced at once, or left alone where something fails.
        metadata: stored in the file, strings as they are and everything else as JSON.
        opset: version of the operators; None takes PyTorch's choice.

    Returns:
        the version of the operators.

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
    with replacing(path) as partial:
        onnx.save(proto, partial)
    return next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))


def quantize_onnx(source: str | Path, target: str | Path) -> None:
    """
    Store the weights of a file's matrix products in 8 bits; activations are quantised as they come.

    What is saved is size. Labels change where two classes are close, and scores by a few thousandths on average; the
    command measures both. Weights are unsigned, since processors without instructions for 8-bit products add signed
    ones in pairs of 16 bits, which overflow: scores were then off by ten times as much.

    Args:
        source: a file of `write_onnx`.
        target: of the smaller file.

    Raises:
        OSError: a file cannot be read or written.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with quiet(), replacing(target) as partial:
        quantize_dynamic(
            source, partial, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True, weight_type=QuantType.QUInt8
        )


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a path beside `path` to write to, and move it there when all went well."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


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
    """Call the sizes of the images by their names, which the exporter numbers."""
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


def _whole_scale(config: SANConfig) -> Fraction:
    """
    A fraction that gives the sizes which `interpolate` gives with the factor `clip_input_scale`.

    With one exception: where `0.7 * side` is a whole number, floating point may fall short of it (1440 gives 1007, the
    next are 2720 and 2880), and `interpolate` then makes CLIP's image a pixel smaller than the fraction does.
    """
    if not config.asymmetric_input:
        return Fraction(1)
    scale = Fraction(config.clip_input_scale)
    fraction = scale.limit_denominator(1000)
    if _LARGEST_SIDE * abs(scale - fraction) > 1e-6:
        raise ValueError(
            f"clip_input_scale is {config.clip_input_scale}, for which sizes cannot be computed in whole numbers: "
            "a model with up to three decimals, such as 0.5 or 0.7, can be exported."
        )
    return fraction


def _longest_window(config: SANConfig, clip_scale: Fraction) -> int:
    """Cells that the longest window of adaptive pooling has, at most, in an image of any size."""
    longest, patch_size = 1, cast(int, config.vision_config.patch_size)
    for side in range(config.size_divisor, _LARGEST_SIDE, config.size_divisor):
        length = side // config.side_patch_size
        cells = side * clip_scale.numerator // clip_scale.denominator // patch_size
        # An image that is too small for a patch of CLIP cannot be run anyway
        if cells:
            longest = max(longest, length // cells if length % cells == 0 else -(-length // cells) + 1)
    return longest


def _first_line(error: Exception) -> str:
    """What an exporter complains about, without the pages that follow."""
    return next((line for line in map(str.strip, str(error).splitlines()) if line), type(error).__name__)


def _interpolate(maps: Tensor, target: int, scale: float, dim: int) -> Tensor:
    """The first `target` values along `dim` of `maps` resized linearly by `scale`."""
    length = maps.shape[dim]
    position = ((torch.arange(target, device=maps.device) + 0.5) / scale - 0.5).clamp(min=0)
    below = position.long().clamp(max=length - 1)
    above = (below + 1).clamp(max=length - 1)
    share = (position - below).to(maps.dtype)
    share = share[:, None] if dim == -2 else share
    return torch.lerp(maps.index_select(dim, below), maps.index_select(dim, above), share)


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
