"""The wheel: what it installs, and that it works among other projects' folders of the same names."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from modeling_san import __version__

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCES = ("modeling_san", "processing", "training", "hub_card", "pyproject.toml", "README.md", "LICENSE")
DECOYS = ("processing", "training", "hub_card")

IMPORT_EVERYTHING = """
import importlib, pkgutil, sys
import modeling_san
for module in pkgutil.walk_packages(modeling_san.__path__, "modeling_san."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        # The page alone comes with an extra, which need not be installed
        if (module.name, error.name) != ("modeling_san.hub_card.app", "gradio"):
            raise
for name, module in sorted(sys.modules.items()):
    if name.split(".")[0] == "modeling_san":
        print(name, module.__file__)
"""


def run(*command, cwd):
    """Run a command without any path to the source tree; returns what it printed."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    finished = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    return finished.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy: building in place would leave a folder behind that later wheels pick up."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (REPOSITORY / name).is_dir():
            shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(REPOSITORY / name, source)
    # Built with the setuptools installed here: nothing is downloaded
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index")
    run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", built, source, cwd=built)
    [path] = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """Python of a new environment that holds the wheel, and after it the libraries of this one."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    executable = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    options = ("--quiet", "--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "--python", executable, "install", *options, wheel, cwd=folder)
    own = Path(run(executable, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    # A path file does not run the path files of the folders it names: an editable install here stays out of sight
    libraries = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (own / "libraries.pth").write_text("\n".join(libraries) + "\n")
    return executable


@pytest.fixture
def elsewhere(tmp_path):
    """A folder with packages of the same names as this project's, which must never be imported."""
    for name in DECOYS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('this is another project')\n")
    return tmp_path


def test_the_wheel_holds_every_module_and_data_file_under_one_import_name(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    folders = {"modeling_san": REPOSITORY / "modeling_san"}
    folders |= {f"modeling_san/{name}": REPOSITORY / name for name in DECOYS}
    expected = {
        f"{target}/{path.relative_to(folder).as_posix()}"
        for target, folder in folders.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }
    assert {"modeling_san/processing/vocabularies/coco_stuff_171.json", "modeling_san/py.typed"} <= expected
    assert expected <= names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"modeling_san"}


def test_everything_imports_from_the_wheel_beside_other_projects_folders(python, elsewhere):
    printed = run(python, "-c", IMPORT_EVERYTHING, cwd=elsewhere)
    modules = dict(line.split(" ", 1) for line in printed.splitlines())
    assert {"modeling_san.processing.labels_san", "modeling_san.training.train", "modeling_san.hub_card"} <= {*modules}
    environment = python.parents[1].resolve()
    assert [name for name, file in modules.items() if environment not in Path(file).resolve().parents] == []


def test_the_wheel_installs_the_console_command(python, elsewhere):
    assert run(python.parent / "san", "--version", cwd=elsewhere) == f"san {__version__}\n"
