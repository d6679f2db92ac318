"""The library's common tests of image processors."""

import unittest

import torch
from tests.test_image_processing_common import (
    ImageProcessingTester,
    ImageProcessingTestMixin,
    PostProcessSemanticSegmentationTestMixin,
)

from modeling_san import SANImageProcessor
from modeling_san.modeling_san import SANOutput

STRIDE = 16


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
        return {"pil": SANImageProcessor}

    def expected_output_image_shape(self, images):
        """As of the library's, padded to a multiple of `size_divisor`."""
        channels, *size = super().expected_output_image_shape(images)
        return channels, *(-(-length // self.size_divisor) * self.size_divisor for length in size)

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
