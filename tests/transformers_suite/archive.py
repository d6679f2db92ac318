"""
Makes the archive's tests importable: what they need of the library's repository and the archive leaves out.

Nothing that is tested is in here. The test image comes from this package, and classes that cannot apply are empty.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import transformers
from transformers import testing_utils
from transformers import utils as transformers_utils

import modeling_san

TEST_IMAGE = Path(modeling_san.__file__).with_name("drawn_examples") / "grass.png"

LEFT_OUT = {
    # `generate` is for language models.
    "tests.generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    # The exports of this package are tested by its own tests.
    "tests.exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    # Not read for configurations that hold others.
    "tests.utils.test_configuration_utils": {"config_common_kwargs": {}},
    "fetch_hub_objects_for_ci": {"url_to_local_path": lambda url: str(TEST_IMAGE)},
}
"""Modules by name, with what the common tests take from them."""

TINY_MODELS = {
    name: {"tokenizer_classes": ["CLIPTokenizer"], "processor_classes": ["SANImageProcessor"]}
    for name in ("SANForOpenVocabSegmentation", "SANForSemanticSegmentation")
}
"""What the tests of pipelines read of each model: the classes that are saved with it."""

TINY_MODELS_FOLDER = tempfile.TemporaryDirectory(prefix="tiny-models-")
"""Where they look for models, which they save there first."""


class Classes(SimpleNamespace):
    """The library, and the classes of this package, as tests look both up by name."""

    def __getattr__(self, name):
        return getattr(modeling_san if hasattr(modeling_san, name) else transformers, name)


def install(tests: Path) -> None:
    """
    Make `tests.test_modeling_common` and the others importable.

    Args:
        tests: the folder that `fetch.py` prints.
    """
    for name, contents in LEFT_OUT.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(contents)
    sys.path.append(str(tests.parent))

    os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = TINY_MODELS_FOLDER.name
    summary = Path(TINY_MODELS_FOLDER.name, "reports", "tiny_model_summary.json")
    summary.parent.mkdir()
    summary.write_text(json.dumps(TINY_MODELS))

    transformers_utils.direct_transformers_import = lambda *_, **__: Classes()
    # It is what other models of the task need
    testing_utils.require_timm = lambda test: test
