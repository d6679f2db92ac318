"""Makes SAN known to transformers' Auto classes and to `pipeline`, once those are there.

Registering takes SAN's classes and with them most of transformers: seconds that `import modeling_san` and `san --help`
shall not cost. So each part is registered as soon as the module of transformers that keeps the register is imported
and none that it needs is half way through.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class _Registration:
    """`register` is called with the modules `where` and `homes`, all of them complete."""

    register: Callable[..., None]
    where: str
    homes: tuple[str, ...]


def _register_config(auto: Any, configuration: Any) -> None:
    auto.AutoConfig.register(configuration.SANConfig.model_type, configuration.SANConfig, exist_ok=True)


def _register_models(auto: Any, configuration: Any, modeling: Any) -> None:
    auto.AutoModel.register(configuration.SANConfig, modeling.SANForOpenVocabSegmentation, exist_ok=True)
    auto.AutoModelForSemanticSegmentation.register(
        configuration.SANConfig, modeling.SANForSemanticSegmentation, exist_ok=True
    )


def _register_image_processor(auto: Any, configuration: Any, processing: Any) -> None:
    classes = {"pil": processing.SANImageProcessor}
    auto.AutoImageProcessor.register(configuration.SANConfig, image_processor_classes=classes, exist_ok=True)


def _register_processor(auto: Any, configuration: Any, processing: Any) -> None:
    auto.AutoProcessor.register(configuration.SANConfig, processing.SANProcessor, exist_ok=True)


def _register_pipeline(pipelines: Any, configuration: Any, pipeline_san: Any) -> None:
    for task, entry in configuration.CUSTOM_PIPELINES.items():
        pipelines.PIPELINE_REGISTRY.register_pipeline(
            task,
            pipeline_class=pipeline_san.OpenVocabularySegmentationPipeline,
            pt_model=pipelines.AutoModel,
            type=entry["type"],
        )


_AUTO = "transformers.models.auto"
_CONFIGURATION = f"{__package__}.configuration_san"
_MODELING = f"{__package__}.modeling_san"
_PROCESSING = f"{__package__}.processing"
_PIPELINE = f"{_PROCESSING}.pipeline_san"

_pending = [
    _Registration(_register_config, f"{_AUTO}.configuration_auto", (_CONFIGURATION,)),
    _Registration(_register_models, f"{_AUTO}.modeling_auto", (_CONFIGURATION, _MODELING)),
    _Registration(_register_image_processor, f"{_AUTO}.image_processing_auto", (_CONFIGURATION, _PROCESSING)),
    _Registration(_register_processor, f"{_AUTO}.processing_auto", (_CONFIGURATION, _PROCESSING)),
    _Registration(_register_pipeline, "transformers.pipelines", (_CONFIGURATION, _PIPELINE)),
]
_PACKAGES = ("transformers.", f"{__package__}.")
_running: set[str] = set()
"""Modules of these packages that are half way through: they have not all of their classes yet."""


def register_when_imported() -> None:
    """Register with those modules of transformers that are imported already, and watch for the others."""
    sys.meta_path.insert(0, _WATCHER)
    _register_what_is_ready()


def _register_what_is_ready() -> None:
    # The modules of transformers import each other in circles, and SAN imports transformers: whatever SAN's classes
    # may need has to be complete. At the end of the outermost module this is called again.
    if _running:
        return
    for registration in tuple(_pending):
        if registration.where not in sys.modules or registration not in _pending:
            continue
        _pending.remove(registration)
        try:
            homes = [importlib.import_module(name) for name in registration.homes]
            registration.register(sys.modules[registration.where], *homes)
        except Exception as error:
            # An import of transformers shall not fail for SAN's sake; the next one tries again
            _pending.append(registration)
            warnings.warn(f"SAN cannot be registered with {registration.where}: {error}", RuntimeWarning, stacklevel=2)
    if not _pending and _WATCHER in sys.meta_path:
        sys.meta_path.remove(_WATCHER)


class _Watcher(importlib.abc.MetaPathFinder):
    """Finds nothing itself; lets the loaders that others find tell when a module is complete."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec that the other finders give, with a loader that tells."""
        if not fullname.startswith(_PACKAGES):
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _TellingLoader(spec.loader)
                return spec
        return None


_WATCHER = _Watcher()


class _TellingLoader(importlib.abc.Loader):
    """Does what another loader does, and registers what is ready when the module is complete."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """The module, as the other loader creates it."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, and register what is ready then."""
        _running.add(module.__name__)
        # The module shall know the loader that it would have without this one
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        try:
            self.loader.exec_module(module)
        finally:
            _running.discard(module.__name__)
            _register_what_is_ready()

    def __getattr__(self, name: str) -> Any:
        """Source, resources and whatever else a loader is asked for."""
        return getattr(self.loader, name)
