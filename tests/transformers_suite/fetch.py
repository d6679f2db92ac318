"""
Fetch the common tests of the installed transformers: they are in its source archive, and in no wheel.

    export TRANSFORMERS_TESTS=$(python tests/transformers_suite/fetch.py FOLDER)
    pytest tests/transformers_suite
"""

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path


def fetch_tests(folder: Path) -> Path:
    """
    Put the archive's `tests` into a folder, unless they are there.

    Args:
        folder: made if it is not there; holds one folder for each version.

    Returns:
        the folder `tests`.

    Raises:
        subprocess.CalledProcessError: pip finds no source archive of this version.
    """
    name = f"transformers-{version('transformers')}"
    tests = folder.resolve() / name / "tests"
    if tests.exists():
        return tests
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    with tempfile.TemporaryDirectory() as downloads:
        wanted = ["--dest", downloads, name.replace("-", "==")]
        # What builds the archive's metadata is here as a rule; where it is not, pip fetches that, too
        if subprocess.run([*download, "--no-build-isolation", *wanted], check=False).returncode:
            subprocess.run([*download, *wanted], check=True)
        [archive] = Path(downloads).glob("transformers-*.tar.gz")
        with tarfile.open(archive) as files:
            members = [member for member in files if member.name.startswith(f"{name}/tests/")]
            files.extractall(folder, members, filter="data")
    return tests


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} FOLDER")
    print(fetch_tests(Path(sys.argv[1])))
