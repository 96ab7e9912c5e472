"""A reference that is another model than the policy: implicit rewards are there to rank by, and training starts away from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file

import pipeline.loop
from pipeline.config_file import load_config
from pipeline.console import Display
from pipeline.selection import Selection
from schemas.errors import UserError

IMPORTED = {
    "prompts": {},
    "pairs": {"sources": [{"path": "package:authored_pairs/{language}.jsonl"}]},
    "evaluate__authored": [],
}


@pytest.fixture
def earlier(tiny_model: Path, tmp_path: Path) -> Path:
    """What the policy was trained from: other weights."""
    folder = tmp_path / "earlier"
    shutil.copytree(tiny_model, folder)
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(folder / "model.safetensors")
    moved = {name: t + 0.02 * torch.randn(t.shape, generator=generator).to(t.dtype) for name, t in tensors.items()}
    save_file(moved, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("by", ["smallest_gap", "implicit"])
def test_pairs_are_ranked_by_implicit_rewards_and_trained_on(
    by: str, earlier: Path, write_tiny, inline_stages, tmp_path: Path
) -> None:
    path = write_tiny(**IMPORTED, model__reference=str(earlier), select__by=by)
    last = "train" if by == "implicit" else "select"
    pipeline.loop.run(load_config(path, ()), Selection(last=last), Display(quiet=True))
    scores, curated, gradients = (
        pl.read_parquet(tmp_path / "runs/t/round-0" / table / "*.parquet")
        for table in ("scores", "curated", "gradients")
    )
    told = gradients.with_columns(
        margin=(pl.col("logp_chosen") - pl.col("ref_logp_chosen"))
        - (pl.col("logp_rejected") - pl.col("ref_logp_rejected"))
    )
    both = scores.join(told.select("pair_id", "margin"), on="pair_id")
    assert both["margin"].to_list() == pytest.approx(both["implicit_margin"].to_list(), abs=1e-4)
    assert (both["margin"].abs() > 1e-3).mean() > 0.9
    rank = pl.col("implicit_margin") * (1 if by == "implicit" else -1)
    for _, mine in scores.with_columns(rank=rank).filter(pl.col("score").is_not_null()).group_by("language"):
        best = mine.sort("rank", descending=True)["pair_id"].head(
            mine["pair_id"].is_in(curated["pair_id"].implode()).sum()
        )
        assert set(best) == set(mine["pair_id"]) & set(curated["pair_id"])
    if last == "train":
        card = (tmp_path / "runs/t/round-0/train/model/README.md").read_text(encoding="utf-8")
        assert "earlier" in card


def test_a_reference_with_other_tokens_is_refused_before_work(earlier: Path, write_tiny, inline_stages) -> None:
    file = earlier / "tokenizer.json"
    given = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = given["model"]["vocab"]
    one, other = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    file.write_text(json.dumps(given), encoding="utf-8")
    path = write_tiny(**IMPORTED, model__reference=str(earlier))
    with pytest.raises(UserError, match=r"earlier has another vocabulary.*") as error:
        pipeline.loop.run(load_config(path, ()), Selection(last="select"), Display(quiet=True))
    assert error.value.where == "model.reference"
