"""docs/architecture.md walks through files that are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_file_of_the_walks_exists_and_the_page_is_linked() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    names = {name for name in re.findall(r"`([\w/]+\.py|[\w/]+/)`", page) if "/" in name}
    names |= {f"optimizers/{name}.py" for name in re.findall(r"`(bucket|part|shard|form|subspace)\.py`", page)}
    gone = [name for name in names if not (ROOT / name).exists() and not (ROOT / "stages/train" / name).exists()]
    assert len(names) > 50 and not gone, gone
    for linking in ("README.md", "CONTRIBUTING.md"):
        assert "docs/architecture.md" in (ROOT / linking).read_text(encoding="utf-8")


def test_every_page_that_the_code_cites_exists() -> None:
    cited = {
        page
        for folder in ("congrad", "schemas", "stages", "pipeline")
        for file in (ROOT / folder).rglob("*.py")
        for page in re.findall(r"\bdocs/[\w-]+\.md|\bMETHODS\.md", file.read_text(encoding="utf-8"))
    }
    gone = sorted(page for page in cited if not (ROOT / page).exists())
    assert len(cited) > 5 and not gone, gone
