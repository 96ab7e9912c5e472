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
