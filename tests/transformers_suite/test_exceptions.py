"""The list of exceptions holds nothing that is gone from the newest version, which it is written for."""

from fnmatch import filter as names_like

import pytest
from packaging.version import Version
from transformers import __version__

from . import test_image_processing_san, test_modeling_san, test_processing_san
from .exceptions import ABOUT_CLASSES, DIFFERENT, EMPTY, NEWEST

CLASSES = vars(test_image_processing_san) | vars(test_modeling_san) | vars(test_processing_san)

pytestmark = pytest.mark.skipif(Version(__version__) < Version(NEWEST), reason="older versions lack newer tests")


@pytest.mark.parametrize("listed", DIFFERENT)
def test_what_works_in_another_way_is_a_test(listed):
    class_name, _, test = listed.partition("::")
    assert hasattr(CLASSES[class_name], test)


@pytest.mark.parametrize("pattern", [*EMPTY, *ABOUT_CLASSES])
def test_what_needs_no_model_is_a_test(pattern):
    assert names_like(dir(test_modeling_san.SANModelTest), pattern)
