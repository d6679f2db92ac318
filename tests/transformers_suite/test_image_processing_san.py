"""The library's common tests of image processors."""

import unittest

import numpy as np
import torch
from PIL import Image
from tests.test_image_processing_common import (
    ImageProcessingTester,
    ImageProcessingTestMixin,
    PostProcessSemanticSegmentationTestMixin,
)
from transformers.utils import is_torchvision_available

from modeling_san.modeling_san import SANOutput
from modeling_san.processing import SANImageProcessor, SANImageProcessorPil

STRIDE = 16


def _size(image):
    """Height and width of what the library's tests make: PIL images, arrays and tensors."""
    if isinstance(image, Image.Image):
        return image.height, image.width
    return image.shape[:2] if isinstance(image, np.ndarray) else image.shape[1:]


class SANImageProcessingTester(ImageProcessingTester):
    """Options that are not the defaults, and what the library's tests expect of them."""

    num_labels = 4

    def __init__(self, parent, **kwargs):
        kwargs.setdefault("size", {"shortest_edge": 64, "longest_edge": 160})
        kwargs.setdefault("image_mean", [0.5, 0.4, 0.3])
        kwargs.setdefault("image_std", [0.2, 0.3, 0.4])
        kwargs.setdefault("size_divisor", 64)
        super().__init__(parent, batch_size=3, **kwargs)

    def _get_image_processing_classes(self):
        backends = {"torchvision": SANImageProcessor} if is_torchvision_available() else {}
        return {**backends, "pil": SANImageProcessorPil}

    def expected_output_image_shape(self, images):
        """The largest image, its sides rounded (the library cuts the fraction off) and padded to `size_divisor`."""
        sizes = []
        for image in images:
            height, width = _size(image)
            scale = min(
                self.size["shortest_edge"] / min(height, width), self.size["longest_edge"] / max(height, width)
            )
            sizes.append([int(scale * length + 0.5) for length in (height, width)])
        largest = (max(lengths) for lengths in zip(*sizes, strict=True))
        return self.num_channels, *(-(-length // self.size_divisor) * self.size_divisor for length in largest)

    def prepare_post_process_semantic_segmentation_inputs(self):
        queries, height, width = 5, 8, 12
        generator = torch.Generator().manual_seed(0)
        outputs = SANOutput(
            masks_queries_logits=torch.randn(self.batch_size, queries, height, width, generator=generator),
            class_queries_logits=torch.randn(self.batch_size, queries, self.num_labels + 1, generator=generator),
        )
        expected = {"num_labels": self.num_labels, "height": height * STRIDE, "width": width * STRIDE}
        return {"outputs": outputs}, expected


class SANImageProcessingTest(ImageProcessingTestMixin, PostProcessSemanticSegmentationTestMixin, unittest.TestCase):
    image_processor_tester_class = SANImageProcessingTester
    test_cast_dtype = True
