"""What is looked at before any work: the files that sources name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.console import Display
from pipeline.doctor import Doctor
from pipeline.loop import preview, run
from pipeline.preflight import _FILES, look_at_sources, notes_on
from pipeline.selection import Selection
from schemas.config import RunConfig
from schemas.errors import UserError
from stages.catalog import BY_NAME, STAGES

_COMMON: dict[str, Any] = {"name": "t", "languages": {"seen": ["en"]}, "model": {"policy": "m"}}
_PAIRS = {"pairs": {"sources": [{"path": "owner/of-the-hub"}]}}


def _given(key: str, path: Path) -> RunConfig:
    *sections, last = key.split(".")
    value: Any = {last: [{"path": str(path)}]}
    for section in reversed(sections):
        value = {section: value}
    return RunConfig.model_validate(_COMMON | ({} if key in ("prompts.sources", "pairs.sources") else _PAIRS) | value)


_HUB = {"path": "owner/of-the-hub", "split": "train_prefs"}
_CHECKED = {"path": "checked.jsonl", "split": "dev"}


@pytest.mark.parametrize(
    ("sources", "fraction", "says"),
    [
        ([_HUB], 0, "needs trusted pairs.*splits: {its split: dev}"),
        ([_HUB, _CHECKED], 0.05, "would put rows of owner/of-the-hub among the trusted pairs"),
        ([_HUB, _CHECKED], 0, None),
        ([_HUB | {"splits": {"train_prefs": "train"}}, _CHECKED], 0.05, None),
        ([_HUB], 0.05, None),
    ],
)
def test_a_split_of_the_hub_says_nothing_of_which_pairs_are_trusted(
    tmp_path: Path, sources: list[dict[str, Any]], fraction: float, says: str | None
) -> None:
    """`split` names what is read there; whether it is for training only `splits` says."""
    given = {"pairs": {"sources": sources, "dev_fraction": fraction}, "conflict": {"target": "dev"}}
    config = RunConfig.model_validate(_COMMON | given | {"run_dir": str(tmp_path)})
    if says is None:
        look_at_sources(config, [])
        return
    with pytest.raises(UserError, match=says):
        look_at_sources(config, [])
    found = [finding for finding in Doctor(config, quick=True).run(lambda name: None) if finding.check == "sources"]
    assert [finding.state for finding in found] == ["problem"]


@pytest.mark.parametrize(
    ("stage", "key"),
    [
        ("prompts", "prompts.sources"),
        ("pairs", "pairs.sources"),
        ("sft", "sft.sources"),
        ("evaluate", "evaluate.authored"),
        ("evaluate", "evaluate.prompts"),
        ("evaluate", "evaluate.baseline.answers"),
    ],
)
@pytest.mark.parametrize(
    ("content", "says"),
    [('{"other": "x"}\n', "no column"), ('{"other": \n', "broken JSON"), ("", "no rows"), (None, "no file")],
    ids=["column", "broken", "empty", "missing"],
)
def test_every_local_source_of_a_stage_is_opened(
    tmp_path: Path, stage: str, key: str, content: str | None, says: str
) -> None:
    path = tmp_path / "a.jsonl"
    if content is not None:
        path.write_text(content)
    config = _given(key, path)
    with pytest.raises(UserError, match=says):
        look_at_sources(config, [BY_NAME[stage]])
    look_at_sources(config, [spec for spec in STAGES if spec.name != stage])


def test_run_and_dry_run_refuse_a_source_before_any_stage_in_the_same_words(
    tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    from pipeline.config_file import load_config

    path = tmp_path / "a.jsonl"
    path.write_text('{"promt": "x"}\n')
    config = load_config(write_config(prompts={"sources": [{"path": str(path)}]}))
    said = []
    for begin in (preview, lambda *given: run(*given, Display(True))):
        with pytest.raises(UserError, match="no column 'prompt'") as error:
            begin(config, Selection(last="prompts"))
        said.append(str(error.value))
    assert said[0] == said[1] and not (tmp_path / "runs" / "t" / "prompts").exists()


def test_a_dry_run_says_how_sources_are_read(tmp_path: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "x", "system_prompt": "y", "language": "en"}\n')
    opened = look_at_sources(_given("prompts.sources", tmp_path / "*.jsonl"), STAGES)
    said = notes_on(opened)
    assert any("of several splits" in note for note in said) and any("system_prompt" in note for note in said)


def test_of_a_source_of_many_files_the_first_are_looked_into(tmp_path: Path) -> None:
    for number in range(_FILES + 1):
        (tmp_path / f"{number:03}.jsonl").write_text("")
    config = _given("prompts.sources", tmp_path / "*.jsonl")
    assert notes_on(look_at_sources(config, STAGES)) == []  # later files may have rows
    (tmp_path / "000.jsonl").unlink()
    with pytest.raises(UserError, match="no rows"):
        look_at_sources(config, STAGES)
