from __future__ import annotations

import pytest

from schemas.errors import UserError
from stages.data import data_path, read_data


def test_shipped_files_are_read_with_and_without_the_prefix() -> None:
    assert data_path("rubrics/de.yaml").read_bytes() == data_path("package:rubrics/de.yaml").read_bytes()
    assert read_data("package:rubrics/de.yaml").strip()


@pytest.mark.parametrize("name", ["package:../pyproject.toml", "/etc/hostname", "rubrics/../../README.md"])
def test_names_outside_data_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="not a file of the package"):
        data_path(name)


def test_a_missing_file_names_its_neighbours() -> None:
    with pytest.raises(UserError, match=r"no file rubrics/xx\.yaml.*de\.yaml"):
        read_data("package:rubrics/xx.yaml")


def test_a_missing_config_names_configs_alone() -> None:
    with pytest.raises(UserError, match=r"demo\.yaml") as refused:
        read_data("configs/nope.yaml")
    assert "schema.json" not in str(refused.value)
    with pytest.raises(UserError, match=r"schema\.json"):
        read_data("configs/nope.toml")
