"""Base -> SFT -> DPO in one run: every stage of round 0 stands on the sft model, and the task vector is the run's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file

import pipeline.loop
from pipeline.config_file import load_config
from pipeline.console import Display
from pipeline.selection import Selection
from pipeline.status import states_of
from schemas.errors import UserError
from tests.end_to_end.test_e2e_compression import IMPORTED


@pytest.fixture
def inline(inline_stages: None) -> Callable[..., list[str]]:
    """inline(config file, overrides, **selection): the real run loop and stages in this process; titles of what ran."""

    def run(path: Path, *overrides: str, **selection: Any) -> list[str]:
        outcome = pipeline.loop.run(load_config(path, overrides), Selection(**selection), Display(quiet=True))
        return [step.title for step in outcome.ran]

    return run


def test_base_sft_dpo_is_one_run(write_tiny, inline, tmp_path, tiny_model, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    talks = tmp_path / "talks.jsonl"
    rows = [{"prompt": f"Say {n}.", "completion": f"{n}, {n} and {n}.", "language": "en"} for n in range(8)]
    talks.write_text("\n".join(map(json.dumps, [*rows, {"prompt": "?", "language": "de"}])), encoding="utf-8")
    path = write_tiny(
        **IMPORTED,
        sft={"sources": [{"path": str(talks)}], "learning_rate": 1e-3, "batch_size": 4, "save_steps": 1},
        train__method="full",
        train__lora={},
        train__optimizer="onties",
        train__merge={"alpha": 1e-3, "reserve": 0.2, "log_every": 1},
    )
    root = tmp_path / "runs/t"
    with pytest.raises(UserError, match="it waits for sft"):
        inline(path, stage="pairs")
    ran = inline(path, last="train")
    assert ran[0] == "sft" and ran[-1] == "train"

    states = {state.step.spec.name: state for state in states_of(root)}
    assert states["sft"].kind == "done" and states["sft"].manifest is not None
    (english, german) = sorted(states["sft"].manifest.tallies, key=lambda t: -t.kept)
    assert (english.language, english.rows_in, english.kept) == ("en", 8, 8)
    assert (german.rows_in, german.kept, german.dropped) == (1, 0, {"empty": 1})
    assert states["gradients"].manifest.models == {"policy": "t sft", "reference": "t sft"}
    merged = {"policy": "t sft", "reference": "t sft", "sft": "t sft", "base": str(tiny_model)}
    assert states["train"].manifest.models == merged
    (vector,) = (tmp_path / "cache").rglob("task_vectors/*.safetensors")
    base, tuned = load_file(tiny_model / "model.safetensors"), load_file(root / "sft/model/model.safetensors")
    tau, name = load_file(vector), "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(tau[name].float(), tuned[name] - base[name], rtol=1e-2, atol=1e-6)
    assert pl.read_parquet(root / "sft_metrics/*.parquet").filter(name="loss").height == 2
    assert inline(path, last="train") == [], "nothing is made twice"

    with pytest.raises(UserError, match=r"sft\.learning_rate.*would be redone"):
        inline(path, "sft.learning_rate=0.002", last="train")
    assert states_of(root)[0].kind == "done"
    assert inline(path, "loss.beta=0.2", "train.save_steps=2", last="conflict") == ["conflict"], "no gradient again"

    (root / "sft/model/model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"no longer what was written|cannot"):
        inline(path, stage="pairs", force=("pairs",))
