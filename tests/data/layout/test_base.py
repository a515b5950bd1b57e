"""Image processors made from the values of their files."""

from __future__ import annotations

import pytest

from vistune.data.layout import make_image_processor
from vistune.errors import DataError


def test_names_of_the_fast_form_give_the_one_on_pillow() -> None:
    made = make_image_processor({"image_processor_type": "CLIPImageProcessorFast"})
    assert type(made).__name__ == "CLIPImageProcessorPil"


def test_a_class_that_needs_torchvision_is_named() -> None:
    with pytest.raises(DataError, match="Sam2ImageProcessor that works without torchvision"):
        make_image_processor({"image_processor_type": "Sam2ImageProcessor"})


def test_values_that_make_no_processor_are_refused() -> None:
    with pytest.raises(DataError, match="cannot be made from the values of its file"):
        make_image_processor({"image_processor_type": "CLIPImageProcessor", "size": {"a": 1}})
