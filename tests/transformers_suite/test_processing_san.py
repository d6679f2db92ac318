"""The library's common tests of processors."""

import unittest

from tests.test_processing_common import ProcessorTesterMixin
from transformers import CLIPTokenizer

from modeling_san import BUILTIN_MODEL, SANImageProcessor, SANProcessor


class SANProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = SANProcessor

    @classmethod
    def _setup_tokenizer(cls):
        return CLIPTokenizer.from_pretrained(BUILTIN_MODEL)

    @classmethod
    def _setup_image_processor(cls):
        return SANImageProcessor()
