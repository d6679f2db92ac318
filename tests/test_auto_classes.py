"""After `import modeling_san` Auto classes and pipelines load SAN folders, whatever was imported first."""

import json
import os
import subprocess
import sys

import pytest

from modeling_san import BUILTIN_MODEL, SANForOpenVocabSegmentation, SANImageProcessor, SANProcessor

pytestmark = pytest.mark.slow

# What each Auto class and each task gives, as {"name": class, ...}; every load is also tried with each answer to the
# question whether a folder's code may run.
REPORT_CLASSES = """
import json, sys
import transformers

def name(value):
    return f"{type(value).__module__}.{type(value).__name__}"

def load(folder, **options):
    autos = ("AutoConfig", "AutoModel", "AutoModelForSemanticSegmentation", "AutoProcessor", "AutoImageProcessor")
    found = {auto: name(getattr(transformers, auto).from_pretrained(folder, **options)) for auto in autos}
    for task in ("image-segmentation", "open-vocabulary-segmentation"):
        pipe = transformers.pipeline(task, model=folder, device="cpu", **options)
        found[task] = name(pipe)
        found[f"{task}: model"] = name(pipe.model)
        found[f"{task}: image processor"] = name(pipe.image_processor)
    return found

builtin, *tampered = sys.argv[1:]
report = {"builtin": load(builtin)}
for folder in tampered:
    report["tampered"] = [load(folder), load(folder, trust_remote_code=False), load(folder, trust_remote_code=True)]
print(json.dumps(report))
"""

IMAGE_PROCESSOR = f"{SANImageProcessor.__module__}.{SANImageProcessor.__name__}"
"""Its name says which backend it is, where torchvision is not installed."""

OUR_CLASSES = {
    "AutoConfig": "modeling_san.configuration_san.SANConfig",
    "AutoModel": "modeling_san.modeling_san.SANForOpenVocabSegmentation",
    "AutoModelForSemanticSegmentation": "modeling_san.modeling_san.SANForSemanticSegmentation",
    "AutoProcessor": "modeling_san.processing.processing_san.SANProcessor",
    "AutoImageProcessor": IMAGE_PROCESSOR,
    "image-segmentation": "transformers.pipelines.image_segmentation.ImageSegmentationPipeline",
    "image-segmentation: model": "modeling_san.modeling_san.SANForSemanticSegmentation",
    "image-segmentation: image processor": IMAGE_PROCESSOR,
    "open-vocabulary-segmentation": "modeling_san.processing.pipeline_san.OpenVocabularySegmentationPipeline",
    "open-vocabulary-segmentation: model": "modeling_san.modeling_san.SANForOpenVocabSegmentation",
    "open-vocabulary-segmentation: image processor": IMAGE_PROCESSOR,
}


def run(*arguments, **environment):
    """Run a new interpreter; returns what it printed last and everything it logged."""
    finished = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return finished.stdout.splitlines()[-1], finished.stderr


@pytest.fixture(scope="module")
def tampered(tmp_path_factory):
    """A saved folder in which every file of code leaves a mark when it runs, and the file for the marks."""
    folder = tmp_path_factory.mktemp("tampered")
    SANForOpenVocabSegmentation.from_pretrained(BUILTIN_MODEL).save_pretrained(folder)
    SANProcessor.from_pretrained(BUILTIN_MODEL).save_pretrained(folder)
    marks = folder / "marks"
    code = sorted(folder.glob("*.py"))
    assert {"configuration_san.py", "modeling_san.py", "processing_san.py", "pipeline_san.py"} <= {
        f.name for f in code
    }
    for file in code:
        mark = f"open({str(marks)!r}, 'a').write('{file.name} ran ')\n"
        # Behind the future imports, which have to come first
        file.write_text(file.read_text().replace("\nimport ", f"\n{mark}import ", 1) + mark)
    return folder, marks


def test_after_the_package_everything_is_its_own_and_code_in_a_folder_never_runs(tampered, tmp_path):
    # Not even with trust_remote_code=True: a class that was registered comes before a folder's.
    folder, marks = tampered
    code = f"import modeling_san\n{REPORT_CLASSES}"
    printed, logged = run("-c", code, BUILTIN_MODEL, folder, HF_MODULES_CACHE=str(tmp_path))
    assert json.loads(printed) == {"builtin": OUR_CLASSES, "tampered": [OUR_CLASSES] * 3}
    assert "is not supported" not in logged
    assert not marks.exists()
    assert [path for path in tmp_path.rglob("*.py") if path.name != "__init__.py"] == []


def test_the_package_may_come_after_transformers_in_a_script_of_any_name(tmp_path):
    # Within the console command of that name the package waits until a model is loaded
    script = tmp_path / "san.py"
    script.write_text(f"from transformers import AutoModel, pipeline\nimport modeling_san\n{REPORT_CLASSES}")
    printed, _ = run(script, BUILTIN_MODEL)
    assert json.loads(printed) == {"builtin": OUR_CLASSES}


def test_the_mark_is_left_where_the_package_is_not_imported(tampered, tmp_path):
    folder, marks = tampered
    code = "AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True); print()"
    run("-c", f"import sys; from transformers import AutoConfig; {code}", folder, HF_MODULES_CACHE=str(tmp_path))
    assert "configuration_san.py ran" in marks.read_text()
    marks.unlink()
