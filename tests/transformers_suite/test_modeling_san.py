"""The library's common tests of models and configurations."""

import copy
import functools
import tempfile
import unittest
from contextlib import nullcontext
from fnmatch import fnmatchcase
from unittest.mock import patch

import torch
from accelerate import cpu_offload
from conftest import TINY, TINY_TEXT, TINY_VISION
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, compute_module_sizes, floats_tensor, ids_tensor
from torch.nn.modules.module import register_module_forward_pre_hook, register_module_module_registration_hook
from torch.testing import assert_close
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
from transformers.testing_utils import force_serialization_as_bin_files, torch_device

from modeling_san import SANConfig, SANForOpenVocabSegmentation, SANForSemanticSegmentation

from .exceptions import ABOUT_CLASSES, EMPTY

LAYERS = 2
SIZE = 32


def guard(test):
    """A test that passes without having built a model has tested nothing, unless it is about classes."""

    @functools.wraps(test)
    def guarded(self, *args, **kwargs):
        name, built = self._testMethodName, set()
        hook = register_module_module_registration_hook(lambda module, *_: built.add(type(module)))
        try:
            test(self, *args, **kwargs)
        finally:
            hook.remove()
        reasons = [reason for pattern, reason in EMPTY.items() if fnmatchcase(name, pattern)]
        if built.intersection(self.all_model_classes) or name in ABOUT_CLASSES:
            assert not reasons, f"{name} tests something by now: take it off the list"
        else:
            assert reasons, f"{name} passes without a model: give it one, or list it"
            self.skipTest(reasons[0])

    return guarded


class SANModelTester:
    """Makes a tiny configuration and inputs, under the names that the library's tests read."""

    num_hidden_layers = LAYERS
    num_attention_heads = TINY_VISION["num_attention_heads"]
    hidden_size = TINY_VISION["hidden_size"]
    # [CLS] and the patches of half the image
    encoder_seq_length = seq_length = 1 + (SIZE // 2 // TINY_VISION["patch_size"]) ** 2
    num_hidden_states_types = 2  # CLIP's and the side adapter's
    batch_size = 2
    num_classes = 3
    is_training = True

    def __init__(self, **changes):
        self.changes = changes

    def get_config(self):
        last = 39
        return SANConfig(
            vision_config={**TINY_VISION, "num_hidden_layers": LAYERS},
            text_config={
                **TINY_TEXT,
                **{"num_hidden_layers": LAYERS, "vocab_size": last + 1},
                **{"bos_token_id": last - 1, "eos_token_id": last, "pad_token_id": last},
            },
            **TINY
            | {"sls_start_layer": 1, "fusion_map": [[0, 0], [1, 1]]}
            | {"side_num_layers": LAYERS, "deep_supervision_layers": [1, 2]}
            | self.changes,
        )

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        input_ids = ids_tensor([self.num_classes, 8], config.text_config.bos_token_id)
        input_ids[:, -1] = config.text_config.eos_token_id
        inputs = {
            "pixel_values": floats_tensor([self.batch_size, 3, SIZE, SIZE]),
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
        }
        return config, inputs


class SANModelTest(ModelTesterMixin, unittest.TestCase):
    """Labels without names, as every configuration has them at first."""

    all_model_classes = (SANForOpenVocabSegmentation, SANForSemanticSegmentation)
    additional_model_inputs = ("input_ids",)
    test_resize_embeddings = False
    test_can_init_all_missing_weights_before_2023 = True
    _is_composite = True
    changes = {}

    def setUp(self):
        self.model_tester = SANModelTester(**self.changes)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = copy.deepcopy(inputs_dict)
        if return_labels:
            batch, _, height, width = inputs["pixel_values"].shape
            columns = torch.arange(width, device=inputs["pixel_values"].device)
            inputs["labels"] = (columns * self.model_tester.num_classes // width).expand(batch, height, -1)
        return inputs

    def test_config(self):
        properties = ["projection_dim", "logit_scale_init_value", "num_queries"]
        tester = ConfigTester(self, SANConfig, has_text_modality=False, common_properties=properties, num_queries=7)
        tester.run_common_tests()

    def test_model_get_set_embeddings(self):
        # As of the library's models of images: what images enter by is no table
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            patches = model.get_input_embeddings()
            other = copy.deepcopy(patches)
            model.set_input_embeddings(other)
            assert model.get_input_embeddings() is other
            assert model.vision_model.embeddings.patch_embedding is other
            assert model.get_output_embeddings() is None

    def test_model_forward_default_config_values(self):
        # Only looks at classes that are named there
        names = tuple(model_class.__name__ for model_class in self.all_model_classes)
        with patch.dict(MODEL_MAPPING_NAMES, {SANConfig.model_type: names}):
            super().test_model_forward_default_config_values()

    def test_enable_input_require_grads_with_gradient_checkpointing(self):
        # CLIP's patch embedding is frozen by default
        self.model_tester.changes = self.changes | {"trainable_clip_parameters": ["vision_model"]}
        super().test_enable_input_require_grads_with_gradient_checkpointing()

    def test_batching_equivalence(self):
        # Logits are cosines times 100
        super().test_batching_equivalence(atol=1e-3)

    def test_model_outputs_equivalence(self):
        # Masks are compared with labels at random points
        def seed(module, _):
            if isinstance(module, self.all_model_classes):
                torch.manual_seed(0)

        hook = register_module_forward_pre_hook(seed)
        try:
            super().test_model_outputs_equivalence()
        finally:
            hook.remove()

    @torch.no_grad()
    def test_torch_export(self):
        # The library's own is not in its archive
        for model_class in self.all_model_classes:
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            model = model_class(config).to(torch_device).eval()
            call = self._prepare_for_class(inputs, model_class)
            program = torch.export.export(model, (), call)
            assert_close(program.module()(**call).to_tuple(), model(**call).to_tuple(), atol=1e-3, rtol=1e-4)

    def _check_offload(self, offloaded_models):
        """Models whose weights are elsewhere until they are needed answer as the model does."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(copy.deepcopy(config)).eval()
            call = {name: tensor.cpu() for name, tensor in self._prepare_for_class(inputs, model_class).items()}
            expected = model(**call)
            for offloaded in offloaded_models(model):
                assert_close(offloaded(**call).to_tuple(), expected.to_tuple(), atol=1e-3, rtol=1e-4)

    def _shares_on_disk(self, model, serialization):
        with tempfile.TemporaryDirectory() as folder:
            with serialization:
                model.save_pretrained(folder)
            for share in self.model_split_percents:
                offloaded = type(model).from_pretrained(
                    folder,
                    device_map="auto",
                    max_memory={"cpu": int(share * compute_module_sizes(model)[0][""])},
                    offload_folder=folder,
                )
                assert set(offloaded.hf_device_map.values()) == {"cpu", "disk"}
                yield offloaded

    def test_cpu_offload_to_memory(self):
        self._check_offload(lambda model: [cpu_offload(copy.deepcopy(model), torch.device("cpu"))])

    def test_disk_offload_of_shares_safetensors(self):
        self._check_offload(lambda model: self._shares_on_disk(model, nullcontext()))

    def test_disk_offload_of_shares_bin(self):
        self._check_offload(lambda model: self._shares_on_disk(model, force_serialization_as_bin_files()))


for name in dir(SANModelTest):
    if name.startswith("test_") and callable(getattr(SANModelTest, name)):
        setattr(SANModelTest, name, guard(getattr(SANModelTest, name)))


class SANNamedLabelsModelTest(SANModelTest):
    """Labels with names, and no embeddings stored for them."""

    changes = {"id2label": {0: "sky", 1: "road", 2: "car"}}
