"""Every stage, for real, on a tiny random model: tables, accounts, resume, workers, rounds, imported pairs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq

from schemas.manifests import StageManifest
from schemas.tables import TABLES, gradients_schema

ROUND_TABLES = [
    "candidates",
    "judgements",
    "pairs",
    "gradients",
    "scores",
    "gram",
    "directions",
    "curated",
    "rejected",
    "metrics",
    "evaluation",
    "answers",
]


def table_bytes(root: Path) -> dict[str, bytes]:
    """Every Parquet file of the tables (not what lies in an artifact's own folder)."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("part-*.parquet"))
        if path.parent.parent.name in ("round-0", "round-1", "_dropped") or path.parent.parent == root
    }


def manifests(root: Path) -> list[StageManifest]:
    return [StageManifest.model_validate_json(p.read_text()) for p in sorted(root.rglob("_stage.json"))]


def test_every_table_is_there_with_its_documented_schema(whole_run):
    _, root, _ = whole_run
    for table in ("prompts", *ROUND_TABLES):
        folder = root / table if table == "prompts" else root / "round-0" / table
        frame = pl.read_parquet(folder / "*.parquet")
        assert frame.height > 0, table
        schema = pq.read_schema(next(folder.iterdir()))
        if table == "gradients":
            width = schema.field("sketch").type.byte_width // 2
            assert 0 < width <= 512
            assert schema.remove_metadata() == gradients_schema(width).remove_metadata()
        else:
            assert schema.remove_metadata() == TABLES[table].schema.remove_metadata()


def test_every_row_is_accounted_for_from_stage_to_stage(whole_run):
    _, root, _ = whole_run
    rows = {t: pl.read_parquet(root / "round-0" / t / "*.parquet") for t in ROUND_TABLES}
    prompts = pl.read_parquet(root / "prompts/*.parquet")
    by_stage = {m.stage: m for m in manifests(root)}

    def account(stage: str, unit: str) -> tuple[int, int]:
        tallies = [t for t in by_stage[stage].tallies if t.unit == unit]
        return sum(t.rows_in for t in tallies), sum(t.kept for t in tallies)

    assert account("prompts", "row") == (48, prompts.height)
    assert account("generate", "prompt") == (prompts.height, prompts.height)
    assert rows["candidates"].height == 3 * prompts.height
    assert account("judge", "candidate")[0] == rows["candidates"].height
    assert account("pairs", "prompt") == (prompts.height, rows["pairs"].height)
    train = rows["pairs"].filter(pl.col("split") == "train")
    assert account("gradients", "pair") == (train.height, rows["gradients"].height)
    assert rows["curated"].height + rows["rejected"].height == train.height
    assert not set(rows["curated"]["pair_id"]) & set(rows["rejected"]["pair_id"])


def test_splits_keep_translation_groups_together_and_train_sees_no_held_out_row(whole_run):
    _, root, _ = whole_run
    prompts = pl.read_parquet(root / "prompts/*.parquet").filter(pl.col("language") != "it")
    assert prompts.group_by("group_id").agg(pl.col("split").n_unique())["split"].max() == 1
    train = set(prompts.filter(pl.col("split") == "train")["prompt_id"])
    assert set(pl.read_parquet(root / "round-0/curated/*.parquet")["prompt_id"]) <= train
    assert not set(pl.read_parquet(root / "round-0/answers/*.parquet")["prompt_id"]) & train


def test_curated_loads_into_datasets_and_the_model_into_transformers(whole_run, tmp_path):
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, root, _ = whole_run
    rows = load_dataset(
        "parquet", data_files=str(root / "round-0/curated/*.parquet"), split="train", cache_dir=str(tmp_path)
    )
    assert rows[0]["prompt"][-1]["role"] == "user" and rows[0]["chosen"][0]["role"] == "assistant"
    model = AutoModelForCausalLM.from_pretrained(root / "round-0/train/model")
    tokenizer = AutoTokenizer.from_pretrained(root / "round-0/train/model")
    ids = tokenizer.apply_chat_template(
        rows[0]["prompt"], return_tensors="pt", add_generation_prompt=True, return_dict=True
    )
    assert model.generate(**ids, max_new_tokens=2, do_sample=False).shape[1] == ids["input_ids"].shape[1] + 2
    assert not list((root / "round-0/train/model").glob("*.bin"))


def test_the_summary_shows_rows_conflict_and_accuracy(whole_run):
    _, _, done = whole_run
    for text in (
        "Rows kept, of how many",
        "Cosine between the languages",
        "Preference accuracy",
        "authored",
        "report.html",
    ):
        assert text in done.stdout


def test_running_again_is_up_to_date(whole_run, inline_command):
    path, root, _ = whole_run
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}
    assert "Up to date" in inline_command("run", str(path)).stderr
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_status_and_inspect_answer(whole_run, inline_command):
    _, root, _ = whole_run
    assert "Everything is up to date" in inline_command("status", str(root)).stdout
    assert "rows of scores" in inline_command("inspect", str(root), "scores", "--lang", "de", "--limit", "2").stdout
    status = json.loads(inline_command("status", str(root), "--json").stdout)
    assert status["done"] and all(s["state"] == "done" for s in status["stages"])


def test_tables_are_equal_for_any_number_of_workers(whole_run, write_tiny, pipeline_command, tmp_path):
    path = write_tiny(execution__workers=2)
    pipeline_command("run", str(path), "--until", "gradients")
    alone = table_bytes(whole_run[1])
    got = table_bytes(tmp_path / "runs/t")
    assert got
    for name, content in got.items():
        assert content == alone[name], name


def test_a_second_round_starts_from_the_trained_model_and_the_first_is_not_made_again(
    whole_run, write_tiny, inline_command, tmp_path
):
    root = tmp_path / "runs/t"
    shutil.copytree(whole_run[1], root)
    inline_command("run", str(write_tiny(rounds=2)), "--until", "train")
    alone, got = table_bytes(whole_run[1]), table_bytes(root)
    assert {name: got[name] for name in alone} == alone
    first, second = (pl.read_parquet(root / f"round-{k}/candidates/*.parquet") for k in (0, 1))
    assert second["round"].unique().to_list() == [1]
    assert not set(first["candidate_id"]) & set(second["candidate_id"])
    prompts = pl.read_parquet(root / "prompts/*.parquet")
    train = set(prompts.filter(pl.col("split") == "train")["prompt_id"])
    assert set(second["prompt_id"]) == train
    state = json.loads((root / "round-1/_state/generate/plan.json").read_text())
    assert (
        state["ingredients"]["model policy"]
        != json.loads((root / "round-0/_state/generate/plan.json").read_text())["ingredients"]["model policy"]
    )
    assert (root / "round-1/train/model/model.safetensors").exists()


def test_existing_pairs_are_curated_without_generation(write_tiny, inline_command, tmp_path):
    path = write_tiny(
        prompts={},
        pairs={"sources": [{"path": "package:authored_pairs/{language}.jsonl"}], "test_fraction": 0.2},
        evaluate__authored=[],
    )
    inline_command("run", str(path))
    root = tmp_path / "runs/t/round-0"
    assert not (root / "candidates").exists()
    pairs, curated = (pl.read_parquet(root / t / "*.parquet") for t in ("pairs", "curated"))
    assert set(pairs["split"]) == {"train", "dev", "test", "unseen"} or {"train", "test", "unseen"} <= set(
        pairs["split"]
    )
    assert 0 < curated.height < pairs.height
    assert set(curated["language"]) == {"en", "de", "zh"}
