"""A saved folder carries its code: it works, bit for bit the same, where only transformers, torch and pillow are."""

import ast
import inspect
import json
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image
from transformers.utils import is_torchvision_available

from drawn_world.world import draw_scene
from modeling_san import BUILTIN_MODEL, SANForOpenVocabSegmentation, SANProcessor

pytestmark = pytest.mark.slow

INSTALLED = ("transformers", "torch", "pillow")
"""All that a user of a folder has to install; what these require comes with them."""

ABSENT = ("modeling_san", "accelerate", "datasets", "evaluate", "ftfy", "scipy", "torchvision")

IF_INSTALLED = {"ftfy", "pillow_heif"}

MAY_BE_IMPORTED = {"transformers", "torch", "numpy", "PIL", "huggingface_hub"} | IF_INSTALLED | sys.stdlib_module_names

PACKAGE_ONLY = {"auto.py", "builtin.py", "conversion.py", "export.py", "files.py", "segment_dataset.py"}

LABELS = ["grass", "cyan plain|blue plain", "wood"]


def segment(folder, image, labels, **options):
    """
    Segment an image in each way there is, in one thread.

    The source of this function runs without the package, too: it names nothing from outside.

    Returns:
        arrays by name, and the classes that were loaded.
    """
    import numpy as np
    import torch
    import transformers
    from PIL import Image

    torch.set_num_threads(1)
    image = Image.open(image)
    size = [image.size[::-1]]
    processor = transformers.AutoProcessor.from_pretrained(folder, **options)
    image_processor = transformers.AutoImageProcessor.from_pretrained(folder, **options)
    config = transformers.AutoConfig.from_pretrained(folder, **options)
    model = transformers.AutoModel.from_pretrained(folder, **options)
    stock = transformers.AutoModelForSemanticSegmentation
    semantic = stock.from_pretrained(folder, **options)
    renamed = stock.from_pretrained(folder, id2label=dict(enumerate(labels)), **options)
    loaded = [type(value).__module__ for value in (processor, image_processor, config, model, semantic, renamed)]

    arrays = {}
    inputs = processor(images=image, text=labels, return_tensors="pt")
    pixels = image_processor(image, return_tensors="pt")
    with torch.no_grad():
        outputs = {"words": model(**inputs), "stored": semantic(**pixels), "renamed": renamed(**pixels)}
    for name, output in outputs.items():
        [arrays[name]] = [found.numpy() for found in processor.post_process_semantic_segmentation(output, size)]
    arrays["logits"] = outputs["renamed"].logits.numpy()
    assert list(renamed.config.id2label.values()) == labels

    words = transformers.pipeline("open-vocabulary-segmentation", model=folder, device="cpu", **options)
    fixed = transformers.pipeline("image-segmentation", model=folder, device="cpu", **options)
    loaded.extend(type(value).__module__ for value in (words, words.model, fixed.model, fixed.image_processor))
    for name, found in (("words", words(image, candidate_labels=labels)), ("image", fixed(image))):
        arrays[f"{name} pipeline: labels"] = np.array([each["label"] for each in found])
        arrays[f"{name} pipeline: masks"] = np.stack([np.asarray(each["mask"]) for each in found])
        arrays[f"{name} pipeline: scores"] = np.array([each["score"] or 0.0 for each in found])
    return arrays, loaded, model, processor


WITHOUT_PACKAGE = f"""
import importlib.util, json, os, sys
folder, image, again, results = sys.argv[1:]
labels = {LABELS!r}

import transformers

refusals = []
for auto in ("AutoConfig", "AutoModel", "AutoModelForSemanticSegmentation", "AutoProcessor", "AutoImageProcessor"):
    try:
        getattr(transformers, auto).from_pretrained(folder)
    except ValueError as error:
        refusals.append(str(error))
for task in ("open-vocabulary-segmentation", "image-segmentation"):
    try:
        transformers.pipeline(task, model=folder)
    except ValueError as error:
        refusals.append(str(error))
modules_before_trust = [name for name in sys.modules if name.startswith("transformers_modules.")]

{inspect.getsource(segment)}

import numpy as np
import torch

arrays, loaded, model, processor = segment(folder, image, labels, trust_remote_code=True)
np.savez(results + "/first.npz", **arrays)
model.save_pretrained(again)
processor.save_pretrained(again)
arrays, loaded_again, _, _ = segment(again, image, labels, trust_remote_code=True)
np.savez(results + "/again.npz", **arrays)

errors = {{}}
def note(name, call):
    try:
        call()
    except Exception as error:
        errors[name] = f"{{type(error).__name__}}: {{error}}"

note("templates", lambda: processor.tokenize_labels(labels, templates="imagenet"))
pixels = torch.zeros(1, 3, 64, 64)
note("training", lambda: model(pixels, labels=torch.zeros(1, 64, 64, dtype=torch.long)))

# The question whether code may run left a line without an end
print()
print(json.dumps({{
    "found": [name for name in {ABSENT!r} if importlib.util.find_spec(name)],
    "refusals": refusals,
    "modules before trust": modules_before_trust,
    "loaded": loaded,
    "loaded again": loaded_again,
    "errors": errors,
}}))
"""


def requirements_of(names):
    """Distributions by name: these and all that they require, with the markers of this machine and no extras."""
    found, waiting = {}, list(names)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            # Required for something that this installation was made without
            continue
        for line in found[name].requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """Python of an environment that has transformers, torch, pillow and what they require, and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    [site] = folder.glob("lib/python*/site-packages")
    for found in requirements_of(INSTALLED).values():
        tops = {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}
        for top in tops:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(found.locate_file(top))).resolve())
    assert (site / "transformers").is_dir(), "how transformers is installed here cannot be followed"
    return python


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder that model and processor saved."""
    folder = tmp_path_factory.mktemp("folder") / "saved"
    SANForOpenVocabSegmentation.from_pretrained(BUILTIN_MODEL).save_pretrained(folder)
    SANProcessor.from_pretrained(BUILTIN_MODEL).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "drawn.png"
    Image.fromarray(draw_scene(7, 3, size=(96, 128)).image).save(path)
    return path


@pytest.fixture(scope="module")
def without_package(bare_python, saved, image, tmp_path_factory):
    """What the bare environment made of the folder: its report, and the folder with its results."""
    results = tmp_path_factory.mktemp("results")
    again = results / "again"
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONSTARTUP")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment.update(
        HF_HOME=str(results / "home"),
        HF_MODULES_CACHE=str(results / "modules"),
        HF_HUB_OFFLINE="1",
        OMP_NUM_THREADS="1",
        PYTHONDONTWRITEBYTECODE="1",
    )
    finished = subprocess.run(
        [bare_python, "-c", WITHOUT_PACKAGE, saved, image, again, results],
        cwd=results,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return json.loads(finished.stdout.splitlines()[-1]), results


def imports_of(file):
    """Names of the modules that a file imports anywhere in it; those beside it start with a dot."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return names


def test_the_folder_carries_code_that_imports_what_is_beside_it_and_the_libraries_named(saved):
    imported = {file.name: imports_of(file) for file in saved.glob("**/*.py")}
    assert {"modeling_san.py", "processing_san.py", "pipeline_san.py", "segmenter.py"} <= imported.keys()
    assert not imported.keys() & PACKAGE_ONLY
    assert not list(saved.glob("**/vocabularies*")), "data of the package"
    beside = {f".{Path(name).stem}" for name in imported}
    strange = {
        name: names
        for name, found in imported.items()
        if (names := {n for n in found if n not in beside and n.partition(".")[0] not in MAY_BE_IMPORTED})
    }
    assert strange == {}
    # The test sees imports
    assert ".side_adapter" in imported["modeling_san.py"]


def test_the_maps_in_the_saved_files_name_classes_that_are_there(saved):
    config = json.loads((saved / "config.json").read_text())
    processor = json.loads((saved / "processor_config.json").read_text())
    entries = {**config["auto_map"], **processor["auto_map"], **processor["image_processor"]["auto_map"]}
    pipelines = {entry["impl"] for entry in config["custom_pipelines"].values()}
    assert set(entries) >= {
        "AutoConfig",
        "AutoModel",
        "AutoModelForSemanticSegmentation",
        "AutoProcessor",
        "AutoImageProcessor",
    }
    for reference in {*entries.values(), *pipelines}:
        module, _, name = reference.partition(".")
        nodes = ast.walk(ast.parse((saved / f"{module}.py").read_text()))
        classes = {node.name for node in nodes if isinstance(node, ast.ClassDef)}
        assert name in classes


def test_the_package_is_not_there(without_package):
    report, _ = without_package
    required = set(requirements_of(INSTALLED))
    assert [name for name in report["found"] if canonicalize_name(name) not in required] == []
    assert "modeling_san" not in report["found"]


def test_without_trust_there_is_one_clear_refusal_and_nothing_runs(without_package):
    report, _ = without_package
    assert len(report["refusals"]) == 7
    assert all("trust_remote_code=True" in refusal for refusal in report["refusals"])
    assert report["modules before trust"] == []


def test_every_class_comes_from_the_folder(without_package):
    report, _ = without_package
    assert all(name.startswith("transformers_modules.saved.") for name in report["loaded"])
    assert all(name.startswith("transformers_modules.again.") for name in report["loaded again"])


@pytest.mark.skipif(is_torchvision_available(), reason="the folder's user has PIL only, which rounds otherwise")
def test_segmentations_are_those_of_the_package_bit_for_bit(without_package, saved, image, one_thread):
    _, results = without_package
    expected, loaded, _, _ = segment(str(saved), str(image), LABELS)
    assert all(name.startswith("modeling_san.") for name in loaded)
    # Three maps that say something, the third by other labels than the second
    assert len(np.unique(expected["stored"])) > 1
    assert len(np.unique(expected["words"])) > 1
    assert np.array_equal(expected["renamed"], expected["words"])
    for name in ("first", "again"):
        found = np.load(results / f"{name}.npz")
        assert set(found) == set(expected)
        for key, value in expected.items():
            assert np.array_equal(found[key], value), (name, key)


def test_a_folder_saved_there_has_the_same_files_and_maps(without_package, saved):
    _, results = without_package
    again = results / "again"
    assert {file.name for file in again.iterdir()} == {file.name for file in saved.iterdir()}
    for file in saved.glob("*.py"):
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name
    for name in ("config.json", "processor_config.json"):
        assert json.loads((again / name).read_text()) == json.loads((saved / name).read_text())


def test_names_of_template_sets_need_the_package_and_say_so(without_package):
    report, _ = without_package
    message = report["errors"]["templates"]
    assert re.match(r"ValueError: there are no prompt templates called 'imagenet'.*not installed", message)
    assert "\n" not in message


def test_training_there_asks_for_what_it_needs(without_package):
    report, _ = without_package
    if "scipy" in report["found"]:
        assert "training" not in report["errors"]
    else:
        assert "scipy" in report["errors"]["training"]
        assert report["errors"]["training"].startswith("ImportError")
