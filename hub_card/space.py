# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""Write a Space: the demo page of one model, ready to be uploaded to the Hub."""

from __future__ import annotations

import importlib
import os
import shutil
from importlib.metadata import PackageNotFoundError, files, requires
from pathlib import Path

from huggingface_hub import SpaceCard, SpaceCardData
from packaging.requirements import InvalidRequirement, Requirement

import modeling_san
from modeling_san.processing.files import new_folder

from .publish import check_repo_id

PACKAGES = (
    "modeling_san",
    "modeling_san.commands",
    "modeling_san.processing",
    "modeling_san.training",
    "modeling_san.training.mean_iou",
    "modeling_san.hub_card",
)
"""The packages that are installed; an editable install does not let them be listed."""

TAGLINE = "Upload an image, name what to look for in any words, and every pixel gets the word that fits best."
"""What the page does, in a sentence."""

_DISTRIBUTION = "modeling-san"
_LICENSE = "apache-2.0"
_PYTHON_VERSION = "3.11"
_CODE_ENDINGS = (".py", ".typed", ".json", ".yaml", ".md", ".css", ".js", ".tmpl", ".html", ".png")
_LEFT_OUT_FOLDERS = ("__pycache__", modeling_san.BUILTIN_MODEL.name)

_APP = '''\
"""The page of a segmentation model. The variable SAN_MODEL names another one than {model_id}."""

import os

from modeling_san.hub_card.app import serve_model

serve_model(os.environ.get("SAN_MODEL") or "{model_id}")
'''
_README = """\
---
{metadata}
---

# {title}

{tagline} The model is a Side Adapter Network with the weights of
[{model_id}](https://huggingface.co/{model_id}).

`app.py` is the page; another model is chosen with the variable `SAN_MODEL` in the Space's settings. No code of the
model's repository is run. {origin}
"""


def write_space(folder: str | os.PathLike, model_id: str, *, package: str | None = None) -> Path:
    """
    Write `app.py`, `requirements.txt` and `README.md` with the metadata of a Space that serves a model's page.

    A copy of this package's code goes into the folder, so that nothing but public libraries has to be installed.

    Args:
        folder: to make; it must not exist, or be empty.
        model_id: the model's repository on the Hub, "user/name".
        package: where pip finds this package, as a line of a requirements file such as
            "modeling-san @ git+https://..."; it is then installed from there instead of copied.

    Returns:
        the folder.

    Raises:
        ValueError: `model_id` is no repository's name, `package` is no requirement, or the package is not installed.
        ImportError: Gradio, whose version the Space is to have, is not installed.
        OSError: the folder is not empty, or cannot be written.
    """
    import gradio

    check_repo_id(model_id)
    try:
        # What the package itself needs; Gradio comes with the Space
        lines = requires(_DISTRIBUTION) or [] if package is None else [str(Requirement(package.strip()))]
    except InvalidRequirement as error:
        raise ValueError(
            f"package is {package!r}, which pip does not read: pass a requirement such as "
            f'"{_DISTRIBUTION} @ git+https://..."'
        ) from error
    except PackageNotFoundError as error:
        raise ValueError(f"the package {_DISTRIBUTION} is not installed, so what it needs is not known") from error
    requirements = sorted(line for line in lines if "extra ==" not in line)
    title = f"{model_id.split('/')[1]} demo"
    metadata = SpaceCardData(
        title=title,
        sdk="gradio",
        sdk_version=gradio.__version__,
        python_version=_PYTHON_VERSION,
        app_file="app.py",
        license=_LICENSE,
        models=[model_id],
        tags=["semantic-segmentation", "open-vocabulary"],
    )
    origin = (
        f"`modeling_san/` is a copy of the package {_DISTRIBUTION} {modeling_san.__version__}."
        if package is None
        else f"The package {_DISTRIBUTION} is installed from where `requirements.txt` says."
    )
    about = {"title": title, "tagline": TAGLINE, "model_id": model_id, "origin": origin}
    readme = _README.format(metadata=metadata.to_yaml().strip(), **about)
    with new_folder(folder) as unfinished:
        SpaceCard(readme).save(unfinished / "README.md")
        (unfinished / "app.py").write_text(_APP.format(model_id=model_id), encoding="utf-8")
        (unfinished / "requirements.txt").write_text("\n".join(requirements) + "\n", encoding="utf-8")
        if package is None:
            _copy_package(unfinished)
    return Path(folder)


def _copy_package(folder: Path) -> None:
    """Copy the package's code and data, wherever its parts lie, but not the built-in model's weights."""
    for name in PACKAGES:
        [place] = importlib.import_module(name).__path__
        _copy_code(Path(place), folder.joinpath(*name.split(".")))
    # Beside the code in a checkout, among the package's records where it is installed
    places = [Path(modeling_san.__path__[0]).parent / "LICENSE"]
    places += [Path(str(path.locate())) for path in files(_DISTRIBUTION) or [] if path.name == "LICENSE"]
    shutil.copyfile(next(place for place in places if place.is_file()), folder / "LICENSE")


def _copy_code(source: Path, target: Path) -> None:
    """Copy the files of one package and its folders of data; packages inside it are copied by themselves."""
    target.mkdir(parents=True, exist_ok=True)
    for entry in sorted(source.iterdir()):
        if entry.is_file() and entry.suffix in _CODE_ENDINGS:
            shutil.copyfile(entry, target / entry.name)
        elif entry.is_dir() and entry.name not in _LEFT_OUT_FOLDERS and not (entry / "__init__.py").is_file():
            _copy_code(entry, target / entry.name)
