"""The library's common tests of pipelines: each model from a folder, one image, many, and batches of a generator."""

import os
import unittest
from pathlib import Path
from unittest.mock import patch

from PIL import Image
from tests.test_pipeline_mixin import PipelineTesterMixin, pipeline_test_mapping
from transformers import pipeline

from modeling_san import (
    BUILTIN_MODEL,
    SANConfig,
    SANForOpenVocabSegmentation,
    SANForSemanticSegmentation,
    SANProcessor,
)

from .archive import TEST_IMAGE

OPEN_VOCABULARY = "open-vocabulary-segmentation"


class SegmentationPipelineTests:
    """What the library's mixin asks of a task: a pipeline with examples, and what must hold for them."""

    task = "image-segmentation"

    def get_test_pipeline(self, model, tokenizer=None, image_processor=None, dtype="float32", **_):
        segmenter = pipeline(self.task, model=model, dtype=dtype, **self.parts(tokenizer, image_processor))
        return segmenter, [str(TEST_IMAGE), Image.open(TEST_IMAGE)]

    def parts(self, tokenizer, image_processor):
        return {"image_processor": image_processor}

    def run_pipeline_test(self, segmenter, examples):
        each = segmenter(examples)
        assert each == [segmenter(example) for example in examples]
        labels = set(segmenter.model.config.id2label.values())
        for example, segments in zip(examples, each, strict=True):
            size = Image.open(example).size if isinstance(example, str) else example.size
            assert segments
            for segment in segments:
                assert segment["label"] in labels
                assert segment["mask"].size == size
                assert segment["score"] is None or 0 <= segment["score"] <= 1


class OpenVocabularySegmentationPipelineTests(SegmentationPipelineTests):
    task = OPEN_VOCABULARY

    def parts(self, tokenizer, image_processor):
        return {"processor": SANProcessor(image_processor, tokenizer)}


# By class or, in later versions of the library, by the path to it
BY_CLASS = isinstance(pipeline_test_mapping["image-segmentation"]["test"], type)
TASKS = {
    test.task: {"test": test if BY_CLASS else f"{__name__}.{test.__name__}"}
    for test in (SegmentationPipelineTests, OpenVocabularySegmentationPipelineTests)
}


@patch.dict(pipeline_test_mapping, TASKS)
class SANPipelineTest(PipelineTesterMixin, unittest.TestCase):
    pipeline_model_mapping = {
        "image-segmentation": SANForSemanticSegmentation,
        OPEN_VOCABULARY: SANForOpenVocabSegmentation,
    }

    @classmethod
    def setUpClass(cls):
        for model_class in cls.pipeline_model_mapping.values():
            folder = Path(os.environ["TRANSFORMERS_TINY_MODEL_PATH"], SANConfig.model_type, model_class.__name__)
            model_class.from_pretrained(BUILTIN_MODEL).save_pretrained(folder)
            SANProcessor.from_pretrained(BUILTIN_MODEL, size={"shortest_edge": 64}).save_pretrained(folder)

    def test_pipeline_open_vocabulary_segmentation(self):
        self.run_task_tests(OPEN_VOCABULARY)

    def test_pipeline_open_vocabulary_segmentation_fp16(self):
        self.run_task_tests(OPEN_VOCABULARY, dtype="float16")
