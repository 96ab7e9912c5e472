"""The shipped demo of training (base, SFT, then DPO with OnTIES and OrthAlign over two language groups), smaller, on the tiny model."""

from __future__ import annotations

from importlib.resources import files

import polars as pl
import torch
import yaml
from safetensors.torch import load_file

from stages.train.optimizers.subspace import Protected


def test_base_sft_and_two_language_groups_in_one_run(tmp_path, tiny_model, inline_command, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = yaml.safe_load(files("data").joinpath("configs/demo-onties-orthalign.yaml").read_text(encoding="utf-8"))
    config |= {"name": "t", "run_dir": str(tmp_path / "runs"), "languages": {"seen": ["en", "de", "zh"]}}
    config["model"] = {"policy": str(tiny_model), "dtype": "float32"}
    config["execution"] = {"deterministic": True, "device": "cpu"}
    config["gradients"] |= {"sketch": {"dim": 512}}
    config["sft"]["sources"][0]["limit"] = 2
    config["sft"] |= {"max_steps": 2, "batch_size": 3, "learning_rate": 1e-3}
    config["pairs"]["sources"][0]["limit"] = 8
    config["train"] |= {"max_steps": 3, "batch_size": 2, "learning_rate": 1e-3}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    inline_command("run", str(path))

    root = tmp_path / "runs/t"
    metrics = pl.read_parquet(root / "round-0/metrics/*.parquet")
    logged = {(row["name"], row["step"]): row["value"] for row in metrics.iter_rows(named=True)}
    for step in range(1, 7):  # three of each objective
        assert {("merge/pull_norm", step), ("merge/cosine", step), ("merge/alpha_sum", step)} <= logged.keys(), step
        assert (("merge/projected", step) in logged) == (step > 3), step
    first, second = (f"objective/{o['name']}" for o in config["train"]["orthalign"]["objectives"])
    assert {step for name, step in logged if name == f"{first}/reward_accuracy"} == {3, 6}
    assert logged[f"{second}/leak", 6] < 1e-3 and (f"{second}/leak_exported", 6) in logged

    protected = Protected.load(root / "round-0/train/checkpoints/objective-0/protected.safetensors")
    base, sft, end = (
        load_file(next(folder.rglob("model.safetensors")))
        for folder in (tiny_model, root / "sft/model", root / "round-0/train/model")
    )
    for name in protected.left:
        assert not torch.equal(base[name], sft[name]) and not torch.equal(sft[name], end[name]), name

    html = (root / "report.html").read_text(encoding="utf-8")
    for said in ("Objectives in sequence", "left by the projection", "Cosine of step and task vector"):
        assert said in html, said
    card = (root / "round-0/train/model/README.md").read_text(encoding="utf-8")
    assert "european, others" in card and "onties, alpha 0.01" in card
