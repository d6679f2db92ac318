# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""EfficientNet-Lite as a feature pyramid: EfficientNet (Tan and Le, ICML 2019) without squeeze-and-excitation and with
ReLU6 in place of swish, so that it is fast and keeps its accuracy in 8 bits wherever it runs.
"""

from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init


@strict
class EfficientNetLiteConfig(PreTrainedConfig):
    """
    Shapes of an [`EfficientNetLite`]; the defaults are EfficientNet-Lite0's.

    Args:
        stem_size (`int`, defaults to 32):
            Channels of the first convolution.
        stages (`list[list[int]]`):
            Kernel size, stride of the first block, expansion, channels and number of blocks of each stage.
        head_size (`int`, defaults to 1280):
            Channels of the last convolution, whose map joins the last map of the pyramid.
        layer_norm_eps (`float`, defaults to 1e-3):
            Epsilon of the batch norms.
    """

    model_type = "efficientnet_lite"

    stem_size: int = 32
    stages: list[list[int]] | tuple[tuple[int, ...], ...] = (
        (3, 1, 1, 16, 1),
        (3, 2, 6, 24, 2),
        (5, 2, 6, 40, 2),
        (3, 2, 6, 80, 3),
        (5, 1, 6, 112, 3),
        (5, 2, 6, 192, 4),
        (3, 1, 6, 320, 1),
    )
    head_size: int = 1280
    layer_norm_eps: float = 1e-3
    num_channels: int = 3

    def __post_init__(self, **kwargs: Any) -> None:
        """One form of the stages makes a saved and loaded config equal to the original."""
        self.stages = [list(stage) for stage in self.stages]
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Refuse stages that make no pyramid; part of the validation of strict configs."""
        strides = [stage[1] for stage in self.stages if len(stage) == 5]
        if len(strides) < len(self.stages) or strides.count(2) != 4 or strides.count(1) != len(strides) - 4:
            raise ValueError(
                f"stages are {self.stages}: each has kernel size, stride, expansion, channels and blocks, and four "
                "have stride 2, so that maps of strides 4, 8, 16 and 32 come out."
            )


class SamePadding(nn.Module):
    """Zeros around an image so that a convolution of stride 2 halves it, more at its end, as TensorFlow has it."""

    def __init__(self, kernel_size: int, stride: int) -> None:
        super().__init__()
        total = kernel_size - stride
        self.sides = (total // 2, total - total // 2) * 2

    def forward(self, image: Tensor) -> Tensor:
        """Pad `(batch, channels, height, width)`, whose sides are multiples of the stride."""
        return nn.functional.pad(image, self.sides)


class ConvNorm(nn.Sequential):
    """Convolution and batch norm, and ReLU6 unless it projects."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel_size: int,
        eps: float,
        *,
        stride: int = 1,
        groups: int = 1,
        act: bool = True,
    ) -> None:
        even = stride == 1
        layers: list[nn.Module] = [] if even else [SamePadding(kernel_size, stride)]
        padding = kernel_size // 2 if even else 0
        layers += [
            nn.Conv2d(inputs, outputs, kernel_size, stride, padding, groups=groups, bias=False),
            nn.BatchNorm2d(outputs, eps=eps),
        ]
        super().__init__(*layers, *([nn.ReLU6()] if act else []))


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project (MobileNetV2, figure 3)."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int, stride: int, expansion: int, eps: float) -> None:
        super().__init__()
        width = inputs * expansion
        self.expand = ConvNorm(inputs, width, 1, eps) if expansion > 1 else nn.Identity()
        self.depthwise = ConvNorm(width, width, kernel_size, eps, stride=stride, groups=width)
        self.project = ConvNorm(width, outputs, 1, eps, act=False)
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, features: Tensor) -> Tensor:
        """From `(batch, inputs, height, width)` to `(batch, outputs, height / stride, width / stride)`."""
        projected = self.project(self.depthwise(self.expand(features)))
        return features + projected if self.is_residual else projected


class EfficientNetLite(PreTrainedModel):
    """
    The pyramid.

    Attributes:
        channels: of the maps at strides 4, 8, 16 and 32.
    """

    config: EfficientNetLiteConfig
    config_class = EfficientNetLiteConfig
    base_model_prefix = "efficientnet_lite"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    _no_split_modules = ["InvertedResidual"]

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        eps, width = config.layer_norm_eps, config.stem_size
        self.stem = ConvNorm(config.num_channels, width, 3, eps, stride=2)
        self.stages = nn.ModuleList()
        for kernel_size, stride, expansion, outputs, blocks in config.stages:
            stage = nn.Sequential()
            for block in range(blocks):
                stage.append(
                    InvertedResidual(width, outputs, kernel_size, stride if block == 0 else 1, expansion, eps)
                )
                width = outputs
            self.stages.append(stage)
        self.head = ConvNorm(width, config.head_size, 1, eps)
        # A stride ends where the next one halves the map; what ends at stride 2 belongs to no pyramid
        halves = [stage[1] == 2 for stage in config.stages[1:]] + [True]
        self._ends = [number for number, ends in enumerate(halves) if ends][-4:]
        self.channels = [config.stages[number][3] for number in self._ends]
        self.channels[-1] += config.head_size
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        else:
            super()._init_weights(module)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """
        Filter a batch of images.

        Args:
            pixel_values: `(batch, 3, height, width)`, both sides multiples of 32.

        Returns:
            maps at strides 4, 8, 16 and 32; the last one has the head's channels behind its own.
        """
        features, maps = self.stem(pixel_values), []
        for number, stage in enumerate(self.stages):
            features = stage(features)
            if number in self._ends:
                maps.append(features)
        maps[-1] = torch.cat([features, self.head(features)], dim=1)
        return tuple(maps)


def convert_weights(model: EfficientNetLite, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """
    Weights of the package efficientnet-lite-pytorch under the names that they have here; its classifier is left out.

    Args:
        model: of the weights' shape.
        weights: its state dict, whose order is that of the layers, as here.

    Raises:
        ValueError: the weights are not those of such a model.
    """
    own, given = model.state_dict(), [value for name, value in weights.items() if not name.startswith("_fc.")]
    if [value.shape for value in own.values()] != [value.shape for value in given]:
        raise ValueError("the weights are not those of an EfficientNet-Lite of this shape.")
    return dict(zip(own, given, strict=True))


__all__ = ["EfficientNetLite", "EfficientNetLiteConfig", "convert_weights"]
