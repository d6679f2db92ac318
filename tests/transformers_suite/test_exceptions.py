"""The list of exceptions holds nothing that is gone."""

import importlib
from fnmatch import filter as names_like

import pytest

from .exceptions import ABOUT_CLASSES, DIFFERENT, EMPTY
from .test_modeling_san import SANModelTest

CLASSES = {
    f"{test.__name__}": test
    for module in ("test_image_processing_san", "test_processing_san", "test_pipelines_san", "test_modeling_san")
    for test in vars(importlib.import_module(f"{__package__}.{module}")).values()
    if isinstance(test, type)
}


@pytest.mark.parametrize("listed", DIFFERENT)
def test_what_works_in_another_way_is_a_test(listed):
    class_name, _, test = listed.partition("::")
    assert hasattr(CLASSES[class_name], test)


@pytest.mark.parametrize("pattern", [*EMPTY, *ABOUT_CLASSES])
def test_what_needs_no_model_is_a_test(pattern):
    assert names_like(dir(SANModelTest), pattern)
