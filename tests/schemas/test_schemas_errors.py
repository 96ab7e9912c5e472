"""What the errors of libraries become."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

from schemas.errors import first_line


def test_pydantics_error_says_what_it_found_and_not_how_many() -> None:
    """vLLM's refusals are pydantic's: their first line is "1 validation error for ModelConfig"."""
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(int).validate_python("many")
    assert first_line(caught.value) == "Input should be a valid integer, unable to parse string as an integer"
