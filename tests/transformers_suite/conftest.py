"""Collects the library's tests where they have been fetched, and applies the list of exceptions."""

import os
from pathlib import Path

import pytest

from .exceptions import DIFFERENT, OLDER

TESTS = os.environ.get("TRANSFORMERS_TESTS")


class WithoutArchive(pytest.Module):
    """A module of tests that has nothing to run."""

    def collect(self):
        pytest.skip("TRANSFORMERS_TESTS does not name the library's tests, which fetch.py beside this file gets")


def pytest_configure(config):
    if TESTS:
        from .archive import install

        install(Path(TESTS))
        config.addinivalue_line("filterwarnings", "ignore::pytest.PytestUnknownMarkWarning")


def pytest_pycollect_makemodule(module_path, parent):
    return None if TESTS else WithoutArchive.from_parent(parent, path=module_path)


def pytest_collection_modifyitems(items):
    listed = DIFFERENT | OLDER
    for item in items:
        if reason := listed.get(f"{getattr(getattr(item, 'cls', None), '__name__', None)}::{item.name}"):
            item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
