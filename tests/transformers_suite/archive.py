"""
Makes the archive's tests importable: what they need of the library's repository and the archive leaves out.

Nothing that is tested is in here. The test image comes from this package, and classes that cannot apply are empty.
"""

import json
import os
import sys
import tempfile
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import transformers
from transformers import testing_utils
from transformers import utils as transformers_utils

import modeling_san

TEST_IMAGE = Path(modeling_san.__file__).with_name("drawn_examples") / "grass.png"


class LeftOut(ModuleType):
    """A module that the archive lacks: each name in it is an empty class."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class LeftOutFinder(MetaPathFinder, Loader):
    """Makes what is left out of the archive's `tests`: helpers for generation, exports and other pipelines."""

    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self, is_package=True) if name.startswith("tests.") else None

    def create_module(self, spec):
        return LeftOut(spec.name)

    def exec_module(self, module):
        """Nothing: names are made as they are asked for."""


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
    sys.path.append(str(tests.parent))
    # Last, so that what there is comes first
    sys.meta_path.append(LeftOutFinder())
    fetcher = sys.modules["fetch_hub_objects_for_ci"] = ModuleType("fetch_hub_objects_for_ci")
    fetcher.url_to_local_path = lambda url: str(TEST_IMAGE)

    os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = TINY_MODELS_FOLDER.name
    summary = Path(TINY_MODELS_FOLDER.name, "reports", "tiny_model_summary.json")
    summary.parent.mkdir()
    summary.write_text(json.dumps(TINY_MODELS))

    transformers_utils.direct_transformers_import = lambda *_, **__: Classes()
    # It is what other models of the task need
    testing_utils.require_timm = lambda test: test
